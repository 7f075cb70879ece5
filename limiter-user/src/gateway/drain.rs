//! The end of a gateway: everybody is told, and waited for, but not for ever.
//!
//! Not everybody at once: clients that are told to go come back together, to another instance or to the next process of this
//! one. So sessions get their turn one after the other, in random order, spread over the time that there is.

use std::{
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use slab::Slab;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep_until, timeout},
};

use super::{Shared, listen::report_panic};

/// The share of `drain_timeout` that is kept for the answers of those whose turn comes last: one in so many parts.
const KEPT_FOR_ANSWERS: u32 = 5;

/// Longest time between one session and the next. With so few of them nobody has a storm to fear, and a restart should not take
/// its time for nothing.
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// Why a gateway ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It is to end. Whoever is not in yet is refused.
    Drain,
    /// Another process accepts on the same sockets from now on. Whoever was accepted before still gets in, and is then told to come
    /// again as everybody is.
    HandOver,
}

/// What became of the sessions that were open at the shutdown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DrainReport {
    /// Sessions that ended in good order.
    pub closed: usize,
    /// Sessions whose client did not answer the Close frame and that were cut.
    pub cut: usize,
    /// How long it took.
    pub took: Duration,
}

/// Tells every connection that the gateway ends, and counts how they take it.
#[derive(Default)]
pub(super) struct Drain {
    begun: AtomicBool,
    /// Whether handshakes go on all the same.
    lets_in: AtomicBool,
    waiting: Mutex<Slab<Place>>,
    closed: AtomicUsize,
    cut: AtomicUsize,
}

/// Of one connection that waits.
struct Place {
    waker: Waker,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// Its turn comes at once.
    Early,
    /// Its turn comes when it does.
    Session,
    /// Its turn has come.
    Called,
}

impl Drain {
    pub(super) fn begun(&self) -> bool {
        self.begun.load(Ordering::Acquire)
    }

    /// Whether handshakes are refused.
    pub(super) fn refuses(&self) -> bool {
        self.begun() && !self.lets_in.load(Ordering::Acquire)
    }

    /// Watches over one session, which counts if it ends in the drain: as cut, unless it is said to be closed before.
    pub(super) fn session(&self) -> Witness<'_> {
        Witness { drain: self, counter: &self.cut }
    }

    /// Completes when the drain begins, unless that lets handshakes go on.
    pub(super) fn wait(&self) -> Wait<'_> {
        Wait { drain: self, kind: State::Early, at: None }
    }

    /// Completes in the drain, when it is the turn of the session that waits.
    pub(super) fn turn(&self) -> Wait<'_> {
        Wait { drain: self, kind: State::Session, at: None }
    }

    /// Tells those that don't wait for a turn, and gives the places of the others in random order. Who comes later has its turn
    /// at once.
    fn begin(&self, ending: Ending) -> Vec<usize> {
        let mut turns = Vec::new();
        let mut early = Vec::new();
        let mut waiting = self.waiting();
        // Before the other, so that nobody sees a drain that refuses where none does.
        self.lets_in.store(ending == Ending::HandOver, Ordering::Release);
        self.begun.store(true, Ordering::Release);
        for (key, place) in waiting.iter_mut() {
            match place.state {
                State::Session => turns.push(key),
                State::Early if ending == Ending::HandOver => {}
                State::Early | State::Called => {
                    place.state = State::Called;
                    early.push(place.waker.clone());
                }
            }
        }
        drop(waiting);
        early.into_iter().for_each(Waker::wake);
        fastrand::shuffle(&mut turns);
        turns
    }

    /// Gives everybody a turn within `time`.
    async fn call(&self, turns: Vec<usize>, time: Duration) {
        let pause = pause(turns.len(), time);
        let begun = Instant::now();
        for (n, key) in (0..).zip(turns) {
            let at = begun + pause.saturating_mul(n);
            // The clock of the runtime goes by milliseconds: of many, several have their turn together.
            if at > Instant::now() {
                sleep_until(at).await;
            }
            // It may have ended meanwhile, and its place may be another's by now, who then was called when it came.
            let waker = self.waiting().get_mut(key).map(|place| {
                place.state = State::Called;
                place.waker.clone()
            });
            waker.into_iter().for_each(Waker::wake);
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Slab<Place>> {
        // Nothing under the lock can panic half way.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See [`Drain::wait`] and [`Drain::turn`]. A session polls it whenever it has news, so it is small, and as long as there is no
/// drain a poll takes no lock.
pub(super) struct Wait<'a> {
    drain: &'a Drain,
    kind: State,
    /// Its place, and who is woken; `None` before the first poll.
    at: Option<(usize, Waker)>,
}

impl Future for Wait<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Self { drain, kind, at } = &mut *self;
        let Some((key, waker)) = at else {
            let mut waiting = drain.waiting();
            // Under the lock: whoever is not there yet when the drain begins sees that it has.
            if drain.begun() && (*kind == State::Session || drain.refuses()) {
                return Poll::Ready(());
            }
            let key = waiting.insert(Place { waker: cx.waker().clone(), state: *kind });
            drop(waiting);
            *at = Some((key, cx.waker().clone()));
            return Poll::Pending;
        };
        let same = waker.will_wake(cx.waker());
        if same && !drain.begun() {
            return Poll::Pending;
        }
        let mut waiting = drain.waiting();
        let place = &mut waiting[*key];
        if place.state == State::Called {
            return Poll::Ready(());
        }
        if !same {
            place.waker.clone_from(cx.waker());
            waker.clone_from(cx.waker());
        }
        Poll::Pending
    }
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        if let Some((key, _)) = self.at {
            drop(self.drain.waiting().remove(key));
        }
    }
}

