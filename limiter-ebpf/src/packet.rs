//! From a frame to a TCP segment: Ethernet, up to four VLAN tags, IPv4 with options or IPv6 with extension headers, TCP.
//!
//! A frame that is anything else is nobody's business here and passes. But one that the stack may find a segment in and that
//! can't be read here is [`Unread::Hidden`]: what was laid out so that nobody but the stack reads it does not get past.
//!
//! Headers are read as the kernel's own structures are, in words: the network header of a frame lies on a multiple of four
//! as BPF sees it (the verifier counts `NET_IP_ALIGN` in), and where it does not in memory, the machine does not mind
//! (`CONFIG_HAVE_EFFICIENT_UNALIGNED_ACCESS`) or the kernel has moved it. Numbers wider than a byte are in network order.

use core::{hint, mem};

use aya_ebpf::{
    bindings::{__sk_buff, xdp_md},
    programs::XdpContext,
};
use limiter_common::{Address, ConnectionKey, TagSecret};

use crate::context::{Packet, Skb};

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
/// IEEE 802.1Q.
const ETHERTYPE_VLAN: u16 = 0x8100;
/// IEEE 802.1ad, the outer tag of two.
const ETHERTYPE_SERVICE_VLAN: u16 = 0x88a8;
/// Nobody needs more than two; but the stack steps over any number of tags that only give a priority (VLAN 0).
const MAX_VLAN_TAGS: usize = 4;

pub const PROTOCOL_TCP: u8 = 6;
const HEADER_HOP_BY_HOP: u8 = 0;
const HEADER_ROUTING: u8 = 43;
const HEADER_FRAGMENT: u8 = 44;
const HEADER_AUTHENTICATION: u8 = 51;
const HEADER_DESTINATION: u8 = 60;
const HEADER_MOBILITY: u8 = 135;
/// RFC 8200 section 4.1 names seven at most in one packet; the kernel has no bound.
const MAX_EXTENSION_HEADERS: usize = 8;

pub const FIN: u8 = 0x01;
pub const SYN: u8 = 0x02;
pub const RST: u8 = 0x04;
pub const ACK: u8 = 0x10;

/// In [`Ipv4Header::flags_and_fragment`].
const MORE_FRAGMENTS: u16 = 0x2000;
/// In [`Ipv4Header::flags_and_fragment`]: the offset, in units of 8 bytes.
const FRAGMENT_OFFSET: u16 = 0x1fff;

const OPTION_END: u8 = 0;
const OPTION_NONE: u8 = 1;
/// RFC 7413 section 4.1.1.
const OPTION_FAST_OPEN: u8 = 34;
/// Of several experiments (RFC 4727), told apart by the two bytes that follow (RFC 6994).
const OPTION_EXPERIMENT: u8 = 254;
/// In [`OPTION_EXPERIMENT`]: what Fast Open was before it had a number. The stack takes it still.
const FAST_OPEN_MAGIC: [u8; 2] = [0xf9, 0x89];
/// Of experiments, too; the stack knows none by it, and skips it.
pub const OPTION_UNKNOWN: u8 = 253;
const MAX_OPTION_BYTES: usize = 40;

#[repr(C)]
pub struct EthernetHeader {
    pub destination: [u8; 6],
    pub source: [u8; 6],
    pub ethertype: u16,
}

#[repr(C)]
struct VlanTag {
    control: u16,
    ethertype: u16,
}

#[repr(C)]
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
struct ExtensionHeader {
    next_header: u8,
    length: u8,
}

/// What a fragment header has behind the two bytes of every [`ExtensionHeader`], and before the identification.
#[repr(C)]
struct FragmentPlace {
    offset_and_flags: u16,
}

