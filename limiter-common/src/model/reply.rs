//! Answers to a client in the server's name, for the model.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::Frame;

/// Shortest frame of Ethernet, without its checksum.
const SHORTEST_FRAME: usize = 60;

/// The RST that answers a SYN (RFC 9293 section 3.10.7.1); `None` if that may not be answered, or is no segment.
pub fn reset(frame: &[u8]) -> Option<Vec<u8>> {
    let Frame::Segment(segment) = Frame::parse(frame) else { return None };
    let packet = &frame[segment.network_at..];
    let tcp = &frame[segment.tcp_at..];
    let (is_v4, total) = match packet[0] >> 4 {
        4 => (true, usize::from(be16(packet, 2))),
        _ => (false, 40 + usize::from(be16(packet, 4))),
    };
    let addresses = if is_v4 { &packet[12..20] } else { &packet[8..40] };
    let (source, destination) = addresses.split_at(addresses.len() / 2);
    let data_at = segment.tcp_at + usize::from(tcp[12] >> 4) * 4;
    let end = segment.network_at + total;
    let sound = data_at >= segment.tcp_at + 20 && data_at <= end && end <= frame.len();
    let to_one = frame[0] & 1 == 0 && is_one(source) && is_one(destination);
    if segment.is_fragment || !sound || !to_one {
        return None;
    }

    let mut answer = [&frame[6..12], &frame[..6], &frame[12..segment.network_at]].concat();
    if is_v4 {
        let mut header = vec![0x45, packet[1] & 0xfc, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0];
        header.extend([destination, source].concat());
        let sum = checksum(&header);
        header[10..12].copy_from_slice(&sum);
        answer.extend(header);
    } else {
        answer.extend([packet[0], packet[1] & 0xc0, 0, 0, 0, 20, 6, 64]);
        answer.extend([destination, source].concat());
    }
    let sequence = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
    // Its data, and one for the SYN.
    let length = u32::try_from(end - data_at).ok()? + 1;
    let mut header = [&tcp[2..4], &tcp[..2], &[0; 4]].concat();
    header.extend(sequence.wrapping_add(length).to_be_bytes());
    // RST and ACK; no window, no urgent data.
    header.extend([5 << 4, 0x14, 0, 0, 0, 0, 0, 0]);
    let sum = checksum(&[destination, source, &[0, 6, 0, 20], &header].concat());
    header[16..18].copy_from_slice(&sum);
    answer.extend(header);
    if frame.len() >= SHORTEST_FRAME && answer.len() < SHORTEST_FRAME {
        answer.resize(SHORTEST_FRAME, 0);
    }
    Some(answer)
}

/// Whether an address can be that of one host.
fn is_one(address: &[u8]) -> bool {
    let ip = match <[u8; 4]>::try_from(address) {
        Ok(octets) => IpAddr::V4(Ipv4Addr::from(octets)),
        Err(_) => match <[u8; 16]>::try_from(address) {
            Ok(octets) => IpAddr::V6(Ipv6Addr::from(octets)),
            Err(_) => return false,
        },
    };
    let is_reserved = matches!(ip, IpAddr::V4(ip) if ip.octets()[0] >= 240);
    !ip.is_unspecified() && !ip.is_multicast() && !is_reserved
}

/// RFC 1071, over an even number of bytes.
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let mut sum: u32 = bytes.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!u16::try_from(sum).unwrap_or(0)).to_be_bytes()
}

fn be16(data: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([data[at], data[at + 1]])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A SYN as a Linux client sent it, with its options, and the answer that a server where nobody listens gives.
    #[test]
    fn an_answer_is_what_a_stack_would_say() {
        let syn = [
            &[2, 2, 2, 2, 2, 2, 4, 4, 4, 4, 4, 4, 8, 0][..],
            &[0x45, 0x00, 0x00, 0x3c, 0x12, 0x34, 0x40, 0x00, 0x40, 0x06, 0xa4, 0x83, 192, 0, 2, 7, 192, 0, 2, 1],
            &[0x9c, 0x40, 0x1f, 0x90, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0xa0, 0x02, 0xfa, 0xf0, 0, 0, 0, 0],
            &[2, 4, 5, 0xb4, 4, 2, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0, 1, 3, 3, 7],
        ]
        .concat();
        let expected = [
            &[4, 4, 4, 4, 4, 4, 2, 2, 2, 2, 2, 2, 8, 0][..],
            &[0x45, 0x00, 0x00, 0x28, 0x00, 0x00, 0x40, 0x00, 0x40, 0x06, 0xb6, 0xc7, 192, 0, 2, 1, 192, 0, 2, 7],
            &[0x1f, 0x90, 0x9c, 0x40, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x14, 0, 0, 0x6f, 0xf7, 0, 0],
            // Padding.
            &[0; 6],
        ]
        .concat();
        let answer = reset(&syn).unwrap();
        assert_eq!(answer.len(), expected.len());
        // A sum over what has a right checksum is zero.
        assert_eq!(checksum(&answer[14..34]), [0, 0]);
        assert_eq!(checksum(&[&answer[26..34], &[0, 6, 0, 20], &answer[34..54]].concat()), [0, 0]);
        assert_eq!(answer, expected);
    }

    proptest! {
        #[test]
        fn no_frame_makes_it_panic(frame in proptest::collection::vec(any::<u8>(), 0..200), v6: bool) {
            let mut frame = frame;
            if let Some(place) = frame.get_mut(12..15) {
                place.copy_from_slice(if v6 { &[0x86, 0xdd, 0x60] } else { &[0x08, 0x00, 0x45] });
            }
            let _ = reset(&frame);
        }
    }
}
