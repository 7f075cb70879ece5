//! One accepted connection, from its first byte to its last.

use std::{
    future::poll_fn,
    net::IpAddr,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Request, Response, StatusCode, body::Incoming, http::request::Parts, server::conn::http1, service::service_fn,
};
use hyper_util::rt::TokioIo;
use tokio::{
    io::AsyncWriteExt,
    time::{Instant, sleep_until, timeout},
};

use super::{
    Shared,
    admission::{Full as NoRoom, Permit},
    answer::{Refusal, switching_protocols},
    application::Opened,
    arrival::{self, Arrived, Endpoints},
    auth::{Member, Visitor},
    forwarded::{self, Identity},
    handshake,
    muted::Muted,
    origin, overload, proxy_hint,
    push::Mailbox,
    route::OnRoute,
    session::{self, Established},
    socket::Socket,
    upstream::Client,
};
use crate::policy::{Limits, TooFast};

/// Longest head of a request, in bytes, and most header lines in it. A cookie and a token fit with room to spare.
pub(super) const MAX_HEAD: usize = 16 * 1024;
pub(super) const MAX_HEADERS: usize = 64;

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
    Arrived { socket, endpoints }: Arrived,
    shared: &Arc<Shared>,
    deadline: Instant,
    is_turned_away: bool,
) -> Option<(Socket, Vec<u8>, Accepted)> {
    let peer = endpoints.remote.ip();
    let answered: Arc<Mutex<Answered>> = Arc::default();
    let service = service_fn(|request| answer(request, endpoints, deadline, is_turned_away, shared, &answered));
    let mut http = http1::Builder::new()
        .max_buf_size(MAX_HEAD)
        .max_headers(MAX_HEADERS)
        .serve_connection(TokioIo::new(Muted::new(socket, Arc::clone(&answered))), service);

    // The HTTP side is polled here rather than in a task of its own, so that the socket can always be taken back.
    let served = tokio::select! {
        served = poll_fn(|cx| http.poll_without_shutdown(cx)) => Ok(served),
        refusal = out_of_time(shared, deadline) => Err(refusal),
    };
    let parts = http.into_parts();
    let (mut socket, held_back) = parts.io.into_inner().into_parts();
    let answered = std::mem::take(&mut *answered.lock().unwrap_or_else(PoisonError::into_inner));

    match (served, answered) {
        (Ok(Ok(())), Answered::Accepted(accepted)) => {
            return Some((socket, parts.read_buf.to_vec(), *accepted));
        }
        (Ok(_), Answered::Refused) => socket.linger(LINGER).await,
        // What came is no request. (The HTTP side has no answer for one that begins like HTTP/2.)
        (Ok(Err(e)), Answered::Nothing) if e.is_parse() => {
            let refusal = Refusal::Malformed(held_back.unwrap_or(StatusCode::BAD_REQUEST));
            refused(shared, peer, &refusal);
            if let Ok(Ok(())) = timeout(LINGER, socket.write_all(&refusal.raw(&shared.metrics.overload))).await {
                socket.linger(LINGER).await;
            }
        }
        // It was counted, and does not take the answer.
        (Err(_), Answered::Refused) => {}
        // Before it had an answer, or without reading it; nothing to log, for that is what port checks do.
        (Ok(_), _) | (Err(_), Answered::Accepted(_)) => shared.metrics.handshake("left"),
        (Err(refusal), Answered::Nothing) => {
            refused(shared, peer, &refusal);
            if let Ok(Ok(())) = timeout(LINGER, socket.write_all(&refusal.raw(&shared.metrics.overload))).await {
                socket.linger(LINGER).await;
            }
        }
    }
    None
}

