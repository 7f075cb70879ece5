//! The XDP program's verdict by connection rates and rules.
#![expect(clippy::unwrap_used, reason = "the helpers of tests, which clippy takes for more than that")]

use std::{
    collections::{BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use limiter::kernel::Hook;
use limiter_common::{
    Counter, DenyReason, Endpoints, ServicePolicy, SourceKey, abi,
    bucket::Rate,
    ledger::RESERVATION_NS,
    policy::OnDeny,
    rule::{OWN_CONNECTIONS, OWN_RATE, RuleAction, RuleEntry},
};
use limiter_tests::{
    fixture::{self, LIMIT, PORT, policy, v4, v6},
    frame::Frame,
    kernel::{Feature, lacks},
    program::{Action, Program, now_ns},
};

/// A program whose one service has sources with so many connections each.
fn program(policy: &ServicePolicy, sources: &[&str], connections: u16) -> Program {
    fixture::program_for(Hook::Xdp, policy, sources, connections).unwrap()
}

fn rule(action: RuleAction) -> RuleEntry {
    RuleEntry { action: action as u8, ..RuleEntry::default() }
}

fn set(program: &mut Program, cidr: &str, rule: RuleEntry) {
    let (network, prefix) = cidr.split_once('/').unwrap();
    program.set_rule(network.parse().unwrap(), prefix.parse().unwrap(), rule).unwrap();
}

/// What becomes of a SYN from an address.
fn syn(program: &mut Program, source: &str) -> Action {
    let source: IpAddr = source.parse().unwrap();
    let frame = Frame { source: SocketAddr::new(source, 50_000), ..if source.is_ipv4() { v4() } else { v6() } };
    program.run(&frame.to_bytes()).unwrap().0
}

/// The verifier takes a million at most; and the more it looks at, the longer `attach` takes.
#[test]
fn the_verifier_has_little_to_look_at() {
    for hook in [Hook::Xdp, Hook::Tc, Hook::TcL3] {
        let program = Program::load_for(hook).unwrap();
        // That it was taken is all that such a kernel tells.
        if lacks(Feature::VerifiedInstructions).unwrap() {
            continue;
        }
        let looked_at = program.verified_instructions().unwrap();
        assert!(looked_at < 200_000, "{hook:?}: {looked_at} instructions");
    }
}

/// A chain of calls has 512 bytes, of which kernels before 6.8 take more than is used.
#[test]
fn every_chain_of_calls_has_room_to_spare_on_the_stack() {
    let without_delivery = lacks(Feature::Delivery).unwrap();
    let mut seen = BTreeSet::new();
    for hook in [Hook::Xdp, Hook::Tc, Hook::TcL3] {
        let mut program = Program::load_for(hook).unwrap();
        assert_eq!(program.load_delivery().is_err(), without_delivery);
        for (name, chain) in program.deepest_chains().unwrap() {
            assert!(chain.bytes <= 480, "{name}: {chain}");
            seen.insert(name);
        }
    }
    let mut all = vec![
        abi::PROGRAM_CONTROL,
        abi::PROGRAM_DELIVERY,
        abi::PROGRAM_SOCK_OPS,
        abi::PROGRAM_TC,
        abi::PROGRAM_TC_L3,
        abi::PROGRAM_XDP,
    ];
    all.retain(|name| *name != abi::PROGRAM_DELIVERY || !without_delivery);
    assert_eq!(seen.iter().map(String::as_str).collect::<Vec<_>>(), all);
}

#[test]
fn of_several_rules_the_longest_prefix_holds() {
    let mut program = program(&policy(), &[], 0);
    set(&mut program, "192.0.0.0/8", rule(RuleAction::Deny));
    set(&mut program, "192.0.2.0/24", rule(RuleAction::Allow));
    set(&mut program, "192.0.2.128/25", rule(RuleAction::Deny));
    set(&mut program, "192.0.2.200/32", rule(RuleAction::Limit));
    set(&mut program, "2001:db8::/32", rule(RuleAction::Deny));
    set(&mut program, "2001:db8:0:1::/64", rule(RuleAction::Allow));
    for (source, action) in [
        ("192.0.3.1", Action::Drop),
        ("192.0.2.7", Action::Pass),
        ("192.0.2.129", Action::Drop),
        ("192.0.2.200", Action::Pass),
        ("193.0.0.1", Action::Pass),
        ("2001:db8::1", Action::Drop),
        ("2001:db8:0:1::1", Action::Pass),
        ("2001:db9::1", Action::Pass),
    ] {
        assert_eq!(syn(&mut program, source), action, "{source}");
    }
    assert_eq!(program.counters().unwrap()[&(0, Counter::SynRule)], 3);
    assert_eq!(program.refusals().unwrap()[0].reason, DenyReason::Rule as u8);
}

#[test]
fn a_rule_for_all_of_ipv6_is_not_one_for_ipv4() {
    let mut program = program(&policy(), &[], 0);
    set(&mut program, "::/0", rule(RuleAction::Deny));
    assert_eq!(syn(&mut program, "2001:db8::7"), Action::Drop);
    assert_eq!(syn(&mut program, "192.0.2.7"), Action::Pass);
    set(&mut program, "0.0.0.0/0", rule(RuleAction::Deny));
    assert_eq!(syn(&mut program, "192.0.2.7"), Action::Drop);
}

#[test]
fn whom_a_rule_allows_is_past_every_limit() {
    let rate = Rate::new(1, 3600);
    let policy = ServicePolicy { connections_total: 1, rate, ..policy() };
    let mut program = program(&policy, &["192.0.2.7", "2001:db8::7"], LIMIT);
    let source = SourceKey::new(0, &v4().source.ip().into(), 32, 64);
    program.set_bucket(&source, now_ns() + rate.full_ns).unwrap();
    for (source, cidr) in [("192.0.2.7", "192.0.2.7/32"), ("2001:db8::7", "2001:db8::/64")] {
        assert_eq!(syn(&mut program, source), Action::Drop);
        set(&mut program, cidr, rule(RuleAction::Allow));
        assert_eq!(syn(&mut program, source), Action::Pass);
    }
}

#[test]
fn a_rule_with_limits_of_its_own_takes_the_place_of_the_services() {
    let mut program = program(&policy(), &["192.0.2.7"], LIMIT);
    let own =
        |connections_per_source| RuleEntry { own: OWN_CONNECTIONS, connections_per_source, ..rule(RuleAction::Limit) };
    for (limit, action) in [(3, Action::Pass), (2, Action::Drop), (1, Action::Drop), (0, Action::Pass)] {
        set(&mut program, "192.0.2.0/24", own(limit));
        assert_eq!(syn(&mut program, "192.0.2.7"), action, "a limit of {limit}");
    }
    // Only a rate: the service's limit holds still.
    let rate = Rate::new(1, 3600);
    set(&mut program, "192.0.2.0/24", RuleEntry { own: OWN_RATE, rate, ..rule(RuleAction::Limit) });
    assert_eq!(syn(&mut program, "192.0.2.7"), Action::Drop);
    assert_eq!(syn(&mut program, "192.0.2.8"), Action::Pass);
    program
        .set_bucket(
            &SourceKey::new(0, &Endpoints::new("192.0.2.8:1".parse().unwrap(), v4().destination).remote, 32, 64),
            now_ns() + rate.full_ns,
        )
        .unwrap();
    assert_eq!(syn(&mut program, "192.0.2.8"), Action::Drop);
    assert_eq!(program.counters().unwrap()[&(0, Counter::SynRateLimit)], 1);
}

#[test]
fn a_rule_that_has_ended_leaves_the_one_around_it() {
    let mut program = program(&policy(), &[], 0);
    set(&mut program, "192.0.0.0/8", rule(RuleAction::Deny));
    let ended = RuleEntry { expires_ns: 1, ..rule(RuleAction::Allow) };
    for cidr in ["192.0.2.0/24", "192.0.2.0/28", "192.0.2.7/32"] {
        set(&mut program, cidr, ended);
    }
    assert_eq!(syn(&mut program, "192.0.2.7"), Action::Drop);
    let hour_ns = 3_600_000_000_000;
    set(&mut program, "192.0.2.0/28", RuleEntry { expires_ns: now_ns() + hour_ns, ..ended });
    assert_eq!(syn(&mut program, "192.0.2.7"), Action::Pass);
    set(&mut program, "0.0.0.0/0", RuleEntry { expires_ns: 1, ..rule(RuleAction::Deny) });
    assert_eq!(syn(&mut program, "198.51.100.1"), Action::Pass);
}

#[test]
fn where_it_only_observes_whom_a_rule_denies_passes() {
    let mut program = program(&ServicePolicy { on_deny: OnDeny::Observe as u8, ..policy() }, &[], 0);
    set(&mut program, "192.0.2.7/32", rule(RuleAction::Deny));
    assert_eq!(syn(&mut program, "192.0.2.7"), Action::Pass);
    assert_eq!(program.counters().unwrap(), [((0, Counter::SynObservedRule), 1)].into());
}

#[test]
fn a_source_without_a_token_is_refused_and_its_neighbours_are_not() {
    let rate = Rate::new(1, 3600);
    let policy = ServicePolicy { connections_per_source: 0, rate, ..policy() };
    let mut program = program(&policy, &[], 0);
    for (number, frame) in (1..).zip([v4(), v6()]) {
        let source = SourceKey::new(0, &frame.source.ip().into(), 32, 64);
        program.set_bucket(&source, now_ns() + rate.full_ns).unwrap();
        assert_eq!(program.run(&frame.to_bytes()).unwrap().0, Action::Drop);
        let refusal = program.refusals().unwrap().pop();
        // Both hold no connection: the service's reports are one per second.
        assert_eq!(refusal.map(|refusal| refusal.reason), (number == 1).then_some(DenyReason::RateLimit as u8));
        assert_eq!(program.counters().unwrap()[&(0, Counter::SynRateLimit)], number);
        // One token, and it may ask as often as it likes: asking spends nothing.
        let word = now_ns() + rate.full_ns - rate.token_ns;
        program.set_bucket(&source, word).unwrap();
        for _ in 0..10 {
            assert_eq!(program.run(&frame.to_bytes()).unwrap().0, Action::Pass);
        }
        assert_eq!(program.bucket(&source).unwrap(), Some(word));
    }
    let neighbour = Frame { source: "192.0.2.8:1".parse().unwrap(), ..v4() };
    assert_eq!(program.run(&neighbour.to_bytes()).unwrap().0, Action::Pass);
    let neighbour = SourceKey::new(0, &neighbour.source.ip().into(), 32, 64);
    assert_eq!(program.bucket(&neighbour).unwrap(), None, "a SYN makes no bucket");
}

#[test]
fn where_it_only_observes_a_source_without_a_token_passes() {
    let rate = Rate::new(1, 3600);
    let policy = ServicePolicy { connections_per_source: 0, on_deny: OnDeny::Observe as u8, rate, ..policy() };
    let mut program = program(&policy, &[], 0);
    program.set_bucket(&SourceKey::new(0, &v4().source.ip().into(), 32, 64), now_ns() + rate.full_ns).unwrap();
    assert_eq!(program.run(&v4().to_bytes()).unwrap().0, Action::Pass);
    assert_eq!(program.counters().unwrap(), [((0, Counter::SynObservedRateLimit), 1)].into());
}

#[test]
fn a_debt_of_an_older_rate_is_forgiven() {
    let policy = ServicePolicy { connections_per_source: 0, rate: Rate::new(1000, 1), ..policy() };
    let mut program = program(&policy, &[], 0);
    let source = SourceKey::new(0, &v4().source.ip().into(), 32, 64);
    program.set_bucket(&source, now_ns() + 3_600_000_000_000).unwrap();
    assert_eq!(program.run(&v4().to_bytes()).unwrap().0, Action::Drop);
    assert!(program.bucket(&source).unwrap().unwrap() <= now_ns() + policy.rate.full_ns);
}

/// What becomes of one more SYN of a source that was at its limit, and was refused and reported a moment ago.
struct Again {
    when: &'static str,
    change: fn(&mut Program),
    action: Action,
    /// What it is counted in, beside the two that came before it.
    counted: &'static [Counter],
    /// Whether it is reported, as the first of a second is.
    reported: bool,
    /// Whether it is an occasion to look for reservations that the stack never confirmed.
    expires: bool,
}

impl Again {
    /// What a source gets that nothing speaks against any more.
    const fn admitted(when: &'static str, change: fn(&mut Program)) -> Self {
        Self { when, change, action: Action::Pass, counted: &[Counter::SynAdmitted], reported: false, expires: false }
    }

    /// What nothing has changed for.
    const fn refused(when: &'static str, change: fn(&mut Program)) -> Self {
        Self {
            when,
            change,
            action: Action::Drop,
            counted: &[Counter::SynSourceLimit],
            reported: false,
            expires: false,
        }
    }
}

fn set_policy(program: &mut Program, policy: ServicePolicy) {
    program.set_service(0, PORT, &policy).unwrap();
}

fn flooding() -> SourceKey {
    SourceKey::new(0, &v4().source.ip().into(), 32, 64)
}

/// What is overdue is looked for when it would keep somebody out, and behind what waits.
#[test]
fn a_syn_is_refused_only_for_what_is_not_overdue() {
    const WAITING: u16 = 20;
    for hook in [Hook::Xdp, Hook::Tc] {
        let mut program = Program::load_for(hook).unwrap();
        set_policy(&mut program, policy());
        let local = v4().destination;
        let reserve = |program: &mut Program, source: &str, port, opened_ns| {
            let ends = Endpoints::new(SocketAddr::new(source.parse().unwrap(), port), local);
            program.reserve(&ends, &SourceKey::new(0, &ends.remote, 32, 64), opened_ns).unwrap();
        };
        let (now, overdue) = (now_ns(), now_ns() - RESERVATION_NS);
        for port in 1..=WAITING {
            reserve(&mut program, "192.0.2.8", port, now);
        }
        for port in 1..=LIMIT {
            reserve(&mut program, "192.0.2.7", port, overdue);
        }
        assert_eq!(syn(&mut program, "192.0.2.7"), Action::Pass, "{hook:?}: all that it holds is overdue");
        assert_eq!(syn(&mut program, "192.0.2.8"), Action::Drop, "{hook:?}: nothing that it holds is");
        let counted = [(Counter::SynAdmitted, 1), (Counter::SynSourceLimit, 1), (Counter::ClosedExpired, LIMIT.into())];
        assert_eq!(program.counters().unwrap(), counted.map(|(counter, count)| ((0, counter), count)).into());
        let state = program.state(0).unwrap();
        assert_eq!((state.connections, state.unconfirmed), (WAITING.into(), WAITING.into()));
        assert_eq!(program.source(&flooding()).unwrap(), None);
    }
}

/// A flood is refused by a short way through the program. Whatever is different from a moment ago takes the long one, and is
/// counted for what it is.
#[test]
fn a_syn_refused_again_is_told_from_every_other() {
    let cases = [
        Again::refused("nothing has changed", |_| {}),
        Again {
            reported: true,
            ..Again::refused("nothing was reported", |program| {
                program.set_source(&flooding(), LIMIT.into()).unwrap();
            })
        },
        Again::refused("the report is half a second old", |program| {
            program.age_report(&flooding(), Duration::from_millis(500)).unwrap();
        }),
        Again {
            reported: true,
            ..Again::refused("the report is a second old", |program| {
                program.age_report(&flooding(), Duration::from_secs(1)).unwrap();
            })
        },
        Again {
            expires: true,
            ..Again::refused("a reservation is not confirmed", |program| {
                program.set_state(0, |state| state.unconfirmed = 1).unwrap();
            })
        },
        Again::admitted("there is room", |program| program.set_source(&flooding(), 1).unwrap()),
        Again::admitted("the limit is higher", |program| {
            set_policy(program, ServicePolicy { connections_per_source: 3, ..policy() });
        }),
        Again::admitted("there is no limit", |program| {
            set_policy(program, ServicePolicy { connections_per_source: 0, ..policy() });
        }),
        Again::admitted("a rule allows it", |program| set(program, "192.0.2.7/32", rule(RuleAction::Allow))),
        Again {
            action: Action::Drop,
            counted: &[Counter::SynRule],
            ..Again::admitted("a rule denies it", |program| set(program, "192.0.2.0/24", rule(RuleAction::Deny)))
        },
        Again {
            counted: &[Counter::SynObservedSourceLimit],
            ..Again::admitted("the service observes", |program| {
                set_policy(program, ServicePolicy { on_deny: OnDeny::Observe as u8, ..policy() });
            })
        },
        Again {
            action: Action::Transmit,
            counted: &[Counter::SynSourceLimit, Counter::ResetSent],
            ..Again::admitted("the service answers by a RST", |program| {
                set_policy(program, ServicePolicy { on_deny: OnDeny::Reset as u8, ..policy() });
            })
        },
        Again {
            action: Action::Drop,
            counted: &[Counter::SynServiceLimit],
            reported: true,
            ..Again::admitted("there is room for the source and none in the service", |program| {
                set_policy(program, ServicePolicy { connections_per_source: 3, connections_total: 1, ..policy() });
            })
        },
    ];
    for case in cases {
        let when = case.when;
        let mut program = program(&policy(), &["192.0.2.7"], LIMIT);
        for _ in 0..2 {
            assert_eq!(syn(&mut program, "192.0.2.7"), Action::Drop, "{when}");
        }
        assert_eq!(program.counters().unwrap(), [((0, Counter::SynSourceLimit), 2)].into(), "{when}");
        assert_eq!(program.refusals().unwrap().len(), 1, "{when}");
        assert_eq!(program.source(&flooding()).unwrap().unwrap().unreported, 1, "{when}");
        assert_eq!(syn(&mut program, "192.0.2.8"), Action::Pass, "{when}: its neighbour is no part of the flood");

        (case.change)(&mut program);
        assert_eq!(syn(&mut program, "192.0.2.7"), case.action, "{when}");
        let mut counted = HashMap::from([((0, Counter::SynSourceLimit), 2), ((0, Counter::SynAdmitted), 1)]);
        for &counter in case.counted {
            *counted.entry((0, counter)).or_default() += 1;
        }
        assert_eq!(program.counters().unwrap(), counted, "{when}");
        assert_eq!(program.refusals().unwrap().len(), usize::from(case.reported), "{when}");
        assert_eq!(program.state(0).unwrap().expired_ns != 0, case.expires, "{when}");
    }
}
