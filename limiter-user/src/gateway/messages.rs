//! What a client may send: how much at once, and how often.

use std::{collections::VecDeque, time::Duration};

use limiter_common::bucket::Rate;
use tokio::time::Instant;
use tokio_tungstenite::tungstenite::protocol::{WebSocketConfig, frame::coding::CloseCode};

use super::{
    metrics::Metrics,
    relay::{Judge, Verdict},
};
use crate::config::{self, OnViolation};

/// Read buffer of a connection with the built-in application, allocated while it lasts. The library's default of 128 KiB
/// would be most of the memory.
const READ_BUFFER: usize = 4096;

/// Room in the write buffer for a message's header, and for control frames that wait with it.
const CONTROL_ROOM: usize = 1024;

/// Pings and pongs that a client may send per second, and at once. No sane client comes near it.
const CONTROL_RATE: Rate = Rate::new(20, 200);

/// The library's settings towards a client, whose `echo`ed messages are as long as its own.
pub(super) fn client_config(limits: &config::Messages) -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER)
        .write_buffer_size(0)
        .max_write_buffer_size(limits.max_size.saturating_add(CONTROL_ROOM))
        .max_message_size(Some(limits.max_size))
        .max_frame_size(Some(limits.max_size))
}

/// What a client does that closes its connection, or has its message left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Violation {
    /// A message over `max_size`.
    TooBig,
    /// A message over `rate`.
    TooMany,
    /// More pings and pongs than anybody has a use for.
    ControlFlood,
}

impl Violation {
    /// What metrics and logs call it.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::TooBig => "too_big",
            Self::TooMany => "over_rate",
            Self::ControlFlood => "control_flood",
        }
    }

    /// The Close frame's code and reason.
    pub(super) fn close(self) -> (CloseCode, &'static str) {
        match self {
            Self::TooBig => (CloseCode::Size, "message too big"),
            Self::TooMany => (CloseCode::Policy, "too many messages"),
            Self::ControlFlood => (CloseCode::Policy, "too many pings or pongs"),
        }
    }
}

/// The limits on what one client sends, and what it has sent.
pub(super) struct Inbound<'a> {
    limits: &'a config::Messages,
    metrics: &'a Metrics,
    rate: Option<WindowLimiter>,
    /// The word of the token bucket of control frames, in nanoseconds since `began`.
    control: u64,
    began: Instant,
    last: Instant,
}

impl<'a> Inbound<'a> {
    pub(super) fn new(limits: &'a config::Messages, metrics: &'a Metrics) -> Self {
        let now = Instant::now();
        let rate = (limits.rate != 0).then(|| WindowLimiter::new(limits.rate, limits.window, now));
        Self { limits, metrics, rate, control: 0, began: now, last: now }
    }

    /// A quiet client costs no more memory than it must.
    pub(super) fn settle(&mut self, now: Instant) {
        if let Some(limiter) = &mut self.rate {
            limiter.settle(now);
        }
    }

    /// When something of a message last came.
    pub(super) fn last(&self) -> Instant {
        self.last
    }

    /// The client broke the protocol.
    pub(super) fn malformed(&self) {
        self.metrics.refused_message("malformed");
    }

    /// The client broke a limit; gives it back.
    pub(super) fn violated(&self, violation: Violation) -> Violation {
        self.metrics.refused_message(violation.label());
        violation
    }
}

impl Judge for Inbound<'_> {
    fn begins(&mut self, _: bool, length: u64, now: Instant) -> Verdict {
        self.last = now;
        if length > self.limits.max_size as u64 {
            return Verdict::Close(self.violated(Violation::TooBig));
        }
        if self.rate.as_mut().is_none_or(|limiter| limiter.admit(now)) {
            return Verdict::Pass;
        }
        let violation = self.violated(Violation::TooMany);
        match self.limits.on_violation {
            OnViolation::Close => Verdict::Close(violation),
            OnViolation::Drop => Verdict::Drop,
        }
    }

    fn goes_on(&mut self, _: u64, total: u64, _: u32, now: Instant) -> Result<(), Violation> {
        self.last = now;
        if total > self.limits.max_size as u64 { Err(self.violated(Violation::TooBig)) } else { Ok(()) }
    }

    fn passed(&mut self, total: u64, now: Instant) {
        self.last = now;
        self.metrics.received.count(total);
    }

    fn control(&mut self, now: Instant) -> Result<(), Violation> {
        let now = now.saturating_duration_since(self.began).as_nanos();
        let now = u64::try_from(now).unwrap_or(u64::MAX);
        if !CONTROL_RATE.has_token(self.control, now) {
            return Err(self.violated(Violation::ControlFlood));
        }
        self.control = CONTROL_RATE.spent(self.control, now);
        Ok(())
    }
}

/// The window is told in this many steps, which bounds the memory whatever the rate.
const STEPS: u32 = 64;

