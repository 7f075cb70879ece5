//! The verdict of the programs for XDP and TC on every shape of packet, below the limit and at it, row by row.
#![expect(clippy::unwrap_used, reason = "the helpers of tests, which clippy takes for more than that")]

use std::{collections::HashMap, net::SocketAddr};

use limiter::kernel::Hook;
use limiter_common::{Counter, DenyReason, Endpoints, ServicePolicy, SourceKey, event::Stage, policy::OnDeny};
use limiter_tests::{
    fixture::{self, LIMIT, policy, v4, v6},
    frame::{Extension, Frame},
    program::{Action, Program},
    segment::flags::{ACK, FIN, RST, SYN},
};

/// A program whose one service has sources with so many connections each.
fn program(policy: &ServicePolicy, sources: &[&str], connections: u16) -> Program {
    program_for(Hook::Xdp, policy, sources, connections)
}

fn program_for(hook: Hook, policy: &ServicePolicy, sources: &[&str], connections: u16) -> Program {
    fixture::program_for(hook, policy, sources, connections).unwrap()
}

struct Row {
    description: &'static str,
    frame: Vec<u8>,
    holds: Holds,
}

/// What the program finds in a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holds {
    /// A SYN: it is counted below the limit, and refused at it.
    Syn,
    /// Nothing that it decides on.
    Nothing,
    /// What only the stack can read, for a service: dropped.
    Hidden,
    /// The same, for nobody knows whom.
    Unreadable,
}

fn row(description: &'static str, is_syn: bool, frame: &Frame) -> Row {
    Row { description, frame: frame.to_bytes(), holds: if is_syn { Holds::Syn } else { Holds::Nothing } }
}

fn hidden(description: &'static str, frame: &Frame) -> Row {
    Row { description, frame: frame.to_bytes(), holds: Holds::Hidden }
}

fn unreadable(description: &'static str, frame: &Frame) -> Row {
    Row { description, frame: frame.to_bytes(), holds: Holds::Unreadable }
}

/// The same with the two bytes there changed.
fn with_length(row: Row, at: usize, length: u16) -> Row {
    let mut frame = row.frame;
    frame[at..at + 2].copy_from_slice(&length.to_be_bytes());
    Row { frame, ..row }
}

