//! Answers to a client in the server's name, for the model.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::Frame;

/// Shortest frame of Ethernet, without its checksum.
const SHORTEST_FRAME: usize = 60;

/// The RST that answers a SYN (RFC 9293 section 3.10.7.1); `None` if that may not be answered, or is no segment.
pub fn reset(frame: &[u8]) -> Option<Vec<u8>> {
    let question = Question::read(frame)?;
    // Its data, and one for the SYN.
    let length = u32::try_from(question.data_length).ok()? + 1;
    // RST and ACK; no window.
    Some(question.answer(0, question.sequence().wrapping_add(length), 0x14, 0, &[]))
}

/// What a host and a listener grant to a connection that is opened by a cookie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grants {
    /// Largest packet of the device.
    pub mtu: u32,
    /// Largest segment that the listener wants; 0: whatever fits.
    pub max_segment: u32,
    /// The window that the client begins with, in bytes.
    pub window: u16,
    /// Timestamps that can hide options.
    pub timestamps: bool,
    /// Selective acknowledgements.
    pub sack: bool,
    /// By how much the host will shift its windows, if by anything.
    pub window_scale: Option<u8>,
    /// Explicit congestion notification.
    pub ecn: bool,
}

/// The SYN-ACK that answers a SYN by a cookie at a time of the host's clock; `None` if it may not be answered, or is no segment.
pub fn syn_ack(frame: &[u8], grants: &Grants, cookie: u32, clock_ms: u64) -> Option<Vec<u8>> {
    let question = Question::read(frame)?;
    let headers = if question.is_v4 { 40 } else { 60 };
    let mut mss = grants.mtu.saturating_sub(headers).min(u16::MAX.into());
    if grants.max_segment != 0 {
        mss = mss.min(grants.max_segment);
    }
    let [_, _, high, low] = mss.to_be_bytes();
    // No answer is longer than its question.
    let room = frame.len() - question.network_at - headers as usize;
    let mut options = if room >= 4 { vec![2, 4, high, low] } else { Vec::new() };
    let mut flags = 0x12;
    let scales = question.option(3, 3).zip(grants.window_scale);
    if let Some(theirs) = question.option(8, 10)
        && grants.timestamps
        && room >= if scales.is_some() { 20 } else { 16 }
    {
        let sack = grants.sack && question.option(4, 2).is_some();
        let ecn = grants.ecn && question.asks_for_ecn();
        let mut hidden = scales.map_or(0xf, |(theirs, _)| u64::from(theirs[0].min(14)));
        hidden |= u64::from(sack) << 4 | u64::from(ecn) << 5;
        // The latest time that is not after now, and has that in its lowest bits.
        let ours = clock_ms.wrapping_sub(clock_ms.wrapping_sub(hidden) & 0x3f);
        options.extend(if sack { [4, 2, 8, 10] } else { [1, 1, 8, 10] });
        options.extend(&ours.to_be_bytes()[4..]);
        options.extend(&theirs[..4]);
        if let Some((_, scale)) = scales {
            options.extend([1, 3, 3, scale]);
        }
        flags |= u8::from(ecn) << 6;
    }
    Some(question.answer(cookie, question.sequence().wrapping_add(1), flags, grants.window, &options))
}

/// A SYN that may be answered.
struct Question<'a> {
    frame: &'a [u8],
    network_at: usize,
    /// The network header and everything behind it.
    packet: &'a [u8],
    is_v4: bool,
    /// Its own and ours, each as long as the family has them.
    source: &'a [u8],
    destination: &'a [u8],
    /// The TCP header, options included.
    tcp: &'a [u8],
    data_length: usize,
}

