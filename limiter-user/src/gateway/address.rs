//! Where the gateway listens: the sockets, taken before anybody can connect.

use std::{
    fmt,
    fs::{self, File},
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::{
    handed::{Handed, Label, Spare},
    inherited,
    listen::BindError,
};
use crate::config::{self, Listen};

/// How much the kernel may hold of what was written but not yet sent, in bytes. Without it a slow client has megabytes
/// queued before a ping, and is taken for dead.
const NOT_SENT_LOW_WATER: u32 = 128 * 1024;

/// Connections that completed their handshake and wait for the accept. The kernel caps it at net.core.somaxconn.
const BACKLOG: i32 = 4096;

/// The address of whoever connects to a unix socket: it has none, and is on this host.
pub(super) const LOCAL_PEER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// Where one socket listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A TCP address.
    Tcp(SocketAddr),
    /// A unix socket of that path; empty for one without a name.
    Unix(PathBuf),
}

impl Place {
    /// The TCP address, if it is one.
    pub fn tcp(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(address) => Some(*address),
            Self::Unix(_) => None,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Sockets that have their addresses. Nobody can connect to those of TCP yet; who connects to another waits in its backlog.
#[derive(Debug)]
pub struct Sockets(Vec<Bound>);

/// A socket that has its address.
#[derive(Debug)]
pub(super) struct Bound {
    pub(super) place: Place,
    /// What it was opened for; one of the service manager's has its name here.
    listen: Listen,
    pub(super) socket: Socket,
    /// The entry in the file system that goes with the socket.
    pub(super) file: Option<SocketFile>,
}

impl Sockets {
    /// Takes all that `gateway.listen` names.
    ///
    /// # Errors
    /// [`BindError`] names the address at fault and says what to do; nothing stays bound then.
    pub fn take(config: &config::Gateway) -> Result<Self, BindError> {
        Self::take_among(config, &mut Handed::default())
    }

    /// The same where the process before has handed sockets over: those that fit are taken, and what is missing is opened.
    ///
    /// # Errors
    /// As [`Self::take`].
    pub fn take_among(config: &config::Gateway, handed: &mut Handed) -> Result<Self, BindError> {
        if config.listen.is_empty() {
            return Err(BindError::NoAddress);
        }
        let mut bound = Vec::new();
        // What has a name is taken first; `systemd` stands for the rest.
        let (rest, first): (Vec<_>, Vec<_>) = config.listen.iter().partition(|listen| **listen == Listen::Systemd);
        for listen in first.into_iter().chain(rest) {
            match listen {
                Listen::Tcp(address) => bound.push(match handed.take_tcp(*address) {
                    Some(socket) => adopt_tcp(*address, socket, config.reuse_port)?,
                    None => tcp(*address, config.reuse_port)?,
                }),
                Listen::Unix(path) => bound.push(match handed.take_unix(path) {
                    Some((socket, file)) => adopt_unix(path, socket, file, config.unix_mode)?,
                    None => unix(path, config.unix_mode)?,
                }),
                Listen::Systemd | Listen::Named(_) => bound.extend(handed_over(listen)?),
            }
        }
        Ok(Self(bound))
    }

    /// Where they listen, in the order of the configuration but for those of systemd, which come last.
    pub fn places(&self) -> impl Iterator<Item = &Place> {
        self.0.iter().map(|bound| &bound.place)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes those out of it that `wanted` says.
    #[must_use]
    pub fn split_off(&mut self, wanted: impl Fn(&Place) -> bool) -> Self {
        let (wanted, rest) = std::mem::take(&mut self.0).into_iter().partition(|bound| wanted(&bound.place));
        self.0 = rest;
        Self(wanted)
    }

    /// A second hand on each, and on those of the service manager that no entry names, for the next process.
    ///
    /// # Errors
    /// That of the kernel, which is out of descriptors.
    pub fn spares(&self) -> io::Result<Vec<Spare>> {
        let mut spares = self.0.iter().map(Bound::spare).collect::<io::Result<Vec<_>>>()?;
        for (name, socket) in inherited::left()? {
            spares.push(Spare::new(Label::new(&Listen::Named(name), None), socket));
        }
        Ok(spares)
    }

    pub(super) fn into_bound(self) -> Vec<Bound> {
        self.0
    }
}

impl Bound {
    fn spare(&self) -> io::Result<Spare> {
        let label = Label::new(&self.listen, self.file.as_ref().map(SocketFile::identity));
        let file = self.file.as_ref().map(SocketFile::owner);
        Ok(Spare::new(label, self.socket.try_clone()?.into()).with_file(file))
    }

    /// Lets clients connect; no harm if they can already.
    pub(super) fn listen(&self) -> Result<(), BindError> {
        if let Place::Tcp(_) = self.place {
            // Accepted sockets have the options of the listening one (tcp(7)), so that none costs a system call for each
            // connection. Both only make things faster or finer.
            _ = self.socket.set_tcp_nodelay(true);
            _ = self.socket.set_tcp_notsent_lowat(NOT_SENT_LOW_WATER);
        }
        self.socket.listen(BACKLOG).map_err(|error| match &self.place {
            Place::Tcp(address) => BindError::Address { address: *address, error },
            Place::Unix(path) => BindError::Unix { path: path.clone(), error },
        })
    }
}

fn tcp(address: SocketAddr, reuse_port: bool) -> Result<Bound, BindError> {
    let bind = || {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        // A restart must not wait for the connections in TIME_WAIT that the last run left.
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(reuse_port)?;
        if address.is_ipv6() {
            // So that 0.0.0.0 and [::] can both be given with the same port.
            socket.set_only_v6(true)?;
        }
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        Ok(socket)
    };
    let socket = bind().map_err(|error| BindError::Address { address, error })?;
    Ok(Bound { place: Place::Tcp(address), listen: address.into(), socket, file: None })
}

/// One that the process before has opened.
fn adopt_tcp(address: SocketAddr, socket: Socket, reuse_port: bool) -> Result<Bound, BindError> {
    socket.set_reuse_port(reuse_port).map_err(|error| BindError::Address { address, error })?;
    Ok(Bound { place: Place::Tcp(address), listen: address.into(), socket, file: None })
}

fn unix(path: &Path, mode: u32) -> Result<Bound, BindError> {
    let failed = |error| BindError::Unix { path: path.to_owned(), error };
    // One at a time, as far as it is limiter: between bind and listen, the socket of another looks like one whose process is
    // dead.
    let folder = path.parent().unwrap_or(Path::new("/"));
    let lock = File::open(folder).map_err(failed)?;
    lock.lock().map_err(failed)?;
    remove_stale(path)?;

    let bind = || {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        // The file is made with the mode of the socket, less the umask: at no time may more than `mode` says.
        // SAFETY: fchmod takes a descriptor, which is open, and a number.
        if unsafe { libc::fchmod(socket.as_raw_fd(), mode) } != 0 {
            return Err(io::Error::last_os_error());
        }
        socket.bind(&SockAddr::unix(path)?)?;
        let file = SocketFile::of(path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
        // Now, and not when the gateway starts: who finds the file must be able to tell that somebody is there.
        socket.listen(BACKLOG)?;
        Ok((socket, file))
    };
    let (socket, file) = bind().map_err(failed)?;
    Ok(bound_unix(path, socket, file))
}

/// One that the process before has made, with its file.
fn adopt_unix(path: &Path, socket: Socket, file: SocketFile, mode: u32) -> Result<Bound, BindError> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .map_err(|error| BindError::Unix { path: path.to_owned(), error })?;
    Ok(bound_unix(path, socket, file))
}

fn bound_unix(path: &Path, socket: Socket, file: SocketFile) -> Bound {
    Bound { place: Place::Unix(path.to_owned()), listen: Listen::Unix(path.to_owned()), socket, file: Some(file) }
}

/// Removes the socket of a process that is gone. Anything else at that path is an error.
fn remove_stale(path: &Path) -> Result<(), BindError> {
    let failed = |error| BindError::Unix { path: path.to_owned(), error };
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(failed(e)),
        Ok(found) if !found.file_type().is_socket() => return Err(BindError::NotSocket { path: path.to_owned() }),
        Ok(_) => {}
    }
    // Non-blocking, since the backlog of somebody who lives may be full.
    let probe = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(failed)?;
    probe.set_nonblocking(true).map_err(failed)?;
    match probe.connect(&SockAddr::unix(path).map_err(failed)?) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(failed),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        // Whoever may not connect can't tell whether somebody is there.
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Err(failed(e)),
        _ => Err(failed(io::Error::from_raw_os_error(libc::EADDRINUSE))),
    }
}

/// Device and inode of a file.
pub(super) type Identity = (u64, u64);

/// A unix socket's entry in the file system, which goes when this is dropped: unless somebody else has put another in its
/// place meanwhile, or it is another process's that has the same socket.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    identity: Identity,
    is_ours: Arc<AtomicBool>,
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), identity: identity(path)?, is_ours: Arc::new(true.into()) })
    }

    /// One that is still another process's.
    pub(super) fn handed(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), identity: identity(path)?, is_ours: Arc::default() })
    }

    pub(super) fn identity(&self) -> Identity {
        self.identity
    }

    /// Whether it is this process's to remove.
    pub(super) fn owner(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.is_ours)
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.is_ours.load(Ordering::Acquire)
            && identity(&self.path).is_ok_and(|found| found == self.identity)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "can't remove a unix socket; the next start does");
        }
    }
}

