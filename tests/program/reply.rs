//! What the programs for XDP and TC make of the packets that they answer, byte by byte.
#![expect(clippy::unwrap_used, reason = "the helpers of tests, which clippy takes for more than that")]

use limiter::kernel::Hook;
use limiter_common::{
    Counter, ServicePolicy, model,
    policy::{OnDeny, RESET_RATE},
    rule::{RuleAction, RuleEntry},
};
use limiter_tests::{
    fixture::{PORT, v4, v6},
    frame::{CLIENT_MAC, Extension, Frame, SERVER_MAC},
    program::{Action, Program, now_ns},
    segment::flags::{ACK, RST, SYN},
};

const HOOKS: [Hook; 2] = [Hook::Xdp, Hook::Tc];

/// The options of a Linux client: MSS, SACK, timestamps, window scale.
fn options() -> Vec<u8> {
    vec![2, 4, 5, 0xb4, 4, 2, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0, 1, 3, 3, 7]
}

/// A program whose one service denies everybody, by a RST.
fn program(hook: Hook) -> Program {
    let mut program = Program::load_for(hook).unwrap();
    let policy =
        ServicePolicy { ipv4_prefix: 32, ipv6_prefix: 64, on_deny: OnDeny::Reset as u8, ..ServicePolicy::default() };
    program.set_service(0, PORT, &policy).unwrap();
    for network in ["0.0.0.0", "::"] {
        let rule = RuleEntry { action: RuleAction::Deny as u8, ..RuleEntry::default() };
        program.set_rule(network.parse().unwrap(), 0, rule).unwrap();
    }
    program
}

/// The frame of a RST to a [`Frame`], put together by hand: its network header and checksums are given.
fn rst(question: &Frame, network: &[u8], acknowledgement: u32, checksum: u16, padding: usize) -> Vec<u8> {
    let mut frame = [CLIENT_MAC, SERVER_MAC].concat();
    for tag in &question.vlan_tags {
        frame.extend(tag.to_be_bytes());
        frame.extend([0x00, 0x64]);
    }
    frame.extend(if question.source.is_ipv4() { [0x08, 0x00] } else { [0x86, 0xdd] });
    frame.extend(network);
    frame.extend([0x1f, 0x90, 0x9c, 0x40, 0, 0, 0, 0]);
    frame.extend(acknowledgement.to_be_bytes());
    frame.extend([0x50, RST | ACK, 0, 0]);
    frame.extend(checksum.to_be_bytes());
    frame.extend([0, 0]);
    frame.extend(vec![0; padding]);
    frame
}

const V4_HEADER: [u8; 20] = [0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0xb6, 0xc7, 192, 0, 2, 1, 192, 0, 2, 7];

fn v6_header() -> Vec<u8> {
    let mut header = vec![0x60, 0, 0, 0, 0, 20, 6, 64];
    for last in [1, 7] {
        header.extend([0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]);
    }
    header
}

#[test]
fn a_refused_syn_is_answered_by_a_reset_byte_by_byte() {
    HOOKS.into_iter().for_each(a_refused_syn_is_answered_by_a_reset_byte_by_byte_on);
}

fn a_refused_syn_is_answered_by_a_reset_byte_by_byte_on(hook: Hook) {
    let mut program = program(hook);
    let v6_header = v6_header();
    let rows: Vec<(&str, Frame, Vec<u8>)> = vec![
        ("IPv4, bare", v4(), rst(&v4(), &V4_HEADER, 2, 0x6ff5, 0)),
        (
            "IPv4, with options: cut, and padded to a whole frame",
            Frame { tcp_options: options(), ..v4() },
            rst(&v4(), &V4_HEADER, 2, 0x6ff5, 6),
        ),
        (
            "IPv4, with data, which is acknowledged",
            Frame { payload: vec![7; 100], ..v4() },
            rst(&v4(), &V4_HEADER, 102, 0x6f91, 6),
        ),
        ("IPv4, the last sequence number", Frame { sequence: u32::MAX, ..v4() }, rst(&v4(), &V4_HEADER, 0, 0x6ff7, 0)),
        (
            "IPv4, with options of its own, which are left out",
            Frame { ipv4_option_words: 10, ..v4() },
            rst(&v4(), &V4_HEADER, 2, 0x6ff5, 6),
        ),
        (
            "IPv4, two VLAN tags, which are kept",
            Frame { vlan_tags: vec![0x88a8, 0x8100], tcp_options: options(), ..v4() },
            rst(&Frame { vlan_tags: vec![0x88a8, 0x8100], ..v4() }, &V4_HEADER, 2, 0x6ff5, 0),
        ),
        ("IPv6, bare", v6(), rst(&v6(), &v6_header, 2, 0x9884, 0)),
        (
            "IPv6, with options and data",
            Frame { tcp_options: options(), payload: vec![7; 3], ..v6() },
            rst(&v6(), &v6_header, 5, 0x9881, 0),
        ),
        (
            "IPv6, behind extension headers and a VLAN tag",
            Frame {
                vlan_tags: vec![0x8100],
                extensions: vec![Extension::Plain(0, 1), Extension::Fragment(0, false), Extension::Authentication(4)],
                ..v6()
            },
            rst(&Frame { vlan_tags: vec![0x8100], ..v6() }, &v6_header, 2, 0x9884, 0),
        ),
    ];
    let count = rows.len() as u64;
    for (description, question, expected) in rows {
        let question = question.to_bytes();
        let (action, answer) = program.run(&question).unwrap();
        assert_eq!(action, Action::Transmit, "{description}");
        assert_eq!(answer, expected, "{description}");
        assert!(answer.len() <= question.len(), "{description}: longer than what it answers");
        assert_eq!(model::reset(&question).as_deref(), Some(&expected[..]), "{description}: the model");
    }
    let counters = [((0, Counter::SynRule), count), ((0, Counter::ResetSent), count)].into();
    assert_eq!(program.counters().unwrap(), counters);
}

