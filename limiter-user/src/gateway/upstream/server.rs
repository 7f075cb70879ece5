//! One upstream server: how many sessions it has, and whether new ones are led to it.
//!
//! Whoever connects to it tells how that went (passive), and so do the health checks, where there are any (active). After some
//! failures in a row a server is left alone for a while, unless all others are, too; one that fails its checks is not asked at all.

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};
use tokio::time::Instant;

use crate::config::{self, Place, Target};

/// Failures in a row after which a server is left alone.
const FAILURES: u32 = 3;

/// For how long at first; twice as long after each time that it fails at once again.
const SHORTEST_REST: Duration = Duration::from_secs(1);
const LONGEST_REST: Duration = Duration::from_secs(30);

/// What went wrong with a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// There is no connection to it.
    Connect,
    /// It does not answer a request, or not in HTTP or WebSocket.
    Answer,
    /// It did not pass a health check.
    Check,
}

impl Failure {
    const ALL: [Self; 3] = [Self::Connect, Self::Answer, Self::Check];

    fn label(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Answer => "answer",
            Self::Check => "check",
        }
    }
}

/// One server, whatever paths and routes lead to it.
pub(super) struct Server {
    name: String,
    sessions: AtomicU32,
    failures: [AtomicU64; Failure::ALL.len()],
    health: Mutex<Health>,
}

#[derive(Default)]
struct Health {
    /// Failures in a row of those who wanted something of it.
    failures: u32,
    /// Until when it is left alone for that.
    rests_until: Option<Instant>,
    /// Whether it is out of use because of its checks.
    is_down: bool,
    /// Checks in a row that say otherwise.
    streak: u32,
}

/// A place among the sessions of a server. Given back when it is dropped.
pub(in crate::gateway) struct Seat(Arc<Server>);

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.sessions.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Seat {
    pub(super) fn server(&self) -> &Arc<Server> {
        &self.0
    }
}

