//! One accepted connection, from its first byte to its last.

use std::{net::IpAddr, sync::Arc, time::Duration};

use hyper::{Method, http::request::Parts};
use tokio::time::{Instant, sleep_until, timeout_at};

use super::{
    Shared,
    admission::Permit,
    answer::{Refusal, switching_protocols},
    application::Opened,
    arrival::{self, Arrived, Endpoints},
    auth::{Member, Visitor},
    forwarded::{self, Identity},
    handshake, limits, origin, overload,
    push::Mailbox,
    request::{self, NoRequest},
    route::OnRoute,
    session::{self, Established},
    socket::Socket,
    upstream::Client,
};

/// How long a client that was refused may take to read why.
const LINGER: Duration = Duration::from_secs(1);

/// How long a connection without a request may go on in a drain.
const DRAIN_GRACE: Duration = Duration::from_secs(1);

/// A handshake that was answered with 101.
pub(super) struct Accepted {
    pub(super) client: IpAddr,
    pub(super) permit: Permit,
    /// `None` where anybody may connect.
    pub(super) user: Option<Box<Member>>,
    pub(super) application: Opened,
    /// What others have for the client, from before it is told that it is in; where they can have something.
    pub(super) mail: Option<Box<Mailbox>>,
    pub(super) place: OnRoute,
}

/// Serves a connection until it is closed.
pub(super) fn serve(socket: Socket, shared: Arc<Shared>) -> impl Future<Output = ()> + Send {
    // Boxed from the start, so that a session does not carry the room for its handshake along.
    let handshake = Box::pin(establish(socket, Arc::clone(&shared)));
    async move {
        if let Some(established) = handshake.await {
            session::run(established, &shared).await;
        }
    }
}

/// Everything up to the answer 101.
async fn establish(socket: Socket, shared: Arc<Shared>) -> Option<Box<Established>> {
    let since = Instant::now();
    let deadline = since + shared.config.handshake_timeout;
    let is_turned_away = shared.metrics.overload.draw() && !shared.drain.begun();
    let socket = if is_turned_away { Box::pin(overload::turn_away(socket, &shared)).await? } else { socket };
    let arrived = arrival::arrive(socket, &shared, deadline).await?;
    let (socket, early, accepted) = shake_hands(arrived, &shared, deadline, is_turned_away).await?;
    Some(Box::new(Established { socket, early, accepted, since }))
}

/// Reads the request and answers it; with what the client has sent since. `None`: refused, or the client left; the
/// connection is closed.
async fn shake_hands(
    Arrived { mut socket, endpoints }: Arrived,
    shared: &Arc<Shared>,
    deadline: Instant,
    is_turned_away: bool,
) -> Option<(Socket, Vec<u8>, Accepted)> {
    let mut asked = Asked { client: endpoints.remote.ip(), method: Method::GET };
    let negotiated = tokio::select! {
        biased;
        negotiated = negotiate(&mut socket, &mut asked, endpoints, deadline, is_turned_away, shared) => negotiated,
        refusal = out_of_time(shared, deadline) => Err(Failure::Refused(refusal)),
    };
    match negotiated {
        Ok((answer, early, accepted)) => {
            if let Ok(Ok(())) = timeout_at(deadline, socket.send(&answer)).await {
                return Some((socket, early, accepted));
            }
            shared.metrics.handshake("left");
        }
        Err(Failure::Refused(refusal)) => {
            refused(shared, asked.client, &refusal);
            let answer = refusal.raw_to(&asked.method, &shared.metrics.overload);
            socket.end_with(&answer, LINGER).await;
        }
        // Before it had an answer; nothing to log, for that is what port checks do.
        Err(Failure::Left) => shared.metrics.handshake("left"),
    }
    None
}

/// Who asks, and how, as far as that is known.
struct Asked {
    client: IpAddr,
    method: Method,
}

/// Why a request does not become a session.
enum Failure {
    /// The client left.
    Left,
    Refused(Refusal),
}

