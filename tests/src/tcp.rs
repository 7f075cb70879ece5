//! A TCP server that knows nothing of limiter, and crowds of clients that connect all at once.

use std::{
    collections::HashMap,
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    os::{fd::AsRawFd, unix::net::UnixStream},
    sync::{Arc, Mutex, MutexGuard},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::{
    lab::{Family, PORT},
    netns::Namespace,
    wait::slowness,
};

/// Sent to every accepted client: who has read it has been served, and does not only believe to be connected.
const GREETING: u8 = b'!';

/// Accepts, greets, holds each connection until the client ends it, and counts.
#[derive(Debug)]
pub struct PlainServer {
    counts: Arc<Mutex<Counts>>,
    stop: UnixStream,
    thread: Option<JoinHandle<io::Result<()>>>,
}

/// What a [`PlainServer`] has seen of one client address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Connections accepted since the start. Whatever was established, however briefly, is accepted in the end.
    pub accepted: u32,
    /// Connections open now.
    pub open: u32,
    /// The most that were open at any one time.
    pub peak: u32,
}

type Counts = HashMap<IpAddr, Seen>;

impl PlainServer {
    /// Listens on every address of a family at [`PORT`] in `namespace`.
    pub fn start(namespace: &Namespace, family: Family) -> Result<Self> {
        Self::listen(namespace, SocketAddr::new(family.unspecified(), PORT))
    }

    /// Listens in `namespace`.
    pub fn listen(namespace: &Namespace, address: SocketAddr) -> Result<Self> {
        Self::of(listener(namespace, address, BACKLOG)?)
    }

    /// Accepts from a listener that there is.
    pub fn of(listener: TcpListener) -> Result<Self> {
        listener.set_nonblocking(true)?;
        let (stop, stopped) = UnixStream::pair()?;
        let counts = Arc::new(Mutex::new(Counts::new()));
        let server_counts = Arc::clone(&counts);
        let thread = std::thread::spawn(move || serve(&listener, &stopped, &server_counts));
        Ok(Self { counts, stop, thread: Some(thread) })
    }

    /// What was seen of a client address.
    pub fn seen(&self, client: IpAddr) -> Seen {
        lock(&self.counts).get(&client.to_canonical()).copied().unwrap_or_default()
    }
}

impl Drop for PlainServer {
    fn drop(&mut self) {
        // Wakes the thread: its end of the pair reads end of file.
        let _ = self.stop.shutdown(std::net::Shutdown::Both);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(Err(error))) => eprintln!("the plain server failed: {error}"),
            Some(Err(_)) => eprintln!("the plain server panicked"),
            Some(Ok(Ok(()))) | None => {}
        }
    }
}

/// Room for every connection of a test.
pub const BACKLOG: u16 = 4096;

/// A listener in `namespace` that nobody accepts from. The kernel completes handshakes until `backlog` plus one
/// connections wait.
pub fn listener(namespace: &Namespace, address: SocketAddr, backlog: u16) -> Result<TcpListener> {
    listener_of(namespace, address, backlog, None, |_| Ok(()))
}

/// The same for another protocol than plain TCP, or with options set before it listens.
pub fn listener_of(
    namespace: &Namespace,
    address: SocketAddr,
    backlog: u16,
    protocol: Option<Protocol>,
    prepare: impl FnOnce(&Socket) -> io::Result<()> + Send,
) -> Result<TcpListener> {
    let listen = || -> io::Result<TcpListener> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, protocol)?;
        socket.set_reuse_address(true)?;
        prepare(&socket)?;
        socket.bind(&address.into())?;
        socket.listen(backlog.into())?;
        Ok(socket.into())
    };
    namespace.enter(listen).with_context(|| format!("cannot listen on {address}"))
}

