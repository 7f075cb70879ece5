//! What a client may send: how much at once, and how often.

use std::net::IpAddr;

use limiter_common::bucket::Rate;
use tokio::time::Instant;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;

use super::{
    Shared, forwarded,
    rate::MessageRate,
    relay::{Judge, Verdict},
};
use crate::config::{self, Kinds, OnViolation};

/// Pings and pongs that a client may send per second, and at once. No sane client comes near it.
const CONTROL_RATE: Rate = Rate::new(20, 200);

/// What a client does that closes its connection, or has its message left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Violation {
    /// A message over `max_size`.
    TooBig,
    /// A message over `rate`.
    TooMany,
    /// More bytes than `bytes_per_second`.
    TooFast,
    /// A message in more than `max_fragments`.
    Fragments,
    /// A message that `allow` does not have.
    WrongKind,
    /// More pings and pongs than anybody has a use for.
    ControlFlood,
}

impl Violation {
    /// What metrics and logs call it.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::TooBig => "too_big",
            Self::TooMany => "over_rate",
            Self::TooFast => "over_bytes",
            Self::Fragments => "fragments",
            Self::WrongKind => "wrong_kind",
            Self::ControlFlood => "control_flood",
        }
    }

    /// The Close frame's code and reason.
    pub(super) fn close(self) -> (CloseCode, &'static str) {
        match self {
            Self::TooBig => (CloseCode::Size, "message too big"),
            Self::TooMany => (CloseCode::Policy, "too many messages"),
            Self::TooFast => (CloseCode::Policy, "too many bytes"),
            Self::Fragments => (CloseCode::Policy, "too many fragments"),
            Self::WrongKind => (CloseCode::Unsupported, "this kind of message is not taken"),
            Self::ControlFlood => (CloseCode::Policy, "too many pings or pongs"),
        }
    }
}

/// The limits on what one client sends, and what it has sent.
pub(super) struct Inbound<'a> {
    shared: &'a Shared,
    limits: &'a config::Messages,
    client: IpAddr,
    rate: Option<MessageRate>,
    /// When the second's worth of bytes will be there again in full, in nanoseconds since `began`.
    bytes_full_at: u64,
    /// The word of the token bucket of control frames, in nanoseconds since `began`.
    control: u64,
    began: Instant,
    last: Instant,
    /// Whether the client's source is denied for what it did.
    denied: bool,
}

impl<'a> Inbound<'a> {
    /// For a client at that address, whose route has these limits.
    pub(super) fn new(shared: &'a Shared, limits: &'a config::Messages, client: IpAddr) -> Self {
        let now = Instant::now();
        let rate = MessageRate::new(limits, now);
        Self { shared, limits, client, rate, bytes_full_at: 0, control: 0, began: now, last: now, denied: false }
    }

    /// A quiet client costs no more memory than it must.
    pub(super) fn settle(&mut self, now: Instant) {
        if let Some(rate) = &mut self.rate {
            rate.settle(now);
        }
    }

    /// When something of a message last came.
    pub(super) fn last(&self) -> Instant {
        self.last
    }

    /// The client broke the protocol.
    pub(super) fn malformed(&mut self) {
        self.record("malformed");
    }

    /// The client broke a limit; gives it back.
    pub(super) fn violated(&mut self, violation: Violation) -> Violation {
        self.record(violation.label());
        violation
    }

    fn record(&mut self, reason: &'static str) {
        self.shared.metrics.refused_message(reason);
        let config::Messages { deny_after, deny_for, .. } = *self.limits;
        // One proxy carries many clients.
        if deny_after == 0 || forwarded::is_trusted(self.client, &self.shared.config.trusted_proxies) {
            return;
        }
        let source = self.shared.policy.limits().source(self.client);
        if self.shared.offenders.violated(source, deny_after, deny_for, Instant::now()) {
            self.denied = true;
            let in_kernel = self.shared.policy.deny(source, deny_for);
            self.shared.metrics.sources_denied.inc();
            tracing::warn!(%source, reason, ?deny_for, in_kernel, "source denied for what its clients send");
        }
    }

    /// The answer to a violation that need not end the connection.
    fn lenient(&mut self, violation: Violation) -> Verdict {
        let violation = self.violated(violation);
        match self.limits.on_violation {
            OnViolation::Drop if !self.denied => Verdict::Drop,
            OnViolation::Drop | OnViolation::Close => Verdict::Close(violation),
        }
    }

    /// Whether so many bytes more are within `bytes_per_second`; if so, they count.
    fn admit_bytes(&mut self, length: u64, now: Instant) -> bool {
        let messages = self.limits;
        if messages.bytes_per_second == 0 {
            return true;
        }
        let takes = |bytes: u64| {
            let nanoseconds = u128::from(bytes) * 1_000_000_000 / u128::from(messages.bytes_per_second);
            u64::try_from(nanoseconds).unwrap_or(u64::MAX)
        };
        let full = takes(messages.max_size as u64).max(1_000_000_000);
        let now = self.nanoseconds(now);
        let full_at = self.bytes_full_at.max(now).saturating_add(takes(length));
        if full_at - now > full {
            return false;
        }
        self.bytes_full_at = full_at;
        true
    }

    fn nanoseconds(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.began).as_nanos()).unwrap_or(u64::MAX)
    }
}

impl Judge for Inbound<'_> {
    fn begins(&mut self, is_text: bool, length: u64, now: Instant) -> Verdict {
        self.last = now;
        let messages = self.limits;
        if length > messages.max_size as u64 {
            return Verdict::Close(self.violated(Violation::TooBig));
        }
        let allowed = match messages.allow {
            Kinds::Any => true,
            Kinds::Text => is_text,
            Kinds::Binary => !is_text,
        };
        if !allowed {
            return self.lenient(Violation::WrongKind);
        }
        if !self.rate.as_mut().is_none_or(|rate| rate.admit(now)) {
            return self.lenient(Violation::TooMany);
        }
        if !self.admit_bytes(length, now) {
            return self.lenient(Violation::TooFast);
        }
        Verdict::Pass
    }

    fn goes_on(&mut self, length: u64, total: u64, fragments: u32, now: Instant) -> Result<(), Violation> {
        self.last = now;
        let messages = self.limits;
        if total > messages.max_size as u64 {
            return Err(self.violated(Violation::TooBig));
        }
        if messages.max_fragments != 0 && fragments > messages.max_fragments {
            return Err(self.violated(Violation::Fragments));
        }
        // A part of the message has passed, so there is no leaving it out.
        if self.admit_bytes(length, now) { Ok(()) } else { Err(self.violated(Violation::TooFast)) }
    }

    fn passed(&mut self, total: u64, now: Instant) {
        self.last = now;
        self.shared.metrics.received.count(total);
    }

    fn control(&mut self, now: Instant) -> Result<(), Violation> {
        let now = self.nanoseconds(now);
        if !CONTROL_RATE.has_token(self.control, now) {
            return Err(self.violated(Violation::ControlFlood));
        }
        self.control = CONTROL_RATE.spent(self.control, now);
        Ok(())
    }
}