/// What every TCP header begins with.
#[repr(C)]
struct Ports {
    source: u16,
    destination: u16,
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

/// The network header of a segment, within the frame.
#[derive(Clone, Copy)]
pub enum Network {
    V4(*const Ipv4Header),
    V6(*const Ipv6Header),
}

/// Why there is no segment.
#[derive(Clone, Copy)]
pub enum Unread {
    /// There is none, or its header is not in this frame and nowhere that the stack would find it.
    Other,
    /// The stack may find one where it can't be read here. With its port, or 0 where that can't be read either.
    Hidden(u16),
}

/// A TCP segment within a frame. The pointers are into the packet, checked against its end.
#[derive(Clone, Copy)]
pub struct Segment {
    pub network: Network,
    tcp: *mut TcpHeader,
    /// Of the TCP header in the packet.
    pub offset: usize,
}

/// The TCP segment in a frame, if there is one and its header is in this frame.
///
/// The plain shapes, which are nearly all there are, are read here; what has VLAN tags or extension headers and what is a
/// fragment, by [`limiter_locate`].
#[inline(always)]
pub fn segment(ctx: &impl Packet) -> Result<Segment, Unread> {
    ctx.reach(PLAIN_HEADERS);
    let mut cursor = Cursor::new(ctx);
    match ctx.link_header(&mut cursor).ok_or(Unread::Other)? {
        ETHERTYPE_IPV4 => {
            let header = ipv4(&mut cursor).ok_or(Unread::Other)?;
            // SAFETY: ipv4 checked it.
            if is_fragment(unsafe { &*header }) {
                return located(ctx);
            }
            tcp_behind(&mut cursor, Network::V4(header)).ok_or(Unread::Other)
        }
        ETHERTYPE_IPV6 => {
            let header = ipv6(&mut cursor).ok_or(Unread::Other)?;
            // SAFETY: take checked it.
            let next = unsafe { (*header).next_header };
            if next == PROTOCOL_TCP {
                tcp_behind(&mut cursor, Network::V6(header)).ok_or(Unread::Other)
            } else if is_extension(next) {
                located(ctx)
            } else {
                Err(Unread::Other)
            }
        }
        ETHERTYPE_VLAN | ETHERTYPE_SERVICE_VLAN => located(ctx),
        _ => Err(Unread::Other),
    }
}

/// The segment that [`limiter_locate`] finds.
#[inline(always)]
fn located(ctx: &impl Packet) -> Result<Segment, Unread> {
    ctx.reach(ALL_HEADERS);
    let place = ctx.locate();
    if place == 0 {
        return Err(Unread::Other);
    }
    if place & HIDDEN != 0 {
        return Err(Unread::Hidden(place as u16));
    }
    at(ctx, place).ok_or(Unread::Other)
}

/// The segment whose TCP header is next.
#[inline(always)]
fn tcp_behind(cursor: &mut Cursor, network: Network) -> Option<Segment> {
    Some(Segment { network, offset: cursor.offset, tcp: cursor.take::<TcpHeader>()? })
}

/// The segment at a place that [`limiter_locate`] has found.
#[inline(always)]
pub fn at(ctx: &impl Packet, place: u32) -> Option<Segment> {
    let mut cursor = Cursor::new(ctx);
    cursor.skip((place >> NETWORK_SHIFT) as usize % NETWORK_END);
    let network = if place & IS_V6 == 0 {
        Network::V4(cursor.take::<Ipv4Header>()?)
    } else {
        Network::V6(cursor.take::<Ipv6Header>()?)
    };
    let mut cursor = Cursor::new(ctx);
    cursor.skip(place as usize % TCP_END);
    Some(Segment { network, offset: place as usize % TCP_END, tcp: cursor.take::<TcpHeader>()? })
}

/// How many bytes the headers take that are read inline: IPv4 may have 40 bytes of options.
const PLAIN_HEADERS: u32 = 14 + 60 + 20;
/// How many all headers take at most that are looked behind.
const ALL_HEADERS: u32 = 14 + 4 * MAX_VLAN_TAGS as u32 + 40 + 2048 * MAX_EXTENSION_HEADERS as u32 + 20;

/// In the answer of [`limiter_locate`]: the network header is that of IPv6.
pub const IS_V6: u32 = 1 << 31;
/// In the answer of [`limiter_locate`]: there is none, but for [`Unread::Hidden`]; the port is in the lowest 16 bits.
pub const HIDDEN: u32 = 1 << 30;
/// In the answer of [`limiter_locate`]: this is the first of several fragments.
pub const IS_FRAGMENT: u32 = 1 << 15;
/// In the answer of [`limiter_locate`]: how far to shift for the offset of the network header. That of the TCP header is
/// in the lowest bits.
pub const NETWORK_SHIFT: u32 = 16;
/// Network headers begin before this offset.
pub const NETWORK_END: usize = 32;
/// TCP headers begin before this offset: 8 extension headers have 2048 bytes each at most.
pub const TCP_END: usize = 1 << 15;
/// TCP options do, too.
const OPTIONS_END: usize = 1 << 15;

/// Where the network header and the TCP header of a frame begin; 0 if there is no TCP header; or [`HIDDEN`].
///
/// A function with a name for the kernel to see (a "global function", kernel 5.6): the verifier looks at it once, and at
/// what follows once and not for each way through the headers. Inlined, the ways through eight extension headers behind
/// two tags make it look at half a million instructions.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn limiter_locate(ctx: *mut xdp_md) -> u32 {
    locate(&XdpContext::new(ctx)).unwrap_or(0)
}