fn identity(path: &Path) -> io::Result<Identity> {
    fs::symlink_metadata(path).map(|found| (found.dev(), found.ino()))
}

/// What the service manager hands over for this entry.
fn handed_over(listen: &Listen) -> Result<Vec<Bound>, BindError> {
    let name = match listen {
        Listen::Named(name) => Some(name.as_str()),
        _ => None,
    };
    let handed = inherited::take(name)?;
    if handed.is_empty() {
        return Err(BindError::NotHandedOver { listen: listen.clone() });
    }
    handed.into_iter().map(|(name, fd)| adopt(&name, fd)).collect()
}

/// A socket that somebody else has opened.
fn adopt(name: &str, fd: OwnedFd) -> Result<Bound, BindError> {
    let unfit = |why| BindError::Unfit { name: name.to_owned(), why };
    let socket = Socket::from(fd);
    if !socket.is_listener().map_err(|_| unfit("it is no socket"))? {
        return Err(unfit("it does not listen (a .socket unit needs ListenStream=, and Accept=no)"));
    }
    if socket.r#type().ok() != Some(Type::STREAM) {
        return Err(unfit("it is no stream socket (ListenStream=)"));
    }
    let address = socket.local_addr().map_err(|_| unfit("it has no address"))?;
    let place = if let Some(address) = address.as_socket() {
        Place::Tcp(address)
    } else if address.is_unix() {
        Place::Unix(address.as_pathname().map(Path::to_owned).unwrap_or_default())
    } else {
        return Err(unfit("it is neither TCP nor a unix socket"));
    };
    socket.set_nonblocking(true).map_err(|_| unfit("it can't be made non-blocking"))?;
    Ok(Bound { place, listen: Listen::Named(name.to_owned()), socket, file: None })
}

