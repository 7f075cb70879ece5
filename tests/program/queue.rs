//! Slots that the stack does not take, as many as there can be: each of them ends when its time is up.

use std::net::{IpAddr, SocketAddr};

use limiter_common::{Counter, Endpoints, ServicePolicy, SourceKey, abi, ledger::RESERVATION_NS};
use limiter_tests::program::{Program, now_ns};

const PORT: u16 = 8080;

#[test]
fn a_ledger_full_of_slots_that_nobody_takes_is_empty_when_their_time_is_up() {
    // More than the queue of a small ledger has room for.
    let connections = abi::MIN_RESERVATIONS + 4_000;
    let mut program = Program::load_sized(connections).unwrap();
    let policy = ServicePolicy { ipv4_prefix: 32, ipv6_prefix: 64, ..ServicePolicy::default() };
    program.set_service(0, PORT, &policy).unwrap();
    let server = SocketAddr::new("192.0.2.1".parse().unwrap(), PORT);
    let overdue = now_ns() - RESERVATION_NS;
    for number in 0..connections {
        let client = SocketAddr::new(IpAddr::from((10 << 24 | number).to_be_bytes()), 40_000);
        let ends = Endpoints::new(client, server);
        program.reserve(&ends, &SourceKey::new(0, &ends.remote, 32, 64), overdue).unwrap();
    }
    assert_eq!(program.state(0).unwrap().connections, u64::from(connections));
    program.expire().unwrap();
    let state = program.state(0).unwrap();
    assert_eq!((state.connections, state.sources, state.unconfirmed), (0, 0, 0));
    assert_eq!(program.counters().unwrap()[&(0, Counter::ClosedExpired)], u64::from(connections));
}
