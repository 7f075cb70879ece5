//! How a session is polled: what there is to do is done, a turn's worth at a time, and an alarm rings when it has waited for
//! too long.

use std::{
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::time::{Instant, Sleep, sleep_until};

use super::{close::End, liveness::FAR};

/// How many bytes one side of one session may bring before others get their turn. The runtime counts operations, and one of
/// those can be long.
pub(super) const TURN: usize = 64 * 1024;

/// A session.
pub(super) trait Turns {
    /// Does what there is to do, for a turn at most; completes when the session is over.
    fn poll_pass(&mut self, cx: &mut Context<'_>, now: Instant) -> Poll<End>;

    /// When to look again; an error is why it is over.
    fn due(&mut self, cx: &mut Context<'_>, now: Instant) -> Result<Instant, End>;

    /// The other end of the client's connection, which may be a proxy.
    fn remote(&self) -> SocketAddr;

    /// Called now and then: a quiet session keeps what it needs.
    fn settle(&mut self, now: Instant);
}

/// What wakes a session that has waited for too long. It is set by [`poll`].
pub(super) fn alarm() -> Sleep {
    sleep_until(Instant::now() + FAR)
}

/// Goes on with a session; completes when it ends, or has to be told that it is over.
pub(super) fn poll(session: &mut impl Turns, cx: &mut Context<'_>, mut alarm: Pin<&mut Sleep>) -> Poll<End> {
    let mut now = Instant::now();
    if let Poll::Ready(end) = session.poll_pass(cx, now) {
        return Poll::Ready(end);
    }
    loop {
        let due = match session.due(cx, now) {
            Ok(due) => due,
            Err(end) => return Poll::Ready(end),
        };
        // Most of what happens makes the next deadline later. The alarm is left as it is then, and set anew when it rings.
        if alarm.is_elapsed() || due < alarm.deadline() {
            alarm.as_mut().reset(due);
        }
        if alarm.as_mut().poll(cx).is_pending() {
            return Poll::Pending;
        }
        now = Instant::now();
        session.settle(now);
    }
}
