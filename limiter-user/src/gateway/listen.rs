//! Listening sockets, and the loop that accepts from them.

use std::{
    future::poll_fn,
    io,
    net::SocketAddr,
    pin::pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use socket2::{Domain, Protocol, Type};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::{JoinError, JoinSet},
    time::sleep,
};

use super::{Shared, connection, socket::Socket};
use crate::config::{AuthError, CertificateError};

/// Connections that completed their handshake and wait for the accept. The kernel caps it at net.core.somaxconn.
const BACKLOG: i32 = 4096;

/// How long the loop rests when the host can give no more sockets; what is established meanwhile waits in the backlog.
pub(crate) const BACKOFF: Duration = Duration::from_millis(100);

/// Why a gateway can't start.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// `gateway.listen` is empty.
    #[error("gateway.listen names no address, so nothing could be served; give one, for example \"0.0.0.0:8080\"")]
    NoAddress,
    /// An address can't be listened on.
    #[error("cannot listen on {address}: {error}; {}", advice(.error, *.address))]
    Address {
        /// The address, as configured.
        address: SocketAddr,
        /// What the kernel said; part of the text.
        error: io::Error,
    },
    /// A certificate of `gateway.tls` can't be used.
    #[error("gateway.tls: {0}; `limiter config check` says so before the start")]
    Certificate(CertificateError),
    /// The keys of `gateway.auth` can't be used.
    #[error("{0}; `limiter config check` says so before the start")]
    Auth(AuthError),
    /// A certificate of `gateway.upstream_tls` can't be used.
    #[error("gateway.upstream_tls: {0}; `limiter config check` says so before the start")]
    UpstreamTls(CertificateError),
}

impl From<CertificateError> for BindError {
    fn from(error: CertificateError) -> Self {
        Self::Certificate(error)
    }
}

impl From<AuthError> for BindError {
    fn from(error: AuthError) -> Self {
        Self::Auth(error)
    }
}

fn advice(error: &io::Error, address: SocketAddr) -> String {
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

/// Sockets that have their addresses, and that nobody can connect to yet.
pub(super) struct Addresses(Vec<(SocketAddr, socket2::Socket)>);

impl Addresses {
    pub(super) fn bind(addresses: &[SocketAddr]) -> Result<Self, BindError> {
        if addresses.is_empty() {
            return Err(BindError::NoAddress);
        }
        let bound = addresses.iter().map(|&address| {
            let socket = bind(address).map_err(|error| BindError::Address { address, error })?;
            Ok((address, socket))
        });
        bound.collect::<Result<_, _>>().map(Self)
    }

    /// Lets clients connect. They wait in the backlog until somebody accepts.
    pub(super) fn listen(self) -> Result<Listeners, BindError> {
        let mut listeners = Listeners { sockets: Vec::new(), addrs: Vec::new(), next: 0 };
        for (address, socket) in self.0 {
            let (socket, addr) = listen(socket).map_err(|error| BindError::Address { address, error })?;
            listeners.sockets.push(socket);
            listeners.addrs.push(addr);
        }
        Ok(listeners)
    }
}

/// Listening sockets.
pub(super) struct Listeners {
    sockets: Vec<TcpListener>,
    addrs: Vec<SocketAddr>,
    /// Which one is asked first next time, so that a busy one does not starve the others.
    next: usize,
}

impl Listeners {
    pub(super) fn local_addrs(&self) -> &[SocketAddr] {
        &self.addrs
    }

    /// The next connection, with the address of the listener that it came in on.
    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<(io::Result<(TcpStream, SocketAddr)>, SocketAddr)> {
        for _ in 0..self.sockets.len() {
            let i = self.next;
            self.next = (self.next + 1) % self.sockets.len();
            if let Poll::Ready(accepted) = self.sockets[i].poll_accept(cx) {
                return Poll::Ready((accepted, self.addrs[i]));
            }
        }
        Poll::Pending
    }
}

fn bind(address: SocketAddr) -> io::Result<socket2::Socket> {
    let socket = socket2::Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    // A restart must not wait for the connections in TIME_WAIT that the last run left.
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        // So that 0.0.0.0 and [::] can both be given with the same port.
        socket.set_only_v6(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

fn listen(socket: socket2::Socket) -> io::Result<(TcpListener, SocketAddr)> {
    socket.listen(BACKLOG)?;
    let listener = TcpListener::from_std(socket.into())?;
    let addr = listener.local_addr()?;
    Ok((listener, addr))
}

/// Accepts and serves until `shutdown` completes; then closes the listening sockets and hands back the connections that
/// are still there.
pub(super) async fn serve(
    mut listeners: Listeners,
    current: &watch::Receiver<Arc<Shared>>,
    shutdown: impl Future<Output = ()>,
) -> JoinSet<()> {
    let mut connections = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    loop {
        tokio::select! {
            biased;
            () = &mut shutdown => return connections,
            Some(ended) = connections.join_next() => report_panic(&ended),
            (accepted, local) = poll_fn(|cx| listeners.poll_accept(cx)) => match accepted {
                Ok((stream, remote)) => {
                    let shared = Arc::clone(&current.borrow());
                    let socket = Socket::new(stream, remote, local, Arc::clone(&shared.policy));
                    connections.spawn(connection::serve(socket, shared));
                }
                // The client went away while it waited in the backlog: its own affair.
                Err(e) if is_about_one_connection(&e) => {}
                Err(e) => {
                    let shared = Arc::clone(&current.borrow());
                    shared.metrics.accept_errors.inc();
                    if let Some(left_out) = shared.log.admit("accept") {
                        tracing::warn!(
                            error = %e, left_out,
                            "cannot accept; clients wait in the backlog (out of descriptors: raise LimitNOFILE)"
                        );
                    }
                    tokio::select! {
                        () = &mut shutdown => return connections,
                        () = sleep(BACKOFF) => {}
                    }
                }
            }
        }
    }
}

/// A connection's own task must not be able to end the others.
pub(super) fn report_panic(ended: &Result<(), JoinError>) {
    if let Err(e) = ended
        && e.is_panic()
    {
        tracing::error!(error = %e, "a connection's task panicked; its connection was closed and released");
    }
}

/// accept(2) also hands out errors that were pending on the new socket itself.
pub(crate) fn is_about_one_connection(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::ECONNABORTED
                | libc::EINTR
                | libc::EPERM
                | libc::EPROTO
                | libc::ENETDOWN
                | libc::ENOPROTOOPT
                | libc::EHOSTDOWN
                | libc::ENONET
                | libc::EHOSTUNREACH
                | libc::EOPNOTSUPP
                | libc::ENETUNREACH
        )
    )
}
