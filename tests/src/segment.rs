//! TCP segments as Ethernet frames: made with the right checksums, and read back.

use std::net::{IpAddr, SocketAddr};

/// TCP flags.
pub mod flags {
    /// No more data from the sender.
    pub const FIN: u8 = 0x01;
    /// The first segment of a direction.
    pub const SYN: u8 = 0x02;
    /// The connection is no more.
    pub const RST: u8 = 0x04;
    /// The acknowledgement number counts.
    pub const ACK: u8 = 0x10;
}

/// A TCP segment with its addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Who it says it comes from.
    pub source: SocketAddr,
    /// Where it goes; the same family.
    pub destination: SocketAddr,
    /// Sequence number.
    pub sequence: u32,
    /// Acknowledgement number.
    pub acknowledgement: u32,
    /// Of [`flags`].
    pub flags: u8,
    /// TCP options, a multiple of 4 bytes.
    pub options: Vec<u8>,
    /// The data.
    pub payload: Vec<u8>,
}

const ETHERNET_HEADER: usize = 14;
const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;
const TCP_HEADER: usize = 20;
const PROTOCOL_TCP: u8 = 6;

impl Segment {
    /// As an Ethernet frame.
    ///
    /// # Panics
    /// If the addresses are of different families, or the payload doesn't fit a packet.
    pub fn to_frame(&self, source_mac: [u8; 6], destination_mac: [u8; 6]) -> Vec<u8> {
        let tcp = self.tcp_bytes();
        let length = u16::try_from(tcp.len()).expect("a test's payload fits a packet");
        let mut frame = Vec::with_capacity(ETHERNET_HEADER + IPV6_HEADER + tcp.len());
        frame.extend(destination_mac);
        frame.extend(source_mac);
        match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                frame.extend([0x08, 0x00]);
                let mut header = [0; IPV4_HEADER];
                header[0] = 0x45;
                header[2..4].copy_from_slice(&(length + 20).to_be_bytes());
                // Don't fragment.
                header[6] = 0x40;
                header[8] = 64;
                header[9] = PROTOCOL_TCP;
                header[12..16].copy_from_slice(&source.octets());
                header[16..20].copy_from_slice(&destination.octets());
                let sum = checksum(&[&header]);
                header[10..12].copy_from_slice(&sum.to_be_bytes());
                frame.extend(header);
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                frame.extend([0x86, 0xdd]);
                let mut header = [0; IPV6_HEADER];
                header[0] = 0x60;
                header[4..6].copy_from_slice(&length.to_be_bytes());
                header[6] = PROTOCOL_TCP;
                header[7] = 64;
                header[8..24].copy_from_slice(&source.octets());
                header[24..40].copy_from_slice(&destination.octets());
                frame.extend(header);
            }
            (source, destination) => panic!("{source} and {destination} are of different families"),
        }
        frame.extend(tcp);
        frame
    }

    /// From a frame without VLAN tags, IPv4 options not looked at, IPv6 without extension headers. `None` if it is
    /// anything else. Checksums are not checked: what comes over a veth often has none yet.
    pub fn parse(frame: &[u8]) -> Option<Self> {
        let (source, destination, tcp): (IpAddr, IpAddr, &[u8]) = match frame.get(12..ETHERNET_HEADER)? {
            [0x08, 0x00] => {
                let ip = frame.get(ETHERNET_HEADER..)?;
                let header = usize::from(ip.first()? & 0x0f) * 4;
                let total = usize::from(u16::from_be_bytes(*ip.get(2..)?.first_chunk()?));
                if *ip.get(9)? != PROTOCOL_TCP {
                    return None;
                }
                let source: [u8; 4] = *ip.get(12..)?.first_chunk()?;
                let destination: [u8; 4] = *ip.get(16..)?.first_chunk()?;
                (source.into(), destination.into(), ip.get(header..total)?)
            }
            [0x86, 0xdd] => {
                let ip = frame.get(ETHERNET_HEADER..)?;
                let length = usize::from(u16::from_be_bytes(*ip.get(4..)?.first_chunk()?));
                if *ip.get(6)? != PROTOCOL_TCP {
                    return None;
                }
                let source: [u8; 16] = *ip.get(8..)?.first_chunk()?;
                let destination: [u8; 16] = *ip.get(24..)?.first_chunk()?;
                (source.into(), destination.into(), ip.get(IPV6_HEADER..IPV6_HEADER + length)?)
            }
            _ => return None,
        };
        let data_offset = usize::from(tcp.get(12)? >> 4) * 4;
        Some(Self {
            source: SocketAddr::new(source, u16::from_be_bytes(*tcp.first_chunk()?)),
            destination: SocketAddr::new(destination, u16::from_be_bytes(*tcp.get(2..)?.first_chunk()?)),
            sequence: u32::from_be_bytes(*tcp.get(4..)?.first_chunk()?),
            acknowledgement: u32::from_be_bytes(*tcp.get(8..)?.first_chunk()?),
            flags: *tcp.get(13)?,
            options: tcp.get(TCP_HEADER..data_offset)?.to_vec(),
            payload: tcp.get(data_offset..)?.to_vec(),
        })
    }

    fn tcp_bytes(&self) -> Vec<u8> {
        let mut tcp = vec![0; TCP_HEADER];
        tcp[0..2].copy_from_slice(&self.source.port().to_be_bytes());
        tcp[2..4].copy_from_slice(&self.destination.port().to_be_bytes());
        tcp[4..8].copy_from_slice(&self.sequence.to_be_bytes());
        tcp[8..12].copy_from_slice(&self.acknowledgement.to_be_bytes());
        let words = u8::try_from((TCP_HEADER + self.options.len()) / 4).expect("a test's options fit a header");
        tcp[12] = words << 4;
        tcp[13] = self.flags;
        // The window.
        tcp[14..16].copy_from_slice(&u16::MAX.to_be_bytes());
        tcp.extend(&self.options);
        tcp.extend(&self.payload);
        let length = u32::try_from(tcp.len()).expect("a test's payload fits a packet").to_be_bytes();
        let protocol = [0, PROTOCOL_TCP];
        let sum = match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                checksum(&[&source.octets(), &destination.octets(), &protocol, &length, &tcp])
            }
            (source, destination) => {
                let octets = |ip| match ip {
                    IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
                    IpAddr::V6(ip) => ip.octets(),
                };
                checksum(&[&octets(source), &octets(destination), &protocol, &length, &tcp])
            }
        };
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());
        tcp
    }
}

