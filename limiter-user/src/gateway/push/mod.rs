//! Messages that others have for a session: members of its room, and whoever uses the gateway's [`Push`].
//!
//! A session can be in three [channels](channel): its room, which is the path that it asked for where the application is
//! `broadcast`; its user's; and the one that everybody is in. The last two are there only once somebody has a [`Push`], so
//! that nobody else pays for them. Numbers are the hub's, not a channel's: a session takes what there is in all of its
//! channels in the order in which it was published.

mod channel;
mod frame;
mod mailbox;

#[cfg(test)]
mod tests;

pub(super) use frame::{Kind, LONGEST_HEADER, frame, header};
pub(super) use mailbox::Mailbox;

use std::{
    collections::BTreeMap,
    future::poll_fn,
    ops::Bound,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    task::{Poll, Waker},
};

use tokio::task::yield_now;

use super::{close::Kick, metrics::Metrics};
use channel::{Appended, Channel, Item, State, WOKEN_AT_ONCE};
use mailbox::{CHANNELS, Seat};

/// Longest name of a room, in bytes.
pub const LONGEST_ROOM: usize = 512;

/// Every channel of a gateway.
pub(super) struct Hub {
    /// The number of the newest entry of all channels.
    clock: AtomicU64,
    /// How far a session may be behind, in bytes.
    limit: AtomicUsize,
    /// Whether somebody can publish to users and to everybody.
    is_reachable: AtomicBool,
    rooms: Mutex<Channels>,
    users: Mutex<Channels>,
    everybody: Arc<Channel>,
    metrics: Arc<Metrics>,
}

/// A channel is there as long as it has members.
type Channels = BTreeMap<Arc<str>, Arc<Channel>>;

/// Publishes messages to a gateway's clients, whatever the application is.
///
/// What is published before it returns comes before what is published after, for every client that gets both. A client gets
/// each message once, between two messages of its application.
#[derive(Clone)]
pub struct Push(Arc<Hub>);

/// Whom a message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recipients<'a> {
    /// Every client.
    All,
    /// The members of a room of the application `broadcast`.
    Room(&'a str),
    /// Every session of a user.
    User(&'a str),
}

/// What is published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content<'a> {
    /// A text message.
    Text(&'a str),
    /// A binary message.
    Binary(&'a [u8]),
}

/// A room or a user, with how many sessions there are.
pub type Listed = (Arc<str>, u32);

impl Push {
    /// Has everybody get the message, and says how many that are.
    ///
    /// It returns when the message is on its way; a client that does not take it, and falls behind too far, is closed. While
    /// clients have had no chance yet to take what was published before, it waits.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub async fn publish(&self, to: Recipients<'_>, content: Content<'_>) -> u32 {
        let frame = match content {
            Content::Text(text) => frame(Kind::Text, text.as_bytes()),
            Content::Binary(bytes) => frame(Kind::Binary, bytes),
        };
        let Some(channel) = self.0.channel(to) else { return 0 };
        self.0.publish(&channel, Item::Frame(frame)).await.receivers
    }

    /// Closes every session of a user with that code, after what was published to it before. Says how many there are.
    ///
    /// Without a reason, it is "disconnected"; with 1012 or 1013 each is then also told when to come back, as those of a shutdown are.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub async fn disconnect(&self, user: &str, code: u16, reason: Option<&str>) -> u32 {
        let Some(channel) = self.0.channel(Recipients::User(user)) else { return 0 };
        self.0.publish(&channel, Item::Leave(Arc::new(Kick::new(code, reason)))).await.receivers
    }

    /// The rooms by their names, from the first after `after` on, `limit` at most.
    pub fn rooms(&self, after: &str, limit: usize) -> Vec<Listed> {
        list(&self.0.rooms, after, limit)
    }

    /// The users that have a session, in the same way.
    pub fn users(&self, after: &str, limit: usize) -> Vec<Listed> {
        list(&self.0.users, after, limit)
    }
}

fn list(channels: &Mutex<Channels>, after: &str, limit: usize) -> Vec<Listed> {
    let channels = lock(channels);
    let listed = channels.range::<str, _>((Bound::Excluded(after), Bound::Unbounded)).take(limit);
    listed.map(|(name, channel)| (Arc::clone(name), channel.lock().count())).collect()
}

