//! What the gateway counts.

use std::{sync::Arc, time::Duration};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};
use tokio::time::Instant;

use super::{overload::Overload, upstream::ServerMetrics};

/// From a millisecond to the usual deadline.
const HANDSHAKE_SECONDS: [f64; 12] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 10.0];

/// From a client that comes and goes to one that stays for days.
const CONNECTION_SECONDS: [f64; 10] = [0.1, 1.0, 10.0, 60.0, 300.0, 1_800.0, 3_600.0, 21_600.0, 86_400.0, 604_800.0];

/// The gateway's metrics. One is made per process, registered, and handed to [`Gateway::bind`](super::Gateway::bind).
pub struct Metrics {
    handshakes: Family<ResultLabel, Counter>,
    handshakes_observed: Family<ReasonLabel, Counter>,
    handshake_seconds: Histogram,
    sessions: Gauge,
    sessions_closed: Family<ReasonLabel, Counter>,
    connection_seconds: Histogram,
    tls_failures: Family<ReasonLabel, Counter>,
    certificate_reloads: Family<ResultLabel, Counter>,
    key_reloads: Family<ResultLabel, Counter>,
    schema_reloads: Family<ResultLabel, Counter>,
    pub(super) users: Gauge,
    messages: Family<MessageLabels, Counter>,
    message_bytes: Family<DirectionLabel, Counter>,
    pub(super) upstreams: ServerMetrics,
    /// How overloaded the process is, which is one for all gateways.
    pub(super) overload: Arc<Overload>,
    pub(super) accept_errors: Counter,
    pub(super) sources_denied: Counter,
    /// Rooms of the application `broadcast` that have members.
    pub(super) rooms: Gauge,
    pub(super) published_by_clients: Published,
    pub(super) published_by_control: Published,
    /// Messages times those who did not get them because they were too far behind.
    pub(super) push_lost: Counter,
    published: Family<PublisherLabel, Counter>,
    published_receivers: Family<PublisherLabel, Counter>,
    /// Series of `messages` and `message_bytes`, at hand so that a message costs no look-up.
    pub(super) received: Direction,
    pub(super) sent: Direction,
}

/// Messages that pass in one direction.
pub(super) struct Direction {
    messages: Counter,
    bytes: Counter,
}

impl Direction {
    pub(super) fn count(&self, bytes: u64) {
        self.messages.inc();
        self.bytes.inc_by(bytes);
    }
}