/// The same for the packets of TC.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn limiter_locate_skb(skb: *mut __sk_buff, has_ethernet: u32) -> u32 {
    locate(&Skb::new(skb, has_ethernet != 0)).unwrap_or(0)
}

/// Where in a packet the number of a Fast Open option is (RFC 7413), of the TCP header that begins at `tcp`; 0 if it has none.
///
/// A global function, like [`limiter_locate`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn limiter_fast_open(ctx: *mut xdp_md, tcp: u32) -> u32 {
    fast_open(&XdpContext::new(ctx), tcp as usize % TCP_END).unwrap_or(0)
}

/// The same for the packets of TC.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn limiter_fast_open_skb(skb: *mut __sk_buff, tcp: u32) -> u32 {
    fast_open(&Skb::new(skb, true), tcp as usize % TCP_END).unwrap_or(0)
}

/// Goes byte by byte, each at a place that is known when the program is compiled: the verifier then has little to follow.
#[inline(always)]
fn fast_open(ctx: &impl Packet, tcp: usize) -> Option<u32> {
    let mut cursor = Cursor::new(ctx);
    cursor.skip(tcp);
    let header = cursor.take::<TcpHeader>()?;
    // SAFETY: take checked it.
    let length = usize::from(unsafe { (*header).data_offset } >> 4) * 4;
    // SAFETY: one past the header that take checked.
    let options = unsafe { header.add(1) } as usize;
    // Where the next option begins, and that whose length comes next.
    let (mut next, mut kind) = (0, OPTION_NONE);
    for place in 0..MAX_OPTION_BYTES {
        let at = options + place;
        if mem::size_of::<TcpHeader>() + place >= length || at + 1 > cursor.end {
            break;
        }
        // SAFETY: the bounds were checked.
        let byte = unsafe { *(at as *const u8) };
        if kind != OPTION_NONE {
            if kind == OPTION_FAST_OPEN
                || kind == OPTION_EXPERIMENT
                    && mem::size_of::<TcpHeader>() + place + 3 <= length
                    && at + 3 <= cursor.end
                    // SAFETY: the bounds were checked.
                    && unsafe { *((at + 1) as *const [u8; 2]) } == FAST_OPEN_MAGIC
            {
                return Some((tcp + mem::size_of::<TcpHeader>() + place - 1) as u32);
            }
            // Where an option is shorter than that, the stack reads no further either.
            if byte < 2 {
                break;
            }
            next = place - 1 + usize::from(byte);
            kind = OPTION_NONE;
        } else if place == next {
            if byte == OPTION_END {
                break;
            }
            next = place + 1;
            kind = byte;
        }
    }
    None
}

/// Reads header after header, each one checked against the end of the packet.
pub struct Cursor {
    start: usize,
    end: usize,
    /// Counted on its own: a difference of pointers would be made in 32 bits, which the verifier refuses.
    offset: usize,
}

impl Cursor {
    #[inline(always)]
    pub fn new(ctx: &impl Packet) -> Self {
        Self { start: ctx.data(), end: ctx.data_end(), offset: 0 }
    }

    /// The next `T`.
    #[inline(always)]
    pub fn take<T>(&mut self) -> Option<*mut T> {
        let at = self.start + self.offset;
        if at + mem::size_of::<T>() > self.end {
            return None;
        }
        self.offset += mem::size_of::<T>();
        Some(at as *mut T)
    }

    #[inline(always)]
    pub fn skip(&mut self, bytes: usize) {
        self.offset += bytes;
    }
}