fn lock(channels: &Mutex<Channels>) -> MutexGuard<'_, Channels> {
    // Nothing under the lock can panic half way.
    channels.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Hub {
    pub(super) fn new(limit: usize, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self {
            clock: AtomicU64::new(0),
            limit: AtomicUsize::new(limit),
            is_reachable: AtomicBool::new(false),
            rooms: Mutex::default(),
            users: Mutex::default(),
            everybody: Channel::new(""),
            metrics,
        })
    }

    /// A hand on it for others. From now on every session that begins can be published to.
    pub(super) fn push(self: &Arc<Self>) -> Push {
        self.is_reachable.store(true, Ordering::Relaxed);
        Push(Arc::clone(self))
    }

    /// How far a session may be behind, in bytes.
    pub(super) fn limit(&self) -> usize {
        self.limit.load(Ordering::Relaxed)
    }

    pub(super) fn set_limit(&self, limit: usize) {
        self.limit.store(limit, Ordering::Relaxed);
    }

    /// A place for a session, in its room and with its user if it has any. `None`: nobody has anything for it. It gets what is
    /// published from now on.
    pub(super) fn enter(self: &Arc<Self>, room: Option<&str>, user: Option<&str>) -> Option<Box<Mailbox>> {
        let is_reachable = self.is_reachable.load(Ordering::Relaxed);
        if room.is_none() && !is_reachable {
            return None;
        }
        let room = room.map(|name| {
            let (seat, is_new) = join(&self.rooms, name);
            if is_new {
                self.metrics.rooms.inc();
            }
            seat
        });
        let user = user.filter(|_| is_reachable).map(|name| join(&self.users, name).0);
        let everybody = is_reachable.then(|| seat(&self.everybody));
        Some(Box::new(Mailbox::new(Arc::clone(self), [room, user, everybody])))
    }

    fn leave(&self, [room, user, everybody]: [Option<Seat>; CHANNELS]) {
        let mut wakers = Vec::new();
        if let Some(room) = room
            && leave(&self.rooms, &room, &mut wakers)
        {
            self.metrics.rooms.dec();
        }
        if let Some(user) = user {
            leave(&self.users, &user, &mut wakers);
        }
        if let Some(everybody) = everybody {
            wakers.append(&mut everybody.channel.lock().leave(everybody.place));
        }
        wakers.into_iter().for_each(Waker::wake);
    }

    fn channel(&self, of: Recipients<'_>) -> Option<Arc<Channel>> {
        match of {
            Recipients::All => Some(Arc::clone(&self.everybody)),
            Recipients::Room(name) => lock(&self.rooms).get(name).map(Arc::clone),
            Recipients::User(name) => lock(&self.users).get(name).map(Arc::clone),
        }
    }

    /// Appends to a channel that is locked; counts it.
    fn append(&self, channel: &Channel, state: &mut State, item: Item, from: Option<u32>) -> Appended {
        // Under the channel's lock, so that numbers rise in its log.
        let number = self.clock.fetch_add(1, Ordering::Relaxed) + 1;
        let by = if from.is_some() { &self.metrics.published_by_clients } else { &self.metrics.published_by_control };
        let appended = channel.append(state, number, item, from, self.limit());
        by.messages.inc();
        by.receivers.inc_by(appended.receivers.into());
        self.metrics.push_lost.inc_by(appended.lost);
        appended
    }

    async fn publish(&self, channel: &Arc<Channel>, item: Item) -> Appended {
        let appended = poll_fn(|cx| {
            let mut state = channel.lock();
            if state.is_busy(self.limit()) {
                state.wait(None, cx.waker());
                return Poll::Pending;
            }
            Poll::Ready(self.append(channel, &mut state, item.clone(), None))
        })
        .await;
        if appended.wake {
            wake_all(channel);
        }
        appended
    }
}

/// Has those woken who have news: at once where they are few, and else by a task that lets others have their turn.
fn wake_all(channel: &Arc<Channel>) {
    let is_small = channel.lock().count() as usize <= WOKEN_AT_ONCE;
    if is_small && !channel.wake_some() {
        return;
    }
    let channel = Arc::clone(channel);
    tokio::spawn(async move {
        while channel.wake_some() {
            yield_now().await;
        }
    });
}

/// A place in the channel of that name, and whether the channel is a new one.
fn join(channels: &Mutex<Channels>, name: &str) -> (Seat, bool) {
    let mut channels = lock(channels);
    if let Some(channel) = channels.get(name) {
        return (seat(channel), false);
    }
    let channel = Channel::new(name);
    let first = seat(&channel);
    channels.insert(Arc::clone(channel.name()), channel);
    (first, true)
}

fn seat(channel: &Arc<Channel>) -> Seat {
    let (place, seen) = channel.lock().join();
    Seat { channel: Arc::clone(channel), place, seen }
}

/// Gives a place up; true if that was the last, and the channel is gone.
fn leave(channels: &Mutex<Channels>, seat: &Seat, wakers: &mut Vec<Waker>) -> bool {
    // Whoever joins meanwhile waits here, and so does not join what is gone.
    let mut channels = lock(channels);
    let mut state = seat.channel.lock();
    wakers.append(&mut state.leave(seat.place));
    let is_last = state.count() == 0;
    if is_last {
        channels.remove(seat.channel.name());
    }
    is_last
}