fn rows() -> Vec<Row> {
    let mut rows = vec![
        row("IPv4", true, &v4()),
        row("IPv6", true, &v6()),
        row("IPv4, one VLAN tag", true, &Frame { vlan_tags: vec![0x8100], ..v4() }),
        row("IPv4, two VLAN tags", true, &Frame { vlan_tags: vec![0x88a8, 0x8100], ..v4() }),
        row("IPv6, two VLAN tags", true, &Frame { vlan_tags: vec![0x8100, 0x8100], ..v6() }),
        row("IPv4, four VLAN tags", true, &Frame { vlan_tags: vec![0x8100; 4], ..v4() }),
        unreadable("IPv4, five VLAN tags", &Frame { vlan_tags: vec![0x8100; 5], ..v4() }),
        row("IPv4, one word of options", true, &Frame { ipv4_option_words: 1, ..v4() }),
        row("IPv4, ten words of options", true, &Frame { ipv4_option_words: 10, ..v4() }),
        row("IPv4, options behind a VLAN tag", true, &Frame { vlan_tags: vec![0x8100], ipv4_option_words: 3, ..v4() }),
        row("IPv4, the first fragment", true, &Frame { ipv4_fragment: (true, 0), ..v4() }),
        with_length(
            hidden("IPv4, a fragment with 19 bytes of TCP", &Frame { ipv4_fragment: (true, 0), ..v4() }),
            16,
            39,
        ),
        with_length(unreadable("IPv4, a fragment with nothing", &Frame { ipv4_fragment: (true, 0), ..v4() }), 16, 0),
        with_length(
            hidden(
                "IPv4, a fragment with options and 8 bytes of TCP, behind a VLAN tag",
                &Frame { vlan_tags: vec![0x8100], ipv4_option_words: 2, ipv4_fragment: (true, 0), ..v4() },
            ),
            20,
            36,
        ),
        with_length(
            row(
                "IPv4, a fragment with 8 bytes of TCP for another port",
                false,
                &Frame { destination: "192.0.2.1:8081".parse().unwrap(), ipv4_fragment: (true, 0), ..v4() },
            ),
            16,
            28,
        ),
        with_length(
            unreadable(
                "IPv4, a fragment that ends within the ports, and another port in its padding",
                &Frame { destination: "192.0.2.1:8081".parse().unwrap(), ipv4_fragment: (true, 0), ..v4() },
            ),
            16,
            23,
        ),
        with_length(row("IPv4, shorter than TCP and no fragment: the stack drops it", true, &v4()), 16, 28),
        with_length(
            hidden(
                "IPv6, a fragment with 8 bytes of TCP",
                &Frame { extensions: vec![Extension::Fragment(0, true)], ..v6() },
            ),
            18,
            16,
        ),
        row("IPv4, a later fragment", false, &Frame { ipv4_fragment: (false, 3), ..v4() }),
        row("IPv4, the highest fragment offset", false, &Frame { ipv4_fragment: (true, 0x1fff), ..v4() }),
        row("IPv6, hop-by-hop", true, &Frame { extensions: vec![Extension::Plain(0, 0)], ..v6() }),
        row("IPv6, routing", true, &Frame { extensions: vec![Extension::Plain(43, 2)], ..v6() }),
        row("IPv6, destination options", true, &Frame { extensions: vec![Extension::Plain(60, 1)], ..v6() }),
        row("IPv6, mobility", true, &Frame { extensions: vec![Extension::Plain(135, 0)], ..v6() }),
        row("IPv6, authentication", true, &Frame { extensions: vec![Extension::Authentication(4)], ..v6() }),
        row("IPv6, the first fragment", true, &Frame { extensions: vec![Extension::Fragment(0, true)], ..v6() }),
        row("IPv6, a later fragment", false, &Frame { extensions: vec![Extension::Fragment(7, false)], ..v6() }),
        row(
            "IPv6, several extension headers",
            true,
            &Frame {
                extensions: vec![
                    Extension::Plain(0, 0),
                    Extension::Plain(60, 3),
                    Extension::Plain(43, 1),
                    Extension::Fragment(0, true),
                    Extension::Authentication(3),
                ],
                ..v6()
            },
        ),
        row("IPv6, eight extension headers", true, &Frame { extensions: vec![Extension::Plain(60, 0); 8], ..v6() }),
        unreadable("IPv6, nine extension headers", &Frame { extensions: vec![Extension::Plain(60, 0); 9], ..v6() }),
        row("IPv6, an unknown extension header", false, &Frame { extensions: vec![Extension::Plain(59, 0)], ..v6() }),
        row("SYN with ECN bits and data", true, &Frame { flags: SYN | 0xc8, payload: vec![1; 32], ..v4() }),
        row("SYN and FIN: the stack drops it", false, &v4().with_flags(SYN | FIN)),
        row("SYN and RST: the stack drops it", false, &v4().with_flags(SYN | RST)),
        row("SYN and ACK: an answer to the host's own SYN", false, &v4().with_flags(SYN | ACK)),
        row("ACK that belongs to nothing", false, &v4().with_flags(ACK)),
        row("FIN and ACK that belong to nothing", false, &v6().with_flags(FIN | ACK)),
        row("RST", false, &v4().with_flags(RST)),
        row("no flags", false, &v4().with_flags(0)),
        row("another port", false, &Frame { destination: "192.0.2.1:8081".parse().unwrap(), ..v4() }),
    ];
    let changed = |description, frame: Frame, at: usize, byte: u8| {
        let mut frame = frame.to_bytes();
        frame[at] = byte;
        Row { description, frame, holds: Holds::Nothing }
    };
    rows.extend([
        changed("IPv4 that says version 5", v4(), 14, 0x55),
        changed("IPv4 with a header of 16 bytes", v4(), 14, 0x44),
        changed("UDP over IPv4", v4(), 23, 17),
        changed("IPv6 that says version 4", v6(), 14, 0x40),
        changed("UDP over IPv6", v6(), 20, 17),
        changed("ARP", v4(), 13, 0x06),
    ]);
    // BPF_PROG_TEST_RUN takes no frame of less than an Ethernet header.
    for (description, whole) in [
        ("IPv4, cut off", v4()),
        ("IPv4 with options, cut off", Frame { ipv4_option_words: 5, ..v4() }),
        ("IPv6, cut off", v6()),
        ("IPv6 with extension headers, cut off", Frame { extensions: vec![Extension::Plain(0, 1); 2], ..v6() }),
        ("VLAN, cut off", Frame { vlan_tags: vec![0x88a8, 0x8100], ..v4() }),
    ] {
        let whole = whole.to_bytes();
        rows.extend((14..whole.len()).map(|length| Row {
            description,
            frame: whole[..length].to_vec(),
            holds: Holds::Nothing,
        }));
    }
    rows
}

