//! Frames of every shape that a TCP segment can arrive in, for the tests of the programs. Checksums are left out: nothing
//! that reads these frames looks at them.

use std::net::{IpAddr, SocketAddr};

use crate::segment::flags;

/// Hardware address of the server: where frames go.
pub const SERVER_MAC: [u8; 6] = [2; 6];
/// Hardware address of the client: where they come from.
pub const CLIENT_MAC: [u8; 6] = [4; 6];

/// What comes between the IP header and TCP, or before the IP header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// VLAN tags, by their ethertype, the outer first.
    pub vlan_tags: Vec<u16>,
    /// The client.
    pub source: SocketAddr,
    /// Who it is for; the same family.
    pub destination: SocketAddr,
    /// Words of IPv4 options, at most 10.
    pub ipv4_option_words: u8,
    /// IPv4: whether more fragments follow, and the offset in units of 8 bytes.
    pub ipv4_fragment: (bool, u16),
    /// IPv6 extension headers, in order.
    pub extensions: Vec<Extension>,
    /// The sequence number.
    pub sequence: u32,
    /// The acknowledgement number.
    pub acknowledgement: u32,
    /// Of [`flags`].
    pub flags: u8,
    /// TCP options, in whole words.
    pub tcp_options: Vec<u8>,
    /// What follows the TCP header.
    pub payload: Vec<u8>,
}

/// An IPv6 extension header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extension {
    /// Of this type, with so many times 8 bytes after the first 8: hop-by-hop (0), routing (43), destination (60),
    /// mobility (135).
    Plain(u8, u8),
    /// Authentication (51), with so many times 4 bytes after the first 8.
    Authentication(u8),
    /// Fragment (44), with its offset in units of 8 bytes and whether more follow.
    Fragment(u16, bool),
}

impl Extension {
    fn number(self) -> u8 {
        match self {
            Self::Plain(number, _) => number,
            Self::Authentication(_) => 51,
            Self::Fragment(..) => 44,
        }
    }

    fn bytes(self, next: u8) -> Vec<u8> {
        match self {
            Self::Plain(_, length) => [vec![next, length], vec![0; 6 + usize::from(length) * 8]].concat(),
            Self::Authentication(length) => [vec![next, length], vec![0; 6 + usize::from(length) * 4]].concat(),
            Self::Fragment(offset, more) => {
                let field = offset << 3 | u16::from(more);
                [vec![next, 0], field.to_be_bytes().to_vec(), vec![0; 4]].concat()
            }
        }
    }
}

impl Frame {
    /// A plain SYN.
    pub fn syn(source: SocketAddr, destination: SocketAddr) -> Self {
        Self {
            vlan_tags: Vec::new(),
            source,
            destination,
            ipv4_option_words: 0,
            ipv4_fragment: (false, 0),
            extensions: Vec::new(),
            sequence: 1,
            acknowledgement: 0,
            flags: flags::SYN,
            tcp_options: Vec::new(),
            payload: Vec::new(),
        }
    }

    /// The same with other flags.
    #[must_use]
    pub fn with_flags(mut self, flags: u8) -> Self {
        self.flags = flags;
        self
    }

    /// As bytes.
    ///
    /// # Panics
    /// If the addresses are of different families.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = [SERVER_MAC, CLIENT_MAC].concat();
        for tag in &self.vlan_tags {
            bytes.extend(tag.to_be_bytes());
            bytes.extend([0x00, 0x64]);
        }
        let tcp = self.tcp();
        match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                bytes.extend([0x08, 0x00]);
                let header_length = 20 + usize::from(self.ipv4_option_words) * 4;
                let total = u16::try_from(header_length + tcp.len()).unwrap_or(u16::MAX);
                bytes.extend([0x40 | (5 + self.ipv4_option_words), 0]);
                bytes.extend(total.to_be_bytes());
                bytes.extend([0, 1]);
                let (more, offset) = self.ipv4_fragment;
                bytes.extend((u16::from(more) << 13 | offset & 0x1fff).to_be_bytes());
                bytes.extend([64, 6, 0, 0]);
                bytes.extend(source.octets());
                bytes.extend(destination.octets());
                bytes.extend(vec![1; usize::from(self.ipv4_option_words) * 4]);
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                bytes.extend([0x86, 0xdd]);
                let numbers: Vec<u8> = self.extensions.iter().map(|extension| extension.number()).chain([6]).collect();
                let extensions: Vec<u8> = self
                    .extensions
                    .iter()
                    .zip(&numbers[1..])
                    .flat_map(|(extension, next)| extension.bytes(*next))
                    .collect();
                let length = u16::try_from(extensions.len() + tcp.len()).unwrap_or(u16::MAX);
                bytes.extend([0x60, 0, 0, 0]);
                bytes.extend(length.to_be_bytes());
                bytes.extend([numbers[0], 64]);
                bytes.extend(source.octets());
                bytes.extend(destination.octets());
                bytes.extend(extensions);
            }
            (source, destination) => panic!("{source} and {destination} are of different families"),
        }
        bytes.extend(tcp);
        bytes
    }

    fn tcp(&self) -> Vec<u8> {
        let mut tcp = Vec::with_capacity(20 + self.payload.len());
        tcp.extend(self.source.port().to_be_bytes());
        tcp.extend(self.destination.port().to_be_bytes());
        tcp.extend(self.sequence.to_be_bytes());
        tcp.extend(self.acknowledgement.to_be_bytes());
        assert!(self.tcp_options.len() <= 40 && self.tcp_options.len().is_multiple_of(4), "options are whole words");
        let offset = 5 + u8::try_from(self.tcp_options.len() / 4).expect("ten words at most");
        tcp.extend([offset << 4, self.flags, 0xff, 0xff, 0, 0, 0, 0]);
        tcp.extend(&self.tcp_options);
        tcp.extend(&self.payload);
        tcp
    }
}
