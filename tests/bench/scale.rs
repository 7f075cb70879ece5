//! What a look-up costs by how many connections and sources there are, and the memory that each takes.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::Result;
use limiter_common::{Endpoints, ServicePolicy, SourceKey, abi};
use limiter_tests::{frame::Frame, program::Program, segment::flags};

use crate::table;

const SIZES: [u32; 5] = [1_000, 10_000, 100_000, 262_144, 1_000_000];
const ROUNDS: usize = 5;
/// Of one packet again and again.
const REPEAT: u32 = 200_000;
/// Packets of as many different connections, one run of the program each.
const DIFFERENT: u32 = 20_000;

pub fn run() -> Result<()> {
    let service: SocketAddr = "192.0.2.1:8080".parse()?;
    let policy =
        ServicePolicy { connections_per_source: 1, ipv4_prefix: 32, ipv6_prefix: 64, ..ServicePolicy::default() };
    let mut rows = Vec::new();
    let mut memory = Vec::new();
    for size in SIZES {
        let mut program = Program::load_sized(size)?;
        program.set_service(0, service.port(), &policy)?;
        let client = |number: u32| SocketAddr::new(Ipv4Addr::from_bits(10 << 24 | number).into(), 40_000);
        let connections = (0..size).map(|number| {
            let ends = Endpoints::new(client(number), service);
            (ends, SourceKey::new(0, &ends.remote, policy.ipv4_prefix, policy.ipv6_prefix))
        });
        program.fill(connections)?;
        let ack = |number| Frame::syn(client(number), service).with_flags(flags::ACK).to_bytes();
        let syn = |number| Frame {
            source: SocketAddr::new(client(number).ip(), 50_000),
            ..Frame::syn(client(number), service)
        };
        let one = size / 2;
        rows.push(vec![
            size.to_string(),
            same(&program, &ack(one))?.to_string(),
            different(&program, size, ack)?.to_string(),
            same(&program, &syn(one).to_bytes())?.to_string(),
            different(&program, size, |number| syn(number).to_bytes())?.to_string(),
        ]);
        let per = |map| program.memory_bytes(map).map(|bytes| bytes / u64::from(size));
        memory.push(vec![size.to_string(), per(abi::MAP_LEDGER)?.to_string(), per(abi::MAP_SOURCES)?.to_string()]);
    }
    table::print(
        "Look-ups by size",
        &format!(
            "As many connections as sources, the maps full. \"the same\": one packet {REPEAT} times, nanoseconds each, the \
             fastest of {ROUNDS} rounds. \"of any\": packets of {DIFFERENT} connections spread over the map, each run once, so that \
             nothing of them is in the caches; their mean, which holds what it takes to start a run."
        ),
        &["connections", "ledger hit, the same", "of any", "SYN refused, the same", "of any"],
        &rows,
    );
    table::print(
        "Memory",
        "What the kernel charges for each map (`memlock` of its fdinfo), by what it has room for. It is taken when limiter is \
         attached, whatever is open.",
        &["max_connections", "bytes per connection", "bytes per source"],
        &memory,
    );
    Ok(())
}

fn same(program: &Program, frame: &[u8]) -> Result<u128> {
    let mut best = u128::MAX;
    for _ in 0..ROUNDS {
        best = program.time(frame, REPEAT)?.min(best);
    }
    Ok(best)
}

fn different(program: &Program, size: u32, frame: impl Fn(u32) -> Vec<u8>) -> Result<u128> {
    let mut best = u128::MAX;
    for _ in 0..ROUNDS {
        let mut total = 0;
        for number in 0..DIFFERENT {
            // A multiplier without common factors: every one comes once before any comes again.
            let place = u64::from(number) * 7_368_787 % u64::from(size);
            total += program.time(&frame(u32::try_from(place)?), 1)?;
        }
        best = best.min(total / u128::from(DIFFERENT));
    }
    Ok(best)
}
