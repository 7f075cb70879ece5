//! The way to the WebSocket servers behind the gateway.
//!
//! [`Upstreams`] chooses one of the servers that a route has, [`server`] knows how each is, [`stream`] connects to it, [`handshake`]
//! asks it for a WebSocket by an [`exchange`](super::exchange), and [`mod@probe`] sees whether it is there.

#[cfg(any(test, limiter_fuzz))]
pub(crate) mod fuzz;
mod handshake;
mod probe;
mod server;
mod stream;

pub(super) use handshake::Client;
pub(super) use probe::probe;
pub(super) use server::{Seat, ServerMetrics, Servers};
pub(super) use stream::{Stream, connect};

use std::sync::Arc;

use hyper::{header::HeaderValue, http::request::Parts};
use tokio::time::{Instant, timeout_at};

use super::{answer::Refusal, handshake::Handshake};
use crate::config::{self, CertificateError, Target};
use server::{Failure, Server, State};
use stream::ClientTls;

/// An upstream's side of a session.
pub(super) struct Connected {
    pub(super) stream: Stream,
    /// What it sent right after its answer.
    pub(super) early: Vec<u8>,
    pub(super) seat: Seat,
}

/// How upstreams of all routes are reached.
pub(super) struct Reach {
    servers: Arc<Servers>,
    /// `None`: no upstream speaks TLS.
    tls: Option<Arc<ClientTls>>,
}

impl Reach {
    /// For everything that `gateway` names. `servers`: those that there are.
    pub(super) fn new(gateway: &config::Gateway, servers: Arc<Servers>) -> Result<Self, CertificateError> {
        let upstreams = gateway.routes.iter().filter_map(|route| route.upstream.as_ref()).chain([&gateway.upstream]);
        let speaks_tls = upstreams.flat_map(config::Upstream::targets).any(|target| target.tls);
        let tls = speaks_tls.then(|| ClientTls::new(&gateway.upstream_tls)).transpose()?.map(Arc::new);
        Ok(Self { servers, tls })
    }

    pub(super) fn servers(&self) -> &Arc<Servers> {
        &self.servers
    }
}

/// The servers behind a route, of which each session gets one.
pub(super) struct Upstreams {
    choices: Vec<(Target, Arc<Server>)>,
    tls: Option<Arc<ClientTls>>,
}

impl Upstreams {
    pub(super) fn new(targets: &[Target], reach: &Reach) -> Self {
        let choices = targets.iter().map(|target| (target.clone(), reach.servers.at(target))).collect();
        Self { choices, tls: reach.tls.clone() }
    }

    /// Opens the upstream's side for a client's request: its side, and the subprotocol that the upstream chose.
    ///
    /// A server that can't be connected to is passed over for the next. What was asked of one is not asked of another.
    pub(super) async fn connect(
        &self,
        head: &Parts,
        shake: &Handshake,
        client: Client,
        deadline: Instant,
    ) -> Result<(Connected, Option<HeaderValue>), Refusal> {
        let mut left: Vec<usize> = self.in_use(Instant::now());
        let mut refusal = Refusal::UpstreamUnreachable("every upstream fails its health checks".into());
        while let Some(at) = self.least(&left) {
            let (target, server) = &self.choices[at];
            let seat = server.sit();
            let now = Instant::now();
            // One that swallows what it is sent leaves the others their share of the time.
            let shares = u32::try_from(left.len()).unwrap_or(u32::MAX).max(1);
            let until = now + deadline.saturating_duration_since(now) / shares;
            match timeout_at(until, Stream::connect(target, self.tls.as_deref())).await {
                Ok(Ok(stream)) => return shake_hands(target, seat, stream, head, shake, client, deadline).await,
                Ok(Err(cause)) => {
                    server.failed(Failure::Connect, &cause, Instant::now());
                    refusal = Refusal::UpstreamUnreachable(format!("{}: {cause}", server.name()));
                }
                Err(_) => {
                    server.failed(Failure::Connect, "it takes too long to connect", Instant::now());
                    refusal = Refusal::UpstreamTimeout;
                }
            }
            left.retain(|&one| one != at);
        }
        Err(refusal)
    }

    /// Those that may be asked. One that failed lately may, if all others are no better.
    fn in_use(&self, now: Instant) -> Vec<usize> {
        let that_are = |state| {
            let choices = self.choices.iter().enumerate();
            choices.filter(|(_, (_, server))| server.state(now) == state).map(|(at, _)| at).collect::<Vec<_>>()
        };
        let up = that_are(State::Up);
        if up.is_empty() { that_are(State::Resting) } else { up }
    }

    /// The one with the fewest sessions; of several, any.
    fn least(&self, among: &[usize]) -> Option<usize> {
        if let [only] = among {
            return Some(*only);
        }
        let fewest = among.iter().map(|&at| self.choices[at].1.sessions()).min()?;
        let least = among.iter().filter(|&&at| self.choices[at].1.sessions() <= fewest);
        fastrand::choice(least.collect::<Vec<_>>()).copied().or_else(|| among.first().copied())
    }

    /// Those that there are, for the health checks.
    fn servers(&self) -> impl Iterator<Item = (&Target, &Arc<Server>)> {
        self.choices.iter().map(|(target, server)| (target, server))
    }
}

async fn shake_hands(
    target: &Target,
    seat: Seat,
    stream: Stream,
    head: &Parts,
    shake: &Handshake,
    client: Client,
    deadline: Instant,
) -> Result<(Connected, Option<HeaderValue>), Refusal> {
    let asked = handshake::shake_hands(target.path.as_ref(), stream, head, shake, client);
    let answered = timeout_at(deadline, asked).await.unwrap_or(Err(Refusal::UpstreamTimeout));
    match &answered {
        Err(Refusal::UpstreamUnreachable(cause)) => seat.server().failed(Failure::Answer, cause, Instant::now()),
        Err(Refusal::UpstreamTimeout) => {
            seat.server().failed(Failure::Answer, "it takes too long to answer", Instant::now());
        }
        // It answers, whatever it says.
        Ok(_) | Err(_) => seat.server().succeeded(),
    }
    let (stream, early, protocol) = answered?;
    Ok((Connected { stream, early, seat }, protocol))
}
