//! A token bucket in one word, as the generic cell rate algorithm keeps it (ITU-T I.371).
//!
//! Instead of a number of tokens and when they were counted, the word holds the time at which the bucket will be full
//! again. A token that is spent moves that time by what one token takes to come back; a time that has passed is a full
//! bucket, and so is 0, a bucket that was never used. So to spend is one compare-and-exchange, and of several CPUs that
//! try at once none can mint a token. Times are in nanoseconds of `CLOCK_MONOTONIC`.

/// How fast a bucket fills, and how much goes in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Rate {
    /// How long one token takes to come back, in nanoseconds; 0: there is no limit.
    pub token_ns: u64,
    /// How long an empty bucket takes to fill, in nanoseconds: `token_ns` times the number of tokens that it holds.
    pub full_ns: u64,
}

impl Rate {
    /// So many tokens per second (0: no limit), in a bucket of `burst` tokens (0 is taken as 1: a bucket that holds none
    /// would let nobody in).
    ///
    /// What one token takes is rounded up, so that there are never more than `burst + per_second * t` tokens in t seconds.
    pub const fn new(per_second: u32, burst: u32) -> Self {
        if per_second == 0 {
            return Self { token_ns: 0, full_ns: 0 };
        }
        let token_ns = NANOSECONDS.div_ceil(per_second as u64);
        let burst = if burst == 0 { 1 } else { burst as u64 };
        // At most 10^9 times 2^32: no overflow.
        Self { token_ns, full_ns: token_ns * burst }
    }

    /// Whether there is a limit at all.
    #[inline(always)]
    pub const fn is_limited(&self) -> bool {
        self.token_ns != 0
    }

    /// Whether a bucket with that word holds a token at that time.
    #[inline(always)]
    pub const fn has_token(&self, full_at_ns: u64, now_ns: u64) -> bool {
        // A clock of another CPU may be behind: then the bucket is a little emptier, never fuller.
        full_at_ns.saturating_sub(now_ns) <= self.full_ns.wrapping_sub(self.token_ns)
    }

    /// The word of a bucket from which one token was taken; the caller has asked [`Self::has_token`].
    #[inline(always)]
    pub const fn spent(&self, full_at_ns: u64, now_ns: u64) -> u64 {
        let from_ns = if full_at_ns > now_ns { full_at_ns } else { now_ns };
        // The clock starts at boot: it does not come near the end of the word in 500 years.
        from_ns.saturating_add(self.token_ns)
    }

    /// What a word becomes that is emptier than empty; `None` if it is not. That happens when the rate is raised or the
    /// bucket made smaller: without this, a debt of the old rate would have to be paid off first.
    #[inline(always)]
    pub const fn forgiven(&self, full_at_ns: u64, now_ns: u64) -> Option<u64> {
        let empty_ns = now_ns.saturating_add(self.full_ns);
        if full_at_ns > empty_ns { Some(empty_ns) } else { None }
    }

    /// How many tokens a bucket holds. For people: it divides.
    pub const fn tokens(&self, full_at_ns: u64, now_ns: u64) -> u64 {
        if self.token_ns == 0 {
            return u64::MAX;
        }
        self.full_ns.saturating_sub(full_at_ns.saturating_sub(now_ns)) / self.token_ns
    }
}

const NANOSECONDS: u64 = 1_000_000_000;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Spends if there is a token, as every user of the bucket does.
    fn spend(rate: &Rate, word: &mut u64, now_ns: u64) -> bool {
        if let Some(forgiven) = rate.forgiven(*word, now_ns) {
            *word = forgiven;
        }
        let there = rate.has_token(*word, now_ns);
        if there {
            *word = rate.spent(*word, now_ns);
        }
        there
    }

    #[test]
    fn a_new_bucket_is_full_and_then_refills_one_by_one() {
        let rate = Rate::new(10, 20);
        let mut word = 0;
        let now = 5 * NANOSECONDS;
        assert_eq!((0..100).filter(|_| spend(&rate, &mut word, now)).count(), 20);
        assert_eq!(rate.tokens(word, now), 0);
        assert!(!spend(&rate, &mut word, now + 99_999_999));
        assert!(spend(&rate, &mut word, now + 100_000_000));
        assert!(!spend(&rate, &mut word, now + 100_000_000));
        // After a long time it is full again, not fuller.
        let later = now + 3600 * NANOSECONDS;
        assert_eq!(rate.tokens(word, later), 20);
        assert_eq!((0..100).filter(|_| spend(&rate, &mut word, later)).count(), 20);
    }

    #[test]
    fn a_bucket_works_in_the_first_nanoseconds_after_boot() {
        let rate = Rate::new(1, 3);
        let mut word = 0;
        assert_eq!((0..10).filter(|_| spend(&rate, &mut word, 0)).count(), 3);
    }

    #[test]
    fn a_bucket_made_smaller_forgives_what_is_more_than_empty() {
        let (large, small) = (Rate::new(1, 1_000_000), Rate::new(10, 5));
        let now = NANOSECONDS;
        let mut word = 0;
        for _ in 0..1_000_000 {
            assert!(spend(&large, &mut word, now));
        }
        assert!(!spend(&small, &mut word, now));
        assert!(spend(&small, &mut word, now + 100_000_000), "and not after eleven days");
    }

    proptest! {
        #[test]
        fn never_more_than_the_burst_and_what_came_back(
            per_second in 1_u32..,
            burst: u32,
            start: u64,
            steps in proptest::collection::vec((0_u64..3 * NANOSECONDS, 0_usize..50), 0..50),
        ) {
            let rate = Rate::new(per_second, burst);
            let start = start >> 2;
            let (mut word, mut now, mut spent) = (0, start, 0_u128);
            for (pause, tries) in steps {
                now += pause;
                for _ in 0..tries {
                    spent += u128::from(spend(&rate, &mut word, now));
                }
                let passed = u128::from(now - start);
                let most = u128::from(burst.max(1)) + passed * u128::from(per_second) / u128::from(NANOSECONDS);
                prop_assert!(spent <= most, "{} of {}", spent, most);
            }
        }

        #[test]
        fn a_source_that_keeps_to_the_rate_is_never_refused(per_second in 1_u32..=1_000_000, burst: u32, start: u64) {
            let rate = Rate::new(per_second, burst);
            let (mut word, mut now) = (0, start >> 2);
            for _ in 0..100 {
                prop_assert!(spend(&rate, &mut word, now));
                now += rate.token_ns;
            }
        }

        #[test]
        fn a_clock_that_goes_back_mints_nothing(per_second in 1_u32.., burst in 1_u32..1000, now: u64, back: u64) {
            let rate = Rate::new(per_second, burst);
            let now = now >> 2;
            let mut word = 0;
            let first = (0..2000).filter(|_| spend(&rate, &mut word, now)).count();
            prop_assert_eq!(first, usize::try_from(burst).unwrap_or(usize::MAX));
            prop_assert!(!spend(&rate, &mut word, now.saturating_sub(back)));
        }

        #[test]
        fn no_number_overflows(token_ns: u64, full_ns: u64, word: u64, now: u64) {
            let rate = Rate { token_ns, full_ns };
            let _ = (rate.has_token(word, now), rate.spent(word, now), rate.forgiven(word, now), rate.tokens(word, now));
        }
    }
}
