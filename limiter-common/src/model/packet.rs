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
    /// Where in the frame the network header begins.
    pub network_at: usize,
    /// Where in the frame the TCP header begins.
    pub tcp_at: usize,
    /// Whether more fragments of it follow.
    pub is_fragment: bool,
    /// FIN, SYN, RST, PSH, ACK, URG, ECE, CWR, from the lowest bit up.
    pub flags: u8,
    /// The first Fast Open option, if there is one (RFC 7413, and what it was before that).
    pub fast_open: Option<FastOpen>,
}

/// Where in a frame a Fast Open option is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FastOpen {
    /// Where it begins.
    pub option: usize,
    /// Where the TCP header does.
    pub tcp: usize,
}

/// What is in a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame {
    /// The start of a segment: at least its first twenty bytes.
    Segment(Segment),
    /// Perhaps one that only the stack can read; for this port, if that can be read.
    Hidden(Option<u16>),
    /// Nothing of TCP.
    Other,
}

/// Most VLAN tags and IPv6 extension headers that are looked behind.
const MAX_TAGS: usize = 4;
const MAX_EXTENSIONS: usize = 8;

/// What is behind the network header.
enum Transport<'a> {
    /// TCP, up to the end of the frame. Of a fragment, how much of that is the packet's and not padding.
    Tcp { remote: IpAddr, local: IpAddr, data: &'a [u8], fragment: Option<usize> },
    /// It can't be known.
    Hidden,
}

impl Frame {
    /// Reads a frame.
    pub fn parse(frame: &[u8]) -> Self {
        Self::try_parse(frame).unwrap_or(Self::Other)
    }

    fn try_parse(frame: &[u8]) -> Option<Self> {
        let mut rest = frame.get(12..)?;
        let mut ethertype = be16(rest, 0)?;
        let mut tags = 0;
        while matches!(ethertype, 0x8100 | 0x88a8) {
            if tags == MAX_TAGS {
                return Some(Self::Hidden(None));
            }
            rest = rest.get(4..)?;
            ethertype = be16(rest, 0)?;
            tags += 1;
        }
        let packet = rest.get(2..)?;
        let transport = match ethertype {
            0x0800 => ipv4(packet)?,
            0x86dd => ipv6(packet)?,
            _ => return None,
        };
        let Transport::Tcp { remote, local, data, fragment } = transport else { return Some(Self::Hidden(None)) };
        // All of its header, options included, has to be in the first fragment.
        if let Some(length) = fragment
            && data.get(..20).is_none_or(|tcp| length < usize::from(tcp[12] >> 4).max(5) * 4)
        {
            return Some(Self::Hidden(be16(data, 2).filter(|port| length >= 4 && *port != 0)));
        }
        let tcp = data.get(..20)?;
        let start = frame.len() - data.len();
        let fast_open =
            fast_open(data, usize::from(tcp[12] >> 4) * 4).map(|at| FastOpen { option: start + at, tcp: start });
        Some(Self::Segment(Segment {
            network_at: frame.len() - packet.len(),
            tcp_at: frame.len() - data.len(),
            is_fragment: fragment.is_some(),
            remote: SocketAddr::new(remote, be16(tcp, 0)?),
            local: SocketAddr::new(local, be16(tcp, 2)?),
            acknowledgement: u32::from_be_bytes(tcp[8..12].try_into().ok()?),
            flags: tcp[13],
            fast_open,
        }))
    }
}

impl Segment {
    /// Whether it asks for a connection: SYN, and none of ACK, RST and FIN.
    pub const fn asks(&self) -> bool {
        self.flags & 0x17 == 0x02
    }

    /// Whether it may belong to a connection or complete a handshake: ACK, and neither SYN nor RST.
    pub const fn continues(&self) -> bool {
        self.flags & 0x16 == 0x10
    }
}

/// Where in a TCP header of that length the first Fast Open option begins.
fn fast_open(tcp: &[u8], length: usize) -> Option<usize> {
    let tcp = tcp.get(..length).unwrap_or(tcp);
    let mut at = 20;
    loop {
        match tcp.get(at..)? {
            [1, ..] => at += 1,
            [34, _, ..] | [254, _, 0xf9, 0x89, ..] => return Some(at),
            [kind, size, ..] if *kind != 0 && *size >= 2 => at += usize::from(*size),
            _ => return None,
        }
    }
}

fn ipv4(packet: &[u8]) -> Option<Transport<'_>> {
    let header = packet.get(..20)?;
    let length = usize::from(header[0] & 0x0f) * 4;
    let later_fragment = be16(header, 6)? & 0x1fff != 0;
    if header[0] >> 4 != 4 || length < 20 || later_fragment || header[9] != 6 {
        return None;
    }
    let more_follow = header[6] & 0x20 != 0;
    let total = usize::from(be16(header, 2)?);
    let address = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(header.get(at..at + 4)?).ok()?));
    Some(Transport::Tcp {
        remote: address(12)?,
        local: address(16)?,
        // Options may reach past the end of the frame.
        data: packet.get(length..).unwrap_or_default(),
        fragment: more_follow.then(|| total.saturating_sub(length)),
    })
}

fn ipv6(packet: &[u8]) -> Option<Transport<'_>> {
    let header = packet.get(..40)?;
    if header[0] >> 4 != 6 {
        return None;
    }
    let address = |at: usize| Some(Ipv6Addr::from(<[u8; 16]>::try_from(header.get(at..at + 16)?).ok()?));
    let (remote, local) = (address(8)?.to_canonical(), address(24)?.to_canonical());
    let mut next = header[6];
    let payload = packet.get(40..)?;
    let mut at = 0;
    let mut fragment = false;
    for count in 0.. {
        if !matches!(next, 0 | 43 | 44 | 51 | 60 | 135) {
            break;
        }
        // Of a first fragment, the rest of the headers may be in the next one.
        let (Some(&following), Some(&length), true) = (payload.get(at), payload.get(at + 1), count < MAX_EXTENSIONS)
        else {
            return (fragment || count == MAX_EXTENSIONS).then_some(Transport::Hidden);
        };
        at += match next {
            44 => {
                let place = be16(payload, at + 2)?;
                if place & 0xfff8 != 0 {
                    return None;
                }
                fragment = place & 1 != 0;
                8
            }
            // authentication: in units of 4 bytes, the first two not counted
            51 => (usize::from(length) + 2) * 4,
            // hop-by-hop, routing, destination, mobility: in units of 8 bytes, the first not counted
            _ => (usize::from(length) + 1) * 8,
        };
        next = following;
    }
    let length = usize::from(be16(header, 4)?);
    (next == 6).then(|| Transport::Tcp {
        remote,
        local,
        data: payload.get(at..).unwrap_or_default(),
        fragment: fragment.then(|| length.saturating_sub(at)),
    })
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
            let _ = Frame::parse(&frame);
        }
    }
}
