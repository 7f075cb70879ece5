//! Layouts that one and the same TCP segment can arrive in: IP options, fragments, extension headers, VLAN tags. Each takes
//! a plain frame, as [`crate::segment::Segment`] makes it, and lays it out anew with right lengths and checksums.

use crate::segment::checksum;

/// A layout. Each is of the family that it says; VLAN tags go with both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shape {
    /// As it is.
    Plain,
    /// Behind these VLAN tags: ethertype and control field, the outer first.
    Vlan(Vec<(u16, u16)>),
    /// IPv4, with so many words of options that say nothing.
    Ipv4Options(u8),
    /// IPv4, in two fragments: so many bytes of TCP in the first, a multiple of 8.
    Ipv4Fragments(u16),
    /// The same, with bytes behind the end of the first packet that look like the rest of another TCP header, as padding of
    /// the Ethernet frame may.
    Ipv4PaddedFragments(u16),
    /// The same, the second fragment before the first.
    Ipv4FragmentsReversed(u16),
    /// IPv6, behind extension headers of these types, of 8 bytes each.
    Ipv6Extensions(Vec<u8>),
    /// IPv6, in two fragments: so many bytes of TCP in the first, a multiple of 8.
    Ipv6Fragments(u16),
    /// The same, with the extension headers of these types in the first fragment, before TCP.
    Ipv6FragmentedExtensions(Vec<u8>, u16),
    /// IPv6, one fragment that is the whole packet (RFC 6946).
    Ipv6AtomicFragment,
}

const ETHERNET: usize = 14;
const IPV4: usize = ETHERNET + 20;
const IPV6: usize = ETHERNET + 40;
const FRAGMENT: u8 = 44;
/// Of a fragment, where more follow.
const MORE: u16 = 1;

impl Shape {
    /// A frame in this layout.
    ///
    /// # Panics
    /// If the frame is not of the shape's family.
    pub fn of(&self, frame: &[u8]) -> Vec<Vec<u8>> {
        match self {
            Self::Plain => vec![frame.to_vec()],
            Self::Vlan(tags) => vec![vlan(frame, tags)],
            Self::Ipv4Options(words) => vec![ipv4(frame, *words, 0x4000, &frame[IPV4..])],
            Self::Ipv4Fragments(first) => ipv4_fragments(frame, *first).into(),
            Self::Ipv4PaddedFragments(first) => {
                let [mut head, tail] = ipv4_fragments(frame, *first);
                let length = head.len();
                // Where the rest of a TCP header would be: all flags are clear.
                head.resize(length.max(60), 0);
                vec![head, tail]
            }
            Self::Ipv4FragmentsReversed(first) => {
                let [head, tail] = ipv4_fragments(frame, *first);
                vec![tail, head]
            }
            Self::Ipv6Extensions(types) => vec![ipv6(frame, types, &frame[IPV6..])],
            Self::Ipv6Fragments(first) => ipv6_fragments(frame, &[], *first),
            Self::Ipv6FragmentedExtensions(types, first) => ipv6_fragments(frame, types, *first),
            Self::Ipv6AtomicFragment => {
                let payload = [&fragment_header(6, 0, 0)[..], &frame[IPV6..]].concat();
                vec![ipv6_of(frame, FRAGMENT, &payload)]
            }
        }
    }
}

fn vlan(frame: &[u8], tags: &[(u16, u16)]) -> Vec<u8> {
    let mut tagged = frame[..12].to_vec();
    for (ethertype, control) in tags {
        tagged.extend(ethertype.to_be_bytes());
        tagged.extend(control.to_be_bytes());
    }
    tagged.extend(&frame[12..]);
    tagged
}

fn ipv4_fragments(frame: &[u8], first: u16) -> [Vec<u8>; 2] {
    assert!(first.is_multiple_of(8), "fragments are counted in units of 8 bytes");
    let tcp = &frame[IPV4..];
    let (head, tail) = tcp.split_at(first.into());
    [ipv4(frame, 0, 0x2000, head), ipv4(frame, 0, first / 8, tail)]
}

/// With options, the word of flags and offset, and a payload.
fn ipv4(frame: &[u8], option_words: u8, fragment: u16, payload: &[u8]) -> Vec<u8> {
    assert_eq!(frame[12..ETHERNET], [0x08, 0x00], "a frame of IPv4");
    let mut header = frame[ETHERNET..IPV4].to_vec();
    // No operation (RFC 791), again and again.
    header.extend(vec![1; usize::from(option_words) * 4]);
    header[0] = 0x45 + option_words;
    let total = u16::try_from(header.len() + payload.len()).expect("a test's packet is small");
    header[2..4].copy_from_slice(&total.to_be_bytes());
    // The fragments of one segment are told from those of others by the identification: here by the client's port.
    header[4..6].copy_from_slice(&frame[IPV4..IPV4 + 2]);
    header[6..8].copy_from_slice(&fragment.to_be_bytes());
    header[10..12].fill(0);
    let sum = checksum(&[&header]);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    [&frame[..ETHERNET], &header, payload].concat()
}

