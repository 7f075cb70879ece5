//! How many messages a client may send: the two ways to count them.

use std::{collections::VecDeque, time::Duration};

use limiter_common::bucket::Rate;
use tokio::time::Instant;

use crate::config::{Algorithm, Messages};

/// A rate of messages, with what came.
pub(super) enum MessageRate {
    Window(WindowLimiter),
    Bucket(Bucket),
}

impl MessageRate {
    /// `None`: there is no limit.
    pub(super) fn new(limits: &Messages, now: Instant) -> Option<Self> {
        (limits.rate != 0).then(|| Self::of(limits.rate, limits.window, limits.algorithm, limits.burst, now))
    }

    /// `rate` (not 0) per `window`; for a bucket with `burst` at once, or a window's worth if that is 0.
    pub(super) fn of(rate: u32, window: Duration, algorithm: Algorithm, burst: u32, now: Instant) -> Self {
        match algorithm {
            Algorithm::SlidingWindow => Self::Window(WindowLimiter::new(rate, window, now)),
            Algorithm::TokenBucket => Self::Bucket(Bucket::new(rate, window, burst, now)),
        }
    }

    /// Whether a message that comes `now` is within the rate.
    pub(super) fn has_room(&mut self, now: Instant) -> bool {
        match self {
            Self::Window(window) => window.has_room(now),
            Self::Bucket(bucket) => bucket.has_room(now),
        }
    }

    /// A message came `now` that there was room for.
    pub(super) fn count(&mut self, now: Instant) {
        match self {
            Self::Window(window) => window.count(now),
            Self::Bucket(bucket) => bucket.count(now),
        }
    }

    /// Whether nothing that came counts any more.
    pub(super) fn is_clear(&mut self, now: Instant) -> bool {
        match self {
            Self::Window(window) => {
                window.settle(now);
                window.total == 0
            }
            Self::Bucket(bucket) => bucket.full_at <= bucket.nanoseconds(now),
        }
    }

    /// Gives back what memory there is nothing to remember in.
    pub(super) fn settle(&mut self, now: Instant) {
        match self {
            Self::Window(window) => window.settle(now),
            Self::Bucket(_) => {}
        }
    }
}

/// A token bucket: `burst` messages at once, and then as many as the rate has given back.
pub(super) struct Bucket {
    rate: Rate,
    /// When it will be full again, in nanoseconds since `began`.
    full_at: u64,
    began: Instant,
}

impl Bucket {
    /// `rate` (not 0) per `window`; a burst of 0 is a window's worth.
    fn new(rate: u32, window: Duration, burst: u32, now: Instant) -> Self {
        // Rounded up: never more than the rate. A window is a day at most, so both fit.
        let token = window.as_nanos().div_ceil(u128::from(rate)).max(1);
        let full = token * u128::from(if burst == 0 { rate } else { burst });
        let nanoseconds = |time: u128| u64::try_from(time).unwrap_or(u64::MAX);
        let rate = Rate { token_ns: nanoseconds(token), full_ns: nanoseconds(full) };
        Self { rate, full_at: 0, began: now }
    }

    fn has_room(&self, now: Instant) -> bool {
        self.rate.has_token(self.full_at, self.nanoseconds(now))
    }

    fn count(&mut self, now: Instant) {
        self.full_at = self.rate.spent(self.full_at, self.nanoseconds(now));
    }

    fn nanoseconds(&self, now: Instant) -> u64 {
        nanoseconds_since(self.began, now)
    }
}

fn nanoseconds_since(began: Instant, now: Instant) -> u64 {
    u64::try_from(now.saturating_duration_since(began).as_nanos()).unwrap_or(u64::MAX)
}

/// So many bytes a second, and a second's worth at once, or the longest message if that is more.
pub(super) struct ByteRate {
    per_second: u64,
    /// How many nanoseconds' worth may come at once.
    full: u64,
    /// When all of it will be there again, in nanoseconds since `began`.
    full_at: u64,
    began: Instant,
}

