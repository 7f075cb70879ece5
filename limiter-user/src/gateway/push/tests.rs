use std::{
    collections::{HashMap, VecDeque},
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    task::{Context, Wake},
};

use bytes::Bytes;
use proptest::prelude::*;
use tokio::time::Instant;

use super::{channel::ENTRY_BYTES, *};
use crate::gateway::close::End;

/// Counts how often it was woken.
#[derive(Default)]
struct Bell(AtomicUsize);

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Relaxed);
    }
}

/// A session as far as its mailbox goes.
struct Session {
    mail: Box<Mailbox>,
    bell: Arc<Bell>,
}

impl Session {
    fn new(hub: &Arc<Hub>, room: Option<&str>, user: Option<&str>) -> Self {
        Self { mail: hub.enter(room, user).unwrap(), bell: Arc::default() }
    }

    fn woken(&self) -> usize {
        self.bell.0.load(Relaxed)
    }

    fn try_take(&mut self) -> Poll<Result<Vec<String>, End>> {
        let waker = Waker::from(Arc::clone(&self.bell));
        let polled = self.mail.poll_take(&mut Context::from_waker(&waker), Instant::now());
        polled.map_ok(|frames| frames.iter().map(text).collect())
    }

    /// All there is.
    fn take(&mut self) -> Vec<String> {
        let mut all = Vec::new();
        while let Poll::Ready(taken) = self.try_take() {
            all.extend(taken.unwrap());
        }
        all
    }

    fn watch(&mut self) -> Result<(), End> {
        let waker = Waker::from(Arc::clone(&self.bell));
        self.mail.watch(&mut Context::from_waker(&waker), true)
    }

    /// False: it has to wait.
    fn say(&mut self, text: &str) -> bool {
        let waker = Waker::from(Arc::clone(&self.bell));
        let mut frames = VecDeque::from([frame(Kind::Text, text.as_bytes())]);
        self.mail.poll_publish(&mut Context::from_waker(&waker), &mut frames).is_ready()
    }
}

fn text(frame: &Bytes) -> String {
    let from = frame.len() - super::frame::payload_length(frame);
    String::from_utf8(frame[from..].to_vec()).unwrap()
}

fn hub(limit: usize) -> Arc<Hub> {
    Hub::new(limit, Arc::default())
}

fn numbered(from: usize, to: usize) -> Vec<String> {
    (from..to).map(|n| n.to_string()).collect()
}

#[tokio::test]
async fn everybody_else_in_the_room_gets_a_message_and_it_is_kept_once() {
    let hub = hub(1 << 20);
    let mut a = Session::new(&hub, Some("/a"), None);
    let mut others: Vec<_> = (0..20).map(|_| Session::new(&hub, Some("/a"), None)).collect();
    let mut elsewhere = Session::new(&hub, Some("/b"), None);
    assert!(a.say("hello"));
    let waker = Waker::noop();
    let mut addresses = Vec::new();
    for other in &mut others {
        let Poll::Ready(Ok(frames)) = other.mail.poll_take(&mut Context::from_waker(waker), Instant::now()) else {
            panic!("there is something")
        };
        assert_eq!(frames.len(), 1);
        addresses.push(frames[0].as_ptr());
        assert!(other.take().is_empty(), "once");
    }
    addresses.dedup();
    assert_eq!(addresses.len(), 1, "one frame for all");
    assert!(a.take().is_empty() && elsewhere.take().is_empty());
    assert_eq!(hub.channel(Recipients::Room("/a")).unwrap().lock().cost(), 0, "nothing is kept that all have");
}

#[tokio::test]
async fn a_room_is_there_as_long_as_it_has_members() {
    let hub = hub(1 << 20);
    let a = Session::new(&hub, Some("/a"), Some("alice"));
    let b = Session::new(&hub, Some("/a"), None);
    let push = Push(Arc::clone(&hub));
    assert_eq!((push.rooms("", 9), push.users("", 9)), (vec![("/a".into(), 2)], vec![]));
    drop(a);
    assert_eq!((push.rooms("", 9), hub.metrics.rooms.get()), (vec![("/a".into(), 1)], 1));
    drop(b);
    assert_eq!((push.rooms("", 9), hub.metrics.rooms.get()), (vec![], 0));
}

