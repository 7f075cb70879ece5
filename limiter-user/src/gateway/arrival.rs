//! What comes on a connection ahead of its request: a PROXY header and TLS, if so configured.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use tokio::time::Instant;

use super::{
    Shared,
    answer::Refusal,
    connection::{out_of_time, refused},
    forwarded::{self, Scheme},
    proxy_protocol::{self, Header, HeaderError},
    socket::Socket,
    tls::Tls,
    wire::Wire,
};
use crate::{config, policy::Connection};

/// How long a client may take to read why it is refused.
const LINGER: Duration = Duration::from_secs(1);

/// The two ends of a connection as the client sees it: a TCP proxy in between does not count.
#[derive(Clone, Copy, Debug)]
pub(super) struct Endpoints {
    /// Who the kernel says is at the other end: the client, or a proxy of any kind.
    pub(super) peer: IpAddr,
    /// The client's address, or that of an HTTP proxy.
    pub(super) remote: SocketAddr,
    /// What it connected to.
    pub(super) local: SocketAddr,
    /// Whether it speaks TLS to us.
    pub(super) scheme: Scheme,
    /// The connection as the kernel knows it.
    pub(super) connection: Connection,
    /// Whether `remote` only stands for whoever connects to a unix socket.
    pub(super) is_local: bool,
}

impl Endpoints {
    /// Whether the other end is a proxy whose word is taken.
    pub(super) fn is_trusted(&self, config: &config::Gateway) -> bool {
        if self.is_local {
            config.trusts_unix
        } else {
            forwarded::is_trusted(self.remote.ip(), &config.trusted_proxies)
        }
    }

    /// Whether the kernel's programs have seen the connection.
    pub(super) fn are_seen_below(&self) -> bool {
        self.connection.remote.port() != 0
    }
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
pub(super) async fn arrive(mut socket: Socket, shared: &Shared, deadline: Instant) -> Option<Arrived> {
    let connection = *socket.connection();
    let is_local = matches!(socket.wire(), Wire::Unix(_));
    let mut endpoints = Endpoints {
        peer: connection.remote.ip(),
        remote: connection.remote,
        local: connection.local,
        scheme: Scheme::Http,
        connection,
        is_local,
    };
    let prepared = tokio::select! {
        // In this order, so that no alarm is set where there is nothing to wait for.
        biased;
        prepared = prepare(&mut socket, &mut endpoints, shared) => prepared,
        refusal = out_of_time(shared, deadline) => {
            if shared.tls.is_some() {
                shared.metrics.tls_failed(refusal.label());
            }
            Err(Failure::Refused(refusal))
        }
    };
    match prepared {
        Ok(()) => return Some(Arrived { socket, endpoints }),
        Err(Failure::Left) => shared.metrics.handshake("left"),
        Err(Failure::Refused(refusal)) => {
            refused(shared, endpoints.remote.ip(), &refusal);
            match refusal {
                Refusal::NotTls => socket.end_with(&refusal.raw(&shared.metrics.overload), LINGER).await,
                // So that the alert arrives, which is the answer in TLS.
                Refusal::Tls(_) => socket.linger(LINGER).await,
                // To the others there is no answer that they would understand.
                _ => {}
            }
        }
    }
    None
}

async fn prepare(socket: &mut Socket, endpoints: &mut Endpoints, shared: &Shared) -> Result<(), Failure> {
    // From others there is no header to wait for: what they send instead is not HTTP, and refused as such.
    if shared.config.proxy_protocol && endpoints.is_trusted(&shared.config) {
        match proxy_protocol::read(socket.wire()).await? {
            Header::Proxied { source, destination } => {
                endpoints.remote = source;
                endpoints.local = destination;
                endpoints.is_local = false;
            }
            Header::Local => {}
        }
    }
    if let Some(tls) = &shared.tls {
        secure(socket, tls, shared).await?;
        endpoints.scheme = Scheme::Https;
    }
    Ok(())
}

/// Makes the TLS handshake.
async fn secure(socket: &mut Socket, tls: &Tls, shared: &Shared) -> Result<(), Failure> {
    let mut first = [0];
    match socket.wire().peek(&mut first).await {
        Ok(0) | Err(_) => return Err(Failure::Left),
        // The first letter of a method; a TLS record begins with 22.
        Ok(_) if first[0].is_ascii_uppercase() => {
            shared.metrics.tls_failed("plain_http");
            return Err(Failure::Refused(Refusal::NotTls));
        }
        Ok(_) => {}
    }
    socket.secure(tls.acceptor()).await.map_err(|error| {
        let Some((reason, detail)) = tls_failure(&error) else {
            shared.metrics.tls_failed("left");
            return Failure::Left;
        };
        shared.metrics.tls_failed(reason);
        Failure::Refused(Refusal::Tls(detail))
    })
}

/// What metrics call a failed TLS handshake, and what went wrong; `None`: the connection ended.
fn tls_failure(error: &io::Error) -> Option<(&'static str, &'static str)> {
    use rustls::Error;
    let cause = error.get_ref()?.downcast_ref::<Error>()?;
    Some(match cause {
        Error::InvalidMessage(_) => ("malformed", "what the client sends is not TLS"),
        Error::PeerIncompatible(_) | Error::NoApplicationProtocol => {
            ("incompatible", "the client and this server have no version, cipher suite or protocol in common")
        }
        Error::AlertReceived(_) => ("alert", "the client does not accept the certificate, or gave up with an alert"),
        _ => ("protocol", "the client breaks the TLS protocol"),
    })
}

impl From<HeaderError> for Failure {
    fn from(error: HeaderError) -> Self {
        match error {
            HeaderError::Ended => Self::Left,
            HeaderError::Invalid(problem) => Self::Refused(Refusal::ProxyHeader(problem)),
        }
    }
}