impl ByteRate {
    /// `per_second` is not 0.
    pub(super) fn new(per_second: u64, longest: usize, now: Instant) -> Self {
        let full = takes(longest as u64, per_second).max(1_000_000_000);
        Self { per_second, full, full_at: 0, began: now }
    }

    /// Whether so many bytes that come `now` are within the rate.
    pub(super) fn has_room(&self, bytes: u64, now: Instant) -> bool {
        let now = nanoseconds_since(self.began, now);
        self.after(bytes, now) - now <= self.full
    }

    /// So many bytes came `now` that there was room for.
    pub(super) fn count(&mut self, bytes: u64, now: Instant) {
        self.full_at = self.after(bytes, nanoseconds_since(self.began, now));
    }

    /// Whether nothing that came counts any more.
    pub(super) fn is_clear(&self, now: Instant) -> bool {
        self.full_at <= nanoseconds_since(self.began, now)
    }

    fn after(&self, bytes: u64, now: u64) -> u64 {
        self.full_at.max(now).saturating_add(takes(bytes, self.per_second))
    }
}

/// How long so many bytes take, in nanoseconds.
fn takes(bytes: u64, per_second: u64) -> u64 {
    let nanoseconds = u128::from(bytes) * 1_000_000_000 / u128::from(per_second);
    u64::try_from(nanoseconds).unwrap_or(u64::MAX)
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

    /// Whether a message that comes `now` is within the rate.
    pub(super) fn has_room(&mut self, now: Instant) -> bool {
        self.forget(self.step_of(now));
        self.total < self.rate
    }

    /// A message came `now` that there was room for.
    pub(super) fn count(&mut self, now: Instant) {
        let step = self.step_of(now);
        match self.admitted.back_mut() {
            Some((last, count)) if *last >= step => *count += 1,
            _ => self.admitted.push_back((step, 1)),
        }
        self.total += 1;
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

    impl WindowLimiter {
        fn admit(&mut self, now: Instant) -> bool {
            let has_room = self.has_room(now);
            if has_room {
                self.count(now);
            }
            has_room
        }
    }

    impl Bucket {
        fn admit(&mut self, now: Instant) -> bool {
            let has_room = self.has_room(now);
            if has_room {
                self.count(now);
            }
            has_room
        }
    }

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

    #[test]
    fn a_bucket_gives_its_burst_at_once_and_then_the_rate() {
        let start = Instant::now();
        let mut bucket = Bucket::new(60, Duration::from_mins(1), 5, start);
        assert_eq!((0..100).filter(|_| bucket.admit(start)).count(), 5);
        assert!(!bucket.admit(start + Duration::from_millis(999)));
        assert!(bucket.admit(start + Duration::from_secs(1)));
        assert!(!bucket.admit(start + Duration::from_secs(1)));
        let later = start + Duration::from_hours(1);
        assert_eq!(
            (0..100).filter(|_| bucket.admit(later)).count(),
            5,
            "no more than the burst, however long it was quiet"
        );
    }

    #[test]
    fn a_bucket_without_a_burst_of_its_own_holds_a_window() {
        let start = Instant::now();
        let mut bucket = Bucket::new(7, Duration::from_hours(24), 0, start);
        assert_eq!((0..100).filter(|_| bucket.admit(start)).count(), 7);
        // Nothing overflows at the ends of the ranges.
        assert!(Bucket::new(1, Duration::from_hours(24), u32::MAX, start).admit(start));
        assert!(Bucket::new(u32::MAX, Duration::from_millis(1), 0, start).admit(start));
    }

    #[test]
    fn a_window_that_has_nothing_to_remember_holds_no_memory() {
        let start = Instant::now();
        let window = Duration::from_secs(1);
        let mut limiter = WindowLimiter::new(60, window, start);
        for n in 0..60 {
            assert!(limiter.admit(start + Duration::from_millis(n * 10)));
        }
        limiter.settle(start + Duration::from_secs(3));
        assert_eq!((limiter.total, limiter.admitted.capacity()), (0, 0));
        assert!(limiter.admit(start + Duration::from_secs(3)));
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
