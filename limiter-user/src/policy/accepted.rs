//! An accepted connection, whose end the policy is told once.

use std::{fmt, net::SocketAddr, sync::Arc};

use socket2::SockRef;
use tokio::net::{TcpStream, UnixStream};

use super::{Connection, Policy};

/// A connection that somebody holds. Whoever drops this, for whatever reason, ends it: the policy is told, once. To be
/// dropped before the descriptor is closed.
pub(crate) struct Accepted {
    policy: Arc<dyn Policy>,
    connection: Connection,
}

impl fmt::Debug for Accepted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Accepted").field("connection", &self.connection).finish_non_exhaustive()
    }
}

impl Accepted {
    /// What was accepted from `remote` by the listener at `listener`.
    pub(crate) fn new(stream: &TcpStream, remote: SocketAddr, listener: SocketAddr, policy: Arc<dyn Policy>) -> Self {
        let cookie = cookie(&SockRef::from(stream), &*policy);
        // It is that of the listener, unless that takes connections to any.
        let local = if listener.ip().is_unspecified() { stream.local_addr().unwrap_or(listener) } else { listener };
        Self { policy, connection: Connection { remote: canonical(remote), local: canonical(local), cookie } }
    }

    /// What was accepted by a unix socket: both ends have the address that stands for one.
    pub(crate) fn local(stream: &UnixStream, address: SocketAddr, policy: Arc<dyn Policy>) -> Self {
        let cookie = cookie(&SockRef::from(stream), &*policy);
        Self { policy, connection: Connection { remote: address, local: address, cookie } }
    }

    pub(crate) fn connection(&self) -> &Connection {
        &self.connection
    }

    pub(crate) fn policy(&self) -> &Arc<dyn Policy> {
        &self.policy
    }
}

impl Drop for Accepted {
    fn drop(&mut self) {
        self.policy.closed(&self.connection);
    }
}

fn cookie(socket: &SockRef<'_>, policy: &dyn Policy) -> u64 {
    // Nobody else knows the connection by it.
    if !policy.is_kept_below() {
        return 0;
    }
    socket.cookie().unwrap_or_else(|e| {
        tracing::warn!(error = %e, "no SO_COOKIE: the ledger entry of this connection waits for the kernel to end it");
        0
    })
}

fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}