#[tokio::test]
async fn rooms_are_listed_in_pages() {
    let hub = hub(1 << 20);
    let _members: Vec<_> = ["/c", "/a", "/b"].map(|room| Session::new(&hub, Some(room), None)).into();
    let push = Push(Arc::clone(&hub));
    let names =
        |after, limit| push.rooms(after, limit).into_iter().map(|(name, _)| name.to_string()).collect::<Vec<_>>();
    assert_eq!(names("", 2), ["/a", "/b"]);
    assert_eq!(names("/b", 2), ["/c"]);
    assert!(names("/c", 2).is_empty());
}

#[tokio::test]
async fn without_a_hand_on_it_a_session_without_a_room_has_no_mailbox() {
    let hub = hub(1 << 20);
    assert!(hub.enter(None, Some("alice")).is_none());
    let push = hub.push();
    let mut alice = Session::new(&hub, None, Some("alice"));
    assert_eq!(push.publish(Recipients::User("alice"), Content::Text("to her")).await, 1);
    assert_eq!(push.publish(Recipients::All, Content::Text("to all")).await, 1);
    assert_eq!(push.publish(Recipients::User("bob"), Content::Text("to nobody")).await, 0);
    assert_eq!(push.publish(Recipients::Room("/"), Content::Text("to nobody")).await, 0);
    assert_eq!(alice.take(), ["to her", "to all"]);
}

#[tokio::test]
async fn what_comes_from_several_channels_is_in_the_order_of_its_publisher() {
    let hub = hub(1 << 20);
    let push = hub.push();
    let mut alice = Session::new(&hub, Some("/a"), Some("alice"));
    let to = [Recipients::Room("/a"), Recipients::All, Recipients::User("alice"), Recipients::All];
    for n in 0..40 {
        assert_eq!(push.publish(to[n % 4], Content::Text(&n.to_string())).await, 1);
    }
    assert_eq!(alice.take(), numbered(0, 40));
}

#[tokio::test]
async fn who_does_not_read_ends_and_holds_no_more_than_its_queue() {
    let limit = 20 * (ENTRY_BYTES + 12);
    let hub = hub(limit);
    let mut sender = Session::new(&hub, Some("/a"), None);
    let mut reader = Session::new(&hub, Some("/a"), None);
    let mut slow = Session::new(&hub, Some("/a"), None);
    assert!(slow.take().is_empty());
    let room = hub.channel(Recipients::Room("/a")).unwrap();
    for n in 0..100 {
        assert!(sender.say(&format!("{n:10}")));
        assert_eq!(reader.take(), [format!("{n:10}")]);
        assert_eq!(slow.woken(), n + 1, "it is told of each");
        assert_eq!(slow.watch().is_ok(), n <= 20, "{n}");
        assert!(room.lock().cost() <= limit + ENTRY_BYTES + 12);
    }
    assert!(matches!(slow.try_take(), Poll::Ready(Err(End::SlowConsumer))));
    assert!(hub.metrics.push_lost.get() > 0);
    drop(slow);
    assert_eq!(room.lock().entries(), 0, "nobody else is behind");
    assert_eq!(room.lock().cost(), 0);
}

#[tokio::test]
async fn a_message_longer_than_the_queue_reaches_who_is_not_behind() {
    let hub = hub(1000);
    let mut a = Session::new(&hub, Some("/a"), None);
    let mut b = Session::new(&hub, Some("/a"), None);
    let long = "x".repeat(100_000);
    for _ in 0..3 {
        assert!(a.say(&long));
        assert_eq!(b.take(), std::slice::from_ref(&long));
    }
}

#[tokio::test]
async fn a_sender_waits_for_those_who_have_had_no_turn_and_not_for_the_slow() {
    let limit = 10 * (ENTRY_BYTES + 3);
    let hub = hub(limit);
    let mut sender = Session::new(&hub, Some("/a"), None);
    let mut reader = Session::new(&hub, Some("/a"), None);
    let mut slow = Session::new(&hub, Some("/a"), None);
    assert!(reader.take().is_empty() && slow.take().is_empty());
    let mut said = 0;
    while sender.say("x") {
        said += 1;
        assert!(said < 20, "it never waits");
    }
    assert_eq!(sender.woken(), 0);
    slow.watch().unwrap();
    assert_eq!(sender.woken(), 0, "the reader has had no turn");
    assert_eq!(reader.take().len(), said, "nothing is lost to somebody who was only waiting for a turn");
    assert_eq!(sender.woken(), 1);
    assert!(sender.say("y"), "the slow one has had its turn");
}

