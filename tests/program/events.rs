//! The ring buffer of refusals with several readers: who only looks on misses nothing that is still there, takes nothing
//! away, and knows what it was too slow for.
#![expect(clippy::unwrap_used, reason = "the helpers of tests, which clippy takes for more than that")]

use std::net::SocketAddr;

use limiter_common::{ServicePolicy, SourceKey, abi, event::Refusal};
use limiter_tests::{
    frame::Frame,
    program::{Action, Program},
};

const PORT: u16 = 8080;

/// How many records the buffer has room for, and a few more.
const MORE_THAN_FIT: u16 = 5000;

fn service() -> SocketAddr {
    "192.0.2.1:8080".parse().unwrap()
}

/// A program that refuses each SYN of one source and reports each.
fn program() -> Program {
    let mut program = Program::load().unwrap();
    let policy =
        ServicePolicy { connections_per_source: 1, ipv4_prefix: 32, ipv6_prefix: 64, ..ServicePolicy::default() };
    program.set_service(0, PORT, &policy).unwrap();
    program
}

/// Has a SYN from that port refused and reported.
fn refuse(program: &mut Program, port: u16) {
    let frame = Frame::syn(SocketAddr::new("192.0.2.7".parse().unwrap(), port), service());
    let source = SourceKey::new(0, &frame.source.ip().into(), 32, 64);
    // One that was never reported.
    program.set_source(&source, 1).unwrap();
    assert_eq!(program.run(&frame.to_bytes()).unwrap().0, Action::Drop);
}

#[test]
fn each_reader_sees_what_there_is_and_takes_nothing_away() {
    let mut program = program();
    let mut early = program.event_log().unwrap();
    assert!(early.read().events.is_empty());
    for port in 1..=3 {
        refuse(&mut program, port);
    }
    let ports = |events: &[limiter::kernel::Event]| events.iter().map(|event| event.remote.port()).collect::<Vec<_>>();
    assert_eq!(ports(&early.read().events), [1, 2, 3]);
    assert!(early.read().events.is_empty(), "once each");
    assert_eq!(program.refusals().unwrap().len(), 3, "the consumer has them all the same");
    refuse(&mut program, 4);
    assert_eq!(ports(&early.read().events), [4]);
    assert_eq!(program.refusals().unwrap().len(), 1);
    // What was consumed is still there until it is written over.
    assert_eq!(ports(&program.event_log().unwrap().read().events), [1, 2, 3, 4]);
}

#[test]
fn who_is_too_slow_knows_how_much_was_missed_and_reads_on() {
    let mut program = program();
    let mut slow = program.event_log().unwrap();
    for port in 1..=MORE_THAN_FIT {
        refuse(&mut program, port);
        if port % 100 == 0 {
            program.refusals().unwrap();
        }
    }
    let mut fresh = program.event_log().unwrap();
    for log in [&mut slow, &mut fresh] {
        let batch = log.read();
        let first = batch.events[0].remote.port();
        assert!((1000..2000).contains(&first), "{first}: the buffer has room for some 3600");
        for (event, port) in batch.events.iter().zip(first..) {
            assert_eq!((event.remote.port(), event.local), (port, service()));
        }
        assert_eq!(batch.events.last().unwrap().remote.port(), MORE_THAN_FIT);
        assert!(batch.lost == 0 || batch.lost == u64::from(first) - 1, "{} lost before {first}", batch.lost);
    }
    assert!(slow.read().events.is_empty());
    refuse(&mut program, 1);
    assert_eq!(slow.read().events.len(), 1);
}

#[test]
fn where_nobody_consumes_a_reader_makes_room() {
    let mut program = program();
    let mut log = program.event_log().unwrap();
    assert!(!log.is_full());
    for port in 1..=MORE_THAN_FIT {
        refuse(&mut program, port);
    }
    assert!(log.is_full());
    let batch = log.read();
    assert_eq!((batch.events[0].remote.port(), batch.lost), (1, 0), "the oldest, since nothing was written over");
    let kept = batch.events.len();
    assert!((3000..4000).contains(&kept), "{kept}");
    assert!(program.event_log().unwrap().is_full(), "to look is not to take");
    log.consume();
    assert!(!log.is_full());
    refuse(&mut program, 7);
    assert_eq!(log.read().events[0].remote.port(), 7);
    let lost = program.counters().unwrap()[&(0, limiter_common::Counter::EventsLost)];
    assert_eq!(lost, u64::from(MORE_THAN_FIT) - kept as u64);
    // Each has a header of eight bytes.
    assert_eq!(abi::EVENTS_BYTES as usize / (size_of::<Refusal>() + 8), kept, "whole records");
}