/// What to do about an address that can't be listened on.
pub(super) fn advice(error: &io::Error, address: SocketAddr) -> String {
    let port = address.port();
    match error.raw_os_error() {
        Some(libc::EADDRINUSE) => {
            format!("`ss -ltnp 'sport = :{port}'` shows who holds the port: stop it, or listen elsewhere")
        }
        Some(libc::EACCES) => format!("port {port} takes root or CAP_NET_BIND_SERVICE; ports from 1024 on don't"),
        Some(libc::EADDRNOTAVAIL) => "no interface has this address (`ip address` lists those there are)".to_owned(),
        Some(libc::EAFNOSUPPORT) => "this host has that address family switched off".to_owned(),
        _ => "listen elsewhere, or mend the cause and start again".to_owned(),
    }
}

/// The same for a path.
pub(super) fn unix_advice(error: &io::Error, path: &Path) -> String {
    let folder = path.parent().unwrap_or(Path::new("/")).display();
    match error.raw_os_error() {
        Some(libc::EADDRINUSE) => {
            format!("`ss -lxp src {}` shows who listens there: stop it, or listen elsewhere", path.display())
        }
        Some(libc::ENOENT) => format!("make the folder {folder} (systemd: RuntimeDirectory=), or listen elsewhere"),
        Some(libc::EACCES | libc::EPERM) => {
            format!("this user may not make sockets in {folder}, or not connect to the one that is there")
        }
        _ => "listen elsewhere, or mend the cause and start again".to_owned(),
    }
}

#[cfg(test)]
#[path = "address_tests.rs"]
mod tests;
