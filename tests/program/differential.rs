//! The programs for XDP and TC and the model of admission, fed the same generated packets.
#![expect(clippy::unwrap_used, reason = "the helpers of tests, which clippy takes for more than that")]

use std::{
    iter,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use limiter::kernel::Hook;
use limiter_common::{
    Counter, Endpoints, ServicePolicy, SourceKey,
    bucket::Rate,
    model::{Admission, FastOpen, Handshake, Sources, Verdict, reset},
    policy::{OnDeny, RESET_RATE},
    rule::{OWN_CONNECTIONS, OWN_RATE, RuleAction, RuleEntry},
};
use limiter_tests::{
    frame::{Extension, Frame},
    program::{Action, Program, now_ns},
    scaled,
};

/// How many packets one program gets. Many more would find every limit reached by then.
const PACKETS: u64 = 100_000;

/// How many programs get as many, each loaded anew; `cargo xtask test --full` tries ten million packets.
const ROUNDS: u64 = 1;
const ROUNDS_IN_FULL: u64 = 100;

/// How many RSTs are sent at once.
const RESET_BURST: u64 = RESET_RATE.full_ns / RESET_RATE.token_ns;

/// So slow that no token comes back while the test runs.
const RATE: Rate = Rate { token_ns: 3_600_000_000_000, full_ns: 7_200_000_000_000 };

/// Four services with different limits, prefixes and manners.
fn services() -> [(u16, u16, ServicePolicy); 4] {
    let base = ServicePolicy { ipv4_prefix: 32, ipv6_prefix: 64, ..ServicePolicy::default() };
    [
        (
            0,
            8080,
            ServicePolicy {
                connections_per_source: 2,
                connections_per_wide_source: 5,
                connections_total: 60,
                wide_ipv4_prefix: 29,
                wide_ipv6_prefix: 63,
                ..base
            },
        ),
        (
            1,
            443,
            ServicePolicy {
                connections_per_source: 3,
                connections_total_all: 250,
                rate: RATE,
                ipv4_prefix: 28,
                ipv6_prefix: 120,
                ..base
            },
        ),
        (
            3,
            9001,
            ServicePolicy { connections_per_source: 1, service_rate: RATE, on_deny: OnDeny::Reset as u8, ..base },
        ),
        (
            2,
            9000,
            ServicePolicy {
                connections_per_source: 1,
                connections_total: 12,
                rate: RATE,
                on_deny: OnDeny::Observe as u8,
                ..base
            },
        ),
    ]
}

/// Rules one in the other, some of which have ended.
fn rules(now_ns: u64) -> Vec<((IpAddr, u8), RuleEntry)> {
    let of = |action: RuleAction| RuleEntry { action: action as u8, ..RuleEntry::default() };
    let own =
        RuleEntry { own: OWN_CONNECTIONS | OWN_RATE, connections_per_source: 5, rate: RATE, ..of(RuleAction::Limit) };
    let ended = |rule: RuleEntry| RuleEntry { expires_ns: now_ns, ..rule };
    let later = |rule: RuleEntry| RuleEntry { expires_ns: now_ns + 3_600_000_000_000, ..rule };
    [
        ("198.51.100.0", 29, of(RuleAction::Allow)),
        ("198.51.100.4", 30, own),
        ("198.51.100.5", 32, ended(of(RuleAction::Deny))),
        ("198.51.100.8", 30, later(of(RuleAction::Deny))),
        ("198.51.100.9", 32, RuleEntry { own: OWN_CONNECTIONS, ..own }),
        ("0.0.0.0", 0, ended(of(RuleAction::Deny))),
        ("::", 0, of(RuleAction::Limit)),
        ("2001:db8::", 62, own),
        ("2001:db8:0:1::", 64, of(RuleAction::Allow)),
        ("2001:db8:0:1::8", 125, of(RuleAction::Deny)),
        ("2001:db8:0:1::8", 127, ended(of(RuleAction::Limit))),
        ("2001:db8:0:1::8", 128, ended(of(RuleAction::Allow))),
    ]
    .map(|(network, prefix, rule)| ((network.parse().expect("an address"), prefix), rule))
    .into()
}

/// Few addresses and ports, so that packets meet connections and limits.
fn address(random: &mut fastrand::Rng, v4: bool) -> IpAddr {
    let last = random.u8(0..24);
    if v4 {
        IpAddr::V4(Ipv4Addr::new(198, 51, 100, last))
    } else {
        let mapped = random.u64(0..8) == 0;
        if mapped {
            IpAddr::V6(Ipv4Addr::new(198, 51, 100, last).to_ipv6_mapped())
        } else {
            IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, random.u16(0..4), 0, 0, 0, u16::from(last)))
        }
    }
}

