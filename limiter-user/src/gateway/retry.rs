//! When clients that are turned away, or closed, are told to come back: `Retry-After`, and the hint in a Close frame's reason.
//!
//! Clients that lose their connection together come back together, and what comes back together is turned away together. So those
//! that are told are put in a line, which comes back at [`RETURNS_PER_SECOND`]: who is told when there is nobody in it comes back soon, and
//! who is told behind ten thousand others comes back when those have. On top of that everybody gets a random part, which grows with
//! the line and with the [overload](super::overload).
//!
//! What a client can bring upon itself, by its source's or its user's limit, puts nobody in the line: else it could make others wait. What is
//! refused because the whole service can't, and sessions that are closed, are two lines: the first can be made long by whoever
//! knocks often enough, and so ends at [`LONGEST_WAIT`].

use std::{
    ops::RangeInclusive,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// How many may come back in a second: what one core sees through a TLS handshake and an upstream's with room for those that are in.
const RETURNS_PER_SECOND: f64 = 500.0;

/// How many times as long the random part is when everybody is turned away for overload; in between, in proportion.
const STRETCH: f64 = 4.0;

/// The random part is this much of the line, and a little.
const SPREAD_OF_LINE: f64 = 0.5;

/// Longest that somebody who is refused is told to wait, in seconds.
const LONGEST_WAIT: u16 = 60;

/// Longest that a session that is closed is told to wait, in seconds. Who closes them is the gateway or an upstream.
const LONGEST_RECONNECT: u16 = 300;

/// What somebody is told who comes when there is neither a line nor overload: so many seconds at least, and at random so many more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wait {
    least: u16,
    random: u16,
    whose: Whose,
}

/// Whose trouble it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Whose {
    /// The client's own: it has too many already, or comes too fast.
    Client,
    /// Everybody's.
    Service,
}

impl Wait {
    /// Of a client that has, or wants, too much.
    pub(super) const fn of_client(least: u16, random: u16) -> Self {
        Self { least, random, whose: Whose::Client }
    }

    /// Of clients that the service has no room for.
    pub(super) const fn of_service(least: u16, random: u16) -> Self {
        Self { least, random, whose: Whose::Service }
    }

    /// Seconds for somebody who is told without regard to others.
    pub(crate) fn alone(self) -> u16 {
        fastrand::u16(window(self, 0.0, 0.0, LONGEST_WAIT))
    }
}

/// What a session that is closed is told; many are, at once.
const RECONNECT: Wait = Wait::of_service(1, 2);

/// The lines of those who were told to come back.
#[derive(Default)]
pub(super) struct Retry {
    refused: Line,
    closed: Line,
}

impl Retry {
    /// Seconds for the `Retry-After` of somebody who is refused. `overload`: the share of new clients that is, from 0 to 1.
    pub(super) fn after(&self, wait: Wait, overload: f64) -> u16 {
        let now = Instant::now();
        let line = match wait.whose {
            Whose::Client => 0.0,
            Whose::Service => self.refused.join(now, LONGEST_WAIT),
        };
        fastrand::u16(window(wait, line, overload, LONGEST_WAIT))
    }

    /// Seconds after which a session that is closed may come back.
    pub(super) fn reconnect(&self, overload: f64) -> u16 {
        let line = self.closed.join(Instant::now(), LONGEST_RECONNECT);
        fastrand::u16(window(RECONNECT, line, overload, LONGEST_RECONNECT))
    }
}

/// The seconds that somebody may be told to wait. `line`: how many seconds those take to come back who were told before.
fn window(wait: Wait, line: f64, overload: f64, longest: u16) -> RangeInclusive<u16> {
    let random = f64::from(wait.random) * (1.0 + (STRETCH - 1.0) * overload) + line * SPREAD_OF_LINE;
    let least = f64::from(wait.least) + line;
    // Whoever would have to wait for too long must not come back with all the others for whom that is so.
    let least = least.min(f64::from(longest) / 2.0);
    let most = (least + random).min(f64::from(longest));
    seconds(least)..=seconds(most)
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "it is neither negative nor past the longest wait"
)]
fn seconds(seconds: f64) -> u16 {
    seconds.round() as u16
}

/// Those who were told to come back and have not had the time to.
#[derive(Default)]
struct Line {
    /// When the last of them comes back, if they come one after the other; `None`: there never was one.
    ends: Mutex<Option<Instant>>,
}

