//! Listening sockets, and the loop that accepts from them.

use std::{
    future::poll_fn,
    io,
    net::SocketAddr,
    path::PathBuf,
    pin::pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    net::{TcpListener, UnixListener},
    sync::watch,
    task::{JoinError, JoinSet},
    time::{MissedTickBehavior, interval, sleep},
};

use super::{
    Shared,
    address::{Bound, LOCAL_PEER, Place, SocketFile, Sockets, advice, unix_advice},
    connection,
    drain::Ending,
    socket::Socket,
    wire::Wire,
};
use crate::config::{AuthError, CertificateError, Listen, SchemaError};

/// How long the loop rests when the host can give no more sockets, unless one of its own connections ends before; what is
/// established meanwhile waits in the backlog.
pub(crate) const BACKOFF: Duration = Duration::from_millis(100);

/// How often what is left of connections that have ended is cleared away.
const CLEARING: Duration = Duration::from_secs(1);

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
    /// A unix socket can't be made, or listened on.
    #[error("cannot listen on unix:{}: {error}; {}", .path.display(), unix_advice(.error, .path))]
    Unix {
        /// Its path, as configured.
        path: PathBuf,
        /// What the kernel said; part of the text.
        error: io::Error,
    },
    /// Something else is where a unix socket should be.
    #[error("cannot listen on unix:{}: what is there is no socket, and is left alone; listen elsewhere", .path.display())]
    NotSocket {
        /// Its path, as configured.
        path: PathBuf,
    },
    /// The environment of socket activation makes no sense.
    #[error("what the service manager says of its sockets can't be read: {0} (LISTEN_FDS, LISTEN_PID, LISTEN_FDNAMES)")]
    Inherited(io::Error),
    /// The service manager has handed nothing over.
    #[error(
        "gateway.listen: {listen}: no such socket was handed over (LISTEN_FDS and LISTEN_PID say which are for this process); \
         start it by a .socket unit, whose FileDescriptorName= is the name after \"fd:\", or name an address"
    )]
    NotHandedOver {
        /// What is configured.
        listen: Listen,
    },
    /// What the service manager has handed over can't be accepted from.
    #[error("gateway.listen: the descriptor {name:?} that was handed over can't be used: {why}")]
    Unfit {
        /// Its name.
        name: String,
        /// What is wrong with it.
        why: &'static str,
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
    /// The schema of `gateway.messages`, or of a route's, can't be used.
    #[error("gateway.messages.schema: {0}; `limiter config check` says so before the start")]
    Schema(SchemaError),
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

impl From<SchemaError> for BindError {
    fn from(error: SchemaError) -> Self {
        Self::Schema(error)
    }
}

/// Listening sockets.
pub(super) struct Listeners {
    sockets: Vec<Listener>,
    /// Of those of TCP.
    addrs: Vec<SocketAddr>,
    places: Vec<Place>,
    /// Which one is asked first next time, so that a busy one does not starve the others.
    next: usize,
}

/// One listening socket.
enum Listener {
    Tcp(TcpListener, SocketAddr),
    Unix {
        listener: UnixListener,
        /// Goes when nobody listens any more.
        _file: Option<SocketFile>,
    },
}

/// What was accepted.
struct Incoming {
    wire: Wire,
    remote: SocketAddr,
    /// The address of the listener that it came in on.
    local: SocketAddr,
}

impl Listeners {
    /// Lets clients connect. They wait in the backlog until somebody accepts.
    pub(super) fn open(sockets: Sockets) -> Result<Self, BindError> {
        let mut listeners = Self { sockets: Vec::new(), addrs: Vec::new(), places: Vec::new(), next: 0 };
        for bound in sockets.into_bound() {
            bound.listen()?;
            let Bound { place, socket, file, .. } = bound;
            let (listener, place) = match place {
                Place::Tcp(address) => {
                    let (listener, address) =
                        tcp_listener(socket).map_err(|error| BindError::Address { address, error })?;
                    listeners.addrs.push(address);
                    (Listener::Tcp(listener, address), Place::Tcp(address))
                }
                Place::Unix(path) => {
                    let listener = UnixListener::from_std(socket.into())
                        .map_err(|error| BindError::Unix { path: path.clone(), error })?;
                    (Listener::Unix { listener, _file: file }, Place::Unix(path))
                }
            };
            listeners.sockets.push(listener);
            listeners.places.push(place);
        }
        Ok(listeners)
    }

    pub(super) fn local_addrs(&self) -> &[SocketAddr] {
        &self.addrs
    }

    pub(super) fn places(&self) -> &[Place] {
        &self.places
    }

    /// The next connection.
    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Incoming>> {
        for _ in 0..self.sockets.len() {
            let i = self.next;
            self.next = (self.next + 1) % self.sockets.len();
            if let Poll::Ready(accepted) = self.sockets[i].poll_accept(cx) {
                return Poll::Ready(accepted);
            }
        }
        Poll::Pending
    }
}

impl Listener {
    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<Incoming>> {
        match self {
            Self::Tcp(listener, local) => listener.poll_accept(cx).map_ok(|(stream, remote)| Incoming {
                wire: Wire::Tcp(stream),
                remote,
                local: *local,
            }),
            Self::Unix { listener, .. } => listener.poll_accept(cx).map_ok(|(stream, _)| Incoming {
                wire: Wire::Unix(stream),
                remote: LOCAL_PEER,
                local: LOCAL_PEER,
            }),
        }
    }
}

fn tcp_listener(socket: socket2::Socket) -> io::Result<(TcpListener, SocketAddr)> {
    let listener = TcpListener::from_std(socket.into())?;
    let addr = listener.local_addr()?;
    Ok((listener, addr))
}

/// Accepts and serves until `ending` completes; then closes the listening sockets and hands back the connections that
/// are still there.
pub(super) async fn serve(
    mut listeners: Listeners,
    current: &watch::Receiver<Arc<Shared>>,
    ending: impl Future<Output = Ending>,
) -> (JoinSet<()>, Ending) {
    let mut connections = JoinSet::new();
    let mut ending = pin!(ending);
    // What is left of a connection that has ended is little and can wait: to be woken by each would take longer than to clear it away.
    let mut clearing = interval(CLEARING);
    clearing.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            ending = &mut ending => return (connections, ending),
            _ = clearing.tick(), if !connections.is_empty() => clear(&mut connections),
            accepted = poll_fn(|cx| listeners.poll_accept(cx)) => match accepted {
                Ok(Incoming { wire, remote, local }) => {
                    let shared = Arc::clone(&current.borrow());
                    let socket = Socket::new(wire, remote, local, Arc::clone(&shared.policy));
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
                    clear(&mut connections);
                    tokio::select! {
                        biased;
                        ending = &mut ending => return (connections, ending),
                        // What it held is free: for whoever has waited longest, and at once.
                        Some(ended) = connections.join_next() => report_panic(&ended),
                        () = sleep(BACKOFF) => {}
                    }
                }
            }
        }
    }
}

/// Clears away what is left of connections that have ended.
fn clear(connections: &mut JoinSet<()>) {
    while let Some(ended) = connections.try_join_next() {
        report_panic(&ended);
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
