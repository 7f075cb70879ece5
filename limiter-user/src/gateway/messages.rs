//! What a client may send: how much at once, and how often.

use std::net::IpAddr;

use limiter_common::bucket::Rate;
use tokio::time::Instant;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;

use super::{
    Shared,
    auth::Member,
    forwarded,
    json::{SchemaFile, Screen, Screened},
    rate::{ByteRate, MessageRate},
    relay::{Judge, Verdict, Whole},
    route::OnRoute,
    together::{Limit, Share, Whose},
};
use crate::config::{self, Kinds, OnViolation, Sanitize};

/// Most frames of a message that is looked at whole, whatever `max_fragments` says: their headers are kept until it is there.
const MOST_FRAGMENTS_HELD: u32 = 16_384;

/// Pings and pongs that a client may send per second, and at once. No sane client comes near it.
const CONTROL_RATE: Rate = Rate::new(20, 200);

/// What a client does that closes its connection, or has its message left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Violation {
    /// A message over `max_size`.
    TooBig,
    /// A frame over `max_frame_size`.
    FrameTooBig,
    /// A message over `rate`.
    TooMany,
    /// More bytes than `bytes_per_second`.
    TooFast,
    /// A message over the rate of its user or source.
    TooManyTogether,
    /// More bytes than its user or source may send.
    TooFastTogether,
    /// A message in more than `max_fragments`.
    Fragments,
    /// A message that `allow` does not have.
    WrongKind,
    /// A text that is no JSON, where its strings are to be sanitised.
    NotJson,
    /// A text that does not fit the schema.
    Unfit,
    /// More pings and pongs than anybody has a use for.
    ControlFlood,
}

impl Violation {
    /// What metrics and logs call it.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::TooBig => "too_big",
            Self::FrameTooBig => "frame_too_big",
            Self::TooMany => "over_rate",
            Self::TooFast => "over_bytes",
            Self::TooManyTogether => "over_shared_rate",
            Self::TooFastTogether => "over_shared_bytes",
            Self::Fragments => "fragments",
            Self::WrongKind => "wrong_kind",
            Self::NotJson => "not_json",
            Self::Unfit => "schema",
            Self::ControlFlood => "control_flood",
        }
    }

    /// The Close frame's code and reason.
    pub(super) fn close(self) -> (CloseCode, &'static str) {
        match self {
            Self::TooBig => (CloseCode::Size, "message too big"),
            Self::FrameTooBig => (CloseCode::Size, "frame too big"),
            Self::TooMany => (CloseCode::Policy, "too many messages"),
            Self::TooFast => (CloseCode::Policy, "too many bytes"),
            Self::TooManyTogether => (CloseCode::Policy, "too many messages over all connections"),
            Self::TooFastTogether => (CloseCode::Policy, "too many bytes over all connections"),
            Self::Fragments => (CloseCode::Policy, "too many fragments"),
            Self::WrongKind => (CloseCode::Unsupported, "this kind of message is not taken"),
            Self::NotJson => (CloseCode::Policy, "message is not JSON"),
            Self::Unfit => (CloseCode::Policy, "message does not fit the schema"),
            Self::ControlFlood => (CloseCode::Policy, "too many pings or pongs"),
        }
    }
}

/// The limits on what one client sends, and what it has sent.
pub(super) struct Inbound<'a> {
    shared: &'a Shared,
    limits: &'a config::Messages,
    schema: Option<&'a SchemaFile>,
    client: IpAddr,
    rate: Option<MessageRate>,
    bytes: Option<Box<ByteRate>>,
    /// What is counted together with others; boxed, because most have nothing of the kind.
    together: Option<Box<Together>>,
    /// The word of the token bucket of control frames, in nanoseconds since `began`.
    control: u64,
    began: Instant,
    last: Instant,
    /// Whether the client's source is denied for what it did.
    denied: bool,
}

/// What the client sends together with others, of its user or its source.
struct Together {
    messages: Option<Share>,
    bytes: Option<Share>,
}

impl Together {
    /// A client counts as its user's where there is a limit for users, and as its source's where there is none: users behind one
    /// address leave each other room, and nobody is without a limit by logging in.
    fn new(
        shared: &Shared,
        limits: &config::Messages,
        client: IpAddr,
        user: Option<&Member>,
        now: Instant,
    ) -> Option<Box<Self>> {
        let of_user = |limit: u64| user.filter(|_| limit != 0).map(|user| (user.whose(), limit));
        let of_source =
            |limit: u64| (limit != 0).then(|| (Whose::Source(shared.policy.limits().source(client)), limit));
        let rate_per_user = user.map_or(limits.rate_per_user, |user| user.rate(limits));
        let messages = of_user(rate_per_user.into()).or_else(|| of_source(limits.rate_per_source.into()));
        let bytes = of_user(limits.bytes_per_second_per_user).or_else(|| of_source(limits.bytes_per_second_per_source));
        if messages.is_none() && bytes.is_none() {
            return None;
        }
        let messages = messages.map(|(whose, rate)| {
            let rate = u32::try_from(rate).unwrap_or(u32::MAX);
            let limit = Limit::Messages { rate, window: limits.window, algorithm: limits.algorithm };
            shared.counters.join(whose, limit, now)
        });
        let bytes = bytes.map(|(whose, per_second)| {
            shared.counters.join(whose, Limit::Bytes { per_second, longest: limits.max_size }, now)
        });
        Some(Box::new(Self { messages, bytes }))
    }
}

