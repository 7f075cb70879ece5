//! A session's place in its channels: its room, its user's, and the one that everybody is in.

use std::{
    array,
    collections::VecDeque,
    sync::{Arc, MutexGuard},
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use tokio::time::Instant;

use super::{
    Hub,
    channel::{Channel, Item, State},
    frame::payload_length,
    wake_all,
};
use crate::gateway::close::{End, Kick};

/// Most that is taken at once, in bytes, but for a message that is longer. So much, or one message, can a session hold that the
/// channel has forgotten.
const MOST_AT_ONCE: usize = 16 * 1024;

/// How many channels a session can be in.
pub(super) const CHANNELS: usize = 3;

/// What others have for a session. Dropping it leaves every channel.
pub(in crate::gateway) struct Mailbox {
    hub: Arc<Hub>,
    /// Its room, its user's channel, everybody's; they are locked in this order.
    seats: [Option<Seat>; CHANNELS],
    /// Whether the task is woken for what comes.
    watches: bool,
    /// When it last took something.
    last: Option<Instant>,
}

/// A place in a channel.
pub(super) struct Seat {
    pub(super) channel: Arc<Channel>,
    pub(super) place: u32,
    /// Number of the last entry that was seen: a copy of what the channel has, to be compared without its lock.
    pub(super) seen: u64,
}

impl Seat {
    fn has_news(&self) -> bool {
        self.channel.newest() > self.seen
    }
}

/// A channel that is locked for a look.
struct Opened<'a> {
    state: MutexGuard<'a, State>,
    place: u32,
}

impl Mailbox {
    pub(super) fn new(hub: Arc<Hub>, seats: [Option<Seat>; CHANNELS]) -> Self {
        Self { hub, seats, watches: false, last: None }
    }

    /// Whether there is something to take.
    pub(in crate::gateway) fn has_news(&self) -> bool {
        self.seats.iter().flatten().any(Seat::has_news)
    }

    /// When it last took something.
    pub(in crate::gateway) fn last(&self) -> Option<Instant> {
        self.last
    }

    /// The next frames, in the order in which they were published; pending: there are none, and the task is woken for those that
    /// come. After frames there may be more, and nobody wakes the task for these. An error ends the session.
    pub(in crate::gateway) fn poll_take(
        &mut self,
        cx: &mut Context<'_>,
        now: Instant,
    ) -> Poll<Result<VecDeque<Bytes>, End>> {
        let Some(need) = self.to_look_at() else { return Poll::Pending };
        let mut frames = VecDeque::new();
        let mut bytes = 0;
        let end = self.look(need, cx, |opened| {
            if let Some(end) = opened.iter_mut().flatten().find_map(Opened::loss) {
                return Some(end);
            }
            while bytes < MOST_AT_ONCE {
                let channels = opened.iter_mut().flatten();
                let next = channels.filter_map(|channel| Some((channel.state.next(channel.place)?, channel)));
                let ((number, leaves), channel) = next.min_by_key(|((number, _), _)| *number)?;
                // What was said before is sent first.
                if leaves && !frames.is_empty() {
                    return None;
                }
                match channel.state.take(channel.place, number)? {
                    Item::Frame(frame) => {
                        bytes += frame.len();
                        frames.push_back(frame);
                    }
                    Item::Leave(kick) => return Some(kicked(&kick)),
                }
            }
            None
        });
        if let Some(end) = end {
            return Poll::Ready(Err(end));
        }
        if frames.is_empty() {
            return Poll::Pending;
        }
        self.last = Some(now);
        for frame in &frames {
            self.hub.metrics.sent.count(payload_length(frame) as u64);
        }
        Poll::Ready(Ok(frames))
    }

    /// Has the task woken for what comes, where nothing is taken now. An error ends the session: it has lost something; or it has to
    /// leave and is held up, by whoever is to receive what comes before, so that it is not waited for.
    pub(in crate::gateway) fn watch(&mut self, cx: &mut Context<'_>, is_held_up: bool) -> Result<(), End> {
        let Some(need) = self.to_look_at() else { return Ok(()) };
        let end = self.look(need, cx, |opened| {
            opened.iter_mut().flatten().find_map(|channel| {
                let leaves = channel.state.must_leave(channel.place).filter(|_| is_held_up);
                channel.loss().or_else(|| leaves.map(|kick| kicked(&kick)))
            })
        });
        end.map_or(Ok(()), Err)
    }

