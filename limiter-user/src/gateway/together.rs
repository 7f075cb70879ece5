//! What the connections of one source, or of one user, send together.
//!
//! Who is limited has one counter, which all of its sessions share, and only where there is a limit. It stays after the last of
//! them for as long as anything that they sent counts: coming back does not make room.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use super::rate::{ByteRate, MessageRate};
use crate::{config::Algorithm, policy::Source};

/// With fewer counters than this, it isn't worth looking for those that nobody needs any more.
const SWEEP_FROM: usize = 1024;

/// Most counters that are kept for somebody without a session. Who has had sessions from more sources than this is not held up
/// by what each of them may send.
const MOST_WITHOUT_SESSION: usize = 262_144;

/// Whose messages are counted together.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Whose {
    Source(Source),
    /// A user; or one of its API keys, by the [id](crate::config::ApiKey::id), each of which counts by itself.
    User(Arc<str>, Option<[u8; 32]>),
}

/// What is counted, and how much of it there may be. None of the limits is 0. Those who have other limits, because they are on
/// another route or came before a change, have other counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Limit {
    Messages { rate: u32, window: Duration, algorithm: Algorithm },
    Bytes { per_second: u64, longest: usize },
}

/// Every counter.
#[derive(Default)]
pub(super) struct Counters {
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    counters: HashMap<(Whose, Limit), Entry>,
    /// From this many on, those that are not needed are looked for.
    sweep_at: usize,
}

struct Entry {
    count: Arc<Mutex<Count>>,
    /// How many sessions have a share of it.
    sessions: u32,
}

/// What came, of one kind.
enum Count {
    Messages(MessageRate),
    Bytes(ByteRate),
}

/// One session's share of a counter; dropping it is the end of the session.
pub(super) struct Share {
    counters: Arc<Counters>,
    key: (Whose, Limit),
    count: Arc<Mutex<Count>>,
}

/// A counter that nobody else can look at meanwhile.
pub(super) struct Held<'a>(MutexGuard<'a, Count>);

impl Counters {
    /// A share of the counter of `whose`, for a session that begins.
    pub(super) fn join(self: &Arc<Self>, whose: Whose, limit: Limit, now: Instant) -> Share {
        let key = (whose, limit);
        let mut known = self.known();
        known.sweep(now);
        let entry = known.counters.entry(key.clone()).or_insert_with(|| Entry::new(limit, now));
        entry.sessions += 1;
        let count = Arc::clone(&entry.count);
        drop(known);
        Share { counters: Arc::clone(self), key, count }
    }

    fn leave(&self, key: &(Whose, Limit), now: Instant) {
        let mut known = self.known();
        let Some(entry) = known.counters.get_mut(key) else { return };
        entry.sessions -= 1;
        if !entry.is_needed(now) {
            known.counters.remove(key);
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // Nothing under the lock can panic half way.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    /// Forgets counters that have neither a session nor anything that counts, when there are twice as many as were left the last
    /// time. So memory follows those who come, and each of them pays for a few.
    fn sweep(&mut self, now: Instant) {
        if self.counters.len() < self.sweep_at.max(SWEEP_FROM) {
            return;
        }
        self.counters.retain(|_, entry| entry.is_needed(now));
        let idle = self.counters.values().filter(|entry| entry.sessions == 0).count();
        if idle > MOST_WITHOUT_SESSION {
            self.counters.retain(|_, entry| entry.sessions > 0);
        }
        self.sweep_at = self.counters.len() * 2;
        self.counters.shrink_to(self.sweep_at);
    }
}

impl Entry {
    fn new(limit: Limit, now: Instant) -> Self {
        let count = match limit {
            // A window's worth at once: `burst` is what one connection may have.
            Limit::Messages { rate, window, algorithm } => {
                Count::Messages(MessageRate::of(rate, window, algorithm, 0, now))
            }
            Limit::Bytes { per_second, longest } => Count::Bytes(ByteRate::new(per_second, longest, now)),
        };
        Self { count: Arc::new(Mutex::new(count)), sessions: 0 }
    }

    fn is_needed(&self, now: Instant) -> bool {
        self.sessions > 0 || !lock(&self.count).is_clear(now)
    }
}

impl Count {
    fn is_clear(&mut self, now: Instant) -> bool {
        match self {
            Self::Messages(rate) => rate.is_clear(now),
            Self::Bytes(rate) => rate.is_clear(now),
        }
    }
}

impl Share {
    /// The counter, for a look and what follows from it. Who holds two at a time takes the one of messages first.
    pub(super) fn hold(&self) -> Held<'_> {
        Held(lock(&self.count))
    }
}

impl Held<'_> {
    /// Whether a message of so many bytes that comes `now` is within the limit.
    pub(super) fn has_room(&mut self, bytes: u64, now: Instant) -> bool {
        match &mut *self.0 {
            Count::Messages(rate) => rate.has_room(now),
            Count::Bytes(rate) => rate.has_room(bytes, now),
        }
    }

