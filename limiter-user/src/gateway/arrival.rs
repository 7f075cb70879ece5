//! What comes on a connection ahead of its request.

use std::net::SocketAddr;

use tokio::time::Instant;

use super::{
    Shared,
    answer::Refusal,
    connection::{out_of_time, refused},
    forwarded,
    proxy_protocol::{self, Header, HeaderError},
    socket::Socket,
};

/// The two ends of a connection as the client sees it: a TCP proxy in between does not count.
#[derive(Clone, Copy, Debug)]
pub(super) struct Endpoints {
    /// The client's address, or that of an HTTP proxy.
    pub(super) remote: SocketAddr,
    /// What it connected to.
    pub(super) local: SocketAddr,
}

/// A connection whose next bytes are those of its HTTP request.
pub(super) struct Arrived {
    pub(super) socket: Socket,
    pub(super) endpoints: Endpoints,
}

/// Why a connection never comes to its request.
enum Failure {
    /// It left.
    Left,
    Refused(Refusal),
}

/// Takes what comes ahead of the request. `None`: the connection is over, and was counted.
pub(super) async fn arrive(socket: Socket, shared: &Shared, deadline: Instant) -> Option<Arrived> {
    let connection = *socket.connection();
    let mut endpoints = Endpoints { remote: connection.remote, local: connection.local };
    // From others there is no header to wait for: what they send instead is not HTTP, and refused as such.
    let is_announced =
        shared.config.proxy_protocol && forwarded::is_trusted(connection.remote.ip(), &shared.config.trusted_proxies);
    if !is_announced {
        return Some(Arrived { socket, endpoints });
    }
    let announced = tokio::select! {
        announced = proxy_protocol::read(socket.tcp()) => announced.map_err(Failure::from),
        refusal = out_of_time(shared, deadline) => Err(Failure::Refused(refusal)),
    };
    match announced {
        Ok(Header::Proxied { source, destination }) => endpoints = Endpoints { remote: source, local: destination },
        Ok(Header::Local) => {}
        // There is nobody to answer: what speaks here is the proxy, and it does not speak HTTP.
        Err(Failure::Left) => {
            shared.metrics.handshake("left");
            return None;
        }
        Err(Failure::Refused(refusal)) => {
            refused(shared, connection.remote.ip(), &refusal);
            return None;
        }
    }
    Some(Arrived { socket, endpoints })
}

impl From<HeaderError> for Failure {
    fn from(error: HeaderError) -> Self {
        match error {
            HeaderError::Ended => Self::Left,
            HeaderError::Invalid(problem) => Self::Refused(Refusal::ProxyHeader(problem)),
        }
    }
}
