//! How fast each source opens connections, where no kernel program keeps count.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Instant,
};

use limiter_common::bucket::Rate;

use super::{Limits, Source};

/// With fewer buckets than this, it isn't worth looking for full ones.
const SWEEP_FROM: usize = 1024;

/// A token bucket for each source that has opened connections lately.
#[derive(Debug)]
pub struct Rates {
    start: Instant,
    buckets: Mutex<Buckets>,
}

#[derive(Debug, Default)]
struct Buckets {
    by_source: HashMap<Source, u64>,
    /// From this many on, full ones are looked for.
    sweep_at: usize,
}

impl Default for Rates {
    fn default() -> Self {
        Self { start: Instant::now(), buckets: Mutex::default() }
    }
}

impl Rates {
    /// Takes a token from the bucket of a source. `false`: there is none.
    pub fn spend(&self, source: Source, limits: &Limits) -> bool {
        self.spend_at(source, limits, Instant::now())
    }

    fn spend_at(&self, source: Source, limits: &Limits, now: Instant) -> bool {
        let rate = Rate::new(limits.connection_rate, limits.connection_burst);
        if !rate.is_limited() {
            return true;
        }
        let now_ns = u64::try_from(now.saturating_duration_since(self.start).as_nanos()).unwrap_or(u64::MAX);
        // Nothing under the lock can panic half way.
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        buckets.sweep(now_ns);
        let word = buckets.by_source.entry(source).or_default();
        if let Some(forgiven) = rate.forgiven(*word, now_ns) {
            *word = forgiven;
        }
        let has_token = rate.has_token(*word, now_ns);
        if has_token {
            *word = rate.spent(*word, now_ns);
        }
        has_token
    }
}

impl Buckets {
    /// Forgets full buckets, which are as good as none, when there are twice as many as were left the last time.
    fn sweep(&mut self, now_ns: u64) {
        if self.by_source.len() < self.sweep_at.max(SWEEP_FROM) {
            return;
        }
        self.by_source.retain(|_, full_at_ns| *full_at_ns > now_ns);
        self.sweep_at = self.by_source.len() * 2;
        self.by_source.shrink_to(self.sweep_at);
    }
}

#[cfg(test)]
mod tests {
    use std::{net::IpAddr, time::Duration};

    use super::*;

    #[test]
    fn each_source_has_its_bucket_and_full_ones_are_forgotten() {
        let rates = Rates::default();
        let limits = Limits { connection_rate: 1, connection_burst: 2, ..Limits::default() };
        let source = |n: u32| limits.source(IpAddr::from(n.to_be_bytes()));
        let at = |seconds| rates.start + Duration::from_secs(seconds);
        assert!(rates.spend_at(source(1), &limits, at(0)) && rates.spend_at(source(1), &limits, at(0)));
        assert!(!rates.spend_at(source(1), &limits, at(0)) && rates.spend_at(source(2), &limits, at(0)));
        assert!(rates.spend_at(source(1), &limits, at(1)) && !rates.spend_at(source(1), &limits, at(1)));
        let unlimited = Limits { connection_rate: 0, ..limits };
        assert!(rates.spend_at(source(1), &unlimited, at(1)));
        for n in 0..50_000_u32 {
            assert!(rates.spend_at(source(n + 10), &limits, at(10 + u64::from(n) / 100)));
        }
        let kept = rates.buckets.lock().unwrap().by_source.len();
        assert!(kept <= 2 * SWEEP_FROM, "{kept}");
    }
}
