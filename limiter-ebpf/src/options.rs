//! The options of a TCP header.

use core::mem;

use aya_ebpf::{
    bindings::{__sk_buff, xdp_md},
    programs::XdpContext,
};

use crate::{
    context::{Packet, Skb},
    headers::TcpHeader,
    locate::TCP_END,
    packet::Cursor,
};

const OPTION_END: u8 = 0;
const OPTION_NONE: u8 = 1;
const OPTION_WINDOW_SCALE: u8 = 3;
const OPTION_SACK_PERMITTED: u8 = 4;
const OPTION_TIMESTAMPS: u8 = 8;
/// RFC 7413 section 4.1.1.
const OPTION_FAST_OPEN: u8 = 34;
/// Of several experiments (RFC 4727), told apart by the two bytes that follow (RFC 6994).
const OPTION_EXPERIMENT: u8 = 254;
/// In [`OPTION_EXPERIMENT`]: what Fast Open was before it had a number. The stack takes it still.
const FAST_OPEN_MAGIC: [u8; 2] = [0xf9, 0x89];
/// Of experiments, too; the stack knows none by it, and skips it.
pub const OPTION_UNKNOWN: u8 = 253;
const MAX_OPTION_BYTES: usize = 40;

/// Where in a packet the number of a Fast Open option is (RFC 7413), of the TCP header that begins at `tcp`; 0 if it has none.
///
/// A global function, like [`crate::locate::limiter_locate`].
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

/// In what [`limiter_offer`] answers, above the timestamp: the SYN has one, and permits selective acknowledgements; and by how
/// much its sender shifts its windows.
pub const OFFERS_TIMESTAMPS: u64 = 1 << 32;
pub const OFFERS_SACK: u64 = 1 << 33;
const WINDOW_SCALE_SHIFT: u32 = 40;
/// In the place of a shift: its sender has no such option.
pub const NO_WINDOW_SCALE: u64 = 0xf;
/// RFC 7323 section 2.3.
const MAX_WINDOW_SCALE: u8 = 14;

/// Which options a SYN offers whose TCP header begins at `tcp`: the value of its timestamp in the lower 32 bits, and
/// [`OFFERS_TIMESTAMPS`] and its like above them. What the stack would not take is not there.
///
/// A global function, like [`crate::locate::limiter_locate`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn limiter_offer(ctx: *mut xdp_md, tcp: u32) -> u64 {
    offer(&XdpContext::new(ctx), tcp as usize % TCP_END)
}

/// The same for the packets of TC.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn limiter_offer_skb(skb: *mut __sk_buff, tcp: u32) -> u64 {
    offer(&Skb::new(skb, true), tcp as usize % TCP_END)
}

/// The window scale in an offer, or [`NO_WINDOW_SCALE`].
#[inline(always)]
pub const fn window_scale(offer: u64) -> u64 {
    offer >> WINDOW_SCALE_SHIFT
}

/// Byte by byte, like [`fast_open`].
#[inline(always)]
fn offer(ctx: &impl Packet, tcp: usize) -> u64 {
    let (mut flags, mut scale, mut timestamp) = (0, NO_WINDOW_SCALE, 0);
    let mut cursor = Cursor::new(ctx);
    cursor.skip(tcp);
    let Some(header) = cursor.take::<TcpHeader>() else { return scale << WINDOW_SCALE_SHIFT };
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
            next = place - 1 + usize::from(byte);
            if byte < 2 || mem::size_of::<TcpHeader>() + next > length {
                break;
            }
            if kind == OPTION_SACK_PERMITTED && byte == 2 {
                flags |= OFFERS_SACK;
            } else if kind == OPTION_WINDOW_SCALE && byte == 3 && at + 2 <= cursor.end {
                // SAFETY: the bounds were checked.
                let found = unsafe { *((at + 1) as *const u8) };
                scale = if found > MAX_WINDOW_SCALE { MAX_WINDOW_SCALE } else { found }.into();
            } else if kind == OPTION_TIMESTAMPS && byte == 10 && at + 5 <= cursor.end {
                flags |= OFFERS_TIMESTAMPS;
                // SAFETY: the bounds were checked.
                timestamp = u32::from_be_bytes(unsafe { *((at + 1) as *const [u8; 4]) });
            }
            kind = OPTION_NONE;
        } else if place == next {
            if byte == OPTION_END {
                break;
            }
            next = place + 1;
            kind = byte;
        }
    }
    u64::from(timestamp) | flags | scale << WINDOW_SCALE_SHIFT
}
