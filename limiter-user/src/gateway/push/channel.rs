//! A channel: messages for some sessions, kept once for all of them and in one order.
//!
//! Whoever publishes appends to the log, and is done. A session that has news is woken, a few at a time, and takes what it has not
//! seen yet in its own turn. So a message costs its publisher the same for two members and for ten thousand, nobody waits for
//! anybody who is slow, and what a channel holds is bounded however many are behind: a session that would hold more back has
//! lost a message, and ends.

use std::{
    collections::VecDeque,
    mem,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::Waker,
};

use bytes::Bytes;

use crate::gateway::close::Kick;

/// What an entry counts for beside its bytes: about what its own bookkeeping takes.
pub(super) const ENTRY_BYTES: usize = 128;

/// How many members are woken before others get their turn.
pub(super) const WOKEN_AT_ONCE: usize = 128;

/// In the place of a member: nobody.
const NOBODY: u32 = u32::MAX;

/// What is told to the members.
#[derive(Clone, Debug)]
pub(super) enum Item {
    /// A whole frame of a server.
    Frame(Bytes),
    /// Their sessions end, with this.
    Leave(Arc<Kick>),
}

impl Item {
    fn cost(&self) -> usize {
        let length = match self {
            Self::Frame(frame) => frame.len(),
            Self::Leave(kick) => kick.frame.reason.len(),
        };
        length + ENTRY_BYTES
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Channel {
    name: Arc<str>,
    /// Number of the newest entry that there has been: who has seen it has no news.
    newest: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
pub(super) struct State {
    /// What some member has not taken yet, oldest first.
    log: VecDeque<Entry>,
    /// What the entries of `log` count for.
    cost: usize,
    newest: u64,
    /// A member keeps its place; so a pass that wakes them misses nobody.
    members: Vec<Option<Member>>,
    /// Places in `members` that nobody has, and some that are not there any more.
    free: Vec<u32>,
    count: u32,
    pass: Option<Pass>,
    /// How many were woken and had no turn since.
    woken: u32,
    /// Publishers that wait until everybody has had a turn.
    waiting: Vec<Waker>,
    /// Raised when those who wait are woken.
    round: u32,
    lost: Lost,
    /// The last time that everybody was told to leave.
    left: Option<(u64, Arc<Kick>)>,
}

#[derive(Debug)]
struct Entry {
    number: u64,
    item: Item,
    /// Whose it is; that member does not get it.
    from: u32,
    /// How many have not taken it yet.
    left: u32,
}

#[derive(Debug)]
struct Member {
    /// Number of the last entry that it took, or need not take.
    seen: u64,
    /// Taken only when there is an entry that it has not seen.
    waker: Option<Waker>,
    /// Whether it was woken, and had no turn since.
    is_woken: bool,
    /// In which round it began to wait for its turn to publish.
    waits: Option<u32>,
}

/// A walk along the members, to wake those who have news.
#[derive(Debug)]
struct Pass {
    next: usize,
    /// There is something newer than when it began.
    again: bool,
}

/// The newest entries that were thrown away before everybody had taken them, of two members.
#[derive(Debug)]
struct Lost {
    newest: (u64, u32),
    /// The newest of somebody else.
    other: u64,
}

impl Default for Lost {
    fn default() -> Self {
        Self { newest: (0, NOBODY), other: 0 }
    }
}

impl Lost {
    fn note(&mut self, number: u64, from: u32) {
        if self.newest.1 != from {
            self.other = self.newest.0;
        }
        self.newest = (number, from);
    }

    /// The newest that was meant for that member.
    fn of(&self, member: u32) -> u64 {
        if self.newest.1 == member { self.other } else { self.newest.0 }
    }
}

/// What became of a message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Appended {
    /// How many members it is for.
    pub(super) receivers: u32,
    /// How many have lost a message for it, counted for each message.
    pub(super) lost: u64,
    /// Somebody has to see to the pass: [`Channel::wake_some`] until it says that there is nothing left to do.
    pub(super) wake: bool,
}

impl Channel {
    pub(super) fn new(name: &str) -> Arc<Self> {
        Arc::new(Self { name: name.into(), newest: AtomicU64::new(0), state: Mutex::default() })
    }

    pub(super) fn name(&self) -> &Arc<str> {
        &self.name
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing under the lock can panic half way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of the newest entry.
    pub(super) fn newest(&self) -> u64 {
        self.newest.load(Ordering::Acquire)
    }

    /// Appends to the log. `number` is greater than any before. What goes past `limit` is thrown away, the oldest first, but never
    /// this very one.
    pub(super) fn append(
        &self,
        state: &mut State,
        number: u64,
        item: Item,
        from: Option<u32>,
        limit: usize,
    ) -> Appended {
        let appended = state.append(number, item, from.unwrap_or(NOBODY), limit);
        self.newest.store(state.newest, Ordering::Release);
        appended
    }

    /// Wakes some of those who have news. False: that's all.
    pub(super) fn wake_some(&self) -> bool {
        let (wakers, more) = self.lock().next_to_wake();
        // Outside of the lock, which they will want.
        wakers.into_iter().for_each(Waker::wake);
        more
    }
}

impl State {
    /// A new member, which gets what comes from now on. Gives its place.
    pub(super) fn join(&mut self) -> (u32, u64) {
        let member = Member { seen: self.newest, waker: None, is_woken: false, waits: None };
        self.count += 1;
        while let Some(place) = self.free.pop() {
            if let Some(free) = self.members.get_mut(place as usize) {
                *free = Some(member);
                return (place, self.newest);
            }
        }
        // A member is a connection, of which there are far fewer than 2^32.
        let place = u32::try_from(self.members.len()).unwrap_or(NOBODY);
        self.members.push(Some(member));
        (place, self.newest)
    }

    /// Gives who is to be woken for it.
    pub(super) fn leave(&mut self, place: u32) -> Vec<Waker> {
        let Some(member) = self.members.get_mut(place as usize).and_then(Option::take) else { return Vec::new() };
        self.count -= 1;
        for entry in self.log.iter_mut().rev().take_while(|entry| entry.number > member.seen) {
            if entry.from != place {
                entry.left -= 1;
            }
        }
        self.trim();
        self.free.push(place);
        while self.members.pop_if(|last| last.is_none()).is_some() {}
        if self.free.len() > self.members.len() {
            let length = self.members.len();
            self.free.retain(|place| (*place as usize) < length);
        }
        if self.members.len() < self.members.capacity() / 4 {
            self.members.shrink_to(self.members.len() * 2);
            self.free.shrink_to_fit();
        }
        if member.is_woken { self.had_turn() } else { Vec::new() }
    }

    /// How many members there are.
    pub(super) fn count(&self) -> u32 {
        self.count
    }

    /// Whether the log is half full and somebody has not had a turn yet to make it shorter. Who can't be sent to has had one: nobody
    /// waits for the slow.
    pub(super) fn is_busy(&self, limit: usize) -> bool {
        self.cost > limit / 2 && (self.pass.is_some() || self.woken > 0)
    }

    /// Has the waker woken when it is worthwhile to try to publish again.
    pub(super) fn wait(&mut self, place: Option<u32>, waker: &Waker) {
        match place.and_then(|place| self.members.get_mut(place as usize)?.as_mut()) {
            Some(member) if member.waits == Some(self.round) => return,
            Some(member) => member.waits = Some(self.round),
            None if self.waiting.iter().any(|waiting| waiting.will_wake(waker)) => return,
            None => {}
        }
        self.waiting.push(waker.clone());
    }

    fn append(&mut self, number: u64, item: Item, from: u32, limit: usize) -> Appended {
        debug_assert!(number > self.newest, "numbers rise");
        let is_member = self.member(from).is_some();
        let receivers = self.count - u32::from(is_member);
        if receivers == 0 {
            return Appended::default();
        }
        // Whoever had seen everything before its own message has seen that, too.
        let newest = self.newest;
        if let Some(own) = self.member(from).filter(|own| own.seen == newest) {
            own.seen = number;
        }
        self.newest = number;
        let mut lost = 0;
        while self.cost > limit {
            let Some(oldest) = self.log.pop_front() else { break };
            self.cost -= oldest.item.cost();
            if oldest.left > 0 {
                self.lost.note(oldest.number, oldest.from);
                lost += u64::from(oldest.left);
            }
        }
        if let Item::Leave(kick) = &item {
            self.left = Some((number, Arc::clone(kick)));
        }
        self.cost += item.cost();
        self.log.push_back(Entry { number, item, from, left: receivers });
        let wake = match &mut self.pass {
            Some(pass) => {
                pass.again = true;
                false
            }
            none => {
                *none = Some(Pass { next: 0, again: false });
                true
            }
        };
        Appended { receivers, lost, wake }
    }

    fn member(&mut self, place: u32) -> Option<&mut Member> {
        self.members.get_mut(place as usize)?.as_mut()
    }

    /// Wakers of some who have news, and whether there may be more.
    fn next_to_wake(&mut self) -> (Vec<Waker>, bool) {
        let Some(pass) = &mut self.pass else { return (Vec::new(), false) };
        let end = self.members.len().min(pass.next + WOKEN_AT_ONCE);
        let mut wakers = Vec::new();
        for member in self.members.get_mut(pass.next..end).into_iter().flatten().flatten() {
            if member.seen < self.newest
                && let Some(waker) = member.waker.take()
            {
                member.is_woken = true;
                self.woken += 1;
                wakers.push(waker);
            }
        }
        pass.next = end;
        if end < self.members.len() {
            return (wakers, true);
        }
        if pass.again {
            *pass = Pass { next: 0, again: false };
            return (wakers, true);
        }
        self.pass = None;
        if self.woken == 0 {
            wakers.append(&mut self.release());
        }
        (wakers, false)
    }

    fn had_turn(&mut self) -> Vec<Waker> {
        self.woken -= 1;
        if self.woken == 0 && self.pass.is_none() { self.release() } else { Vec::new() }
    }

    fn release(&mut self) -> Vec<Waker> {
        self.round = self.round.wrapping_add(1);
        mem::take(&mut self.waiting)
    }

    /// The member has its turn: it is not waited for any more. Gives who is to be woken for it.
    pub(super) fn turn(&mut self, place: u32) -> Vec<Waker> {
        match self.member(place) {
            Some(member) if member.is_woken => {
                member.is_woken = false;
                self.had_turn()
            }
            _ => Vec::new(),
        }
    }

    /// Has the member woken when there is something newer than what there is now.
    pub(super) fn watch(&mut self, place: u32, waker: &Waker) {
        if let Some(member) = self.member(place) {
            match &mut member.waker {
                Some(old) => old.clone_from(waker),
                none => *none = Some(waker.clone()),
            }
        }
    }

    /// Whether something was thrown away that the member should have had.
    pub(super) fn has_lost(&mut self, place: u32) -> bool {
        let lost = self.lost.of(place);
        self.member(place).is_some_and(|member| lost > member.seen)
    }

    /// With what the member has to leave, however much is before that.
    pub(super) fn must_leave(&mut self, place: u32) -> Option<Arc<Kick>> {
        let seen = self.member(place)?.seen;
        self.left.as_ref().filter(|(number, _)| *number > seen).map(|(_, frame)| Arc::clone(frame))
    }

    /// The number of the next entry for the member, and whether that tells it to leave; those of its own are passed over.
    pub(super) fn next(&mut self, place: u32) -> Option<(u64, bool)> {
        let newest = self.newest;
        let seen = self.member(place)?.seen;
        let first = self.log.partition_point(|entry| entry.number <= seen);
        let next = self.log.range(first..).find(|entry| entry.from != place);
        let next = next.map(|entry| (entry.number, matches!(entry.item, Item::Leave(_))));
        if next.is_none()
            && let Some(member) = self.member(place)
        {
            member.seen = newest;
        }
        next
    }

    /// Takes that entry, which is the [`next`](Self::next).
    pub(super) fn take(&mut self, place: u32, number: u64) -> Option<Item> {
        let at = self.log.binary_search_by_key(&number, |entry| entry.number).ok()?;
        let entry = self.log.get_mut(at)?;
        entry.left -= 1;
        let item = entry.item.clone();
        if let Some(member) = self.member(place) {
            member.seen = number;
        }
        Some(item)
    }

    /// Number of the last entry that the member has seen.
    pub(super) fn seen(&mut self, place: u32) -> u64 {
        self.member(place).map_or(0, |member| member.seen)
    }

    /// Forgets what everybody has taken.
    pub(super) fn trim(&mut self) {
        while let Some(entry) = self.log.pop_front_if(|entry| entry.left == 0) {
            self.cost -= entry.item.cost();
        }
        if self.log.is_empty() && self.log.capacity() > 0 {
            self.log = VecDeque::new();
        }
    }

    #[cfg(test)]
    pub(super) fn cost(&self) -> usize {
        self.cost
    }

    #[cfg(test)]
    pub(super) fn entries(&self) -> usize {
        self.log.len()
    }
}
