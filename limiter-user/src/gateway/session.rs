//! A WebSocket session: messages one way and the other, until something ends it.

use std::{net::IpAddr, sync::Arc, time::Duration};

use tokio::{net::TcpStream, time::Instant};
use tokio_tungstenite::{WebSocketStream, tungstenite::Message};

use super::{
    Shared,
    admission::Permit,
    application::Opened,
    auth::Member,
    close::{self, End},
    liveness,
    messages::WindowLimiter,
    metrics::{Metrics, OpenSession},
    peer::{Peer, Received, SendError},
    socket::Socket,
};
use crate::config::{Messages, OnViolation};

/// Who is at the other end of a session.
pub(super) struct Client {
    pub(super) address: IpAddr,
    /// `None` where anybody may connect.
    pub(super) user: Option<Member>,
}

/// Serves `client`, which is `who`, to the end of the session and closes both sides.
pub(super) async fn run(
    client: WebSocketStream<Socket>,
    who: Client,
    application: Opened,
    permit: Permit,
    mut open: OpenSession<'_>,
    shared: &Arc<Shared>,
) {
    let config = &shared.config;
    let mut witness = shared.drain.session();
    let client = Peer::new(client, config.pong_timeout);
    let inbound = Inbound::new(config.messages, &shared.metrics);
    let upstream = match application {
        Opened::Echo => None,
        Opened::Relay(socket) => Some(Peer::new(*socket, config.pong_timeout)),
    };

    let served = async {
        match &upstream {
            None => echo(&client, inbound, &shared.metrics).await,
            Some(upstream) => relay(&client, upstream, inbound, &shared.metrics).await,
        }
    };
    let end = tokio::select! {
        biased;
        () = shared.drain.wait() => End::Draining,
        end = liveness::watch(&client, config) => end,
        end = lapse(who.user.as_ref(), shared) => end,
        end = served => end,
    };
    open.ends(end.label());
    log(&end, &client, &who, open.lasted(), shared);

    let close_upstream = async {
        if let Some(upstream) = upstream {
            close::upstream(upstream.into_socket(), &end).await;
        }
    };
    let close_client = async {
        if close::client(client.into_socket(), &end, config.drain_timeout).await {
            witness.closed();
        }
        // The socket is closed by now: whoever gets the slot doesn't find it still taken in the kernel.
        drop((witness, open, permit));
    };
    // At the same time, so that the client's slot isn't held for the upstream's sake.
    tokio::join!(close_client, close_upstream);
}

fn log(end: &End, client: &Peer<Socket>, who: &Client, lasted: Duration, shared: &Shared) {
    let reason = end.label();
    let Client { address, user } = who;
    let user = user.as_ref().map(Member::user);
    let remote = client.transport(|socket| socket.connection().remote);
    tracing::debug!(client = %address, %remote, user, reason, ?lasted, "session ends");
    if end.is_abuse()
        && let Some(left_out) = shared.log.admit(reason)
    {
        tracing::info!(client = %address, %remote, user, reason, left_out, "session closed for what its client does");
    }
}

/// Completes when the client's right to go on ends; never where anybody may connect.
async fn lapse(user: Option<&Member>, shared: &Shared) -> End {
    match (user, &shared.auth) {
        (Some(user), Some(auth)) => auth.lapse(user).await,
        _ => std::future::pending().await,
    }
}

/// Sends each message back.
async fn echo(client: &Peer<Socket>, mut inbound: Inbound<'_>, metrics: &Metrics) -> End {
    loop {
        let message = match inbound.next(client).await {
            Ok(message) => message,
            Err(end) => return end,
        };
        if let Err(end) = deliver(client, message, metrics).await {
            return end;
        }
    }
}

/// Passes messages both ways, each in its own time: a client that does not read may still write, as without us.
async fn relay(client: &Peer<Socket>, upstream: &Peer<TcpStream>, mut inbound: Inbound<'_>, metrics: &Metrics) -> End {
    let up = async {
        loop {
            let message = match inbound.next(client).await {
                Ok(message) => message,
                Err(end) => return end,
            };
            match upstream.send(message).await {
                Ok(()) => {}
                Err(SendError::Slow) => return End::UpstreamGone,
                // There may be messages and a Close frame to read before the end.
                Err(SendError::Broken) => std::future::pending().await,
            }
        }
    };
    let down = async {
        loop {
            match upstream.receive().await {
                Ok(Received::Message(message)) => {
                    if let Err(end) = deliver(client, message, metrics).await {
                        match end {
                            End::Lost => std::future::pending().await,
                            end => return end,
                        }
                    }
                }
                Ok(Received::Close(frame)) => return End::Upstream(frame),
                Err(e) => return End::of_upstream(&e),
            }
        }
    };
    tokio::select! {
        end = up => end,
        end = down => end,
    }
}

/// Sends the client a message.
async fn deliver(client: &Peer<Socket>, message: Message, metrics: &Metrics) -> Result<(), End> {
    let bytes = message.len();
    match client.send(message).await {
        Ok(()) => {
            metrics.sent.count(bytes);
            Ok(())
        }
        Err(SendError::Slow) => Err(End::SlowConsumer),
        Err(SendError::Broken) => Err(End::Lost),
    }
}

/// What comes from the client, within its limits.
struct Inbound<'a> {
    limiter: Option<WindowLimiter>,
    on_violation: OnViolation,
    metrics: &'a Metrics,
}

impl<'a> Inbound<'a> {
    fn new(limits: Messages, metrics: &'a Metrics) -> Self {
        let limiter = (limits.rate != 0).then(|| WindowLimiter::new(limits.rate, limits.window, Instant::now()));
        Self { limiter, on_violation: limits.on_violation, metrics }
    }

    /// The next message that may pass, or why there is none.
    async fn next(&mut self, client: &Peer<Socket>) -> Result<Message, End> {
        loop {
            match client.receive().await {
                Ok(Received::Message(message)) => {
                    if self.limiter.as_mut().is_none_or(|limiter| limiter.admit(Instant::now())) {
                        self.metrics.received.count(message.len());
                        return Ok(message);
                    }
                    self.metrics.over_rate.inc();
                    match self.on_violation {
                        OnViolation::Close => return Err(End::TooMany),
                        OnViolation::Drop => {}
                    }
                }
                Ok(Received::Close(frame)) => return Err(End::Client(frame)),
                Err(e) => {
                    let end = End::of_client(&e);
                    match end {
                        End::TooBig => self.metrics.too_big.inc(),
                        End::Malformed(_) => self.metrics.malformed.inc(),
                        _ => 0,
                    };
                    return Err(end);
                }
            }
        }
    }
}