/// What the HTTP side came to.
#[derive(Default)]
pub(super) enum Answered {
    #[default]
    Nothing,
    Refused,
    Accepted(Box<Accepted>),
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

/// Boxed because the HTTP side must be able to move it.
type Answering = Pin<Box<dyn Future<Output = hyper::Result<Response<Full<Bytes>>>> + Send>>;

/// The answer to a request, and through `answered` what comes of the connection.
fn answer(
    request: Request<Incoming>,
    endpoints: Endpoints,
    deadline: Instant,
    is_turned_away: bool,
    shared: &Arc<Shared>,
    answered: &Arc<Mutex<Answered>>,
) -> Answering {
    let shared = Arc::clone(shared);
    let answered = Arc::clone(answered);
    Box::pin(async move {
        let (mut head, _) = request.into_parts();
        let peer = endpoints.remote.ip();
        let is_proxy = endpoints.is_trusted(&shared.config);
        let identity = forwarded::identify(peer, is_proxy, &head.headers, &shared.config.trusted_proxies);
        let client = identity.as_ref().map_or(peer, |identity| identity.ip);
        let decided = match identity {
            Ok(identity) => decide(&mut head, endpoints, identity, deadline, is_turned_away, &shared).await,
            Err(refusal) => Err(refusal),
        };
        let (response, outcome) = match decided {
            Ok((response, accepted)) => (response, Answered::Accepted(Box::new(accepted))),
            Err(refusal) => {
                refused(&shared, client, &refusal);
                (refusal.response(&shared.metrics.overload), Answered::Refused)
            }
        };
        *answered.lock().unwrap_or_else(PoisonError::into_inner) = outcome;
        Ok(response)
    })
}

/// Whether this client gets a session, and the application's side of it. `is_turned_away`: unless its route is exempt, it does not.
async fn decide(
    head: &mut Parts,
    endpoints: Endpoints,
    identity: Identity,
    deadline: Instant,
    is_turned_away: bool,
    shared: &Arc<Shared>,
) -> Result<(Response<Full<Bytes>>, Accepted), Refusal> {
    let mut handshake = handshake::check(head)?;
    let route = shared.routes.of(head)?;
    origin::check(&head.headers, &shared.config.allowed_origins)?;
    if shared.drain.refuses() {
        return Err(Refusal::Draining);
    }
    if is_turned_away && !route.exempt {
        return Err(Refusal::Overloaded);
    }
    // The kernel has seen to those that it sees.
    let is_seen_below = shared.policy.is_kept_below() && identity.ip == endpoints.peer && endpoints.are_seen_below();
    if !is_seen_below && shared.policy.denies(identity.ip) {
        return Err(Refusal::Denied);
    }
    if (shared.config.messages.deny_after != 0 || route.config.messages.deny_after != 0)
        && shared.offenders.denies(shared.policy.limits().source(identity.ip), Instant::now())
    {
        return Err(Refusal::Denied);
    }
    // A rule that lets a proxy past the limits is for what it carries, not for a client that it hides.
    let limits = if identity.is_proxy { shared.policy.limits() } else { shared.policy.limits_for(identity.ip) };
    let limits = if route.exempt {
        Limits {
            connections_per_source: 0,
            connections_per_wide_source: 0,
            connections_total: 0,
            connections_total_all: 0,
            connection_rate: 0,
            service_connection_rate: 0,
            ..limits
        }
    } else {
        limits
    };
    let admitted = shared.admission.try_admit(identity.ip, &limits).map_err(|full| match full {
        NoRoom::Source(limit) => Refusal::SourceFull(limit),
        NoRoom::Service => Refusal::ServiceFull,
        NoRoom::AllServices => Refusal::AllFull,
    });
    proxy_hint::warn(shared, &endpoints, &head.headers, &limits);
    let mut permit = admitted?;
    if !is_seen_below {
        // The kernel has counted a proxy's connection as one to the service, whoever the client is.
        let is_counted_below = shared.policy.is_kept_below() && endpoints.are_seen_below();
        let service_connection_rate = if is_counted_below { 0 } else { limits.service_connection_rate };
        let rates = Limits { service_connection_rate, ..limits };
        shared.rates.spend(limits.source(identity.ip), &rates).map_err(|too_fast| match too_fast {
            TooFast::Source => Refusal::SourceRate,
            TooFast::Service => Refusal::ServiceRate,
        })?;
    }
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
    let response = switching_protocols(&handshake, protocol.or_else(|| handshake.fallback_protocol.clone()));
    Ok((response, Accepted { client: identity.ip, permit, user, application, mail, place }))
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