/// Sets an option of TCP that is an integer.
pub fn set_tcp_option(socket: &impl AsRawFd, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let length = libc::socklen_t::try_from(size_of_val(&value)).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open; value and length are valid for the call, and the length is that of the value.
    let answer =
        unsafe { libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, option, (&raw const value).cast(), length) };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn serve(listener: &TcpListener, stopped: &UnixStream, counts: &Mutex<Counts>) -> io::Result<()> {
    let mut connections: Vec<(TcpStream, IpAddr)> = Vec::new();
    loop {
        let polled = poll_all(stopped, listener, &connections, None)?;
        if polled[0].revents != 0 {
            return Ok(());
        }
        drop_ended(&mut connections, &polled[2..], counts);
        if polled[1].revents == 0 {
            continue;
        }
        loop {
            match listener.accept() {
                Ok((mut stream, client)) => {
                    let client = client.ip().to_canonical();
                    stream.set_nonblocking(true)?;
                    // Its slot may be that of one that has ended meanwhile, which is not to be counted with it.
                    let seen = lock(counts).get(&client).copied().unwrap_or_default();
                    if seen.open > 0 && seen.open == seen.peak {
                        let polled = poll_all(stopped, listener, &connections, Some(Duration::ZERO))?;
                        drop_ended(&mut connections, &polled[2..], counts);
                    }
                    {
                        let mut counts = lock(counts);
                        let seen = counts.entry(client).or_default();
                        seen.accepted += 1;
                        seen.open += 1;
                        seen.peak = seen.peak.max(seen.open);
                    }
                    // A client that is gone already is noticed when its connection is read.
                    let _ = stream.write_all(&[GREETING]);
                    connections.push((stream, client));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
    }
}

/// What is ready of what the server waits for: to be stopped, a client, news of each connection.
fn poll_all(
    stopped: &UnixStream,
    listener: &TcpListener,
    connections: &[(TcpStream, IpAddr)],
    limit: Option<Duration>,
) -> io::Result<Vec<libc::pollfd>> {
    let mut polled = vec![poll_entry(stopped, libc::POLLIN), poll_entry(listener, libc::POLLIN)];
    polled.extend(connections.iter().map(|(stream, _)| poll_entry(stream, libc::POLLIN)));
    poll(&mut polled, limit)?;
    Ok(polled)
}

/// Closes those that have ended, of which there is news.
fn drop_ended(connections: &mut Vec<(TcpStream, IpAddr)>, polled: &[libc::pollfd], counts: &Mutex<Counts>) {
    // Backwards, so that a removal moves none that is still to be looked at.
    for (place, entry) in polled.iter().enumerate().rev() {
        if entry.revents != 0 && ended(&mut connections[place].0) {
            let (stream, client) = connections.swap_remove(place);
            drop(stream);
            lock(counts).entry(client).or_default().open -= 1;
        }
    }
}

/// Reads what there is, and says whether that was the end.
fn ended(stream: &mut TcpStream) -> bool {
    let mut buffer = [0; 1024];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() != io::ErrorKind::WouldBlock,
        }
    }
}

/// Connections that were opened all at once, in whatever state they are.
#[derive(Debug, Default)]
pub struct Crowd {
    /// Those that the server has greeted.
    pub served: Vec<TcpStream>,
    /// Those that are connected for all that the client knows, and were never greeted.
    pub unserved: Vec<TcpStream>,
    /// Those whose SYNs were not answered.
    pub unanswered: Vec<TcpStream>,
    /// How many were refused or reset.
    pub refused: usize,
}

impl Crowd {
    /// Opens `count` connections from `namespace` to `server` at once, and looks at them until `patience` has passed or
    /// every one is served or refused. SYNs are sent again after one second: with less patience, retries go unseen.
    pub fn connect(namespace: &Namespace, server: SocketAddr, count: usize, patience: Duration) -> Result<Self> {
        Self::connect_from(namespace, None, server, count, patience)
    }

    /// The same, from a given address of the client's.
    pub fn connect_from(
        namespace: &Namespace,
        client: Option<IpAddr>,
        server: SocketAddr,
        count: usize,
        patience: Duration,
    ) -> Result<Self> {
        let client = client.map(|client| SocketAddr::new(client, 0));
        Self::begin(namespace, client, server, count, patience)
    }

    /// One connection, from a given address and port of the client's.
    pub fn connect_from_port(
        namespace: &Namespace,
        client: SocketAddr,
        server: SocketAddr,
        patience: Duration,
    ) -> Result<Self> {
        Self::begin(namespace, Some(client), server, 1, patience)
    }

    fn begin(
        namespace: &Namespace,
        client: Option<SocketAddr>,
        server: SocketAddr,
        count: usize,
        patience: Duration,
    ) -> Result<Self> {
        let mut waiting = namespace
            .enter(|| (0..count).map(|_| begin_connect(client, server)).collect::<io::Result<Vec<_>>>())
            .with_context(|| format!("cannot begin {count} connections to {server}"))?;
        let mut crowd = Self::default();
        let deadline = Instant::now() + patience;
        while !waiting.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let mut polled: Vec<_> = waiting.iter().map(|stream| poll_entry(stream, libc::POLLIN)).collect();
            poll(&mut polled, Some(left))?;
            for (place, entry) in polled.iter().enumerate().rev() {
                if entry.revents == 0 {
                    continue;
                }
                let mut stream = waiting.swap_remove(place);
                let mut byte = [0];
                match stream.read(&mut byte) {
                    Ok(1) => crowd.served.push(stream),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => waiting.push(stream),
                    Ok(_) | Err(_) => crowd.refused += 1,
                }
            }
        }
        (crowd.unserved, crowd.unanswered) = waiting.into_iter().partition(|stream| stream.peer_addr().is_ok());
        Ok(crowd)
    }

    /// Ends those that are connected, as [`reset`] does.
    pub fn reset(self) -> io::Result<()> {
        reset(self.served.into_iter().chain(self.unserved))
    }
}