impl From<NoRequest> for Failure {
    fn from(none: NoRequest) -> Self {
        match none {
            NoRequest::Left => Self::Left,
            NoRequest::Malformed(status) => Self::Refused(Refusal::Malformed(status)),
        }
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

/// Reads the request and finds the answer; with what the client has sent since.
async fn negotiate(
    socket: &mut Socket,
    asked: &mut Asked,
    endpoints: Endpoints,
    deadline: Instant,
    is_turned_away: bool,
    shared: &Arc<Shared>,
) -> Result<(Vec<u8>, Vec<u8>, Accepted), Failure> {
    let (mut head, mut early) = request::read(socket).await?;
    asked.method.clone_from(&head.method);
    let is_proxy = endpoints.is_trusted(&shared.config);
    let identity = forwarded::identify(asked.client, is_proxy, &head.headers, &shared.config.trusted_proxies)?;
    asked.client = identity.ip;
    tokio::select! {
        biased;
        decided = decide(&mut head, endpoints, identity, deadline, is_turned_away, shared) => {
            let (answer, accepted) = decided?;
            Ok((answer, early, accepted))
        }
        // The upstream, or who is asked whether it may connect, need not go on.
        () = request::leaves(socket, &mut early) => Err(Failure::Left),
    }
}

/// Completes when a handshake must be over, with what to tell the client.
pub(super) async fn out_of_time(shared: &Shared, deadline: Instant) -> Refusal {
    tokio::select! {
        () = sleep_until(deadline) => Refusal::Timeout,
        () = shared.drain.wait() => {
            sleep_until(deadline.min(Instant::now() + DRAIN_GRACE)).await;
            Refusal::Draining
        }
    }
}

/// Whether this client gets a session: the answer that says so, and the application's side of it. `is_turned_away`: unless its route is exempt, it does not.
async fn decide(
    head: &mut Parts,
    endpoints: Endpoints,
    identity: Identity,
    deadline: Instant,
    is_turned_away: bool,
    shared: &Arc<Shared>,
) -> Result<(Vec<u8>, Accepted), Refusal> {
    let mut handshake = handshake::check(head)?;
    let route = shared.routes.of(head)?;
    origin::check(&head.headers, &shared.config.allowed_origins)?;
    if shared.drain.refuses() {
        return Err(Refusal::Draining);
    }
    if is_turned_away && !route.exempt {
        return Err(Refusal::Overloaded);
    }
    let mut permit = limits::admit(&head.headers, &endpoints, &identity, route, shared)?;
    let place = route.enter().ok_or(Refusal::ServiceFull)?;
    let user = match &shared.auth {
        Some(auth) if route.auth => {
            let scheme = identity.scheme.unwrap_or(endpoints.scheme).name();
            let visitor = Visitor { address: identity.ip, scheme };
            let authenticated = auth.authenticate(head, &mut handshake, visitor).await?;
            let member = auth.enter(authenticated, route.exempt, &shared.metrics)?;
            // From here on it counts as its user's, so that users behind one address leave each other room.
            permit.leave_source();
            shared.policy.authenticated(&endpoints.connection, member.user());
            Some(Box::new(member))
        }
        _ => None,
    };
    let client = Client::new(identity, endpoints, user.as_deref().map(Member::user));
    // A tenth of the time is kept, to tell the client that the upstream has not answered.
    let upstream_deadline = deadline - shared.config.handshake_timeout / 10;
    let (application, protocol) = route.application.open(route, head, &handshake, client, upstream_deadline).await?;
    let room = match &application {
        Opened::Broadcast(room) => Some(room.as_str()),
        Opened::Echo | Opened::Relay(_) => None,
    };
    let mail = shared.hub.enter(room, user.as_deref().map(Member::user));
    if let Some(member) = &user {
        member.take_over();
    }
    let answer = switching_protocols(&handshake, protocol.as_ref().or(handshake.fallback_protocol.as_ref()));
    Ok((answer, Accepted { client: identity.ip, permit, user, application, mail, place }))
}

/// Counts a handshake that came to nothing, and logs some of them. Never the URL: tokens live there.
pub(super) fn refused(shared: &Shared, client: IpAddr, refusal: &Refusal) {
    let reason = refusal.label();
    shared.metrics.handshake(reason);
    if matches!(refusal, Refusal::Overloaded) {
        shared.metrics.overload.count();
    }
    if let Some(left_out) = shared.log.admit(reason) {
        match refusal.fault() {
            None => tracing::info!(%client, reason, left_out, "handshake refused"),
            Some(fault) => tracing::warn!(%client, reason, fault, left_out, "handshake failed"),
        }
    }
}
