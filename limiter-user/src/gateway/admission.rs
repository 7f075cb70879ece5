//! Whether there is room for one more session, counted per source, in all, and over all gateways.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

use crate::policy::{Limits, Source};

/// From this many sources on, the table gives memory back when most of them are gone.
const KEEP_CAPACITY: usize = 1024;

/// What the gateways of one process hold together, for `connections_total_all`. Each has its own unless they are opened with
/// the same ([`Reserved::open_among`](super::Reserved::open_among)).
#[derive(Clone, Debug, Default)]
pub struct AllServices(Arc<AtomicU32>);

impl AllServices {
    /// Takes a slot, if there is one.
    fn take(&self, limit: u32) -> bool {
        let one_more = |held| (!reached(held, limit)).then_some(held + 1);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).is_ok()
    }

    /// Takes one, whether there is one or not.
    fn take_past(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn give_back(&self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The sessions that are open. Its memory is bounded by them: a source without one is not in it.
#[derive(Default)]
pub(crate) struct Admission {
    all: AllServices,
    counts: Mutex<Counts>,
}

#[derive(Default)]
struct Counts {
    total: u32,
    sources: HashMap<Source, u32>,
    wide_sources: HashMap<Source, u32>,
}

/// The right to one session; dropping it gives the slot back.
#[must_use]
pub(crate) struct Permit {
    admission: Arc<Admission>,
    /// As they were when the slot was taken: the prefixes may have been changed since. `None`: it counts as a user's.
    sources: Option<Sources>,
}

/// What a session counts against.
#[derive(Clone, Copy)]
struct Sources {
    narrow: Source,
    wide: Option<Source>,
}

/// Which limit is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Full {
    /// `connections_per_source` or `connections_per_wide_source`, which is this much.
    Source(u32),
    /// `connections_total`.
    Service,
    /// `connections_total_all`.
    AllServices,
}

impl Admission {
    /// One of several that count together what they hold.
    pub(super) fn among(all: AllServices) -> Self {
        Self { all, counts: Mutex::default() }
    }

    /// Takes a slot for a client at `ip` under the limits of this moment.
    pub(crate) fn try_admit(self: &Arc<Self>, ip: IpAddr, limits: &Limits) -> Result<Permit, Full> {
        let source = limits.source(ip);
        let mut counts = self.counts();
        let held = counts.sources.get(&source).copied().unwrap_or(0);
        if reached(held, limits.connections_per_source) {
            return Err(Full::Source(limits.connections_per_source));
        }
        let wide_source = limits.wide_source(ip);
        let held_wide = wide_source.map_or(0, |wide| counts.wide_sources.get(&wide).copied().unwrap_or(0));
        if wide_source.is_some() && reached(held_wide, limits.connections_per_wide_source) {
            return Err(Full::Source(limits.connections_per_wide_source));
        }
        if reached(counts.total, limits.connections_total) {
            return Err(Full::Service);
        }
        if !self.all.take(limits.connections_total_all) {
            return Err(Full::AllServices);
        }
        Ok(self.enter(&mut counts, Sources { narrow: source, wide: wide_source }))
    }

    /// Takes a slot for a client at `ip` whatever the limits say: it is only observed. It counts like any other.
    pub(crate) fn admit_past(self: &Arc<Self>, ip: IpAddr, limits: &Limits) -> Permit {
        let sources = Sources { narrow: limits.source(ip), wide: limits.wide_source(ip) };
        self.all.take_past();
        self.enter(&mut self.counts(), sources)
    }

    /// Counts a session that has its slot among all.
    fn enter(self: &Arc<Self>, counts: &mut Counts, sources: Sources) -> Permit {
        *counts.sources.entry(sources.narrow).or_default() += 1;
        if let Some(wide) = sources.wide {
            *counts.wide_sources.entry(wide).or_default() += 1;
        }
        counts.total += 1;
        Permit { admission: Arc::clone(self), sources: Some(sources) }
    }

    /// How many sessions are open.
    pub(super) fn total(&self) -> u32 {
        self.counts().total
    }

    /// How many sessions are open for clients that count as `source`, and how many in all.
    pub(crate) fn held(&self, source: Source) -> (u32, u32) {
        let counts = self.counts();
        (counts.sources.get(&source).copied().unwrap_or(0), counts.total)
    }

    fn release(&self, sources: Option<Sources>) {
        if let Some(sources) = sources {
            self.release_sources(sources);
        }
        self.counts().total -= 1;
        self.all.give_back();
    }

    fn release_sources(&self, sources: Sources) {
        let mut counts = self.counts();
        give_back(&mut counts.sources, sources.narrow);
        if let Some(wide) = sources.wide {
            give_back(&mut counts.wide_sources, wide);
        }
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        // Nothing under the lock can panic half way.
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes one from what a source holds.
fn give_back(sources: &mut HashMap<Source, u32>, source: Source) {
    let held = sources.get_mut(&source).map(|held| {
        *held -= 1;
        *held
    });
    if held == Some(0) {
        sources.remove(&source);
        let capacity = sources.capacity();
        if capacity > KEEP_CAPACITY && sources.len() < capacity / 4 {
            sources.shrink_to(KEEP_CAPACITY.max(capacity / 2));
        }
    }
}

/// 0: there is no limit.
fn reached(held: u32, limit: u32) -> bool {
    limit != 0 && held >= limit
}

impl Permit {
    /// Counts no longer against its source: its client has shown who it is, and counts as its user's.
    pub(super) fn leave_source(&mut self) {
        if let Some(sources) = self.sources.take() {
            self.admission.release_sources(sources);
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.admission.release(self.sources.take());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn limits(per_source: u32, total: u32) -> Limits {
        Limits { connections_per_source: per_source, connections_total: total, ..Limits::default() }
    }

    fn ip(n: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, n])
    }

    #[test]
    fn the_source_limit_is_exact_and_a_drop_makes_room() {
        let admission = Arc::new(Admission::default());
        let limits = limits(2, 0);
        let first = admission.try_admit(ip(1), &limits).unwrap();
        let _second = admission.try_admit(ip(1), &limits).unwrap();
        assert_eq!(admission.try_admit(ip(1), &limits).err(), Some(Full::Source(2)));
        let _other = admission.try_admit(ip(2), &limits).unwrap();
        drop(first);
        let _third = admission.try_admit(ip(1), &limits).unwrap();
        assert_eq!(admission.total(), 3);
    }

    #[test]
    fn the_source_is_told_before_the_service() {
        let admission = Arc::new(Admission::default());
        let _permit = admission.try_admit(ip(1), &limits(1, 1)).unwrap();
        assert_eq!(admission.try_admit(ip(1), &limits(1, 1)).err(), Some(Full::Source(1)));
        assert_eq!(admission.try_admit(ip(2), &limits(1, 1)).err(), Some(Full::Service));
    }

    #[test]
    fn gateways_that_count_together_hold_no_more_than_all_may() {
        let all = AllServices::default();
        let [chat, game] = [(); 2].map(|()| Arc::new(Admission::among(all.clone())));
        let limits = Limits { connections_total_all: 3, ..limits(2, 0) };
        let first = chat.try_admit(ip(1), &limits).unwrap();
        let others = [chat.try_admit(ip(1), &limits).unwrap(), game.try_admit(ip(1), &limits).unwrap()];
        assert_eq!(chat.try_admit(ip(1), &limits).err(), Some(Full::Source(2)), "the source is told before");
        assert_eq!(chat.try_admit(ip(2), &limits).err(), Some(Full::AllServices));
        assert_eq!(game.try_admit(ip(1), &limits).err(), Some(Full::AllServices));
        assert!(game.counts().sources.len() == 1 && game.total() == 1, "what was refused holds nothing");
        drop(first);
        let again = game.try_admit(ip(1), &limits).unwrap();
        drop((others, again));
        assert_eq!(all.0.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_wider_source_has_a_limit_of_its_own() {
        let admission = Arc::new(Admission::default());
        let limits = Limits { wide_ipv4_prefix: 30, connections_per_wide_source: 3, ..limits(2, 0) };
        let first = admission.try_admit(ip(1), &limits).unwrap();
        let second = admission.try_admit(ip(1), &limits).unwrap();
        let elsewhere = admission.try_admit(ip(2), &limits).unwrap();
        assert_eq!(admission.try_admit(ip(3), &limits).err(), Some(Full::Source(3)));
        assert_eq!(admission.try_admit(ip(1), &limits).err(), Some(Full::Source(2)));
        assert!(admission.try_admit(ip(4), &limits).is_ok(), "of another");
        drop(first);
        let third = admission.try_admit(ip(3), &limits).unwrap();
        drop((second, elsewhere, third));
        assert!(admission.counts().wide_sources.is_empty());
    }

    #[test]
    fn who_is_only_observed_counts_like_any_other_and_gives_back_what_it_took() {
        let admission = Arc::new(Admission::default());
        let limits =
            Limits { connections_total_all: 1, wide_ipv4_prefix: 24, connections_per_wide_source: 1, ..limits(1, 1) };
        let first = admission.try_admit(ip(1), &limits).unwrap();
        let mut past = [1, 1, 2].map(|n| admission.admit_past(ip(n), &limits));
        assert_eq!((admission.total(), admission.all.0.load(Ordering::Relaxed)), (4, 4));
        assert_eq!(
            (admission.held(limits.source(ip(1))).0, admission.counts().wide_sources.values().sum::<u32>()),
            (3, 4)
        );
        past[1].leave_source();
        assert_eq!(admission.held(limits.source(ip(1))).0, 2);
        drop(first);
        assert_eq!(admission.try_admit(ip(1), &limits).err(), Some(Full::Source(1)), "those past it are there");
        drop(past);
        assert_eq!((admission.total(), admission.all.0.load(Ordering::Relaxed)), (0, 0));
        assert!(admission.counts().sources.is_empty() && admission.counts().wide_sources.is_empty());
        assert!(admission.try_admit(ip(1), &limits).is_ok());
    }

    #[test]
    fn zero_is_no_limit() {
        let admission = Arc::new(Admission::default());
        let permits: Vec<_> = (0..100).map(|_| admission.try_admit(ip(1), &limits(0, 0)).unwrap()).collect();
        assert_eq!(admission.total(), 100);
        drop(permits);
        assert_eq!(admission.total(), 0);
    }

    #[test]
    fn who_leaves_its_source_makes_room_there_and_still_counts_in_all() {
        let admission = Arc::new(Admission::default());
        let mut first = admission.try_admit(ip(1), &limits(1, 2)).unwrap();
        first.leave_source();
        first.leave_source();
        let second = admission.try_admit(ip(1), &limits(1, 2)).unwrap();
        assert_eq!(admission.try_admit(ip(2), &limits(1, 2)).err(), Some(Full::Service));
        drop((first, second));
        assert_eq!(admission.total(), 0);
        assert!(admission.counts().sources.is_empty());
    }

    #[test]
    fn a_permit_goes_back_to_the_source_it_came_from_when_prefixes_change() {
        let admission = Arc::new(Admission::default());
        let wide = Limits { ipv4_prefix: 24, ..limits(1, 0) };
        let permit = admission.try_admit(ip(1), &wide).unwrap();
        let _narrow = admission.try_admit(ip(1), &limits(1, 0)).unwrap();
        drop(permit);
        assert!(admission.try_admit(ip(9), &wide).is_ok());
        assert_eq!(admission.counts().sources.len(), 1);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Arrive(u8),
        /// The same, where whoever is past a limit is only observed.
        ArrivePast(u8),
        Leave(usize),
        Tune(u32, u32),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0..4u8).prop_map(Step::Arrive),
            1 => (0..4u8).prop_map(Step::ArrivePast),
            3 => any::<usize>().prop_map(Step::Leave),
            1 => (0..5u32, 0..12u32).prop_map(|(per_source, total)| Step::Tune(per_source, total)),
        ]
    }

    proptest! {
        #[test]
        fn nothing_new_is_over_the_limit_nor_released_twice(steps in proptest::collection::vec(step(), 0..300)) {
            let admission = Arc::new(Admission::default());
            let mut current = limits(3, 8);
            let mut held: Vec<(u8, Permit)> = Vec::new();
            for step in steps {
                match step {
                    Step::Arrive(n) => {
                        let own = u32::try_from(held.iter().filter(|(m, _)| *m == n).count()).unwrap();
                        let all = u32::try_from(held.len()).unwrap();
                        let expected = if reached(own, current.connections_per_source) {
                            Some(Full::Source(current.connections_per_source))
                        } else if reached(all, current.connections_total) {
                            Some(Full::Service)
                        } else {
                            None
                        };
                        match admission.try_admit(ip(n), &current) {
                            Ok(permit) => {
                                prop_assert_eq!(expected, None);
                                held.push((n, permit));
                            }
                            Err(full) => prop_assert_eq!(expected, Some(full)),
                        }
                    }
                    Step::ArrivePast(n) => held.push((n, admission.admit_past(ip(n), &current))),
                    Step::Leave(i) if !held.is_empty() => {
                        let i = i % held.len();
                        drop(held.swap_remove(i));
                    }
                    Step::Leave(_) => {}
                    Step::Tune(per_source, total) => current = limits(per_source, total),
                }
                let sources: std::collections::HashSet<u8> = held.iter().map(|(n, _)| *n).collect();
                prop_assert_eq!(admission.total() as usize, held.len());
                prop_assert_eq!(admission.counts().sources.len(), sources.len());
            }
            drop(held);
            prop_assert_eq!(admission.total(), 0);
            prop_assert!(admission.counts().sources.is_empty());
        }
    }
}