impl<'a> Inbound<'a> {
    /// For a client at that address, who is that `user` if it has shown it, and is in that place.
    pub(super) fn new(shared: &'a Shared, place: &OnRoute, client: IpAddr, user: Option<&Member>) -> Self {
        let now = Instant::now();
        let limits = &shared.routes.settings_of(place).messages;
        let bytes = (limits.bytes_per_second != 0)
            .then(|| Box::new(ByteRate::new(limits.bytes_per_second, limits.max_size, now)));
        Self {
            shared,
            limits,
            schema: shared.routes.schema_of(place),
            client,
            rate: MessageRate::new(limits, now),
            bytes,
            together: Together::new(shared, limits, client, user, now),
            control: 0,
            began: now,
            last: now,
            denied: false,
        }
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

    /// Whether so many bytes more, of a message that `begins` with them or has begun, are within every rate; if so, they count for
    /// each, and if not for none.
    fn admit(&mut self, begins: bool, length: u64, now: Instant) -> Result<(), Violation> {
        let Self { rate, bytes, together, .. } = self;
        let mut rate = rate.as_mut().filter(|_| begins);
        if !rate.as_mut().is_none_or(|rate| rate.has_room(now)) {
            return Err(Violation::TooMany);
        }
        if !bytes.as_ref().is_none_or(|bytes| bytes.has_room(length, now)) {
            return Err(Violation::TooFast);
        }
        if let Some(together) = together {
            // Held until all is decided, in the same order by everybody.
            let mut messages = together.messages.as_ref().filter(|_| begins).map(Share::hold);
            if !messages.as_mut().is_none_or(|messages| messages.has_room(length, now)) {
                return Err(Violation::TooManyTogether);
            }
            let mut bytes = together.bytes.as_ref().map(Share::hold);
            if !bytes.as_mut().is_none_or(|bytes| bytes.has_room(length, now)) {
                return Err(Violation::TooFastTogether);
            }
            for count in [&mut messages, &mut bytes].into_iter().flatten() {
                count.count(length, now);
            }
        }
        if let Some(rate) = rate {
            rate.count(now);
        }
        if let Some(bytes) = bytes {
            bytes.count(length, now);
        }
        Ok(())
    }

    fn is_over_frame_size(&self, length: u64) -> bool {
        self.limits.max_frame_size != 0 && length > self.limits.max_frame_size as u64
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
        if self.is_over_frame_size(length) {
            return Verdict::Close(self.violated(Violation::FrameTooBig));
        }
        let allowed = match messages.allow {
            // A text could else be sent as a binary message, past the schema.
            Kinds::Any => is_text || !self.screens(),
            Kinds::Text => is_text,
            Kinds::Binary => !is_text,
        };
        if !allowed {
            return self.lenient(Violation::WrongKind);
        }
        match self.admit(true, length, now) {
            Ok(()) => Verdict::Pass,
            Err(violation) => self.lenient(violation),
        }
    }

    fn goes_on(&mut self, length: u64, total: u64, fragments: u32, now: Instant) -> Result<(), Violation> {
        self.last = now;
        let messages = self.limits;
        if total > messages.max_size as u64 {
            return Err(self.violated(Violation::TooBig));
        }
        if self.is_over_frame_size(length) {
            return Err(self.violated(Violation::FrameTooBig));
        }
        let most = match messages.max_fragments {
            0 => u32::MAX,
            most => most,
        };
        let most = if self.screens() { most.min(MOST_FRAGMENTS_HELD) } else { most };
        if fragments > most {
            return Err(self.violated(Violation::Fragments));
        }
        // A part of the message has passed, so there is no leaving it out.
        self.admit(false, length, now).map_err(|violation| self.violated(violation))
    }

    fn screens(&self) -> bool {
        self.schema.is_some() || self.limits.sanitize != Sanitize::None
    }

    fn whole(&mut self, text: &str) -> Whole {
        let screen = Screen { sanitize: self.limits.sanitize, schema: self.schema };
        let violation = match screen.look(text) {
            Screened::Pass => return Whole::Pass,
            Screened::Instead(text) => return Whole::Instead(text),
            Screened::NotJson => Violation::NotJson,
            Screened::Unfit => Violation::Unfit,
        };
        match self.lenient(violation) {
            Verdict::Close(violation) => Whole::Close(violation),
            Verdict::Drop | Verdict::Pass => Whole::Drop,
        }
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