#[inline(always)]
fn locate(ctx: &impl Packet) -> Option<u32> {
    let mut cursor = Cursor::new(ctx);
    let mut ethertype = ctx.link_header(&mut cursor)?;
    for _ in 0..MAX_VLAN_TAGS {
        if ethertype != ETHERTYPE_VLAN && ethertype != ETHERTYPE_SERVICE_VLAN {
            break;
        }
        // SAFETY: take checked it.
        ethertype = u16::from_be(unsafe { (*cursor.take::<VlanTag>()?).ethertype });
    }
    let network = (cursor.offset as u32) << NETWORK_SHIFT;
    match ethertype {
        ETHERTYPE_IPV4 => Some(locate_in_v4(&mut cursor)? | network),
        ETHERTYPE_IPV6 => Some(locate_in_v6(&mut cursor)? | network),
        ETHERTYPE_VLAN | ETHERTYPE_SERVICE_VLAN => Some(HIDDEN),
        _ => None,
    }
}

/// Steps over an Ethernet header, and returns what it says that follows.
#[inline(always)]
pub fn ethernet(cursor: &mut Cursor) -> Option<u16> {
    // SAFETY: take checked it.
    Some(u16::from_be(unsafe { (*cursor.take::<EthernetHeader>()?).ethertype }))
}

#[inline(always)]
fn locate_in_v4(cursor: &mut Cursor) -> Option<u32> {
    let start = cursor.offset;
    // SAFETY: ipv4 checked it.
    let ip = unsafe { &*ipv4(cursor)? };
    // The fragment offset is in the lower 13 bits: only the first fragment has the TCP header.
    if u16::from_be(ip.flags_and_fragment) & FRAGMENT_OFFSET != 0 {
        return None;
    }
    // What is behind the packet is padding of the frame, and looks like whatever its sender wants.
    let end = start + usize::from(u16::from_be(ip.total_length));
    Some(whole(cursor, is_fragment(ip), end))
}

#[inline(always)]
fn locate_in_v6(cursor: &mut Cursor) -> Option<u32> {
    let header = ipv6(cursor)?;
    // SAFETY: ipv6 checked it.
    let (next, length) = unsafe { ((*header).next_header, u16::from_be((*header).payload_length)) };
    let end = cursor.offset + usize::from(length);
    match extensions(cursor, next) {
        Extensions::Tcp { fragment } => Some(whole(cursor, fragment, end) | IS_V6),
        Extensions::Other => None,
        Extensions::Endless => Some(HIDDEN),
    }
}

/// The place of the TCP header that begins here, in a packet that ends at `end`. Of a fragment that does not hold all of it,
/// options included, the stack finds the rest in the next one: nobody sends such a one but to hide it (RFC 1858 section 3;
/// RFC 7112).
#[inline(always)]
fn whole(cursor: &mut Cursor, fragment: bool, end: usize) -> u32 {
    let place = cursor.offset;
    if !fragment {
        return place as u32;
    }
    let Some(ports) = cursor.take::<Ports>() else { return HIDDEN };
    // SAFETY: take checked it.
    let hidden = HIDDEN | u32::from(u16::from_be(unsafe { (*ports).destination }));
    cursor.offset = place;
    let Some(tcp) = cursor.take::<TcpHeader>() else { return hidden };
    // SAFETY: take checked it.
    let length = usize::from(unsafe { (*tcp).data_offset } >> 4) * 4;
    let least = if length < mem::size_of::<TcpHeader>() { mem::size_of::<TcpHeader>() } else { length };
    if place + least <= end { place as u32 | IS_FRAGMENT } else { hidden }
}

/// Steps over an IPv4 header (RFC 791) that is followed by TCP.
#[inline(always)]
fn ipv4(cursor: &mut Cursor) -> Option<*const Ipv4Header> {
    let header = cursor.take::<Ipv4Header>()?;
    // SAFETY: take checked it.
    let ip = unsafe { &*header };
    let length = usize::from(ip.version_and_length & 0x0f) * 4;
    if ip.version_and_length >> 4 != 4 || length < mem::size_of::<Ipv4Header>() || ip.protocol != PROTOCOL_TCP {
        return None;
    }
    cursor.skip(length - mem::size_of::<Ipv4Header>());
    Some(header)
}

/// Whether a packet is but a part of one: more follow, or some came before.
#[inline(always)]
fn is_fragment(ip: &Ipv4Header) -> bool {
    u16::from_be(ip.flags_and_fragment) & (MORE_FRAGMENTS | FRAGMENT_OFFSET) != 0
}

/// Steps over an IPv6 header (RFC 8200).
#[inline(always)]
fn ipv6(cursor: &mut Cursor) -> Option<*const Ipv6Header> {
    let header = cursor.take::<Ipv6Header>()?;
    // SAFETY: take checked it.
    if unsafe { (*header).version_and_class } >> 4 != 6 {
        return None;
    }
    Some(header)
}

