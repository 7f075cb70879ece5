//! What the programs remember of the ledger: a connection is known as long as it has an entry, and no longer, whoever closes it
//! while another CPU is about to remember it.
#![expect(clippy::unwrap_used, reason = "the helpers of tests, which clippy takes for more than that")]

use std::{
    net::{IpAddr, SocketAddr},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::Instant,
};

use limiter_common::{Endpoints, ServicePolicy, SourceKey, abi};
use limiter_tests::{frame::Frame, program::Program, segment::flags, wait::SOON};

const PORT: u16 = 8080;
/// The owner of the entries of [`Program::add_connection`].
const OWNER: u64 = 1;

/// Both ends of a client's connection to a service of its family, and a segment of it.
fn connection(client: SocketAddr) -> (Endpoints, Vec<u8>) {
    let server: IpAddr = if client.is_ipv4() { "192.0.2.1" } else { "2001:db8::1" }.parse().unwrap();
    let server = SocketAddr::new(server, PORT);
    (Endpoints::new(client, server), Frame::syn(client, server).with_flags(flags::ACK).to_bytes())
}

fn source(ends: &Endpoints) -> SourceKey {
    SourceKey::new(0, &ends.remote, 32, 64)
}

fn program(connections: u32) -> Program {
    let mut program = Program::load_sized(connections).unwrap();
    let policy = ServicePolicy { ipv4_prefix: 32, ipv6_prefix: 64, ..ServicePolicy::default() };
    program.set_service(0, PORT, &policy).unwrap();
    program
}

#[test]
fn a_connection_is_known_from_its_first_segment_until_it_is_closed() {
    let mut program = program(16);
    for client in ["198.51.100.7:40000", "[2001:db8:7::7]:40000"] {
        let (ends, segment) = connection(client.parse().unwrap());
        let (flow, slot) = program.flow(&ends).unwrap();
        program.run(&segment).unwrap();
        assert_eq!(program.flow_at(slot).unwrap(), 0, "{client} has no entry");
        for round in 0..2 {
            program.add_connection(&ends, &source(&ends)).unwrap();
            assert_eq!(program.flow_at(slot).unwrap(), 0, "{client} has said nothing yet, round {round}");
            for _ in 0..2 {
                program.run(&segment).unwrap();
                assert_eq!(program.flow_at(slot).unwrap(), flow, "{client}, round {round}");
            }
            assert!(!program.release(&ends, OWNER + 1).unwrap(), "it is somebody else's");
            assert_eq!(program.flow_at(slot).unwrap(), flow, "{client} is open still");
            assert!(program.release(&ends, OWNER).unwrap());
            assert_eq!(program.flow_at(slot).unwrap(), 0, "{client} is closed, round {round}");
        }
    }
}

#[test]
fn of_two_connections_in_one_place_the_first_stays_until_it_is_closed() {
    let mut program = program(16);
    let first = connection("198.51.100.7:40000".parse().unwrap());
    let (flow, slot) = program.flow(&first.0).unwrap();
    // One in as many as there are places will do.
    let second = (0..100 * abi::FLOW_SLOTS)
        .map(|number| connection(SocketAddr::new(IpAddr::from((203 << 24 | number).to_be_bytes()), 40_000)))
        .find(|(ends, _)| program.flow(ends).unwrap().1 == slot)
        .unwrap();
    let (other, _) = program.flow(&second.0).unwrap();
    for (ends, _) in [&first, &second] {
        program.add_connection(ends, &source(ends)).unwrap();
    }
    for (_, segment) in [&first, &second, &second, &first] {
        program.run(segment).unwrap();
        assert_eq!(program.flow_at(slot).unwrap(), flow);
    }
    // The end of the one that was never remembered changes nothing.
    assert!(program.release(&second.0, OWNER).unwrap());
    assert_eq!(program.flow_at(slot).unwrap(), flow);
    program.add_connection(&second.0, &source(&second.0)).unwrap();
    assert!(program.release(&first.0, OWNER).unwrap());
    assert_eq!(program.flow_at(slot).unwrap(), 0);
    program.run(&second.1).unwrap();
    assert_eq!(program.flow_at(slot).unwrap(), other);
}

/// For each connection, a segment of it and its end at the same moment on two CPUs.
#[test]
fn who_is_closed_while_he_is_remembered_is_forgotten() {
    const CONNECTIONS: usize = 20_000;
    let mut program = program(32_768);
    let connections: Vec<_> = (0..u16::try_from(CONNECTIONS).unwrap())
        .map(|number| {
            let host = if number % 2 == 0 { "198.51.100.7" } else { "2001:db8:7::7" };
            connection(SocketAddr::new(host.parse().unwrap(), 10_000 + number))
        })
        .collect();
    for (ends, _) in &connections {
        program.add_connection(ends, &source(ends)).unwrap();
    }
    let (remembered, closed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    thread::scope(|scope| {
        let (program, connections) = (&program, &connections);
        let (remembered, closed) = (&remembered, &closed);
        scope.spawn(move || {
            for (number, (_, segment)) in connections.iter().enumerate() {
                remembered.store(number + 1, Ordering::Release);
                wait_for(closed, number + 1);
                program.touch(segment).unwrap();
            }
        });
        scope.spawn(move || {
            for (number, (ends, _)) in connections.iter().enumerate() {
                closed.store(number + 1, Ordering::Release);
                wait_for(remembered, number + 1);
                assert!(program.release(ends, OWNER).unwrap(), "nobody else closes it");
            }
        });
    });
    let known: Vec<u32> = (0..abi::FLOW_SLOTS).filter(|&slot| program.flow_at(slot).unwrap() != 0).collect();
    assert_eq!(known, Vec::<u32>::new(), "of {CONNECTIONS} connections, all of them closed");
}

/// Waits until the other thread is as far; but not for ever, should it have failed.
fn wait_for(other: &AtomicUsize, number: usize) {
    let begun = Instant::now();
    for spins in 1_u64.. {
        if other.load(Ordering::Acquire) >= number {
            return;
        }
        // Both are on a CPU at the same time only if neither sleeps; but there may be one CPU.
        if spins % 4096 == 0 {
            assert!(begun.elapsed() < SOON, "the other thread is not there");
            thread::yield_now();
        }
    }
}