/// Behind extension headers.
fn ipv6(frame: &[u8], types: &[u8], payload: &[u8]) -> Vec<u8> {
    let (first, chain) = extensions(types, 6);
    ipv6_of(frame, first, &[&chain, payload].concat())
}

/// The number of the first header, and the headers.
fn extensions(types: &[u8], last: u8) -> (u8, Vec<u8>) {
    let numbers: Vec<u8> = types.iter().copied().chain([last]).collect();
    let chain = types
        .iter()
        .zip(&numbers[1..])
        // Hop-by-hop and destination options: padding of four bytes (PadN, RFC 8200 section 4.2). Routing: of an unknown
        // type, with no segments left, which a host has to pass over.
        .flat_map(
            |(number, next)| if *number == 43 { [*next, 0, 253, 0, 0, 0, 0, 0] } else { [*next, 0, 1, 4, 0, 0, 0, 0] },
        )
        .collect();
    (numbers[0], chain)
}

fn ipv6_fragments(frame: &[u8], types: &[u8], first: u16) -> Vec<Vec<u8>> {
    assert!(first.is_multiple_of(8), "fragments are counted in units of 8 bytes");
    let identification = u32::from(u16::from_be_bytes([frame[IPV6], frame[IPV6 + 1]]));
    let (next, chain) = extensions(types, 6);
    let (head, tail) = frame[IPV6..].split_at(first.into());
    let offset = u16::try_from(chain.len()).expect("a test's headers are few") + first;
    let part = |offset, payload: &[u8]| {
        ipv6_of(frame, FRAGMENT, &[&fragment_header(next, offset, identification)[..], payload].concat())
    };
    vec![part(MORE, &[&chain, head].concat()), part(offset, tail)]
}

/// `place` is the offset in bytes, which is a multiple of 8, and [`MORE`] in its lowest bit.
fn fragment_header(next: u8, place: u16, identification: u32) -> [u8; 8] {
    let [high, low] = place.to_be_bytes();
    let [a, b, c, d] = identification.to_be_bytes();
    [next, 0, high, low, a, b, c, d]
}

fn ipv6_of(frame: &[u8], next: u8, payload: &[u8]) -> Vec<u8> {
    assert_eq!(frame[12..ETHERNET], [0x86, 0xdd], "a frame of IPv6");
    let mut header = frame[ETHERNET..IPV6].to_vec();
    let length = u16::try_from(payload.len()).expect("a test's packet is small");
    header[4..6].copy_from_slice(&length.to_be_bytes());
    header[6] = next;
    [&frame[..ETHERNET], &header, payload].concat()
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;
    use crate::segment::{Segment, flags};

    fn frame(source: &str, destination: &str) -> Vec<u8> {
        let [source, destination] = [source, destination].map(|end| end.parse::<SocketAddr>().unwrap());
        let segment = Segment {
            source,
            destination,
            sequence: 7,
            acknowledgement: 9,
            flags: flags::ACK,
            options: Vec::new(),
            payload: b"data".to_vec(),
        };
        segment.to_frame([2; 6], [4; 6])
    }

    #[test]
    fn a_segment_is_found_behind_options_and_its_fragments_hold_it_whole() {
        let frame = frame("192.0.2.7:1025", "192.0.2.8:8080");
        let [with_options] = &Shape::Ipv4Options(3).of(&frame)[..] else { panic!("one frame") };
        assert_eq!(Segment::parse(with_options), Segment::parse(&frame));
        let [head, tail] = &Shape::Ipv4Fragments(8).of(&frame)[..] else { panic!("two frames") };
        assert_eq!([&head[IPV4..], &tail[IPV4..]].concat(), frame[IPV4..]);
        assert_eq!((head[20..22].to_vec(), tail[20..22].to_vec()), (vec![0x20, 0], vec![0, 1]));
    }

    #[test]
    fn extension_headers_name_each_other_and_tcp_last() {
        let frame = frame("[2001:db8::7]:1025", "[2001:db8::8]:8080");
        let [extended] = &Shape::Ipv6Extensions(vec![0, 60]).of(&frame)[..] else { panic!("one frame") };
        assert_eq!((extended[20], extended[IPV6], extended[IPV6 + 8]), (0, 60, 6));
        assert_eq!(extended[IPV6 + 16..], frame[IPV6..]);
    }
}
