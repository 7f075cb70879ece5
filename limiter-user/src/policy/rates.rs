//! How fast connections are opened, by each source and to the service, where no kernel program keeps count.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Instant,
};

use limiter_common::bucket::Rate;

use super::{Limits, Source};

/// With fewer buckets than this, it isn't worth looking for full ones.
const SWEEP_FROM: usize = 1024;

/// A token bucket for each source that has opened connections to a service lately, and one for the service.
#[derive(Debug)]
pub struct Rates {
    start: Instant,
    buckets: Mutex<Buckets>,
}

#[derive(Debug, Default)]
struct Buckets {
    of_service: u64,
    by_source: HashMap<Source, u64>,
    /// From this many on, full ones are looked for.
    sweep_at: usize,
}

impl Default for Rates {
    fn default() -> Self {
        Self { start: Instant::now(), buckets: Mutex::default() }
    }
}

/// Whose bucket has no token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TooFast {
    /// The source's: `connection_rate`.
    Source,
    /// The service's: `service_connection_rate`.
    Service,
}

impl Rates {
    /// Takes a token from the bucket of a source and one from that of the service, or none from either.
    ///
    /// # Errors
    /// [`TooFast`] says which is empty.
    pub fn spend(&self, source: Source, limits: &Limits) -> Result<(), TooFast> {
        self.spend_at(source, limits, Instant::now())
    }

    fn spend_at(&self, source: Source, limits: &Limits, now: Instant) -> Result<(), TooFast> {
        let rate = Rate::new(limits.connection_rate, limits.connection_burst);
        let service_rate = Rate::new(limits.service_connection_rate, limits.service_connection_burst);
        if !rate.is_limited() && !service_rate.is_limited() {
            return Ok(());
        }
        let now_ns = u64::try_from(now.saturating_duration_since(self.start).as_nanos()).unwrap_or(u64::MAX);
        // Nothing under the lock can panic half way.
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        buckets.sweep(now_ns);
        let Buckets { of_service, by_source, .. } = &mut *buckets;
        if rate.is_limited() && !has_token(by_source.entry(source).or_default(), &rate, now_ns) {
            return Err(TooFast::Source);
        }
        if service_rate.is_limited() {
            if !has_token(of_service, &service_rate, now_ns) {
                return Err(TooFast::Service);
            }
            *of_service = service_rate.spent(*of_service, now_ns);
        }
        if rate.is_limited() {
            let word = by_source.entry(source).or_default();
            *word = rate.spent(*word, now_ns);
        }
        Ok(())
    }
}

/// Whether a bucket has a token, which stays in it.
fn has_token(word: &mut u64, rate: &Rate, now_ns: u64) -> bool {
    if let Some(forgiven) = rate.forgiven(*word, now_ns) {
        *word = forgiven;
    }
    rate.has_token(*word, now_ns)
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
        let spend = |n, limits: &Limits, seconds| rates.spend_at(source(n), limits, at(seconds)).is_ok();
        assert!(spend(1, &limits, 0) && spend(1, &limits, 0));
        assert!(!spend(1, &limits, 0) && spend(2, &limits, 0));
        assert!(spend(1, &limits, 1) && !spend(1, &limits, 1));
        let unlimited = Limits { connection_rate: 0, ..limits };
        assert!(spend(1, &unlimited, 1));
        for n in 0..50_000_u32 {
            assert!(spend(n + 10, &limits, 10 + u64::from(n) / 100));
        }
        let kept = rates.buckets.lock().unwrap().by_source.len();
        assert!(kept <= 2 * SWEEP_FROM, "{kept}");
    }

    #[test]
    fn a_service_has_a_bucket_for_all_its_sources_and_a_refusal_spends_nothing() {
        let rates = Rates::default();
        let limits = Limits {
            connection_rate: 1,
            connection_burst: 2,
            service_connection_rate: 1,
            service_connection_burst: 3,
            ..Limits::default()
        };
        let spend = |n: u8, seconds| {
            let source = limits.source(IpAddr::from([192, 0, 2, n]));
            rates.spend_at(source, &limits, rates.start + Duration::from_secs(seconds))
        };
        assert_eq!([spend(1, 0), spend(1, 0)], [Ok(()); 2]);
        assert_eq!(spend(1, 0), Err(TooFast::Source), "and that costs the service nothing:");
        assert_eq!(spend(2, 0), Ok(()));
        assert_eq!([spend(2, 0), spend(3, 0)], [Err(TooFast::Service); 2]);
        assert_eq!(spend(3, 1), Ok(()));
        assert_eq!(spend(2, 1), Err(TooFast::Service), "and that has cost the source nothing:");
        assert_eq!(spend(2, 2), Ok(()));
        assert_eq!(spend(2, 3), Ok(()));
    }
}
