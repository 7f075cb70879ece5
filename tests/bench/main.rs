use limiter_common::{ConnectionKey, ServicePolicy, SourceKey};
use limiter_tests::{frame::Frame, program::Program, segment::flags};
fn main() {
    let mut program = Program::load().unwrap();
    let policy = ServicePolicy {
        connections_per_source: 1,
        connections_total: 10000,
        ipv4_prefix: 32,
        ipv6_prefix: 64,
        ..Default::default()
    };
    program.set_service(0, 8080, &policy).unwrap();
    for (s, d) in [("192.0.2.7:4000", "192.0.2.1:8080"), ("[2001:db8::7]:4000", "[2001:db8::1]:8080")] {
        let f = Frame::syn(s.parse().unwrap(), d.parse().unwrap());
        let key = ConnectionKey::new(f.source, f.destination);
        program.add_connection(&key, &SourceKey::new(0, &key.remote, 32, 64)).unwrap();
        let n = 300_000;
        let best = |f: &[u8]| (0..15).map(|_| program.time(f, n).unwrap()).min().unwrap();
        let mut other = f.clone();
        other.destination.set_port(81);
        let mut free = f.clone();
        free.source =
            if s.starts_with('[') { "[2001:db8:1::9]:1".parse().unwrap() } else { "192.0.2.9:1".parse().unwrap() };
        let mut miss = f.clone().with_flags(flags::ACK);
        miss.source.set_port(7);
        {
            println!(
                "{s}: not tcp to service {} established {} refused {} admitted {} ack miss {}",
                best(&other.to_bytes()),
                best(&f.clone().with_flags(flags::ACK).to_bytes()),
                best(&f.to_bytes()),
                best(&free.to_bytes()),
                best(&miss.to_bytes())
            );
        }
    }
    let mut b = vec![0u8; 60];
    b[12] = 8;
    b[13] = 6;
    println!("arp {}", (0..15).map(|_| program.time(&b, 300_000).unwrap()).min().unwrap());
}