/// Whether a "next header" is that of an extension header that is looked behind.
#[inline(always)]
const fn is_extension(next: u8) -> bool {
    matches!(
        next,
        HEADER_HOP_BY_HOP
            | HEADER_ROUTING
            | HEADER_FRAGMENT
            | HEADER_AUTHENTICATION
            | HEADER_DESTINATION
            | HEADER_MOBILITY
    )
}

/// What is behind the extension headers of a packet.
enum Extensions {
    /// TCP; and whether that is but the first fragment of it.
    Tcp { fragment: bool },
    /// Something else, or a later fragment.
    Other,
    /// More of them than anybody sends, or the rest of them in the next fragment.
    Endless,
}

/// Steps over IPv6 extension headers, of which the first is of type `next`.
#[inline(always)]
fn extensions(cursor: &mut Cursor, mut next: u8) -> Extensions {
    let mut fragment = false;
    for _ in 0..MAX_EXTENSION_HEADERS {
        if !is_extension(next) {
            break;
        }
        let Some(header) = cursor.take::<ExtensionHeader>() else {
            return if fragment { Extensions::Endless } else { Extensions::Other };
        };
        // SAFETY: take checked it.
        let length = usize::from(unsafe { (*header).length });
        let mut rest = (length + 1) * 8;
        if next == HEADER_FRAGMENT {
            let Some(place) = cursor.take::<FragmentPlace>() else { return Extensions::Other };
            // SAFETY: take checked it.
            let place = u16::from_be(unsafe { (*place).offset_and_flags });
            if place & 0xfff8 != 0 {
                return Extensions::Other;
            }
            fragment = place & 1 != 0;
            rest = 8 - mem::size_of::<FragmentPlace>();
        } else if next == HEADER_AUTHENTICATION {
            // In units of 4 bytes, the first two not counted (RFC 4302 section 2.2); the others in units of 8 bytes, the first
            // not counted.
            rest = (length + 2) * 4;
        }
        // SAFETY: take checked it.
        next = unsafe { (*header).next_header };
        cursor.skip(rest - mem::size_of::<ExtensionHeader>());
    }
    if next == PROTOCOL_TCP {
        Extensions::Tcp { fragment }
    } else if is_extension(next) {
        Extensions::Endless
    } else {
        Extensions::Other
    }
}

impl Segment {
    #[inline(always)]
    fn tcp(&self) -> &TcpHeader {
        // SAFETY: the pointer was checked when the segment was made, and packets don't shrink under a program that does
        // not shrink them.
        unsafe { &*self.tcp }
    }

    /// The key of the connection that the segment belongs to.
    #[inline(always)]
    pub fn key(&self, secret: &TagSecret) -> ConnectionKey {
        // SAFETY: the pointers were checked when the segment was made; both ports are the first word of the TCP header.
        unsafe {
            let ports = *self.tcp.cast::<u32>();
            match self.network {
                Network::V4(ip) => ConnectionKey::of_v4((*ip).source, (*ip).destination, ports),
                Network::V6(ip) => ConnectionKey::of_v6(&(*ip).source, &(*ip).destination, ports, secret),
            }
        }
    }

    /// The client's port.
    #[inline(always)]
    pub fn remote_port(&self) -> u16 {
        u16::from_be(self.tcp().source_port)
    }

    /// The port that the segment is for.
    #[inline(always)]
    pub fn local_port(&self) -> u16 {
        u16::from_be(self.tcp().destination_port)
    }

    /// The acknowledgement number.
    #[inline(always)]
    pub fn acknowledgement(&self) -> u32 {
        u32::from_be(self.tcp().acknowledgement)
    }

    /// The flags of the low byte: FIN to CWR.
    #[inline(always)]
    pub fn flags(&self) -> u8 {
        self.tcp().flags
    }

    /// The TCP header without its options.
    #[inline(always)]
    pub fn tcp_header(&self) -> *mut TcpHeader {
        self.tcp
    }

    /// The client's address.
    #[inline(always)]
    pub fn remote(&self) -> Address {
        // SAFETY: the pointers were checked when the segment was made.
        match self.network {
            Network::V4(ip) => Address::from_v4_word(unsafe { (*ip).source }),
            Network::V6(ip) => Address::from_v6_words(unsafe { (*ip).source }),
        }
    }