    /// Publishes frames in the room, in their order, as far as those before them are on their way. Pending: the task is woken when it
    /// may be tried again.
    pub(in crate::gateway) fn poll_publish(&mut self, cx: &mut Context<'_>, frames: &mut VecDeque<Bytes>) -> Poll<()> {
        let waker = cx.waker().clone();
        if self.publish_if(frames, |state, place, limit| {
            let busy = state.is_busy(limit);
            if busy {
                state.wait(Some(place), &waker);
            }
            !busy
        }) {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    }

    /// Publishes all of them, whatever is on its way: for what a session has still to say at its end.
    pub(in crate::gateway) fn publish(&mut self, frames: &mut VecDeque<Bytes>) {
        self.publish_if(frames, |_, _, _| true);
    }

    /// Whether all are published.
    fn publish_if(&mut self, frames: &mut VecDeque<Bytes>, may: impl Fn(&mut State, u32, usize) -> bool) -> bool {
        let hub = &self.hub;
        let [Some(room), ..] = &mut self.seats else {
            frames.clear();
            return true;
        };
        let mut wake = false;
        let mut state = room.channel.lock();
        while !frames.is_empty() && may(&mut state, room.place, hub.limit()) {
            let Some(frame) = frames.pop_front() else { break };
            wake |= hub.append(&room.channel, &mut state, Item::Frame(frame), Some(room.place)).wake;
        }
        room.seen = state.seen(room.place);
        drop(state);
        if wake {
            wake_all(&room.channel);
        }
        frames.is_empty()
    }

    /// The channels that have news, or all of them if the task is not woken for any.
    fn to_look_at(&self) -> Option<[bool; CHANNELS]> {
        let need = self.seats.each_ref().map(|seat| seat.as_ref().is_some_and(|seat| !self.watches || seat.has_news()));
        need.contains(&true).then_some(need)
    }

    /// Has `looker` look at these channels, all at the same moment, and the task woken for what it leaves.
    fn look(
        &mut self,
        need: [bool; CHANNELS],
        cx: &mut Context<'_>,
        looker: impl FnOnce(&mut [Option<Opened<'_>>; CHANNELS]) -> Option<End>,
    ) -> Option<End> {
        let mut opened = open(&self.seats, need);
        let end = looker(&mut opened);
        let mut wakers = Vec::new();
        let seen = opened.map(|channel| {
            let Opened { mut state, place } = channel?;
            state.trim();
            state.watch(place, cx.waker());
            wakers.append(&mut state.turn(place));
            Some(state.seen(place))
        });
        wakers.into_iter().for_each(Waker::wake);
        for (seat, seen) in self.seats.iter_mut().zip(seen) {
            if let (Some(seat), Some(seen)) = (seat, seen) {
                seat.seen = seen;
            }
        }
        self.watches = true;
        end
    }
}

/// Locks the channels that are needed. What was published before anything that is there then, by the same publisher or by one who
/// knew of it, is there, too: a channel that gets news meanwhile is one that is needed.
fn open(seats: &[Option<Seat>; CHANNELS], mut need: [bool; CHANNELS]) -> [Option<Opened<'_>>; CHANNELS] {
    loop {
        let opened = array::from_fn(|at| {
            let seat = seats[at].as_ref().filter(|_| need[at])?;
            Some(Opened { state: seat.channel.lock(), place: seat.place })
        });
        let before = need;
        for (need, seat) in need.iter_mut().zip(seats) {
            *need |= seat.as_ref().is_some_and(Seat::has_news);
        }
        if need == before {
            return opened;
        }
    }
}

impl Opened<'_> {
    fn loss(&mut self) -> Option<End> {
        if !self.state.has_lost(self.place) {
            return None;
        }
        Some(self.state.must_leave(self.place).map_or(End::SlowConsumer, |kick| kicked(&kick)))
    }
}

fn kicked(kick: &Kick) -> End {
    End::Kicked(Box::new(kick.clone()))
}

impl Drop for Mailbox {
    fn drop(&mut self) {
        let seats = array::from_fn(|at| self.seats[at].take());
        self.hub.leave(seats);
    }
}