fn frame(random: &mut fastrand::Rng) -> Vec<u8> {
    let v4 = random.u64(0..2) == 0;
    let source = SocketAddr::new(address(random, v4), 1 + random.u16(0..6));
    let local: IpAddr =
        if v4 { Ipv4Addr::new(192, 0, 2, 1).into() } else { Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into() };
    let port = [8080, 8080, 443, 9000, 9001, 22][random.usize(0..6)];
    let mut frame = Frame::syn(source, SocketAddr::new(local, port));
    frame.flags = match random.u64(0..4) {
        0 | 1 => 0x02,
        2 => 0x10,
        _ => random.u8(..),
    };
    let tags = if random.u64(0..16) == 0 { random.u64(3..7) } else { random.u64(0..4).saturating_sub(1) };
    frame.vlan_tags = (0..tags).map(|_| if random.u64(0..2) == 0 { 0x8100 } else { 0x88a8 }).collect();
    frame.ipv4_option_words = if random.u64(0..3) == 0 { random.u8(0..11) } else { 0 };
    if random.u64(0..6) == 0 {
        frame.ipv4_fragment = (random.u64(0..2) == 0, if random.u64(0..2) == 0 { 0 } else { random.u16(0..0x2000) });
    }
    if random.u64(0..3) == 0 {
        frame.extensions = (0..random.u64(0..10))
            .map(|_| match random.u64(0..6) {
                0 => Extension::Authentication(random.u8(0..6)),
                1 => Extension::Fragment(
                    if random.u64(0..3) == 0 { random.u16(0..0x2000) } else { 0 },
                    random.u64(0..2) == 0,
                ),
                2 => Extension::Plain(random.u8(..), 0),
                _ => Extension::Plain([0, 43, 60, 135][random.usize(0..4)], random.u8(0..3)),
            })
            .collect();
    }
    frame.sequence = random.u32(..);
    frame.tcp_options = (0..random.usize(0..11) * 4).map(|_| random.u8(..)).collect();
    frame.payload = vec![0; random.usize(0..40)];
    if random.u64(0..2) == 0 {
        // Right ones among them, and cut off wherever the header ends.
        frame.tcp_options = iter::repeat_with(|| option(random)).take(8).flatten().collect();
        frame.tcp_options.resize(random.usize(0..11) * 4, 0);
    }
    let mut bytes = frame.to_bytes();
    if random.u64(0..8) == 0 {
        // A length that is not that of the packet.
        let at = 14 + 4 * frame.vlan_tags.len() + if v4 { 2 } else { 4 };
        let length = [random.u16(0..100), random.u16(..)][random.usize(0..2)];
        bytes[at..at + 2].copy_from_slice(&length.to_be_bytes());
    }
    if random.u64(0..5) == 0 {
        for _ in 0..=random.u64(0..3) {
            let at = random.usize(0..bytes.len());
            bytes[at] = random.u8(..);
        }
    }
    if random.u64(0..8) == 0 {
        bytes.truncate(14 + random.usize(0..bytes.len()));
    }
    bytes
}

/// A TCP option, or what is like one.
fn option(random: &mut fastrand::Rng) -> Vec<u8> {
    match random.u8(0..9) {
        0 => vec![0],
        1..4 => vec![1],
        4 => vec![2, 4, 5, 0xb4],
        5 => vec![34, random.u8(0..5), random.u8(..), random.u8(..)],
        6 => vec![254, 4, 0xf9, 0x89],
        7 => vec![254, random.u8(..), random.u8(..), random.u8(..)],
        _ => vec![random.u8(..), random.u8(0..6)],
    }
}

/// A frame as it is after a verdict.
fn left(frame: &[u8], verdict: Verdict) -> Vec<u8> {
    let mut frame = frame.to_vec();
    if let Verdict::PassWithout(FastOpen { option, tcp }) = verdict {
        // RFC 1624: HC' = ~(~HC + ~m + m')
        let word =
            |frame: &[u8], at: usize| u32::from(frame[at]) << 8 | frame.get(at + 1).map_or(0, |low| u32::from(*low));
        let of_option = option - (option - tcp) % 2;
        let before = word(&frame, of_option);
        frame[option] = 253;
        let mut sum = (!word(&frame, tcp + 16) & 0xffff) + (!before & 0xffff) + word(&frame, of_option);
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        let [_, _, high, low] = (!sum).to_be_bytes();
        frame[tcp + 16..tcp + 18].copy_from_slice(&[high, low]);
    }
    frame
}

#[test]
fn xdp_and_model_agree_on_generated_packets() {
    program_and_model_agree(Hook::Xdp);
}

