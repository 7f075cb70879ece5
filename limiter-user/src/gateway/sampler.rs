//! Log lines of which there may be thousands a second.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// How often one kind is written, unless told otherwise.
const INTERVAL: Duration = Duration::from_secs(1);

/// Lets one line of each kind pass per interval, which is a second for most, and counts the others.
#[derive(Default)]
pub(crate) struct Sampler {
    kinds: Mutex<HashMap<&'static str, Kind>>,
}

struct Kind {
    written: Instant,
    left_out: u64,
}

impl Sampler {
    /// Whether to write a line of `kind` now; then with how many of it were left out since the last.
    pub(crate) fn admit(&self, kind: &'static str) -> Option<u64> {
        self.admit_every(INTERVAL, kind)
    }

    /// The same, with another interval.
    pub(super) fn admit_every(&self, interval: Duration, kind: &'static str) -> Option<u64> {
        self.admit_at(kind, interval, Instant::now())
    }

    fn admit_at(&self, kind: &'static str, interval: Duration, now: Instant) -> Option<u64> {
        // Nothing under the lock can panic half way.
        let mut kinds = self.kinds.lock().unwrap_or_else(PoisonError::into_inner);
        match kinds.get_mut(kind) {
            Some(kind) if now.saturating_duration_since(kind.written) < interval => {
                kind.left_out += 1;
                None
            }
            Some(kind) => {
                kind.written = now;
                Some(std::mem::take(&mut kind.left_out))
            }
            None => {
                kinds.insert(kind, Kind { written: now, left_out: 0 });
                Some(0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_one_line_a_second_with_a_count() {
        let sampler = Sampler::default();
        let start = Instant::now();
        assert_eq!(sampler.admit_at("a", INTERVAL, start), Some(0));
        assert_eq!(sampler.admit_at("a", INTERVAL, start + INTERVAL / 2), None);
        assert_eq!(sampler.admit_at("a", INTERVAL, start + INTERVAL / 2), None);
        assert_eq!(sampler.admit_at("b", INTERVAL, start + INTERVAL / 2), Some(0));
        assert_eq!(sampler.admit_at("a", INTERVAL, start + INTERVAL), Some(2));
        assert_eq!(sampler.admit_at("a", INTERVAL, start + 3 * INTERVAL), Some(0));
    }
}