#[test]
fn the_class_of_traffic_is_kept_without_its_congestion_bits() {
    HOOKS.into_iter().for_each(the_class_of_traffic_is_kept_without_its_congestion_bits_on);
}

fn the_class_of_traffic_is_kept_without_its_congestion_bits_on(hook: Hook) {
    let mut program = program(hook);
    for (frame, at, set, kept) in [(v4(), 15, 0xbb, 0xb8), (v6(), 15, 0xff, 0xc0)] {
        let mut bytes = frame.to_bytes();
        bytes[at] = set;
        let (action, answer) = program.run(&bytes).unwrap();
        assert_eq!((action, answer[at]), (Action::Transmit, kept));
        assert_eq!(model::reset(&bytes).as_deref(), Some(answer));
    }
}

#[test]
fn what_has_no_right_answer_is_dropped_without_one() {
    HOOKS.into_iter().for_each(what_has_no_right_answer_is_dropped_without_one_on);
}

fn what_has_no_right_answer_is_dropped_without_one_on(hook: Hook) {
    let mut program = program(hook);
    let changed = |frame: Frame, change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = frame.to_bytes();
        change(&mut bytes);
        bytes
    };
    let rows: Vec<(&str, Vec<u8>)> = vec![
        ("a fragment", Frame { ipv4_fragment: (true, 0), ..v4() }.to_bytes()),
        ("a fragment, IPv6", Frame { extensions: vec![Extension::Fragment(0, true)], ..v6() }.to_bytes()),
        ("to a group of stations", changed(v4(), &|frame| frame[0] = 0x01)),
        ("to all stations", changed(v6(), &|frame| frame[..6].fill(0xff))),
        ("to a group", changed(v4(), &|frame| frame[30] = 224)),
        ("to everybody", changed(v4(), &|frame| frame[30..34].fill(0xff))),
        ("from a group", changed(v4(), &|frame| frame[26] = 239)),
        ("from nobody", changed(v4(), &|frame| frame[26..30].fill(0))),
        ("to a group, IPv6", changed(v6(), &|frame| frame[38] = 0xff)),
        ("from a group, IPv6", changed(v6(), &|frame| frame[22] = 0xff)),
        ("from nobody, IPv6", changed(v6(), &|frame| frame[22..38].fill(0))),
        ("a TCP header that is too short", changed(v4(), &|frame| frame[46] = 0x40)),
        ("a TCP header past the end of the packet", changed(v4(), &|frame| frame[46] = 0x60)),
        ("a packet longer than its frame", changed(v4(), &|frame| frame[17] += 1)),
        ("a packet shorter than its headers", changed(v4(), &|frame| frame[17] -= 1)),
        ("a packet longer than its frame, IPv6", changed(v6(), &|frame| frame[19] += 1)),
        ("a packet shorter than its headers, IPv6", changed(v6(), &|frame| frame[19] -= 1)),
    ];
    let count = rows.len() as u64;
    for (description, frame) in rows {
        let (action, out) = program.run(&frame).unwrap();
        assert_eq!((action, out), (Action::Drop, &frame[..]), "{description}");
        assert_eq!(model::reset(&frame), None, "{description}: the model");
    }
    let counters = [((0, Counter::SynRule), count), ((0, Counter::ResetSuppressed), count)].into();
    assert_eq!(program.counters().unwrap(), counters);
}

/// RFC 9293: to a RST nothing is answered. And what is not a SYN alone is the stack's own business.
#[test]
fn nothing_but_a_syn_is_answered() {
    HOOKS.into_iter().for_each(nothing_but_a_syn_is_answered_on);
}

fn nothing_but_a_syn_is_answered_on(hook: Hook) {
    let mut program = program(hook);
    for flags in 0..=u8::MAX {
        let (action, _) = program.run(&v4().with_flags(flags).to_bytes()).unwrap();
        let is_syn = flags & (SYN | ACK | RST | 0x01) == SYN;
        assert_eq!(action, if is_syn { Action::Transmit } else { Action::Pass }, "flags {flags:#04x}");
    }
}

#[test]
fn past_so_many_resets_a_refused_syn_is_dropped() {
    HOOKS.into_iter().for_each(past_so_many_resets_a_refused_syn_is_dropped_on);
}

fn past_so_many_resets_a_refused_syn_is_dropped_on(hook: Hook) {
    let mut program = program(hook);
    let hour_ns = 3_600_000_000_000;
    program.set_state(0, |state| state.resets_ns = now_ns() + hour_ns).unwrap();
    assert_eq!(program.run(&v4().to_bytes()).unwrap().0, Action::Drop);
    assert_eq!(program.counters().unwrap()[&(0, Counter::ResetSuppressed)], 1);
    // A bucket from which everything but two tokens was taken.
    program.set_state(0, |state| state.resets_ns = now_ns() + RESET_RATE.full_ns - 2 * RESET_RATE.token_ns).unwrap();
    assert_eq!(program.run(&v6().to_bytes()).unwrap().0, Action::Transmit);
    let spent = program.state(0).unwrap().resets_ns;
    assert!(spent > now_ns() && spent <= now_ns() + RESET_RATE.full_ns, "a token was taken");
}