#[test]
fn tc_and_model_agree_on_generated_packets() {
    program_and_model_agree(Hook::Tc);
}

fn program_and_model_agree(hook: Hook) {
    // Another seed each time finds more; the seed of a failure is in its message.
    let given = std::env::var("LIMITER_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    for _ in 0..scaled(ROUNDS, ROUNDS_IN_FULL) {
        round(hook, given.unwrap_or_else(|| fastrand::u64(..)));
    }
}

fn round(hook: Hook, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut program = Program::load_for(hook).unwrap();
    let mut model = Admission { ledger_size: 1024, now_ns: now_ns(), ..Admission::default() };
    for (index, port, policy) in services() {
        program.set_service(index, port, &policy).unwrap();
        model.ports.insert(port, index);
        model.policies.insert(index, policy);
    }
    for (cidr, rule) in rules(model.now_ns) {
        let rule = program.set_rule(cidr.0, cidr.1, rule).unwrap();
        model.rules.insert(cidr, rule);
    }
    let (mut drops, mut answers, mut voided) = (0, 0, 0);
    for number in 0..PACKETS {
        // Connections come by now and then, as the stack would confirm them.
        if number % 1000 == 0 {
            for (index, port, policy) in services() {
                let remote = SocketAddr::new(address(&mut random, number % 2000 == 0), 1 + random.u16(0..6));
                let local: IpAddr = if remote.ip().to_canonical().is_ipv4() {
                    Ipv4Addr::new(192, 0, 2, 1).into()
                } else {
                    Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into()
                };
                let key = Endpoints::new(remote, SocketAddr::new(local, port));
                let sources = Sources::of(index, &policy, &key.remote);
                if model.ledger.insert(key, sources).is_none() {
                    program.add_connection(&key, &sources.narrow).unwrap();
                    if let Some(wide) = &sources.wide {
                        program.count_at(wide).unwrap();
                    }
                }
                // To each service connections were opened just now.
                let word = (model.now_ns + RATE.token_ns * random.u64(1..4)).min(model.now_ns + RATE.full_ns);
                model.service_rates.insert(index, word);
                program.set_state(index, |state| state.bucket = word).unwrap();
                // And somebody has opened one, two or more of them just now.
                let someone = address(&mut random, number % 2000 == 0).into();
                let source = SourceKey::new(index, &someone, policy.ipv4_prefix, policy.ipv6_prefix);
                let word = model.now_ns + RATE.token_ns * random.u64(1..4);
                model.rates.insert(source, word.min(model.now_ns + RATE.full_ns));
                program.set_bucket(&source, word).unwrap();
            }
        }
        // The model knows no limit of RSTs, so it is not to be reached.
        if number % (RESET_BURST / 2) == 0 {
            program.set_state(3, |state| state.resets_ns = 0).unwrap();
        }
        let frame = frame(&mut random);
        if !program.takes(&frame) {
            continue;
        }
        // Nothing listens in this test's kernel, so no segment completes a handshake.
        let wanted = model.admit(&frame, |_| Handshake::None);
        let (action, out) = program.run(&frame).unwrap();
        let wanted_action = match wanted {
            Verdict::Drop => Action::Drop,
            Verdict::Answer => Action::Transmit,
            Verdict::Pass | Verdict::PassWithout(_) | Verdict::Reset => Action::Pass,
        };
        assert_eq!(action, wanted_action, "seed {seed}, packet {number}: {frame:02x?}");
        if wanted == Verdict::Answer {
            assert_eq!(Some(out), reset(&frame).as_deref(), "seed {seed}, the answer to packet {number}: {frame:02x?}");
            answers += 1;
        } else {
            assert_eq!(out, left(&frame, wanted), "seed {seed}, packet {number} after {wanted:?}");
        }
        voided += u64::from(matches!(wanted, Verdict::PassWithout(_)));
        drops += u64::from(action == Action::Drop);
        if number % 5000 == 0 {
            assert_eq!(program.counters().unwrap(), model.counters, "seed {seed}, up to packet {number}");
        }
    }
    assert_eq!(program.counters().unwrap(), model.counters, "seed {seed}");
    for counter in [Counter::SynRateLimit, Counter::SynRule, Counter::SynSourceLimit, Counter::HeadersHidden] {
        assert!(model.counters.contains_key(&(1, counter)), "no packet was refused for {}", counter.name());
    }
    assert!(voided > PACKETS / 1000, "{voided} Fast Open options");
    assert!((PACKETS / 100..PACKETS / 2).contains(&drops), "{drops} drops: the packets don't try the limits");
    assert!(answers > PACKETS / 200, "{answers} answers");
    assert!(model.counters.contains_key(&(3, Counter::ResetSuppressed)), "no packet was without a right answer");
}