impl<'a> Question<'a> {
    fn read(frame: &'a [u8]) -> Option<Self> {
        let Frame::Segment(segment) = Frame::parse(frame) else { return None };
        let packet = &frame[segment.network_at..];
        let tcp = &frame[segment.tcp_at..];
        let (is_v4, total) = match packet[0] >> 4 {
            4 => (true, usize::from(be16(packet, 2))),
            _ => (false, 40 + usize::from(be16(packet, 4))),
        };
        let addresses = if is_v4 { &packet[12..20] } else { &packet[8..40] };
        let (source, destination) = addresses.split_at(addresses.len() / 2);
        let header_length = usize::from(tcp[12] >> 4) * 4;
        let data_at = segment.tcp_at + header_length;
        let end = segment.network_at + total;
        let sound = header_length >= 20 && data_at <= end && end <= frame.len();
        let to_one = frame[0] & 1 == 0 && is_one(source) && is_one(destination);
        if segment.is_fragment || !sound || !to_one {
            return None;
        }
        Some(Self {
            frame,
            network_at: segment.network_at,
            packet,
            is_v4,
            source,
            destination,
            tcp: &tcp[..header_length],
            data_length: end - data_at,
        })
    }

    fn sequence(&self) -> u32 {
        u32::from_be_bytes([self.tcp[4], self.tcp[5], self.tcp[6], self.tcp[7]])
    }

    /// RFC 3168 section 6.1.1: ECE and CWR, in a packet that itself has no bits of congestion.
    fn asks_for_ecn(&self) -> bool {
        let congestion = if self.is_v4 { self.packet[1] } else { self.packet[1] >> 4 };
        self.tcp[13] & 0xc0 == 0xc0 && congestion.is_multiple_of(4)
    }

