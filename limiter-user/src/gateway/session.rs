//! A WebSocket session: messages one way and the other, until something ends it.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;
use tokio_tungstenite::{WebSocketStream, tungstenite::Message, tungstenite::protocol::Role};

use super::{
    Shared,
    application::Opened,
    auth::Member,
    close::{self, End},
    connection::Accepted,
    liveness, messages,
    messages::Inbound,
    metrics::{Metrics, OpenSession},
    peer::{Peer, Received, SendError},
    relay::{self, Judge, Relay, Verdict},
    socket::Socket,
};

/// Serves a client to the end of the session and closes both sides. `early`: what came right after the handshake.
pub(super) async fn run(
    client: Socket,
    early: Vec<u8>,
    accepted: Accepted,
    mut open: OpenSession<'_>,
    shared: &Arc<Shared>,
) {
    let Accepted { client: address, permit, user, application } = accepted;
    let config = &shared.config;
    let mut witness = shared.drain.session();
    let who = Who { address, remote: client.connection().remote, user };
    // What is only needed at the end, or by the built-in application, takes no room in a relayed session.
    match application {
        Opened::Relay(upstream) => {
            let mut relay = Relay::new(client, early, upstream, address, shared);
            let end = tokio::select! {
                biased;
                () = shared.drain.wait() => End::Draining,
                end = lapse(who.user.as_ref(), shared) => end,
                end = relay.run() => end,
            };
            open.ends(end.label());
            log(&end, &who, open.lasted(), shared);
            let closed = |agreed: bool| {
                if agreed {
                    witness.closed();
                }
                drop((witness, open, permit, who));
            };
            Box::pin(relay::close(relay, &end, config.drain_timeout, closed)).await;
        }
        Opened::Echo => {
            Box::pin(async {
                let limits = messages::client_config(&config.messages);
                let client = WebSocketStream::from_partially_read(client, early, Role::Server, Some(limits)).await;
                let client = Peer::new(client, config.pong_timeout);
                let inbound = Inbound::new(shared, address);
                let end = tokio::select! {
                    biased;
                    () = shared.drain.wait() => End::Draining,
                    end = liveness::watch(&client, config) => end,
                    end = lapse(who.user.as_ref(), shared) => end,
                    end = echo(&client, inbound, &shared.metrics) => end,
                };
                open.ends(end.label());
                log(&end, &who, open.lasted(), shared);
                if close::client(client.into_socket(), &end, config.drain_timeout).await {
                    witness.closed();
                }
                // The socket is closed by now: whoever gets the slot doesn't find it still taken in the kernel.
                drop((witness, open, permit, who));
            })
            .await;
        }
    }
}

/// Who is at the other end of a session.
struct Who {
    address: IpAddr,
    remote: SocketAddr,
    /// `None` where anybody may connect.
    user: Option<Member>,
}

fn log(end: &End, who: &Who, lasted: Duration, shared: &Shared) {
    let reason = end.label();
    let Who { address, remote, user } = who;
    let user = user.as_ref().map(Member::user);
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
        // Boxed, so that it takes no room in the sessions of others.
        (Some(user), Some(auth)) => Box::pin(auth.lapse(user)).await,
        _ => std::future::pending().await,
    }
}

/// Sends each message back.
async fn echo(client: &Peer<Socket>, mut inbound: Inbound<'_>, metrics: &Metrics) -> End {
    loop {
        let message = match next(client, &mut inbound).await {
            Ok(message) => message,
            Err(end) => return end,
        };
        let bytes = message.len() as u64;
        match client.send(message).await {
            Ok(()) => metrics.sent.count(bytes),
            Err(SendError::Slow) => return End::SlowConsumer,
            Err(SendError::Broken) => return End::Lost,
        }
    }
}

/// The next message that may pass, or why there is none.
async fn next(client: &Peer<Socket>, inbound: &mut Inbound<'_>) -> Result<Message, End> {
    loop {
        match client.receive().await {
            Ok(Received::Message(message)) => {
                let (now, bytes) = (Instant::now(), message.len() as u64);
                match inbound.begins(message.is_text(), bytes, now) {
                    Verdict::Pass => {
                        inbound.passed(bytes, now);
                        return Ok(message);
                    }
                    Verdict::Drop => {}
                    Verdict::Close(violation) => return Err(End::Violation(violation)),
                }
            }
            Ok(Received::Close(frame)) => return Err(End::Client(frame)),
            Err(e) => {
                let end = End::of_client(&e);
                match end {
                    End::Violation(violation) => _ = inbound.violated(violation),
                    End::Malformed(..) => inbound.malformed(),
                    _ => {}
                }
                return Err(end);
            }
        }
    }
}
