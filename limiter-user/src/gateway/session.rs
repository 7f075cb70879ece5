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
    admission::Permit,
    application::Opened,
    auth::Member,
    close::{self, End},
    connection::Accepted,
    drain::Witness,
    liveness, messages,
    messages::Inbound,
    metrics::{Metrics, OpenSession},
    peer::{Peer, Received, SendError},
    relay::{self, Judge, Relay, Verdict},
    route::OnRoute,
    socket::Socket,
};
use crate::config;

/// What a session begins with. Boxed, and taken apart before the session waits for anything: what is moved out of a future's
/// variable still takes room in it.
pub(super) struct Established {
    pub(super) socket: Socket,
    /// What the client sent right after its handshake.
    pub(super) early: Vec<u8>,
    pub(super) accepted: Accepted,
    /// When the connection was accepted.
    pub(super) since: Instant,
}

/// What a session gives back at its end.
struct Held<'a> {
    who: Who,
    permit: Permit,
    open: OpenSession<'a>,
    witness: Witness<'a>,
    place: OnRoute,
}

impl Held<'_> {
    /// The client's socket is closed: whoever gets the slot doesn't find it still taken in the kernel.
    fn release(self, agreed: bool) {
        let Self { who, permit, open, mut witness, place } = self;
        if agreed {
            witness.closed();
        }
        drop((witness, open, permit, place, who));
    }
}

/// A session with an upstream: all that a quiet one keeps, in one piece.
struct Relayed<'a> {
    relay: Relay<'a>,
    held: Held<'a>,
}

enum Begun<'a> {
    Relay(Box<Relayed<'a>>),
    Echo(Box<(Socket, Vec<u8>, &'a config::Gateway, Held<'a>)>),
}

/// Serves a client to the end of the session and closes both sides.
pub(super) async fn run(established: Box<Established>, shared: &Arc<Shared>) {
    match begin(*established, shared) {
        Begun::Relay(session) => relayed(session, shared).await,
        Begun::Echo(session) => Box::pin(echoed(session, shared)).await,
    }
}

fn begin(established: Established, shared: &Shared) -> Begun<'_> {
    let Established { socket, early, accepted, since } = established;
    let Accepted { client: address, permit, user, application, place } = accepted;
    let config = shared.routes.settings_of(&place);
    let open = shared.metrics.session_opened(since.elapsed());
    let who = Who { address, remote: socket.connection().remote, user };
    let held = Held { who, permit, open, witness: shared.drain.session(), place };
    match application {
        Opened::Relay(upstream) => {
            let relay = Relay::new(socket, early, upstream, address, config, shared);
            Begun::Relay(Box::new(Relayed { relay, held }))
        }
        Opened::Echo => Begun::Echo(Box::new((socket, early, config, held))),
    }
}

async fn relayed(mut session: Box<Relayed<'_>>, shared: &Shared) {
    let Relayed { relay, held } = &mut *session;
    let end = tokio::select! {
        biased;
        () = shared.drain.wait() => End::Draining,
        end = lapse(held.who.user.as_ref(), shared) => end,
        end = relay.run() => end,
    };
    ends(&end, held, shared);
    // Boxed, because the room is needed only now.
    Box::pin(async move {
        let Relayed { relay, held } = *session;
        relay::close(relay, &end, shared.config.drain_timeout, |agreed| held.release(agreed)).await;
    })
    .await;
}

async fn echoed(session: Box<(Socket, Vec<u8>, &config::Gateway, Held<'_>)>, shared: &Shared) {
    let (client, early, config, mut held) = *session;
    let limits = messages::client_config(&config.messages);
    let client = WebSocketStream::from_partially_read(client, early, Role::Server, Some(limits)).await;
    let client = Peer::new(client, config.pong_timeout);
    let inbound = Inbound::new(shared, &config.messages, held.who.address);
    let end = tokio::select! {
        biased;
        () = shared.drain.wait() => End::Draining,
        end = liveness::watch(&client, config) => end,
        end = lapse(held.who.user.as_ref(), shared) => end,
        end = echo(&client, inbound, &shared.metrics) => end,
    };
    ends(&end, &mut held, shared);
    let agreed = close::client(client.into_socket(), &end, config.drain_timeout).await;
    held.release(agreed);
}

fn ends(end: &End, held: &mut Held<'_>, shared: &Shared) {
    held.open.ends(end.label());
    log(end, &held.who, held.open.lasted(), shared);
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