#[test]
fn below_the_limit_xdp_passes_everything_untouched_but_what_is_hidden() {
    every_row_is(Hook::Xdp, 1, Counter::SynAdmitted, Action::Pass);
}

#[test]
fn below_the_limit_tc_passes_everything_untouched_but_what_is_hidden() {
    every_row_is(Hook::Tc, 1, Counter::SynAdmitted, Action::Pass);
}

#[test]
fn at_the_limit_xdp_drops_every_shape_of_syn_and_nothing_else_but_what_is_hidden() {
    every_row_is(Hook::Xdp, LIMIT, Counter::SynSourceLimit, Action::Drop);
}

#[test]
fn at_the_limit_tc_drops_every_shape_of_syn_and_nothing_else_but_what_is_hidden() {
    every_row_is(Hook::Tc, LIMIT, Counter::SynSourceLimit, Action::Drop);
}

fn every_row_is(hook: Hook, connections: u16, counter: Counter, of_syn: Action) {
    let mut program = program_for(hook, &policy(), &["192.0.2.7", "2001:db8::99"], connections);
    let (mut syns, mut hidden, mut unreadable) = (0, 0, 0);
    for Row { description, frame, holds } in rows() {
        if !program.takes(&frame) {
            continue;
        }
        let (action, out) = program.run(&frame).unwrap();
        let wanted = match holds {
            Holds::Syn => of_syn,
            Holds::Nothing => Action::Pass,
            Holds::Hidden | Holds::Unreadable => Action::Drop,
        };
        assert_eq!((action, out), (wanted, frame.as_slice()), "{description} ({} bytes)", frame.len());
        syns += u64::from(holds == Holds::Syn);
        hidden += u64::from(holds == Holds::Hidden);
        unreadable += u64::from(holds == Holds::Unreadable);
        let counters = program.counters().unwrap();
        let counted = [counter, Counter::HeadersHidden, Counter::HeadersUnreadable]
            .map(|counter| counters.get(&(0, counter)).copied().unwrap_or(0));
        assert_eq!(counted, [syns, hidden, unreadable], "{description} ({} bytes)", frame.len());
    }
    assert_eq!(program.counters().unwrap().len(), 3);
}

#[test]
fn a_service_that_observes_lets_what_is_hidden_pass() {
    let policy = ServicePolicy { on_deny: OnDeny::Observe as u8, ..policy() };
    let mut program = program(&policy, &[], 0);
    let mut counters = HashMap::new();
    for row in rows() {
        let counter = match row.holds {
            Holds::Hidden => Counter::HeadersHidden,
            Holds::Unreadable => Counter::HeadersUnreadable,
            Holds::Syn | Holds::Nothing => continue,
        };
        assert_eq!(program.run(&row.frame).unwrap().0, Action::Pass, "{}", row.description);
        *counters.entry((0, counter)).or_insert(0_u64) += 1;
    }
    assert_eq!(program.counters().unwrap(), counters);
}

#[test]
fn a_segment_of_a_connection_in_the_ledger_passes_uncounted() {
    let mut program = program(&policy(), &["192.0.2.7", "2001:db8::7"], LIMIT);
    for mut frame in [v4(), v6()] {
        frame.source.set_port(1);
        for flags in [ACK, ACK | FIN, ACK | 0x08] {
            frame.flags = flags;
            assert_eq!(program.run(&frame.to_bytes()).unwrap().0, Action::Pass);
        }
    }
    assert!(program.counters().unwrap().is_empty());
}

