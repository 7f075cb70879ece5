//! The TCP header behind what seldom comes before it: VLAN tags, IPv6 extension headers, a fragment's header.

use core::mem;

use aya_ebpf::{
    bindings::{__sk_buff, xdp_md},
    programs::XdpContext,
};

use crate::{
    context::{Packet, Skb},
    headers::{
        ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_SERVICE_VLAN, ETHERTYPE_VLAN, ExtensionHeader, FRAGMENT_OFFSET,
        FragmentPlace, HEADER_AUTHENTICATION, HEADER_DESTINATION, HEADER_FRAGMENT, HEADER_HOP_BY_HOP, HEADER_MOBILITY,
        HEADER_ROUTING, PROTOCOL_TCP, Ports, TcpHeader, VlanTag,
    },
    packet::{Cursor, ipv4, ipv6, is_fragment},
};

/// Nobody needs more than two; but the stack steps over any number of tags that only give a priority (VLAN 0).
const MAX_VLAN_TAGS: usize = 4;
/// RFC 8200 section 4.1 names seven at most in one packet; the kernel has no bound.
const MAX_EXTENSION_HEADERS: usize = 8;

/// How many all headers take at most that are looked behind.
pub const ALL_HEADERS: u32 = 14 + 4 * MAX_VLAN_TAGS as u32 + 40 + 2048 * MAX_EXTENSION_HEADERS as u32 + 20;

/// In the answer of [`limiter_locate`]: the network header is that of IPv6.
pub const IS_V6: u32 = 1 << 31;
/// In the answer of [`limiter_locate`]: there is none, but for [`crate::packet::Unread::Hidden`]; the port is in the lowest 16 bits.
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
    if cursor.offset > end {
        return HIDDEN;
    }
    // SAFETY: take checked it.
    let hidden = HIDDEN | u32::from(u16::from_be(unsafe { (*ports).destination }));
    cursor.offset = place;
    let Some(tcp) = cursor.take::<TcpHeader>() else { return hidden };
    // SAFETY: take checked it.
    let length = usize::from(unsafe { (*tcp).data_offset } >> 4) * 4;
    let least = if length < mem::size_of::<TcpHeader>() { mem::size_of::<TcpHeader>() } else { length };
    if place + least <= end { place as u32 | IS_FRAGMENT } else { hidden }
}

/// Whether a "next header" is that of an extension header that is looked behind.
#[inline(always)]
pub const fn is_extension(next: u8) -> bool {
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
