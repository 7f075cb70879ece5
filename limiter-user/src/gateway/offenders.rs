//! Sources whose clients break the rules again and again.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use crate::policy::Source;

/// Most sources that are remembered. It takes a violation, hence a whole handshake, to become one of them.
const MOST: usize = 65_536;

/// Who broke the rules lately, and how often.
#[derive(Default)]
pub(super) struct Offenders {
    known: Mutex<HashMap<Source, Offender>>,
}

struct Offender {
    violations: u32,
    last: Instant,
    denied_until: Option<Instant>,
}

impl Offenders {
    /// A client of `source` broke a rule. True: with that it has done so `after` times, and is denied from now on.
    pub(super) fn violated(&self, source: Source, after: u32, lasts: Duration, now: Instant) -> bool {
        let mut known = self.known();
        if known.len() >= MOST && !known.contains_key(&source) {
            known.retain(|_, offender| !offender.is_forgotten(lasts, now));
            // Of so many, another one is not worth the memory.
            if known.len() >= MOST {
                return false;
            }
        }
        let offender = known.entry(source).or_insert(Offender { violations: 0, last: now, denied_until: None });
        if offender.is_forgotten(lasts, now) {
            *offender = Offender { violations: 0, last: now, denied_until: None };
        }
        offender.last = now;
        offender.violations += 1;
        if offender.violations < after {
            return false;
        }
        offender.violations = 0;
        offender.denied_until = Some(now + lasts);
        true
    }

    /// Whether `source` is denied.
    pub(super) fn denies(&self, source: Source, now: Instant) -> bool {
        self.known().get(&source).is_some_and(|offender| offender.denied_until.is_some_and(|until| now < until))
    }

    fn known(&self) -> MutexGuard<'_, HashMap<Source, Offender>> {
        // Nothing under the lock can panic half way.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Offender {
    fn is_forgotten(&self, lasts: Duration, now: Instant) -> bool {
        now.saturating_duration_since(self.last) >= lasts && self.denied_until.is_none_or(|until| now >= until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Limits;

    const LASTS: Duration = Duration::from_mins(10);

    fn source(n: u32) -> Source {
        Limits::default().source(std::net::Ipv4Addr::from_bits(n).into())
    }

    #[test]
    fn the_last_of_so_many_violations_denies_for_a_time() {
        let offenders = Offenders::default();
        let start = Instant::now();
        assert!(!offenders.violated(source(1), 3, LASTS, start));
        assert!(!offenders.violated(source(1), 3, LASTS, start));
        assert!(!offenders.violated(source(2), 3, LASTS, start), "another source");
        assert!(!offenders.denies(source(1), start));
        assert!(offenders.violated(source(1), 3, LASTS, start));
        assert!(offenders.denies(source(1), start + LASTS - Duration::from_millis(1)));
        assert!(!offenders.denies(source(2), start));
        assert!(!offenders.denies(source(1), start + LASTS));
        // Then it has a clean slate.
        assert!(!offenders.violated(source(1), 3, LASTS, start + LASTS));
    }

    #[test]
    fn violations_far_apart_do_not_add_up() {
        let offenders = Offenders::default();
        let start = Instant::now();
        for n in 0..10 {
            assert!(!offenders.violated(source(1), 2, LASTS, start + LASTS * n));
        }
    }

    #[test]
    fn memory_is_bounded_and_makes_room_for_those_who_come_later() {
        let offenders = Offenders::default();
        let start = Instant::now();
        for n in 0..u32::try_from(MOST).unwrap() + 100 {
            offenders.violated(source(n), 2, LASTS, start);
        }
        assert_eq!(offenders.known().len(), MOST);
        offenders.violated(source(u32::MAX), 2, LASTS, start + LASTS);
        assert_eq!(offenders.known().len(), 1);
    }
}
