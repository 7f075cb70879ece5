//! What the XDP program takes for each kind of packet, by `BPF_PROG_TEST_RUN`, beside programs of two instructions.

use std::net::SocketAddr;

use anyhow::Result;
use limiter_common::{Endpoints, ServicePolicy, SourceKey, bucket::Rate};
use limiter_tests::{
    bare::{Answer, BareXdp},
    frame::Frame,
    program::Program,
    segment::flags,
};

use crate::table;

const ROUNDS: usize = 25;
const REPEAT: u32 = 200_000;

pub fn run() -> Result<()> {
    let policy = ServicePolicy {
        connections_per_source: 1,
        connections_total: 10_000,
        rate: Rate::new(10, 20),
        ipv4_prefix: 32,
        ipv6_prefix: 64,
        ..ServicePolicy::default()
    };
    let mut program = Program::load()?;
    program.set_service(0, 8080, &policy)?;
    let bare = [("bare XDP_DROP", BareXdp::load(Answer::Drop)?), ("bare XDP_PASS", BareXdp::load(Answer::Pass)?)];

    let mut frames = Vec::new();
    for (family, client, other, server) in [
        ("IPv4", "192.0.2.7:40000", "192.0.2.9:40000", "192.0.2.1:8080"),
        ("IPv6", "[2001:db8::7]:40000", "[2001:db8:0:1::9]:40000", "[2001:db8::1]:8080"),
    ] {
        let [client, other, server]: [SocketAddr; 3] = [client.parse()?, other.parse()?, server.parse()?];
        let key = Endpoints::new(client, server);
        program.add_connection(&key, &SourceKey::new(0, &key.remote, policy.ipv4_prefix, policy.ipv6_prefix))?;
        let syn = Frame::syn(client, server);
        let elsewhere = SocketAddr::new(server.ip(), 22);
        let unknown = SocketAddr::new(client.ip(), 40_001);
        for (name, frame) in [
            ("not for a service", Frame { destination: elsewhere, ..syn.clone() }),
            ("of an established connection (ledger hit)", syn.clone().with_flags(flags::ACK)),
            ("SYN admitted", Frame { source: other, ..syn.clone() }),
            ("SYN refused, its source at the limit", syn.clone()),
            ("ACK of no connection (socket look-up)", Frame { source: unknown, ..syn.with_flags(flags::ACK) }),
        ] {
            frames.push((format!("{family}, {name}"), frame.to_bytes()));
        }
    }

    let probe = frames[0].1.clone();
    let mut bare_ns = [u128::MAX; 2];
    let mut best_ns = vec![u128::MAX; frames.len()];
    for _ in 0..ROUNDS {
        for ((_, bare), best) in bare.iter().zip(&mut bare_ns) {
            *best = bare.time(&probe, REPEAT)?.as_nanos().min(*best);
        }
        for ((_, frame), best) in frames.iter().zip(&mut best_ns) {
            *best = program.time(frame, REPEAT)?.min(*best);
        }
    }

    let pass_ns = bare_ns[1];
    let rows: Vec<Vec<String>> = bare
        .iter()
        .map(|(name, _)| (*name).to_owned())
        .zip(bare_ns)
        .chain(frames.into_iter().map(|(name, _)| name).zip(best_ns))
        .map(|(name, ns)| vec![name, ns.to_string(), format!("{:+}", ns.cast_signed() - pass_ns.cast_signed())])
        .collect();
    table::print(
        "Cost of each verdict",
        &format!("BPF_PROG_TEST_RUN, the fastest of {ROUNDS} rounds of {REPEAT} packets, one CPU."),
        &["packet", "ns", "over bare XDP_PASS"],
        &rows,
    );
    Ok(())
}