impl Line {
    /// Gets in line, and gives the seconds until those before have come back. It gets no longer than `longest` seconds.
    fn join(&self, now: Instant, longest: u16) -> f64 {
        // Nothing under the lock can panic half way.
        let mut ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        let before = ends.map_or(Duration::ZERO, |ends| ends.saturating_duration_since(now));
        let after = before + Duration::from_secs_f64(1.0 / RETURNS_PER_SECOND);
        *ends = Some(now + after.min(Duration::from_secs(longest.into())));
        before.as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WAIT: Wait = Wait::of_service(5, 10);

    fn far(window: &RangeInclusive<u16>) -> u16 {
        window.end() - window.start()
    }

    #[test]
    fn alone_it_is_what_the_refusal_says() {
        assert_eq!(window(WAIT, 0.0, 0.0, LONGEST_WAIT), 5..=15);
        let retry = Retry::default();
        for _ in 0..1000 {
            assert!((1..=3).contains(&retry.after(Wait::of_client(1, 2), 0.0)));
        }
    }

    #[test]
    fn overload_and_a_line_make_it_later_and_further_apart() {
        assert_eq!(window(WAIT, 0.0, 1.0, LONGEST_WAIT), 5..=45);
        assert_eq!(window(WAIT, 0.0, 0.5, LONGEST_WAIT), 5..=30);
        assert_eq!(window(WAIT, 20.0, 0.0, LONGEST_WAIT), 25..=45);
        // Too long to be told; still not all at once.
        assert_eq!(window(WAIT, 1000.0, 0.0, LONGEST_WAIT), 30..=60);
    }

    #[test]
    fn a_line_comes_back_at_its_rate_and_is_forgotten_when_it_has() {
        let line = Line::default();
        let now = Instant::now();
        for n in 0..1000 {
            let expected = f64::from(n) / RETURNS_PER_SECOND;
            let told = line.join(now, LONGEST_RECONNECT);
            assert!((told - expected).abs() < 0.001, "the {n}th: {told}");
        }
        let told = line.join(now + Duration::from_secs(1), LONGEST_RECONNECT);
        assert!((told - 1.0).abs() < 0.01, "{told}");
        assert!(line.join(now + Duration::from_mins(1), LONGEST_RECONNECT) < f64::EPSILON);
    }

    #[test]
    fn who_brings_it_upon_itself_makes_nobody_wait() {
        let retry = Retry::default();
        for _ in 0..1_000_000 {
            retry.after(Wait::of_client(5, 5), 0.0);
        }
        assert!(retry.after(WAIT, 0.0) <= 15);
    }

    #[test]
    fn who_knocks_all_the_time_makes_others_wait_for_a_minute_at_most() {
        let retry = Retry::default();
        for _ in 0..1_000_000 {
            let wait = retry.after(WAIT, 1.0);
            assert!((5..=LONGEST_WAIT).contains(&wait), "{wait}");
        }
        // And those that are closed not at all.
        let hint = retry.reconnect(0.0);
        assert!((1..=3).contains(&hint), "{hint}");
    }

    #[test]
    fn many_that_are_closed_together_come_back_apart() {
        // Fifty thousand, which is a hundred seconds' worth.
        let retry = Retry::default();
        let mut back = vec![0_u32; usize::from(LONGEST_RECONNECT) + 1];
        for _ in 0..50_000 {
            back[usize::from(retry.reconnect(0.0))] += 1;
        }
        assert_eq!(back[0], 0);
        let most = *back.iter().max().unwrap();
        assert!(f64::from(most) < RETURNS_PER_SECOND * 1.6, "{most} in one second");
        assert!(back[120..].iter().sum::<u32>() > 1000, "the last of them after the line");
    }

    proptest! {
        #[test]
        fn nobody_is_told_more_than_the_longest_and_all_are_told_apart(
            least in 0u16..=30, random in 1u16..=30, line in 0.0..1e6, overload in 0.0..=1.0,
        ) {
            for longest in [LONGEST_WAIT, LONGEST_RECONNECT] {
                let window = window(Wait::of_service(least, random), line, overload, longest);
                prop_assert!(*window.end() <= longest);
                prop_assert!(*window.start() >= least.min(longest / 2));
                prop_assert!(far(&window) >= 1);
            }
        }

        #[test]
        fn the_more_there_are_the_later_and_the_further_apart(
            line in 0.0..20.0, longer in 0.0..20.0, overload in 0.0..=0.5, more in 0.0..=0.5,
        ) {
            let before = window(WAIT, line, overload, LONGEST_RECONNECT);
            let after = window(WAIT, line + longer, overload + more, LONGEST_RECONNECT);
            prop_assert!(after.start() >= before.start() && after.end() >= before.end());
            // Each end is rounded by itself.
            prop_assert!(far(&after) + 1 >= far(&before));
        }
    }
}