/// Counts a session when it is dropped, which is what happens to those that are cut.
pub(super) struct Witness<'a> {
    drain: &'a Drain,
    counter: &'a AtomicUsize,
}

impl Witness<'_> {
    /// The client closed too.
    pub(super) fn closed(&mut self) {
        self.counter = &self.drain.closed;
    }
}

impl Drop for Witness<'_> {
    fn drop(&mut self) {
        if self.drain.begun() {
            self.counter.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// From one of so many turns to the next.
fn pause(turns: usize, time: Duration) -> Duration {
    let turns = u32::try_from(turns).unwrap_or(u32::MAX).max(1);
    (time / turns).min(LONGEST_PAUSE)
}

/// How long it may take until the last of the sessions has its turn.
fn time_for_turns(drain_timeout: Duration) -> Duration {
    drain_timeout / KEPT_FOR_ANSWERS * (KEPT_FOR_ANSWERS - 1)
}

/// Ends `connections`, in good order as far as their clients take part.
pub(super) async fn finish(connections: &mut JoinSet<()>, shared: &Arc<Shared>, ending: Ending) -> DrainReport {
    let started = Instant::now();
    let limit = shared.config.drain_timeout;
    let turns = shared.drain.begin(ending);
    tracing::info!(sessions = shared.admission.total(), timeout = ?limit, "draining");

    // Handshakes that go on have a deadline of their own.
    let patience = match ending {
        Ending::Drain => limit,
        Ending::HandOver => limit.max(shared.config.handshake_timeout),
    };
    let ended = timeout(patience, async {
        let all = async {
            while let Some(ended) = connections.join_next().await {
                report_panic(&ended);
            }
        };
        tokio::pin!(all);
        tokio::select! {
            () = &mut all => {}
            () = shared.drain.call(turns, time_for_turns(limit)) => all.await,
        }
    });
    if ended.await.is_err() {
        connections.shutdown().await;
    }
    let report = DrainReport {
        closed: shared.drain.closed.load(Ordering::Relaxed),
        cut: shared.drain.cut.load(Ordering::Relaxed),
        took: started.elapsed(),
    };
    tracing::info!(closed = report.closed, cut = report.cut, took = ?report.took, "drained");
    report
}

#[cfg(test)]
#[path = "drain_tests.rs"]
mod tests;