/// The Internet checksum (RFC 1071) over parts, of which all but the last have an even length.
#[expect(clippy::cast_possible_truncation, reason = "the carries are folded in")]
pub fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum: u32 = 0;
    for part in parts {
        let (pairs, rest) = part.as_chunks::<2>();
        sum += pairs.iter().map(|pair| u32::from(u16::from_be_bytes(*pair))).sum::<u32>();
        sum += rest.first().map_or(0, |&byte| u32::from(byte) << 8);
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(source: &str, destination: &str) -> Segment {
        Segment {
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
            sequence: 0xffff_fff0,
            acknowledgement: 7,
            flags: flags::ACK,
            options: vec![1, 1, 1, 0],
            payload: b"odd".to_vec(),
        }
    }

    #[test]
    fn a_segment_comes_back_from_its_frame() {
        for segment in
            [segment("192.0.2.7:1025", "192.0.2.8:8080"), segment("[2001:db8::7]:1025", "[2001:db8::8]:8080")]
        {
            assert_eq!(Segment::parse(&segment.to_frame([2; 6], [4; 6])), Some(segment));
        }
    }

    #[test]
    fn a_sum_over_a_right_checksum_is_zero() {
        let tcp = segment("192.0.2.7:1025", "192.0.2.8:8080").tcp_bytes();
        let length = u32::try_from(tcp.len()).unwrap().to_be_bytes();
        assert_eq!(checksum(&[&[192, 0, 2, 7], &[192, 0, 2, 8], &[0, 6], &length, &tcp]), 0);
    }

    #[test]
    fn a_truncated_frame_is_no_segment() {
        let frame = segment("192.0.2.7:1025", "192.0.2.8:8080").to_frame([2; 6], [4; 6]);
        for length in 0..frame.len() {
            assert_eq!(Segment::parse(&frame[..length]), None, "{length} bytes");
        }
    }
}
