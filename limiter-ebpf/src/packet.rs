//! From a frame to a TCP segment: Ethernet, up to four VLAN tags, IPv4 with options or IPv6 with extension headers, TCP.
//!
//! A frame that is anything else is nobody's business here and passes. But one that the stack may find a segment in and that
//! can't be read here is [`Unread::Hidden`]: what was laid out so that nobody but the stack reads it does not get past.

use core::{hint, mem};

use aya_ebpf::programs::XdpContext;
use limiter_common::{Address, ConnectionKey, Endpoints, Netns, TagSecret};

use crate::{
    context::Packet,
    headers::{
        ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_SERVICE_VLAN, ETHERTYPE_VLAN, EthernetHeader, FRAGMENT_OFFSET,
        Ipv4Header, Ipv6Header, MORE_FRAGMENTS, PROTOCOL_TCP, RST, TcpHeader,
    },
    locate::{ALL_HEADERS, HIDDEN, IS_V6, NETWORK_END, NETWORK_SHIFT, TCP_END, is_extension},
    options::OPTION_UNKNOWN,
};

/// How many bytes the headers take that are read inline: IPv4 may have 40 bytes of options.
const PLAIN_HEADERS: u32 = 14 + 60 + 20;
/// TCP options begin before this offset, as TCP headers do.
const OPTIONS_END: usize = 1 << 15;

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
/// fragment, by [`crate::locate::limiter_locate`].
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

/// The segment that [`crate::locate::limiter_locate`] finds.
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

/// The segment at a place that [`crate::locate::limiter_locate`] has found.
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

/// Reads header after header, each one checked against the end of the packet.
pub struct Cursor {
    pub start: usize,
    pub end: usize,
    /// Counted on its own: a difference of pointers would be made in 32 bits, which the verifier refuses.
    pub offset: usize,
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

/// Steps over an Ethernet header, and returns what it says that follows.
#[inline(always)]
pub fn ethernet(cursor: &mut Cursor) -> Option<u16> {
    // SAFETY: take checked it.
    Some(u16::from_be(unsafe { (*cursor.take::<EthernetHeader>()?).ethertype }))
}

/// Steps over an IPv4 header (RFC 791) that is followed by TCP.
#[inline(always)]
pub fn ipv4(cursor: &mut Cursor) -> Option<*const Ipv4Header> {
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
pub fn is_fragment(ip: &Ipv4Header) -> bool {
    u16::from_be(ip.flags_and_fragment) & (MORE_FRAGMENTS | FRAGMENT_OFFSET) != 0
}

/// Steps over an IPv6 header (RFC 8200).
#[inline(always)]
pub fn ipv6(cursor: &mut Cursor) -> Option<*const Ipv6Header> {
    let header = cursor.take::<Ipv6Header>()?;
    // SAFETY: take checked it.
    if unsafe { (*header).version_and_class } >> 4 != 6 {
        return None;
    }
    Some(header)
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

    /// Both ends of its connection.
    #[inline(always)]
    pub fn endpoints(&self) -> Endpoints {
        Endpoints {
            remote: self.remote(),
            local: self.local(),
            remote_port: self.remote_port(),
            local_port: self.local_port(),
            netns: Netns::OWN,
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