/// A sliding window: of the messages that it admits, no window holds more than the rate.
///
/// Times are rounded to 1/64 of the window, always so that a message counts a little longer, never shorter. Messages
/// that are not admitted do not count.
pub(super) struct WindowLimiter {
    rate: u32,
    origin: Instant,
    step: Duration,
    /// Messages admitted within the window, by step, oldest first. At most the lesser of `rate` and `STEPS` + 2 entries.
    admitted: VecDeque<(u64, u32)>,
    /// The sum of `admitted`.
    total: u32,
}

impl WindowLimiter {
    /// At most `rate` messages (not 0) in any `window` from `now` on.
    pub(super) fn new(rate: u32, window: Duration, now: Instant) -> Self {
        // Rounded up, so that STEPS of them are at least the window.
        let step = window.div_f64(f64::from(STEPS)) + Duration::from_nanos(1);
        Self { rate, origin: now, step, admitted: VecDeque::new(), total: 0 }
    }

    /// Whether a message that came `now` is within the rate; if so, it counts.
    pub(super) fn admit(&mut self, now: Instant) -> bool {
        let step = self.step_of(now);
        self.forget(step);
        if self.total >= self.rate {
            return false;
        }
        match self.admitted.back_mut() {
            Some((last, count)) if *last >= step => *count += 1,
            _ => self.admitted.push_back((step, 1)),
        }
        self.total += 1;
        true
    }

    /// Gives the memory back if there is nothing to remember.
    pub(super) fn settle(&mut self, now: Instant) {
        self.forget(self.step_of(now));
        if self.admitted.is_empty() {
            self.admitted = VecDeque::new();
        }
    }

    /// Drops what is in no window that ends in `step` or later.
    fn forget(&mut self, step: u64) {
        // A message of step s came before s + 1 began, so it is out of every window that ends in s + 1 + STEPS or later.
        while let Some(&(oldest, count)) = self.admitted.front()
            && step > oldest + u64::from(STEPS)
        {
            self.total -= count;
            self.admitted.pop_front();
        }
    }

    fn step_of(&self, now: Instant) -> u64 {
        let since = now.saturating_duration_since(self.origin).as_nanos();
        u64::try_from(since / self.step.as_nanos()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Counts by looking at every message that was ever admitted, rounded as documented.
    struct Naive {
        rate: usize,
        step: Duration,
        steps: Vec<u128>,
    }

    impl Naive {
        fn admit(&mut self, at: Duration) -> bool {
            let step = at.as_nanos() / self.step.as_nanos();
            let counting = self.steps.iter().filter(|s| step - **s <= u128::from(STEPS)).count();
            let admitted = counting < self.rate;
            if admitted {
                self.steps.push(step);
            }
            admitted
        }
    }

    #[test]
    fn the_message_after_the_last_allowed_waits_for_the_window() {
        let start = Instant::now();
        let window = Duration::from_mins(1);
        let mut limiter = WindowLimiter::new(3, window, start);
        for second in [0, 1, 2] {
            assert!(limiter.admit(start + Duration::from_secs(second)));
        }
        assert!(!limiter.admit(start + Duration::from_secs(3)));
        assert!(!limiter.admit(start + Duration::from_secs(59)));
        assert!(limiter.admit(start + Duration::from_secs(61)));
        assert!(!limiter.admit(start + Duration::from_millis(61_100)));
    }

    #[test]
    fn memory_is_bounded_at_any_rate() {
        let start = Instant::now();
        let mut limiter = WindowLimiter::new(u32::MAX, Duration::from_secs(1), start);
        for n in 0..100_000 {
            assert!(limiter.admit(start + Duration::from_micros(n * 50)));
        }
        assert!(limiter.admitted.len() <= STEPS as usize + 2, "{}", limiter.admitted.len());
    }

    proptest! {
        #[test]
        fn it_agrees_with_the_naive_model_and_no_window_holds_more_than_the_rate(
            rate in 1..20u32,
            window_ms in 1..2_000u64,
            gaps_us in proptest::collection::vec(0..400_000u64, 1..300),
        ) {
            let start = Instant::now();
            let window = Duration::from_millis(window_ms);
            let mut limiter = WindowLimiter::new(rate, window, start);
            let mut naive = Naive { rate: rate as usize, step: limiter.step, steps: Vec::new() };
            let mut admitted: Vec<Duration> = Vec::new();
            let mut at = Duration::ZERO;
            for gap in gaps_us {
                at += Duration::from_micros(gap);
                let verdict = limiter.admit(start + at);
                prop_assert_eq!(verdict, naive.admit(at));
                if verdict {
                    admitted.push(at);
                    let in_window = admitted.iter().filter(|t| at < **t + window).count();
                    prop_assert!(in_window <= rate as usize, "{in_window} in one window");
                } else {
                    // Refused for a reason: a window that is 2 steps longer is full.
                    let near = admitted.iter().filter(|t| at < **t + window + 3 * limiter.step).count();
                    prop_assert!(near >= rate as usize, "refused with {near} of {rate}");
                }
            }
        }
    }
}