    /// The address that the segment is for.
    #[inline(always)]
    pub fn local(&self) -> Address {
        // SAFETY: the pointers were checked when the segment was made.
        match self.network {
            Network::V4(ip) => Address::from_v4_word(unsafe { (*ip).destination }),
            Network::V6(ip) => Address::from_v6_words(unsafe { (*ip).destination }),
        }
    }

    /// The sequence number.
    #[inline(always)]
    pub fn sequence(&self) -> u32 {
        u32::from_be(self.tcp().sequence)
    }

    /// The two bytes that the flags are the second of, as they are and as they would be with these, in network order.
    #[inline(always)]
    pub fn with_flags(&self, flags: u8) -> (u16, u16) {
        let tcp = self.tcp();
        (u16::from_ne_bytes([tcp.data_offset, tcp.flags]), u16::from_ne_bytes([tcp.data_offset, flags]))
    }

    /// Writes the flags to the packet, and mends the checksum (RFC 1624).
    #[inline(always)]
    pub fn set_flags(&self, flags: u8) {
        let (before, after) = self.with_flags(flags);
        // SAFETY: the pointer was checked when the segment was made.
        let tcp = unsafe { &mut *self.tcp };
        tcp.flags = flags;
        let sum =
            u32::from(!u16::from_be(tcp.checksum)) + u32::from(!u16::from_be(before)) + u32::from(u16::from_be(after));
        tcp.checksum = folded(sum);
    }

    /// Writes the sequence number to the packet, and mends the checksum (RFC 1624).
    #[inline(always)]
    pub fn set_sequence(&self, sequence: u32) {
        let before = self.sequence();
        // SAFETY: the pointer was checked when the segment was made.
        let tcp = unsafe { &mut *self.tcp };
        tcp.sequence = sequence.to_be();
        let halves = |number: u32| (number >> 16) + (number & 0xffff);
        tcp.checksum = folded(u32::from(!u16::from_be(tcp.checksum)) + halves(!before) + halves(sequence));
    }

    /// Whether there is anything behind the header's fixed part.
    #[inline(always)]
    pub fn has_options(&self) -> bool {
        self.tcp().data_offset >> 4 > 5
    }

    /// Gives the option at that offset in the packet a number that the stack does not know, so that it skips it, and mends
    /// the checksum.
    #[inline(always)]
    pub fn void_option(&self, ctx: &XdpContext, place: usize) {
        // Hidden from the compiler, which would make the pointer twice, and have one of them checked and use the other.
        let at = hint::black_box(ctx.data() + place % OPTIONS_END);
        if at + 2 > ctx.data_end() {
            return;
        }
        let kind = at as *mut u8;
        // SAFETY: it was checked just now (an option has two bytes at least); the other when the segment was made.
        let (kind, tcp) = unsafe { (&mut *kind, &mut *self.tcp) };
        let (before, after) = self.option_words(place, *kind);
        *kind = OPTION_UNKNOWN;
        let sum = u32::from(!u16::from_be(tcp.checksum)) + u32::from(!before) + u32::from(after);
        tcp.checksum = folded(sum);
    }

    /// What [`Self::void_option`] changes as the checksum has it, before and after, in host order: words begin at even
    /// offsets of the TCP header.
    #[inline(always)]
    pub fn option_words(&self, place: usize, kind: u8) -> (u16, u16) {
        let shift = if (place - self.offset).is_multiple_of(2) { 8 } else { 0 };
        (u16::from(kind) << shift, u16::from(OPTION_UNKNOWN) << shift)
    }

    /// Moves the sequence number by 2^31. A SYN cookie covers the number before it, with its age in the upper bits, so it is
    /// never valid afterwards; the acknowledgement number, which is that of the RST that the stack then answers with, stays
    /// what the client expects.
    #[inline(always)]
    pub fn spoil_cookie(&self, ctx: &impl Packet) {
        ctx.set_sequence(self, self.sequence() ^ (1 << 31));
    }

    /// Turns the segment into a RST in place, at the same sequence number.
    #[inline(always)]
    pub fn turn_into_reset(&self, ctx: &impl Packet) {
        ctx.set_flags(self, RST);
    }
}

/// A sum of 16-bit words as the checksum of a header, in network order.
#[inline(always)]
fn folded(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    (!(sum as u16)).to_be()
}
