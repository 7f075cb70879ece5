//! What a client may send: how much at once, and how often.

use std::{collections::VecDeque, time::Duration};

use tokio::time::Instant;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;

use crate::config;

/// Read buffer of a connection, allocated while it lasts. The library's default of 128 KiB would be most of the memory.
const READ_BUFFER: usize = 4096;

/// Room in the write buffer for a message's header, and for control frames that wait with it.
const CONTROL_ROOM: usize = 1024;

/// The longest message that the upstream may send. It is trusted not to abuse it, but not with all the memory.
const UPSTREAM_MAX_SIZE: usize = 16 << 20;

/// The library's settings towards a client, whose `echo`ed messages are as long as its own.
pub(super) fn client_config(limits: &config::Messages, relayed: bool) -> WebSocketConfig {
    let longest_sent = if relayed { UPSTREAM_MAX_SIZE } else { limits.max_size };
    config(limits.max_size, longest_sent)
}

/// The library's settings towards the upstream, which gets what a client may send.
pub(super) fn upstream_config(limits: &config::Messages) -> WebSocketConfig {
    config(UPSTREAM_MAX_SIZE, limits.max_size)
}

fn config(longest_received: usize, longest_sent: usize) -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER)
        .write_buffer_size(0)
        .max_write_buffer_size(longest_sent.saturating_add(CONTROL_ROOM))
        .max_message_size(Some(longest_received))
        .max_frame_size(Some(longest_received))
}

/// The window is told in this many steps, which bounds the memory whatever the rate.
const STEPS: u32 = 256;

/// A sliding window: of the messages that it admits, no window holds more than the rate.
///
/// Times are rounded to 1/256 of the window, always so that a message counts a little longer, never shorter. Messages
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
        // A message of step s came before s + 1 began, so it is out of every window that ends in s + 1 + STEPS or later.
        while let Some(&(oldest, count)) = self.admitted.front()
            && step > oldest + u64::from(STEPS)
        {
            self.total -= count;
            self.admitted.pop_front();
        }
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
        assert!(limiter.admit(start + Duration::from_millis(60_500)));
        assert!(!limiter.admit(start + Duration::from_millis(60_600)));
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
