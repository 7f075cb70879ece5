//! Handshakes in every layout that a segment can arrive in. None gets past the limit, with nobody there to cut what did; and
//! none that an honest client may use is refused.

use std::time::Duration;

use anyhow::Result;
use limiter_tests::{
    both_families,
    lab::{Family, Lab},
    limiter::Limiter,
    raw::{RawClient, RawConnection},
    segment::{Segment, flags},
    shape::Shape,
    tcp::{PlainServer, connect_served},
    wait::{SOON, eventually},
};

const LIMIT: u32 = 3;
/// At once, of one source.
const HANDSHAKES: u16 = 12;

/// Whether an honest client may send it, so that it has to be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Honest {
    Yes,
    No,
}

use Honest::{No, Yes};

const VLAN: u16 = 0x8100;
const DESTINATION: u8 = 60;

fn shapes(family: Family) -> Vec<(Shape, Honest)> {
    let priority = |tags| Shape::Vlan(vec![(VLAN, 3 << 13); tags]);
    let mut shapes =
        vec![(Shape::Plain, Yes), (priority(1), Yes), (priority(2), Yes), (priority(3), No), (priority(9), No)];
    shapes.extend(match family {
        Family::V4 => vec![
            (Shape::Ipv4Options(1), Yes),
            (Shape::Ipv4Options(10), Yes),
            // The headers are 32 bytes long. What cuts them in two hides something.
            (Shape::Ipv4Fragments(32), Yes),
            (Shape::Ipv4FragmentsReversed(32), Yes),
            (Shape::Ipv4PaddedFragments(32), Yes),
            (Shape::Ipv4Fragments(24), No),
            (Shape::Ipv4PaddedFragments(24), No),
            (Shape::Ipv4Fragments(8), No),
            (Shape::Ipv4Fragments(16), No),
            (Shape::Ipv4FragmentsReversed(8), No),
            (Shape::Ipv4PaddedFragments(8), No),
            (Shape::Ipv4PaddedFragments(16), No),
        ],
        Family::V6 => vec![
            (Shape::Ipv6Extensions(vec![0]), Yes),
            (Shape::Ipv6Extensions(vec![DESTINATION]), Yes),
            (Shape::Ipv6Extensions(vec![0, DESTINATION, 43, DESTINATION]), Yes),
            (Shape::Ipv6Extensions(vec![DESTINATION; 8]), Yes),
            (Shape::Ipv6AtomicFragment, Yes),
            (Shape::Ipv6Fragments(32), Yes),
            (Shape::Ipv6FragmentedExtensions(vec![DESTINATION], 32), Yes),
            (Shape::Ipv6Fragments(24), No),
            (Shape::Ipv6Extensions(vec![DESTINATION; 9]), No),
            (Shape::Ipv6Extensions(vec![DESTINATION; 60]), No),
            (Shape::Ipv6Fragments(8), No),
            (Shape::Ipv6Fragments(16), No),
            (Shape::Ipv6FragmentedExtensions(vec![DESTINATION; 9], 32), No),
        ],
    });
    shapes
}

both_families!(no_layout_of_a_handshake_gets_past_the_limit);

fn no_layout_of_a_handshake_gets_past_the_limit(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::protecting(&lab, LIMIT)?;
    let mut raw = RawClient::new(client, family)?;
    let mut accepted = 0;
    let mut wrong = Vec::new();
    for (shape, honest) in shapes(family) {
        // The SYN, the ACK, or both.
        for (of_syn, of_ack) in [(&shape, &Shape::Plain), (&Shape::Plain, &shape), (&shape, &shape)] {
            let connections = half_open(&mut raw, of_syn, honest)?;
            send(&raw, of_ack, &connections, flags::ACK)?;
            // Behind them on the same link, from a source of its own in both families.
            drop(connect_served(&client.namespace, client.service(Family::V4), SOON)?);
            let seen = server.seen(raw.address());
            let opened = seen.accepted - accepted;
            accepted = seen.accepted;
            let allowed = if honest == Yes { LIMIT..=LIMIT } else { 0..=LIMIT };
            if !allowed.contains(&opened) {
                wrong.push(format!("SYN {of_syn:?}, ACK {of_ack:?}: {opened} connections of {}", connections.len()));
            }
            // At the sequence number behind the data.
            let sent: Vec<_> = connections
                .iter()
                .map(|connection| RawConnection {
                    next_sequence: connection.next_sequence.wrapping_add(8),
                    ..*connection
                })
                .collect();
            raw.reset(&sent)?;
            eventually(SOON, "all are closed", || Ok(server.seen(raw.address()).open == 0))?;
            limiter.wait_held(raw.address(), 0)?;
        }
    }
    assert!(wrong.is_empty(), "opened at once, where {LIMIT} are allowed: {wrong:#?}");
    Ok(())
}

fn send(raw: &RawClient, shape: &Shape, connections: &[RawConnection], flags: u8) -> Result<()> {
    let segments = connections.iter().map(|connection| longer(connection.segment(flags)));
    raw.send_frames(segments.flat_map(|segment: Segment| shape.of(&raw.frame(&segment))).collect())
}

/// Twelve bytes of options that say nothing, and data, so that there is more than a bare header to lay out.
#[expect(clippy::needless_pass_by_value, reason = "a segment is handed on")]
fn longer(segment: Segment) -> Segment {
    Segment { options: vec![1; 12], payload: DATA.to_vec(), ..segment }
}

const DATA: &[u8; 8] = b"GET / HT";

/// Half-open connections by SYNs of a shape; none if the server does not answer such.
fn half_open(raw: &mut RawClient, shape: &Shape, honest: Honest) -> Result<Vec<RawConnection>> {
    let patience = if honest == Yes { SOON } else { Duration::from_millis(300) };
    let syns: Vec<_> = raw.syns(HANDSHAKES).into_iter().map(longer).collect();
    raw.send_frames(syns.iter().flat_map(|syn| shape.of(&raw.frame(syn))).collect())?;
    raw.answered(&syns, patience)
}
