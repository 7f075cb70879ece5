//! Headers as they stand in a packet. They are read as the kernel's own structures are, in words: the network header of a frame
//! lies on a multiple of four as BPF sees it (the verifier counts `NET_IP_ALIGN` in), and where it does not in memory, the
//! machine does not mind (`CONFIG_HAVE_EFFICIENT_UNALIGNED_ACCESS`) or the kernel has moved it. Numbers wider than a byte are in
//! network order.

pub const ETHERTYPE_IPV4: u16 = 0x0800;
pub const ETHERTYPE_IPV6: u16 = 0x86dd;
/// IEEE 802.1Q.
pub const ETHERTYPE_VLAN: u16 = 0x8100;
/// IEEE 802.1ad, the outer tag of two.
pub const ETHERTYPE_SERVICE_VLAN: u16 = 0x88a8;

pub const PROTOCOL_TCP: u8 = 6;
pub const HEADER_HOP_BY_HOP: u8 = 0;
pub const HEADER_ROUTING: u8 = 43;
pub const HEADER_FRAGMENT: u8 = 44;
pub const HEADER_AUTHENTICATION: u8 = 51;
pub const HEADER_DESTINATION: u8 = 60;
pub const HEADER_MOBILITY: u8 = 135;

pub const FIN: u8 = 0x01;
pub const SYN: u8 = 0x02;
pub const RST: u8 = 0x04;
pub const ACK: u8 = 0x10;
/// RFC 3168 section 6.1.1: who asks for ECN sets both in its SYN, and who grants it the first in its SYN-ACK.
pub const ECE: u8 = 0x40;
pub const CWR: u8 = 0x80;

/// In [`Ipv4Header::flags_and_fragment`].
pub const MORE_FRAGMENTS: u16 = 0x2000;
/// In [`Ipv4Header::flags_and_fragment`]: the offset, in units of 8 bytes.
pub const FRAGMENT_OFFSET: u16 = 0x1fff;

#[repr(C)]
pub struct EthernetHeader {
    pub destination: [u8; 6],
    pub source: [u8; 6],
    pub ethertype: u16,
}

#[repr(C)]
pub struct VlanTag {
    pub control: u16,
    pub ethertype: u16,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Ipv4Header {
    pub version_and_length: u8,
    pub service: u8,
    pub total_length: u16,
    pub identification: u16,
    pub flags_and_fragment: u16,
    pub ttl: u8,
    pub protocol: u8,
    pub checksum: u16,
    pub source: u32,
    pub destination: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Ipv6Header {
    pub version_and_class: u8,
    pub class_and_flow: [u8; 3],
    pub payload_length: u16,
    pub next_header: u8,
    pub hop_limit: u8,
    pub source: [u32; 4],
    pub destination: [u32; 4],
}

#[repr(C)]
pub struct ExtensionHeader {
    pub next_header: u8,
    pub length: u8,
}

/// What a fragment header has behind the two bytes of every [`ExtensionHeader`], and before the identification.
#[repr(C)]
pub struct FragmentPlace {
    pub offset_and_flags: u16,
}

/// What every TCP header begins with.
#[repr(C)]
pub struct Ports {
    pub source: u16,
    pub destination: u16,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct TcpHeader {
    pub source_port: u16,
    pub destination_port: u16,
    pub sequence: u32,
    pub acknowledgement: u32,
    pub data_offset: u8,
    pub flags: u8,
    pub window: u16,
    pub checksum: u16,
    pub urgent: u16,
}
