use proptest::prelude::*;

use super::*;

fn account(name: &str) -> Account {
    Account { user: name.into(), key: None }
}

fn limits(connections: u32, on_excess: OnExcess, attempts_per_minute: u32) -> UserLimits {
    UserLimits { connections, on_excess, attempts_per_minute }
}

fn is_replaced(seat: &Seat) -> bool {
    futures_util::FutureExt::now_or_never(seat.replaced()).is_some()
}

#[test]
fn the_newer_is_refused_or_the_older_replaced_and_others_are_left_alone() {
    let (users, present) = (Arc::<Users>::default(), Gauge::default());
    let now = Instant::now();
    let enter = |name: &str, on_excess| users.enter(account(name), limits(2, on_excess, 0), present.clone(), now);
    let first = enter("alice", OnExcess::Refuse).unwrap();
    let second = enter("alice", OnExcess::Refuse).unwrap();
    assert_eq!(enter("alice", OnExcess::Refuse).err(), Some(Crowded::Connections(2)));
    let other = enter("bob", OnExcess::Refuse).unwrap();
    let by_key = Account { user: "alice".into(), key: Some([1; 32]) };
    let _by_key = users.enter(by_key, limits(1, OnExcess::Refuse, 0), present.clone(), now).unwrap();
    assert_eq!(present.get(), 3);

    let third = enter("alice", OnExcess::Replace).unwrap();
    assert!(!is_replaced(&first), "nobody leaves before it is sure that the new one begins");
    third.take_over();
    assert!(is_replaced(&first) && !is_replaced(&third) && !is_replaced(&other));
    drop(first);
    third.take_over();
    assert!(!is_replaced(&second), "once is enough");
}

#[test]
fn nobody_leaves_for_one_that_comes_to_nothing() {
    let (users, present) = (Arc::<Users>::default(), Gauge::default());
    let enter = || users.enter(account("a"), limits(1, OnExcess::Replace, 0), present.clone(), Instant::now()).unwrap();
    let first = enter();
    let second = enter();
    let third = enter();
    second.take_over();
    assert!(is_replaced(&first) && !is_replaced(&second) && !is_replaced(&third));
    drop(third);
    assert!(!is_replaced(&second));
    drop((first, second));
    assert_eq!(present.get(), 0);
    assert!(users.accounts().by_name.is_empty());
}

#[test]
fn attempts_are_counted_for_a_minute_wherever_the_sessions_end() {
    let (users, present) = (Arc::<Users>::default(), Gauge::default());
    let start = Instant::now();
    let enter = |second| {
        let now = start + Duration::from_secs(second);
        users.enter(account("a"), limits(0, OnExcess::Refuse, 2), present.clone(), now).map(drop)
    };
    assert_eq!(enter(0), Ok(()));
    assert_eq!(enter(10), Ok(()));
    assert_eq!(enter(20), Err(Crowded::Attempts(Duration::from_secs(40))));
    assert_eq!(enter(59), Err(Crowded::Attempts(Duration::from_secs(1))));
    assert_eq!(enter(60), Ok(()));
    assert_eq!(enter(60), Err(Crowded::Attempts(Duration::from_secs(10))));
}

#[test]
fn accounts_that_nobody_uses_are_forgotten() {
    let (users, present) = (Arc::<Users>::default(), Gauge::default());
    let start = Instant::now();
    for n in 0..20_000_u64 {
        let now = start + Duration::from_millis(n * 100);
        let limits = limits(1, OnExcess::Refuse, 5);
        drop(users.enter(account(&n.to_string()), limits, present.clone(), now).unwrap());
    }
    // A minute has 600 of them.
    assert!(users.accounts().by_name.len() <= 2 * SWEEP_FROM, "{}", users.accounts().by_name.len());
    assert_eq!(present.get(), 0);
}

#[derive(Clone, Debug)]
enum Step {
    Enter(u8, bool),
    TakeOver(usize),
    Leave(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..3u8, any::<bool>()).prop_map(|(user, refuse)| Step::Enter(user, refuse)),
        2 => any::<usize>().prop_map(Step::TakeOver),
        3 => any::<usize>().prop_map(Step::Leave),
    ]
}

proptest! {
    #[test]
    fn those_who_began_and_were_not_told_to_leave_are_never_too_many(
        steps in prop::collection::vec(step(), 0..200),
        limit in 1..4u32,
    ) {
        let (users, present) = (Arc::<Users>::default(), Gauge::default());
        // A user's number, whether the session has begun, and its seat.
        let mut seats: Vec<(u8, bool, Seat)> = Vec::new();
        for step in steps {
            match step {
                Step::Enter(user, refuse) => {
                    let on_excess = if refuse { OnExcess::Refuse } else { OnExcess::Replace };
                    let entered =
                        users.enter(account(&user.to_string()), limits(limit, on_excess, 0), present.clone(), Instant::now());
                    if let Ok(seat) = entered {
                        seats.push((user, false, seat));
                    } else {
                        prop_assert!(refuse);
                    }
                }
                Step::TakeOver(i) if !seats.is_empty() => {
                    let i = i % seats.len();
                    seats[i].2.take_over();
                    seats[i].1 = true;
                }
                Step::Leave(i) if !seats.is_empty() => {
                    drop(seats.remove(i % seats.len()));
                }
                _ => {}
            }
            seats.retain(|(_, _, seat)| !is_replaced(seat));
            for user in 0..3u8 {
                let begun = seats.iter().filter(|(name, begun, _)| *name == user && *begun).count();
                prop_assert!(begun <= usize::try_from(limit).unwrap(), "{begun} of user {user}");
            }
            let present_now: std::collections::HashSet<u8> = seats.iter().map(|(user, ..)| *user).collect();
            prop_assert_eq!(usize::try_from(present.get()).unwrap(), present_now.len());
        }
        drop(seats);
        prop_assert_eq!(present.get(), 0);
        prop_assert!(users.accounts().by_name.is_empty());
    }
}