/// Messages that are published for others.
pub(super) struct Published {
    pub(super) messages: Counter,
    /// Messages times those who get them.
    pub(super) receivers: Counter,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PublisherLabel {
    by: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabel {
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DirectionLabel {
    direction: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MessageLabels {
    direction: &'static str,
    verdict: &'static str,
}

impl Default for Metrics {
    fn default() -> Self {
        let messages: Family<MessageLabels, Counter> = Family::default();
        let message_bytes: Family<DirectionLabel, Counter> = Family::default();
        let verdict = |direction, verdict| messages.get_or_create_owned(&MessageLabels { direction, verdict });
        let passed = |direction| Direction {
            messages: verdict(direction, "passed"),
            bytes: message_bytes.get_or_create_owned(&DirectionLabel { direction }),
        };
        let published: Family<PublisherLabel, Counter> = Family::default();
        let published_receivers: Family<PublisherLabel, Counter> = Family::default();
        let published_by = |by| Published {
            messages: published.get_or_create_owned(&PublisherLabel { by }),
            receivers: published_receivers.get_or_create_owned(&PublisherLabel { by }),
        };
        // So that they are there, as 0, before the first.
        for reason in ["over_rate", "too_big", "malformed"] {
            verdict("in", reason);
        }
        Self {
            received: passed("in"),
            sent: passed("out"),
            handshakes: Family::default(),
            handshakes_observed: Family::default(),
            handshake_seconds: Histogram::new(HANDSHAKE_SECONDS),
            sessions: Gauge::default(),
            sessions_closed: Family::default(),
            connection_seconds: Histogram::new(CONNECTION_SECONDS),
            tls_failures: Family::default(),
            certificate_reloads: Family::default(),
            key_reloads: Family::default(),
            schema_reloads: Family::default(),
            users: Gauge::default(),
            upstreams: ServerMetrics::default(),
            overload: Arc::default(),
            accept_errors: Counter::default(),
            sources_denied: Counter::default(),
            rooms: Gauge::default(),
            published_by_clients: published_by("client"),
            published_by_control: published_by("control"),
            push_lost: Counter::default(),
            published,
            published_receivers,
            messages,
            message_bytes,
        }
    }
}

impl Metrics {
    /// Adds them to `registry`, whose prefix should be `limiter`. Done once; a second time would write each twice.
    pub fn register(&self, registry: &mut Registry) {
        registry.register_collector(Box::new(self.upstreams.clone()));
        self.overload.register(registry);
        registry.register("handshakes", "WebSocket handshakes, by what came of them", self.handshakes.clone());
        registry.register(
            "handshakes_observed",
            "WebSocket handshakes that the limits of a service would have refused if it did not only observe, by reason",
            self.handshakes_observed.clone(),
        );
        registry.register(
            "handshake_seconds",
            "From accept to the end of the upgrade, of handshakes that succeeded",
            self.handshake_seconds.clone(),
        );
        registry.register("sessions", "WebSocket sessions that are open in the gateway", self.sessions.clone());
        registry.register("sessions_closed", "WebSocket sessions that ended, by reason", self.sessions_closed.clone());
        registry.register("users", "Users (and API keys) that have a session", self.users.clone());
        registry.register("connection_seconds", "How long WebSocket sessions lasted", self.connection_seconds.clone());
        registry.register("tls_failures", "TLS handshakes that failed, by reason", self.tls_failures.clone());
        registry.register(
            "certificate_reloads",
            "Certificates that changed on disk, by whether the new ones could be used",
            self.certificate_reloads.clone(),
        );
        registry.register(
            "key_reloads",
            "Keys of clients that changed on disk, by whether the new ones could be used",
            self.key_reloads.clone(),
        );
        registry.register(
            "schema_reloads",
            "Schemas of messages that changed on disk, by whether the new ones could be used",
            self.schema_reloads.clone(),
        );
        registry.register(
            "messages",
            "Messages from (in) and to (out) clients, by what was done with them",
            self.messages.clone(),
        );
        registry.register("message_bytes", "Payload of the messages that were passed on", self.message_bytes.clone());
        registry.register(
            "sources_denied",
            "Sources denied for a time because of what their clients sent",
            self.sources_denied.clone(),
        );
        registry.register("rooms", "Rooms of the broadcast application that have members", self.rooms.clone());
        registry.register(
            "published",
            "Messages published for other clients, by a client or by the admin address",
            self.published.clone(),
        );
        registry.register(
            "published_receivers",
            "The same, each times the clients that it is for",
            self.published_receivers.clone(),
        );
        registry.register(
            "published_lost",
            "Messages times the clients that did not get them, being too far behind; these are closed as slow_consumer",
            self.push_lost.clone(),
        );
        registry.register(
            "accept_errors",
            "Failed accepts; out of file descriptors, mostly",
            self.accept_errors.clone(),
        );
    }

    /// How overloaded the process is, for whoever is asked for its health.
    pub fn overload(&self) -> Arc<Overload> {
        Arc::clone(&self.overload)
    }

    /// A handshake came to an end.
    pub(super) fn handshake(&self, result: &'static str) {
        self.handshakes.get_or_create(&ResultLabel { result }).inc();
    }

    /// A handshake goes on that would have been refused.
    pub(super) fn handshake_observed(&self, reason: &'static str) {
        self.handshakes_observed.get_or_create(&ReasonLabel { reason }).inc();
    }

    /// A client's message does not pass, for that reason.
    pub(super) fn refused_message(&self, verdict: &'static str) {
        self.messages.get_or_create(&MessageLabels { direction: "in", verdict }).inc();
    }

    /// A TLS handshake failed.
    pub(super) fn tls_failed(&self, reason: &'static str) {
        self.tls_failures.get_or_create(&ReasonLabel { reason }).inc();
    }

    /// Certificates have changed on disk.
    pub(super) fn certificates_reloaded(&self, result: &'static str) {
        self.certificate_reloads.get_or_create(&ResultLabel { result }).inc();
    }

    /// Keys of clients have changed on disk.
    pub(super) fn keys_reloaded(&self, result: &'static str) {
        self.key_reloads.get_or_create(&ResultLabel { result }).inc();
    }

    /// A schema of messages has changed on disk.
    pub(super) fn schema_reloaded(&self, result: &'static str) {
        self.schema_reloads.get_or_create(&ResultLabel { result }).inc();
    }

    /// A handshake succeeded, `took` after the accept. The session lasts until what is returned is dropped.
    pub(super) fn session_opened(&self, took: Duration) -> OpenSession<'_> {
        self.handshake("accepted");
        self.handshake_seconds.observe(took.as_secs_f64());
        self.sessions.inc();
        OpenSession { metrics: self, opened: Instant::now(), reason: "cut" }
    }
}

/// A session that is counted as open.
pub(super) struct OpenSession<'a> {
    metrics: &'a Metrics,
    opened: Instant,
    /// Why it ends: "cut", unless told otherwise.
    reason: &'static str,
}

impl OpenSession<'_> {
    pub(super) fn ends(&mut self, reason: &'static str) {
        self.reason = reason;
    }

    pub(super) fn lasted(&self) -> Duration {
        self.opened.elapsed()
    }
}

impl Drop for OpenSession<'_> {
    fn drop(&mut self) {
        self.metrics.sessions_closed.get_or_create(&ReasonLabel { reason: self.reason }).inc();
        self.metrics.connection_seconds.observe(self.lasted().as_secs_f64());
        // Last, so that whoever sees that nobody is there sees how they ended, too.
        self.metrics.sessions.dec();
    }
}
