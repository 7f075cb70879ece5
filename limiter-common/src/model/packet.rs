//! From a frame to a TCP segment, for the model.

use core::net::{IpAddr, Ipv6Addr, SocketAddr};

/// The start of a TCP segment, as it arrives at the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The client.
    pub remote: SocketAddr,
    /// Who it is for.
    pub local: SocketAddr,
    /// The acknowledgement number.
    pub acknowledgement: u32,
    /// FIN, SYN, RST, PSH, ACK, URG, ECE, CWR, from the lowest bit up.
    pub flags: u8,
}

/// Most VLAN tags and IPv6 extension headers that are looked behind.
const MAX_TAGS: usize = 2;
const MAX_EXTENSIONS: usize = 8;

impl Segment {
    /// The segment in a frame, if there is one and its first twenty bytes are in the frame.
    pub fn parse(frame: &[u8]) -> Option<Self> {
        let mut rest = frame.get(12..)?;
        let mut ethertype = be16(rest, 0)?;
        let mut tags = 0;
        while matches!(ethertype, 0x8100 | 0x88a8) && tags < MAX_TAGS {
            rest = rest.get(4..)?;
            ethertype = be16(rest, 0)?;
            tags += 1;
        }
        let packet = rest.get(2..)?;
        let (remote, local, tcp) = match ethertype {
            0x0800 => ipv4(packet)?,
            0x86dd => ipv6(packet)?,
            _ => return None,
        };
        let tcp = tcp.get(..20)?;
        Some(Self {
            remote: SocketAddr::new(remote, be16(tcp, 0)?),
            local: SocketAddr::new(local, be16(tcp, 2)?),
            acknowledgement: u32::from_be_bytes(tcp[8..12].try_into().ok()?),
            flags: tcp[13],
        })
    }

    /// Whether it asks for a connection: SYN, and none of ACK, RST and FIN.
    pub const fn asks(&self) -> bool {
        self.flags & 0x17 == 0x02
    }

    /// Whether it may belong to a connection or complete a handshake: ACK, and neither SYN nor RST.
    pub const fn continues(&self) -> bool {
        self.flags & 0x16 == 0x10
    }
}

fn ipv4(packet: &[u8]) -> Option<(IpAddr, IpAddr, &[u8])> {
    let header = packet.get(..20)?;
    let length = usize::from(header[0] & 0x0f) * 4;
    let later_fragment = be16(header, 6)? & 0x1fff != 0;
    if header[0] >> 4 != 4 || length < 20 || later_fragment || header[9] != 6 {
        return None;
    }
    let address = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(header.get(at..at + 4)?).ok()?));
    Some((address(12)?, address(16)?, packet.get(length..)?))
}

fn ipv6(packet: &[u8]) -> Option<(IpAddr, IpAddr, &[u8])> {
    let header = packet.get(..40)?;
    if header[0] >> 4 != 6 {
        return None;
    }
    let address = |at: usize| Some(Ipv6Addr::from(<[u8; 16]>::try_from(header.get(at..at + 16)?).ok()?));
    let (remote, local) = (address(8)?.to_canonical(), address(24)?.to_canonical());
    let mut next = header[6];
    let mut rest = packet.get(40..)?;
    let mut extensions = 0;
    while next != 6 {
        if extensions == MAX_EXTENSIONS {
            return None;
        }
        extensions += 1;
        let length = match next {
            // hop-by-hop, routing, destination, mobility: in units of 8 bytes, the first not counted
            0 | 43 | 60 | 135 => (usize::from(*rest.get(1)?) + 1) * 8,
            // authentication: in units of 4 bytes, the first two not counted
            51 => (usize::from(*rest.get(1)?) + 2) * 4,
            // fragment: only the first one goes on with TCP
            44 if be16(rest, 2)? & 0xfff8 == 0 => 8,
            _ => return None,
        };
        next = *rest.first()?;
        rest = rest.get(length..)?;
    }
    Some((remote, local, rest))
}

fn be16(data: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(data.get(at..at + 2)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_frame_makes_it_panic(frame in proptest::collection::vec(any::<u8>(), 0..200), ethertype in 0..3_usize) {
            let mut frame = frame;
            if let Some(place) = frame.get_mut(12..14) {
                place.copy_from_slice(&[[0x08, 0x00], [0x86, 0xdd], [0x81, 0x00]][ethertype]);
            }
            let _ = Segment::parse(&frame);
        }
    }
}