#[tokio::test]
async fn nobody_waits_for_who_has_left() {
    let hub = hub(4 * ENTRY_BYTES);
    let mut sender = Session::new(&hub, Some("/a"), None);
    let mut gone = Session::new(&hub, Some("/a"), None);
    let _other = Session::new(&hub, Some("/a"), None);
    assert!(gone.take().is_empty());
    while sender.say("x") {}
    drop(gone);
    assert_eq!(sender.woken(), 1);
    assert!(sender.say("y"));
}

#[tokio::test]
async fn own_messages_are_no_loss_of_their_sender() {
    let hub = hub(4 * ENTRY_BYTES);
    let mut sender = Session::new(&hub, Some("/a"), None);
    let mut slow = Session::new(&hub, Some("/a"), None);
    assert!(sender.take().is_empty() && slow.take().is_empty());
    for _ in 0..50 {
        slow.watch().unwrap_or(());
        assert!(sender.say("x"));
    }
    assert!(matches!(slow.watch(), Err(End::SlowConsumer)));
    assert!(sender.watch().is_ok() && sender.take().is_empty());
}

#[tokio::test]
async fn a_user_who_has_to_leave_gets_what_was_published_before_and_nothing_after() {
    let hub = hub(1 << 20);
    let push = hub.push();
    let mut reader = Session::new(&hub, None, Some("alice"));
    let mut stalled = Session::new(&hub, None, Some("alice"));
    push.publish(Recipients::User("alice"), Content::Text("before")).await;
    assert_eq!(push.disconnect("alice", 4000, Some("bye")).await, 2);
    push.publish(Recipients::User("alice"), Content::Text("after")).await;
    let mut later = Session::new(&hub, None, Some("alice"));
    let Poll::Ready(Ok(before)) = reader.try_take() else { panic!("there is something") };
    assert_eq!(before, ["before"]);
    let Poll::Ready(Err(End::Kicked(kick))) = reader.try_take() else { panic!("it has to leave") };
    assert_eq!((u16::from(kick.frame.code), kick.frame.reason.as_str()), (4000, "bye"));
    assert!(matches!(stalled.watch(), Err(End::Kicked(_))), "it is not waited for");
    assert!(later.take().is_empty() && later.watch().is_ok());
    assert_eq!(push.disconnect("bob", 4000, None).await, 0);
}

#[tokio::test]
async fn a_turn_that_ends_before_all_is_taken_is_no_reason_to_leave_early() {
    let hub = hub(1 << 20);
    let push = hub.push();
    let mut alice = Session::new(&hub, None, Some("alice"));
    let long = "x".repeat(10_000);
    for _ in 0..5 {
        push.publish(Recipients::User("alice"), Content::Text(&long)).await;
    }
    push.disconnect("alice", 4000, None).await;
    let mut taken = 0;
    let end = loop {
        match alice.try_take() {
            Poll::Ready(Ok(some)) => taken += some.len(),
            Poll::Ready(Err(end)) => break end,
            Poll::Pending => panic!("it has to leave"),
        }
        assert!(alice.mail.watch(&mut Context::from_waker(Waker::noop()), false).is_ok());
    };
    assert!(matches!(end, End::Kicked(_)));
    assert_eq!(taken, 5);
}

