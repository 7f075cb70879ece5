//! The options of a TCP header.

use core::{hint, mem};

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

#[inline(always)]
fn fast_open(ctx: &impl Packet, tcp: usize) -> Option<u32> {
    let mut found = None;
    walk(ctx, tcp, |option| {
        let is_it = option.kind == OPTION_FAST_OPEN
            || option.kind == OPTION_EXPERIMENT
                && option.place + 3 <= option.header_length
                && option.content + 2 <= option.end
                // SAFETY: the bounds were checked.
                && unsafe { *(option.content as *const [u8; 2]) } == FAST_OPEN_MAGIC;
        if is_it {
            found = Some((tcp + option.place - 1) as u32);
        }
        !is_it
    });
    found
}

/// An option that has a length.
struct TcpOption {
    kind: u8,
    length: u8,
    /// Where the byte of its length is, from the beginning of the TCP header.
    place: usize,
    /// What is behind that byte, up to the end of the packet.
    content: usize,
    end: usize,
    /// Of the TCP header, the options included.
    header_length: usize,
}

/// Shows the options that have a length, until one is not to be followed by others (`false`), or the stack would read no further.
///
/// Goes byte by byte, each at a place that the verifier knows, and counts how many are to be skipped, of which it knows nothing: so
/// it has seen all that may follow a place when it has seen it once. (Before kernel 6.2 it takes two states for the same only if
/// what it knows of every number is.)
#[inline(always)]
fn walk(ctx: &impl Packet, tcp: usize, mut see: impl FnMut(TcpOption) -> bool) {
    let mut cursor = Cursor::new(ctx);
    cursor.skip(tcp);
    let Some(header) = cursor.take::<TcpHeader>() else { return };
    // SAFETY: take checked it.
    let header_length = usize::from(unsafe { (*header).data_offset } >> 4) * 4;
    // SAFETY: one past the header that take checked.
    let options = unsafe { header.add(1) } as usize;
    let (mut skip, mut kind) = (0_u32, OPTION_NONE);
    for index in 0..MAX_OPTION_BYTES {
        let (at, place) = (options + index, mem::size_of::<TcpHeader>() + index);
        if place >= header_length || at + 1 > cursor.end {
            break;
        }
        // SAFETY: the bounds were checked.
        let byte = unsafe { *(at as *const u8) };
        if kind != OPTION_NONE {
            let option = TcpOption { kind, length: byte, place, content: at + 1, end: cursor.end, header_length };
            if !see(option) || byte < 2 {
                break;
            }
            skip = u32::from(byte) - 2;
            kind = OPTION_NONE;
        } else if skip != 0 {
            // Behind the mask it may be anything again. The compiler would do without it.
            skip = hint::black_box(skip - 1) & 0xff;
        } else if byte == OPTION_END {
            break;
        } else {
            kind = byte;
        }
    }
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

#[expect(clippy::int_plus_one, reason = "the verifier is to see the end of what is read")]
#[inline(always)]
fn offer(ctx: &impl Packet, tcp: usize) -> u64 {
    let length = ctx.data_end() - ctx.data();
    // 0, of which the verifier knows nothing. What it is added to it knows nothing of either, and so doesn't follow each way to it.
    let nothing = (hint::black_box(length) - length) as u64;
    let mut offer = (NO_WINDOW_SCALE << WINDOW_SCALE_SHIFT) + nothing;
    walk(ctx, tcp, |option| {
        if option.length < 2 || option.place - 1 + usize::from(option.length) > option.header_length {
            return false;
        }
        let is = |kind, length| option.kind == kind && option.length == length;
        if is(OPTION_SACK_PERMITTED, 2) {
            offer = (offer | OFFERS_SACK) + nothing;
        } else if is(OPTION_WINDOW_SCALE, 3) && option.content + 1 <= option.end {
            // SAFETY: the bounds were checked.
            let found = unsafe { *(option.content as *const u8) };
            let scale = u64::from(if found > MAX_WINDOW_SCALE { MAX_WINDOW_SCALE } else { found });
            offer = (offer & !(NO_WINDOW_SCALE << WINDOW_SCALE_SHIFT) | scale << WINDOW_SCALE_SHIFT) + nothing;
        } else if is(OPTION_TIMESTAMPS, 10) && option.content + 4 <= option.end {
            // SAFETY: the bounds were checked.
            let timestamp = u32::from_be_bytes(unsafe { *(option.content as *const [u8; 4]) });
            offer = (offer >> u32::BITS << u32::BITS | OFFERS_TIMESTAMPS | u64::from(timestamp)) + nothing;
        }
        true
    });
    offer
}
