use std::task::Poll::{Pending, Ready};

use futures_util::FutureExt;
use proptest::prelude::*;

use super::*;

/// Sessions that wait, and when each had its turn, counted from the beginning of the drain: in the order in which they came.
async fn turns(sessions: usize, time: Duration) -> Vec<Duration> {
    let drain = Arc::new(Drain::default());
    let mut tasks = JoinSet::new();
    for n in 0..sessions {
        let drain = Arc::clone(&drain);
        tasks.spawn(async move {
            drain.turn().await;
            (n, Instant::now())
        });
    }
    while drain.waiting().len() < sessions {
        tokio::task::yield_now().await;
    }
    let begun = Instant::now();
    let order = drain.begin(Ending::Drain);
    let mut turns = vec![Duration::MAX; sessions];
    let all = async {
        while let Some(turn) = tasks.join_next().await {
            let (n, at) = turn.unwrap();
            turns[n] = at - begun;
        }
    };
    tokio::join!(drain.call(order, time), all);
    assert!(drain.waiting().is_empty());
    turns
}

/// A busy host makes turns late, but never early.
#[tokio::test]
async fn turns_are_spread_in_random_order() {
    const SESSIONS: u32 = 200;
    let time = Duration::from_millis(400);
    let turns = turns(SESSIONS as usize, time).await;
    let mut sorted = turns.clone();
    sorted.sort();
    for (n, at) in (0..SESSIONS).zip(&sorted) {
        assert!(*at >= time * n / SESSIONS, "turn {n} at {at:?}");
    }
    assert_ne!(turns, sorted, "in the order in which they came");
}

#[tokio::test]
async fn without_time_all_turns_come_without_a_pause() {
    assert_eq!(pause(50, Duration::ZERO), Duration::ZERO);
    assert_eq!(turns(50, Duration::ZERO).await.len(), 50);
}

#[test]
fn a_few_sessions_do_not_take_all_the_time() {
    assert_eq!(pause(5, Duration::from_secs(24)), LONGEST_PAUSE);
    assert_eq!(pause(0, Duration::from_secs(24)), LONGEST_PAUSE);
}

#[tokio::test]
async fn handshakes_and_latecomers_have_no_turn_to_wait_for() {
    let drain = Drain::default();
    let mut handshake = Box::pin(drain.wait());
    let mut session = Box::pin(drain.turn());
    assert_eq!((handshake.as_mut().now_or_never(), session.as_mut().now_or_never()), (None, None));
    let order = drain.begin(Ending::Drain);
    assert_eq!(order.len(), 1);
    assert_eq!((handshake.as_mut().now_or_never(), session.as_mut().now_or_never()), (Some(()), None));
    assert_eq!((drain.wait().now_or_never(), drain.turn().now_or_never()), (Some(()), Some(())));
    drop(session);
    drain.call(order, Duration::ZERO).await;
}

#[test]
fn a_session_keeps_little_for_it() {
    assert!(size_of::<Wait<'_>>() <= 40, "{}", size_of::<Wait<'_>>());
    assert!(size_of::<Place>() <= 24, "{}", size_of::<Place>());
}

/// What a connection may do while it waits.
#[derive(Clone, Debug)]
enum Step {
    Come(bool),
    Poll(usize),
    Go(usize),
    Begin,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => any::<bool>().prop_map(Step::Come),
        4 => any::<usize>().prop_map(Step::Poll),
        2 => any::<usize>().prop_map(Step::Go),
        1 => Just(Step::Begin),
    ]
}

proptest! {
    #[test]
    fn the_last_turn_leaves_a_share_for_the_answers(sessions in 1..2_000_000_usize, millis in 0..3_600_000_u64) {
        let timeout = Duration::from_millis(millis);
        let pause = pause(sessions, time_for_turns(timeout));
        let last = pause * u32::try_from(sessions - 1).unwrap();
        prop_assert!(last + timeout / KEPT_FOR_ANSWERS <= timeout);
        // Nearly all of the rest is used, unless they are few.
        prop_assert!(pause == LONGEST_PAUSE || last + pause + Duration::from_millis(2) >= time_for_turns(timeout));
    }

    #[test]
    fn nobody_is_forgotten_and_nobody_is_told_before_the_drain(steps in proptest::collection::vec(step(), 0..100)) {
        let drain = Drain::default();
        let mut cx = Context::from_waker(Waker::noop());
        let mut waiting: Vec<Pin<Box<Wait<'_>>>> = Vec::new();
        let mut order = None;
        for step in steps {
            match step {
                Step::Come(session) => waiting.push(Box::pin(if session { drain.turn() } else { drain.wait() })),
                Step::Poll(i) if !waiting.is_empty() => {
                    let i = i % waiting.len();
                    let polled = waiting[i].as_mut().poll(&mut cx);
                    prop_assert!(order.is_some() || polled == Pending);
                }
                Step::Go(i) if !waiting.is_empty() => drop(waiting.swap_remove(i % waiting.len())),
                Step::Begin if order.is_none() => order = Some(drain.begin(Ending::Drain)),
                Step::Poll(_) | Step::Go(_) | Step::Begin => {}
            }
        }
        let order = order.unwrap_or_else(|| drain.begin(Ending::Drain));
        drain.call(order, Duration::ZERO).now_or_never().expect("there is nothing to wait for");
        for wait in &mut waiting {
            prop_assert_eq!(wait.as_mut().poll(&mut cx), Ready(()));
        }
        drop(waiting);
        prop_assert!(drain.waiting().is_empty());
    }
}

#[test]
fn where_another_process_takes_over_handshakes_go_on() {
    let drain = Drain::default();
    let mut before = Box::pin(drain.wait());
    assert_eq!(before.as_mut().now_or_never(), None);
    drain.begin(Ending::HandOver);
    assert!(drain.begun() && !drain.refuses());
    assert_eq!((before.now_or_never(), drain.wait().now_or_never()), (None, None));
    assert_eq!(drain.turn().now_or_never(), Some(()), "whoever gets in is told to come again");
}