    /// What the last option of that kind and length has behind both.
    fn option(&self, kind: u8, length: usize) -> Option<&'a [u8]> {
        let mut rest = &self.tcp[20..];
        let mut found = None;
        loop {
            rest = match rest {
                [0, ..] | [] => return found,
                [1, rest @ ..] => rest,
                [this, size, ..] if *size >= 2 => {
                    let Some((option, rest)) = rest.split_at_checked((*size).into()) else { return found };
                    if *this == kind && option.len() == length {
                        found = Some(&option[2..]);
                    }
                    rest
                }
                _ => return found,
            };
        }
    }

    /// The frame that goes back.
    fn answer(&self, sequence: u32, acknowledgement: u32, flags: u8, window: u16, options: &[u8]) -> Vec<u8> {
        let mut answer = [&self.frame[6..12], &self.frame[..6], &self.frame[12..self.network_at]].concat();
        // Ten words of options at most.
        let length = u8::try_from(20 + options.len()).unwrap_or(u8::MAX);
        if self.is_v4 {
            let mut header = vec![0x45, self.packet[1] & 0xfc, 0, 20 + length, 0, 0, 0x40, 0, 64, 6, 0, 0];
            header.extend([self.destination, self.source].concat());
            let sum = checksum(&header);
            header[10..12].copy_from_slice(&sum);
            answer.extend(header);
        } else {
            answer.extend([self.packet[0], self.packet[1] & 0xc0, 0, 0, 0, length, 6, 64]);
            answer.extend([self.destination, self.source].concat());
        }
        let mut header = [&self.tcp[2..4], &self.tcp[..2]].concat();
        header.extend(sequence.to_be_bytes());
        header.extend(acknowledgement.to_be_bytes());
        header.extend([(length / 4) << 4, flags]);
        header.extend(window.to_be_bytes());
        // No checksum yet, and no urgent data.
        header.extend([0, 0, 0, 0]);
        header.extend(options);
        let sum = checksum(&[self.destination, self.source, &[0, 6, 0, length], &header].concat());
        header[16..18].copy_from_slice(&sum);
        answer.extend(header);
        if self.frame.len() >= SHORTEST_FRAME && answer.len() < SHORTEST_FRAME {
            answer.resize(SHORTEST_FRAME, 0);
        }
        answer
    }
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

    const GRANTS: Grants = Grants {
        mtu: 1500,
        max_segment: 0,
        window: 0x8000,
        timestamps: true,
        sack: true,
        window_scale: Some(10),
        ecn: true,
    };

    /// A SYN with these options, flags and an even number of words.
    fn syn(flags: u8, options: &[u8]) -> Vec<u8> {
        let length = u8::try_from(20 + options.len()).unwrap();
        [
            &[2, 2, 2, 2, 2, 2, 4, 4, 4, 4, 4, 4, 8, 0][..],
            &[0x45, 0, 0, 20 + length, 0, 0, 0x40, 0, 64, 6, 0, 0, 192, 0, 2, 7, 192, 0, 2, 1],
            &[0x9c, 0x40, 0x1f, 0x90, 0, 0, 0, 9, 0, 0, 0, 0, (length / 4) << 4, flags, 0xfa, 0xf0, 0, 0, 0, 0],
            options,
        ]
        .concat()
    }

    fn options_of(answer: &[u8]) -> &[u8] {
        &answer[54..34 + usize::from(answer[46] >> 4) * 4]
    }

    #[test]
    fn a_cookie_grants_what_is_offered_and_hides_it_in_the_timestamp() {
        let mss = [2, 4, 5, 0xb4];
        let all = [&mss[..], &[4, 2, 8, 10, 1, 2, 3, 4, 0, 0, 0, 0, 1, 3, 3, 7]].concat();
        let answer = syn_ack(&syn(0xc2, &all), &GRANTS, 0xaabb_ccdd, 0x1234).unwrap();
        // 7 and SACK and ECN: 0x37 in the last six bits, which would be after 0x1234.
        let expected = [&mss[..], &[4, 2, 8, 10, 0, 0, 0x11, 0xf7, 1, 2, 3, 4, 1, 3, 3, 10]].concat();
        assert_eq!(options_of(&answer), expected);
        assert_eq!(
            (&answer[38..46], answer[47], &answer[48..50]),
            (&[0xaa, 0xbb, 0xcc, 0xdd, 0, 0, 0, 10][..], 0x52, &[0x80, 0][..])
        );
        assert_eq!(checksum(&[&answer[26..34], &[0, 6, 0, 40], &answer[34..74]].concat()), [0, 0]);

        // Nothing but timestamps: 0xf says that no window is scaled.
        let plain = [&mss[..], &[1, 1, 8, 10, 1, 2, 3, 4, 0, 0, 0, 0, 1, 1, 1, 1]].concat();
        let answer = syn_ack(&syn(0x02, &plain), &GRANTS, 1, 0x1234).unwrap();
        assert_eq!(options_of(&answer), [&mss[..], &[1, 1, 8, 10, 0, 0, 0x12, 0x0f, 1, 2, 3, 4]].concat());
        assert_eq!(answer[47], 0x12);
    }

    #[test]
    fn without_a_timestamp_a_cookie_grants_the_mss_alone() {
        let options = [2, 4, 5, 0xb4, 1, 1, 4, 2, 1, 3, 3, 7];
        let answer = syn_ack(&syn(0xc2, &options), &GRANTS, 1, 0x1234).unwrap();
        assert_eq!((options_of(&answer), answer[47]), (&[2, 4, 5, 0xb4][..], 0x12));
        let answer = syn_ack(&syn(0xc2, &options), &Grants { max_segment: 536, ..GRANTS }, 1, 0x1234).unwrap();
        assert_eq!(options_of(&answer), [2, 4, 2, 0x18]);
        assert_eq!(options_of(&syn_ack(&syn(0x02, &[]), &GRANTS, 1, 0x1234).unwrap()), [], "there is no room");
    }

    proptest! {
        #[test]
        fn no_frame_makes_it_panic(frame in proptest::collection::vec(any::<u8>(), 0..200), v6: bool) {
            let mut frame = frame;
            if let Some(place) = frame.get_mut(12..15) {
                place.copy_from_slice(if v6 { &[0x86, 0xdd, 0x60] } else { &[0x08, 0x00, 0x45] });
            }
            let _ = reset(&frame);
            let _ = syn_ack(&frame, &GRANTS, 1, 2);
        }
    }
}