#[tokio::test]
async fn places_of_those_who_left_are_used_again() {
    let hub = hub(1 << 20);
    let mut keeper = Session::new(&hub, Some("/a"), None);
    for round in 0..50 {
        let mut others: Vec<_> = (0..round).map(|_| Session::new(&hub, Some("/a"), None)).collect();
        assert!(keeper.say("x"));
        // Some leave with the message unread, some after, in no order.
        for at in (0..others.len()).rev().step_by(2) {
            others.swap_remove(at);
        }
        let mut fresh = Session::new(&hub, Some("/a"), None);
        assert!(fresh.take().is_empty(), "what was said before is not for it");
        for other in &mut others {
            assert_eq!(other.take(), ["x"]);
        }
        let room = hub.channel(Recipients::Room("/a")).unwrap();
        assert_eq!(room.lock().entries(), 0);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Join(usize),
    Leave(usize),
    Say(usize),
    Take(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let who = 0..6_usize;
    prop_oneof![
        1 => who.clone().prop_map(Step::Join),
        1 => who.clone().prop_map(Step::Leave),
        4 => who.clone().prop_map(Step::Say),
        3 => who.prop_map(Step::Take),
    ]
}

proptest! {
    /// Each member gets every message of others from its joining on, once and in the order in which all get them; or it has lost
    /// one and is told so, and then it was behind by more than the queue.
    #[test]
    fn a_member_gets_all_there_is_once_and_in_order_or_is_told(
        steps in proptest::collection::vec(step(), 1..200),
        limit in prop_oneof![Just(1_usize << 20), Just(8 * ENTRY_BYTES)],
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let _in_it = runtime.enter();
        let hub = hub(limit);
        let mut sessions: HashMap<usize, (Session, usize)> = HashMap::new();
        // What was said, and by whom (a session's own number: a place is used again).
        let mut said: Vec<(usize, usize)> = Vec::new();
        let mut names: HashMap<usize, usize> = HashMap::new();
        for (time, step) in steps.into_iter().enumerate() {
            match step {
                Step::Join(who) => {
                    sessions.entry(who).or_insert_with(|| {
                        names.insert(who, time);
                        (Session::new(&hub, Some("/a"), None), said.len())
                    });
                }
                Step::Leave(who) => _ = sessions.remove(&who),
                Step::Say(who) => {
                    if let Some((session, _)) = sessions.get_mut(&who) {
                        // Whether it would have to wait is another test's.
                        let mut frames = VecDeque::from([frame(Kind::Text, time.to_string().as_bytes())]);
                        session.mail.publish(&mut frames);
                        said.push((time, names[&who]));
                    }
                }
                Step::Take(who) => {
                    let Some((session, from)) = sessions.get_mut(&who) else { continue };
                    let expected: Vec<String> = said[*from..]
                        .iter()
                        .filter(|(_, by)| *by != names[&who])
                        .map(|(time, _)| time.to_string())
                        .collect();
                    let mut got = Vec::new();
                    let lost = loop {
                        match session.try_take() {
                            Poll::Ready(Ok(some)) => got.extend(some),
                            Poll::Ready(Err(end)) => break Some(end),
                            Poll::Pending => break None,
                        }
                    };
                    if let Some(end) = lost {
                        prop_assert!(matches!(end, End::SlowConsumer));
                        prop_assert!(expected.len() * (ENTRY_BYTES + 2) + said.len() * (ENTRY_BYTES + 5) > limit);
                        prop_assert!(got.is_empty());
                        sessions.remove(&who);
                    } else {
                        prop_assert_eq!(got, expected);
                        *from = said.len();
                    }
                }
            }
            if let Some(room) = hub.channel(Recipients::Room("/a")) {
                prop_assert!(room.lock().cost() <= limit + ENTRY_BYTES + 5);
            }
        }
    }
}

/// Real tasks on several threads, which come and go while others publish.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nothing_is_missed_by_tasks_that_sleep_while_others_come_and_go() {
    const SENDERS: usize = 4;
    const EACH: usize = 300;
    let hub = hub(64 * 1024);
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..200 {
        let mut mail = hub.enter(Some("/a"), None).unwrap();
        tasks.spawn(async move {
            let mut got: Vec<String> = Vec::new();
            while got.len() < SENDERS * EACH {
                let frames = poll_fn(|cx| mail.poll_take(cx, Instant::now())).await.unwrap();
                got.extend(frames.iter().map(text));
            }
            got
        });
    }
    let passers_by = Arc::clone(&hub);
    let passing = tokio::spawn(async move {
        loop {
            drop(passers_by.enter(Some("/a"), None));
            yield_now().await;
        }
    });
    let mut senders = tokio::task::JoinSet::new();
    for sender in 0..SENDERS {
        // They leave at once when they have said all; what they hear is not taken.
        let push = Push(Arc::clone(&hub));
        senders.spawn(async move {
            for n in 0..EACH {
                push.publish(Recipients::Room("/a"), Content::Text(&format!("{sender}:{n}"))).await;
            }
        });
    }
    senders.join_all().await;
    let all = tasks.join_all().await;
    passing.abort();
    for got in &all {
        assert_eq!(got, &all[0], "one order for all");
    }
    for sender in 0..SENDERS {
        let own: Vec<_> = all[0].iter().filter_map(|text| text.strip_prefix(&format!("{sender}:"))).collect();
        assert_eq!(own, numbered(0, EACH), "the order of each sender");
    }
}