/// Ends connections by RSTs.
///
/// A server that answers by SYN cookies may take the last ACK of a close for one if it comes twice, as it does on a busy host, and
/// opens another connection. That stays until the client, which answers nothing of an old one for a minute, resets it.
pub fn reset(connections: impl IntoIterator<Item = TcpStream>) -> io::Result<()> {
    connections.into_iter().try_for_each(|stream| SockRef::from(&stream).set_linger(Some(Duration::ZERO)))
}

/// One connection that the server has greeted, or the reason why there is none. Patience is for machines that are as fast as others.
pub fn connect_served(namespace: &Namespace, server: SocketAddr, patience: Duration) -> Result<TcpStream> {
    let mut crowd = Crowd::connect(namespace, server, 1, patience * slowness())?;
    crowd.served.pop().with_context(|| format!("{server} served nobody within {patience:?}: {crowd:?}"))
}

fn begin_connect(client: Option<SocketAddr>, server: SocketAddr) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(server), Type::STREAM, None)?;
    if let Some(client) = client {
        socket.set_reuse_address(true)?;
        socket.bind(&client.into())?;
    }
    socket.set_nonblocking(true)?;
    match socket.connect(&server.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(socket.into()),
    }
}

fn poll_entry(descriptor: &impl AsRawFd, events: i16) -> libc::pollfd {
    libc::pollfd { fd: descriptor.as_raw_fd(), events, revents: 0 }
}

/// Waits until one of the descriptors is ready, for ever if `limit` is `None`.
fn poll(entries: &mut [libc::pollfd], limit: Option<Duration>) -> io::Result<()> {
    let milliseconds = limit.map_or(-1, |limit| i32::try_from(limit.as_millis() + 1).unwrap_or(i32::MAX));
    // SAFETY: the pointer and the length are those of one slice.
    let ready = unsafe { libc::poll(entries.as_mut_ptr(), entries.len() as libc::nfds_t, milliseconds) };
    if ready < 0 {
        let error = io::Error::last_os_error();
        return if error.kind() == io::ErrorKind::Interrupted { Ok(()) } else { Err(error) };
    }
    Ok(())
}

fn lock(counts: &Mutex<Counts>) -> MutexGuard<'_, Counts> {
    // The counts are consistent after each change, so a panic elsewhere does not spoil them.
    counts.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