#[test]
fn a_limit_of_zero_is_none() {
    let policy = ServicePolicy { connections_per_source: 0, ..policy() };
    let mut program = program(&policy, &["192.0.2.7"], 50);
    assert_eq!(program.run(&v4().to_bytes()).unwrap().0, Action::Pass);
}

#[test]
fn a_full_service_drops_the_syns_of_everyone() {
    let policy = ServicePolicy { connections_total: 4, ..policy() };
    let mut program = program(&policy, &["192.0.2.8", "192.0.2.9"], LIMIT);
    for frame in [v4(), v6()] {
        assert_eq!(program.run(&frame.to_bytes()).unwrap().0, Action::Drop);
    }
    assert_eq!(program.counters().unwrap(), [((0, Counter::SynServiceLimit), 2)].into());
    let refusals = program.refusals().unwrap();
    assert_eq!(refusals.len(), 1, "one report a second for a full service");
    assert_eq!(refusals[0].reason, DenyReason::ServiceLimit as u8);
}

#[test]
fn a_service_that_observes_counts_and_lets_pass() {
    let policy = ServicePolicy { on_deny: OnDeny::Observe as u8, ..policy() };
    let mut program = program(&policy, &["192.0.2.7"], LIMIT);
    assert_eq!(program.run(&v4().to_bytes()).unwrap().0, Action::Pass);
    assert_eq!(program.counters().unwrap(), [((0, Counter::SynObservedSourceLimit), 1)].into());
    assert_eq!(program.refusals().unwrap()[0].observed, 1);
}

#[test]
fn a_source_is_its_prefix_and_its_neighbours_are_not() {
    let policy = ServicePolicy { ipv4_prefix: 24, ipv6_prefix: 56, ..policy() };
    let mut program = program(&policy, &["192.0.2.200", "2001:db8:0:ff::1"], LIMIT);
    for (source, action) in [
        ("192.0.2.7:1", Action::Drop),
        ("192.0.3.7:1", Action::Pass),
        ("[2001:db8:0:1::1]:1", Action::Drop),
        ("[2001:db8:0:100::1]:1", Action::Pass),
    ] {
        let source: SocketAddr = source.parse().unwrap();
        let frame = Frame { source, ..if source.is_ipv4() { v4() } else { v6() } };
        assert_eq!(program.run(&frame.to_bytes()).unwrap().0, action, "{source}");
    }
}

#[test]
fn refusals_are_reported_once_a_second_with_what_was_left_out() {
    let mut program = program(&policy(), &["192.0.2.7"], LIMIT);
    let frame = v4().to_bytes();
    for _ in 0..100 {
        assert_eq!(program.run(&frame).unwrap().0, Action::Drop);
    }
    let refusals = program.refusals().unwrap();
    // A hundred runs take far less than a second, but might stand at the edge of one.
    assert!((1..=2).contains(&refusals.len()), "{} reports", refusals.len());
    let first = refusals[0];
    assert_eq!(first.connection, Endpoints::new(v4().source, v4().destination));
    assert_eq!((first.reason, first.stage), (DenyReason::SourceLimit as u8, Stage::Syn as u8));
    assert_eq!((first.service, first.observed, first.unreported), (0, 0, 0));
    let source = SourceKey::new(0, &first.connection.remote, 32, 64);
    let reported: u64 = refusals.iter().map(|refusal| 1 + refusal.unreported).sum();
    assert_eq!(reported + program.source(&source).unwrap().unwrap().unreported, 100);
}

#[test]
fn a_spoofed_syn_stores_nothing_about_its_source() {
    let mut program = program(&policy(), &[], 0);
    for last in 1..=200 {
        let frame = Frame { source: format!("203.0.113.{last}:5").parse().unwrap(), ..v4() };
        assert_eq!(program.run(&frame.to_bytes()).unwrap().0, Action::Pass);
        let source = SourceKey::new(0, &frame.source.ip().into(), 32, 64);
        assert_eq!(program.source(&source).unwrap(), None);
    }
    assert_eq!(program.state(0).unwrap().sources, 0);
}