impl Server {
    fn new(target: &Target) -> Self {
        Self {
            name: target.to_string(),
            sessions: AtomicU32::new(0),
            failures: Default::default(),
            health: Mutex::default(),
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn sessions(&self) -> u32 {
        self.sessions.load(Ordering::Relaxed)
    }

    pub(super) fn sit(self: &Arc<Self>) -> Seat {
        self.sessions.fetch_add(1, Ordering::Relaxed);
        Seat(Arc::clone(self))
    }

    fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether its health checks say that it is there, and whether it is left alone all the same.
    pub(super) fn state(&self, now: Instant) -> State {
        let health = self.health();
        if health.is_down {
            State::Down
        } else if health.rests_until.is_some_and(|until| now < until) {
            State::Resting
        } else {
            State::Up
        }
    }

    /// Somebody got what it wanted.
    pub(super) fn succeeded(&self) {
        let mut health = self.health();
        if health.rests_until.take().is_some() {
            tracing::info!(upstream = self.name, "the upstream answers again");
        }
        health.failures = 0;
    }

    /// Somebody did not.
    pub(super) fn failed(&self, failure: Failure, cause: &str, now: Instant) {
        self.count(failure);
        let mut health = self.health();
        health.failures = health.failures.saturating_add(1);
        // One failure counts, however many find it at the same time.
        if health.failures < FAILURES || health.rests_until.is_some_and(|until| now < until) {
            return;
        }
        let rest = rest_after(health.failures, fastrand::f64());
        if health.rests_until.replace(now + rest).is_none() {
            tracing::warn!(upstream = self.name, cause, "the upstream fails: others are asked first");
        }
    }

    fn count(&self, failure: Failure) {
        let index = Failure::ALL.iter().position(|&one| one == failure).unwrap_or_default();
        self.failures[index].fetch_add(1, Ordering::Relaxed);
    }

    /// A health check came to this.
    pub(super) fn checked(&self, outcome: Result<(), String>, config: &config::Health) {
        if outcome.is_err() {
            self.count(Failure::Check);
        }
        let mut health = self.health();
        let agrees = outcome.is_err() == health.is_down;
        if agrees {
            health.streak = 0;
            return;
        }
        health.streak += 1;
        if health.streak < if health.is_down { config.rise } else { config.fall } {
            return;
        }
        health.streak = 0;
        health.is_down = outcome.is_err();
        match outcome {
            Ok(()) => {
                (health.failures, health.rests_until) = (0, None);
                tracing::info!(upstream = self.name, "the upstream passes its health checks again");
            }
            Err(cause) => tracing::error!(upstream = self.name, cause, "the upstream fails its health checks"),
        }
    }

    /// Nobody checks it any more.
    pub(super) fn unchecked(&self) {
        let mut health = self.health();
        (health.is_down, health.streak) = (false, 0);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Up,
    /// It failed lately.
    Resting,
    /// It fails its health checks.
    Down,
}

/// For how long a server is left alone. `spread`, from 0 to 1, makes that different for each.
fn rest_after(failures: u32, spread: f64) -> Duration {
    let doubled = SHORTEST_REST.saturating_mul(1 << failures.saturating_sub(FAILURES).min(16));
    doubled.min(LONGEST_REST).mul_f64(0.5 + spread / 2.0)
}

/// Every server that there is, so that those of other routes, and of the settings before, are the same.
#[derive(Default)]
pub(in crate::gateway) struct Servers(Mutex<HashMap<(Place, bool), Weak<Server>>>);

impl Servers {
    /// The one at `target`.
    pub(super) fn at(&self, target: &Target) -> Arc<Server> {
        let mut servers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        servers.retain(|_, server| server.strong_count() > 0);
        let place = (target.at.clone(), target.tls);
        if let Some(server) = servers.get(&place).and_then(Weak::upgrade) {
            return server;
        }
        let server = Arc::new(Server::new(target));
        servers.insert(place, Arc::downgrade(&server));
        server
    }

    fn all(&self) -> Vec<Arc<Server>> {
        let servers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<_> = servers.values().filter_map(Weak::upgrade).collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }
}

/// Their metrics.
#[derive(Clone, Default)]
pub(in crate::gateway) struct ServerMetrics(Arc<Mutex<Weak<Servers>>>);

impl fmt::Debug for ServerMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerMetrics").finish_non_exhaustive()
    }
}

impl ServerMetrics {
    /// From now on they are those of `servers`.
    pub(in crate::gateway) fn observe(&self, servers: &Arc<Servers>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(servers);
    }
}

impl Collector for ServerMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Some(servers) = self.0.lock().unwrap_or_else(PoisonError::into_inner).upgrade() else { return Ok(()) };
        let (servers, now) = (servers.all(), Instant::now());
        if servers.is_empty() {
            return Ok(());
        }
        let mut up = encoder.encode_descriptor(
            "upstream_up",
            "Whether clients are led to the upstream",
            None,
            MetricType::Gauge,
        )?;
        for server in &servers {
            let is_up = ConstGauge::new(i64::from(server.state(now) == State::Up));
            is_up.encode(up.encode_family(&[("upstream", server.name())])?)?;
        }
        let mut connections = encoder.encode_descriptor(
            "upstream_connections",
            "Sessions of the upstream, those that are being opened among them",
            None,
            MetricType::Gauge,
        )?;
        for server in &servers {
            let sessions = ConstGauge::new(i64::from(server.sessions()));
            sessions.encode(connections.encode_family(&[("upstream", server.name())])?)?;
        }
        let mut failures = encoder.encode_descriptor(
            "upstream_failures",
            "What went wrong with the upstream, by what was tried",
            None,
            MetricType::Counter,
        )?;
        for server in &servers {
            for (failure, count) in Failure::ALL.iter().zip(&server.failures) {
                let count = ConstCounter::new(count.load(Ordering::Relaxed));
                let labels = [("upstream", server.name()), ("reason", failure.label())];
                count.encode(failures.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server() -> Server {
        Server::new(&"ws://127.0.0.1:9000".parse().unwrap())
    }

    #[test]
    fn it_rests_after_failures_in_a_row_and_longer_each_time() {
        let server = server();
        let start = Instant::now();
        for _ in 1..FAILURES {
            server.failed(Failure::Connect, "", start);
        }
        server.succeeded();
        for _ in 1..FAILURES {
            server.failed(Failure::Connect, "", start);
            assert_eq!(server.state(start), State::Up);
        }
        server.failed(Failure::Connect, "", start);
        assert_eq!(server.state(start), State::Resting);
        // Others that fail meanwhile make it no longer.
        server.failed(Failure::Answer, "", start);
        assert_eq!(server.state(start + SHORTEST_REST), State::Up);
        server.failed(Failure::Answer, "", start + SHORTEST_REST);
        assert_eq!(server.state(start + SHORTEST_REST + Duration::from_millis(900)), State::Resting);
        server.succeeded();
        assert_eq!(server.state(start + SHORTEST_REST), State::Up);
    }

    #[test]
    fn a_rest_has_bounds() {
        for failures in FAILURES..100 {
            for spread in [0.0, 0.5, 1.0] {
                let rest = rest_after(failures, spread);
                assert!(rest >= SHORTEST_REST / 2 && rest <= LONGEST_REST, "{failures} {spread}: {rest:?}");
                assert!(rest <= rest_after(failures + 1, spread));
            }
        }
    }

    #[test]
    fn checks_in_a_row_put_it_out_of_use_and_back() {
        let server = server();
        let config = config::Health { rise: 2, fall: 3, ..config::Health::default() };
        let now = Instant::now();
        let fails = || server.checked(Err("no answer".into()), &config);
        let passes = || server.checked(Ok(()), &config);
        fails();
        fails();
        passes();
        fails();
        fails();
        assert_eq!(server.state(now), State::Up);
        fails();
        assert_eq!(server.state(now), State::Down);
        passes();
        fails();
        passes();
        assert_eq!(server.state(now), State::Down);
        passes();
        assert_eq!(server.state(now), State::Up);
    }

    #[test]
    fn one_server_is_the_same_for_all_that_lead_to_it() {
        let servers = Servers::default();
        let at = |url: &str| servers.at(&url.parse().unwrap());
        let first = at("ws://app/one");
        let seat = first.sit();
        assert!(Arc::ptr_eq(&first, &at("ws://app:80/two")));
        assert!(!Arc::ptr_eq(&first, &at("wss://app:80")));
        drop(first);
        assert_eq!(at("ws://app").sessions(), 1, "as long as anybody sits there");
        drop(seat);
        assert_eq!(at("ws://app").sessions(), 0);
    }
}