    /// A message of so many bytes came `now` that there was room for.
    pub(super) fn count(&mut self, bytes: u64, now: Instant) {
        match &mut *self.0 {
            Count::Messages(rate) => rate.count(now),
            Count::Bytes(rate) => rate.count(bytes, now),
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.counters.leave(&self.key, Instant::now());
    }
}

fn lock(count: &Mutex<Count>) -> MutexGuard<'_, Count> {
    // Nothing under the lock can panic half way.
    count.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Limits;

    const WINDOW: Duration = Duration::from_mins(1);
    const THREE: Limit = Limit::Messages { rate: 3, window: WINDOW, algorithm: Algorithm::SlidingWindow };

    fn source(n: u32) -> Whose {
        Whose::Source(Limits::default().source(std::net::Ipv4Addr::from_bits(n).into()))
    }

    fn send(share: &Share, bytes: u64, now: Instant) -> bool {
        let mut held = share.hold();
        let has_room = held.has_room(bytes, now);
        if has_room {
            held.count(bytes, now);
        }
        has_room
    }

    fn kept(counters: &Counters) -> usize {
        counters.known().counters.len()
    }

    #[test]
    fn sessions_of_one_source_share_and_others_do_not() {
        let counters = Arc::new(Counters::default());
        let now = Instant::now();
        let [first, second] = [1, 1].map(|n| counters.join(source(n), THREE, now));
        let other = counters.join(source(2), THREE, now);
        let key = counters.join(Whose::User("alice".into(), Some([1; 32])), THREE, now);
        let user = counters.join(Whose::User("alice".into(), None), THREE, now);
        assert_eq!([&first, &second, &first, &second].map(|share| send(share, 1, now)), [true, true, true, false]);
        for share in [other, key, user] {
            assert!(send(&share, 1, now));
        }
        assert!(send(&second, 1, now + WINDOW * 2));
    }

    #[test]
    fn bytes_are_counted_by_their_number() {
        let counters = Arc::new(Counters::default());
        let now = Instant::now();
        let limit = Limit::Bytes { per_second: 10, longest: 100 };
        let [first, second] = [1, 1].map(|n| counters.join(source(n), limit, now));
        assert!(send(&first, 60, now) && !send(&second, 41, now) && send(&second, 40, now));
        assert!(!send(&first, 1, now) && send(&first, 10, now + Duration::from_secs(1)));
    }

    #[test]
    fn who_comes_back_finds_what_it_sent_until_that_counts_no_more() {
        let counters = Arc::new(Counters::default());
        let now = Instant::now();
        for sent in [true, true, true, false] {
            let share = counters.join(source(1), THREE, now);
            assert_eq!(send(&share, 1, now), sent);
        }
        assert_eq!(kept(&counters), 1);
        let later = now + WINDOW * 2;
        assert!(!counters.known().counters[&(source(1), THREE)].is_needed(later), "its window is empty");
        drop(counters.join(source(2), THREE, now));
        assert_eq!(kept(&counters), 1, "who has sent nothing is not kept");
    }

    #[test]
    fn what_counts_no_more_is_forgotten_when_others_come() {
        let counters = Arc::new(Counters::default());
        let now = Instant::now();
        for n in 0..1024 {
            send(&counters.join(source(n), THREE, now), 1, now);
        }
        assert_eq!(kept(&counters), 1024);
        let share = counters.join(source(u32::MAX), THREE, now + WINDOW * 2);
        assert_eq!(kept(&counters), 1);
        drop(share);
    }

    #[test]
    fn no_message_is_too_many_however_many_threads_there_are() {
        let counters = Arc::new(Counters::default());
        let now = Instant::now();
        let limit = Limit::Messages { rate: 1000, window: WINDOW, algorithm: Algorithm::SlidingWindow };
        let sent: usize = std::thread::scope(|scope| {
            let senders: Vec<_> = (0..8)
                .map(|_| {
                    let share = counters.join(source(1), limit, now);
                    scope.spawn(move || (0..500).filter(|_| send(&share, 1, now)).count())
                })
                .collect();
            senders.into_iter().map(|sender| sender.join().unwrap()).sum()
        });
        assert_eq!(sent, 1000);
    }
}
