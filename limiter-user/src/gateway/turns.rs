//! How a session is polled: what there is to do is done, a turn's worth at a time, and an alarm rings when it has waited for
//! too long.

use std::{
    net::SocketAddr,
    pin::{Pin, pin},
    task::{Context, Poll, ready},
};

use tokio::{
    task::yield_now,
    time::{Instant, Sleep, sleep_until},
};

use super::{close::End, liveness::FAR};

/// How many bytes one side of one session may bring before others get their turn. The runtime counts operations, and one of
/// those can be long. With twice as many a session that floods gets a tenth more through, and the others wait twice as long.
pub(super) const TURN: usize = 32 * 1024;

/// A session.
pub(super) trait Turns {
    /// Does what there is to do, for a turn at most, and gives way if there is more; completes when the session is over.
    fn poll_pass(&mut self, cx: &mut Context<'_>, now: Instant, way: &mut Way) -> Poll<End>;

    /// When to look again; an error is why it is over.
    fn due(&mut self, cx: &mut Context<'_>, now: Instant) -> Result<Instant, End>;

    /// The other end of the client's connection, which may be a proxy.
    fn remote(&self) -> SocketAddr;

    /// Called whenever the alarm rings: a quiet session keeps what it needs.
    fn settle(&mut self, now: Instant);
}

/// How a session lets the others go first when its turn is over and there is more to do.
///
/// The runtime looks for news when nobody has anything left to do, and wakes those that have given way right after it. Whom it
/// wakes last it polls first, so that would be the session that gave way, before those that there was news for. It takes the end
/// of the line then.
#[derive(Debug, Default)]
pub(super) struct Way {
    given: bool,
}

impl Way {
    /// The turn is over: the task is woken when the others have had theirs.
    pub(super) fn give(&mut self, cx: &mut Context<'_>) {
        // The future has done its work with the first poll.
        _ = pin!(yield_now()).poll(cx);
        self.given = true;
    }

    /// To be asked whenever the task is polled. Pending: it is the others' turn still.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if std::mem::take(&mut self.given) {
            // Woken while it runs, a task goes to the end of the line.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        Poll::Ready(())
    }
}

/// What wakes a session that has waited for too long. It is set by [`poll`].
pub(super) fn alarm() -> Sleep {
    sleep_until(Instant::now() + FAR)
}

/// Goes on with a session; completes when it ends, or has to be told that it is over.
pub(super) fn poll(
    session: &mut impl Turns,
    cx: &mut Context<'_>,
    way: &mut Way,
    mut alarm: Pin<&mut Sleep>,
) -> Poll<End> {
    ready!(way.poll(cx));
    let mut now = Instant::now();
    if let Poll::Ready(end) = session.poll_pass(cx, now, way) {
        return Poll::Ready(end);
    }
    loop {
        let due = match session.due(cx, now) {
            Ok(due) => due,
            Err(end) => return Poll::Ready(end),
        };
        // Most of what happens makes the next deadline later. The alarm is left as it is then, and set anew when it rings.
        let rings = alarm.is_elapsed();
        if rings {
            session.settle(now);
        }
        if rings || due < alarm.deadline() {
            alarm.as_mut().reset(due);
        }
        if alarm.as_mut().poll(cx).is_pending() {
            return Poll::Pending;
        }
        now = Instant::now();
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::poll_fn,
        sync::{Arc, Mutex},
        time::Duration,
    };

    use tokio::{io::AsyncReadExt, net::UnixStream, runtime::Builder, time::timeout};

    use super::*;

    /// A session in which nothing happens but what is due, again and again.
    #[derive(Default)]
    struct Quiet {
        settled: u32,
    }

    impl Turns for Quiet {
        fn poll_pass(&mut self, _: &mut Context<'_>, _: Instant, _: &mut Way) -> Poll<End> {
            Poll::Pending
        }

        fn due(&mut self, _: &mut Context<'_>, now: Instant) -> Result<Instant, End> {
            Ok(now + Duration::from_millis(5))
        }

        fn remote(&self) -> SocketAddr {
            unreachable!("nobody logs it")
        }

        fn settle(&mut self, _: Instant) {
            self.settled += 1;
        }
    }

    #[tokio::test]
    async fn a_session_settles_whenever_its_alarm_rings() {
        let (mut quiet, mut way, mut polls) = (Quiet::default(), Way::default(), 0);
        let mut alarm = pin!(alarm());
        let rung = poll_fn(|cx| {
            polls += 1;
            assert!(poll(&mut quiet, cx, &mut way, alarm.as_mut()).is_pending());
            if quiet.settled < 3 { Poll::Pending } else { Poll::Ready(()) }
        });
        timeout(Duration::from_secs(20), rung).await.expect("the alarm rings");
        assert!(polls <= 4, "it is polled to set the alarm, and then when that rings: {polls}");
    }

    #[test]
    fn whoever_has_news_comes_before_the_one_that_gave_way() {
        const TURNS: usize = 20;
        // As in the daemon; the runtime of one thread alone has another order.
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let order: Arc<Mutex<Vec<&str>>> = Arc::default();
        runtime.block_on(async {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let seen = Arc::clone(&order);
            let reader = tokio::spawn(async move {
                for _ in 0..TURNS {
                    theirs.read_u8().await.unwrap();
                    seen.lock().unwrap().push("news");
                }
            });
            let seen = Arc::clone(&order);
            let busy = tokio::spawn(async move {
                let (mut way, mut turns) = (Way::default(), 0);
                ours.writable().await.unwrap();
                poll_fn(|cx| {
                    ready!(way.poll(cx));
                    if turns == TURNS {
                        return Poll::Ready(());
                    }
                    turns += 1;
                    seen.lock().unwrap().push("turn");
                    ours.try_write(&[0]).unwrap();
                    way.give(cx);
                    Poll::Pending
                })
                .await;
            });
            busy.await.unwrap();
            reader.await.unwrap();
        });
        assert_eq!(*order.lock().unwrap(), ["turn", "news"].repeat(TURNS));
    }
}
