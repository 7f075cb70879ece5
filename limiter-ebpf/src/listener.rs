//! What a listener grants the connections that it opens, read from its socket and from its network namespace, at each SYN: what
//! a program promises in its name, the stack has to keep when the cookie comes back, by what is set then.
//!
//! Where the kernel has no BTF to tell where these fields are, nothing is known of a listener.

use aya_ebpf::{Global, bindings::bpf_sock, helpers::bpf_skc_to_tcp_sock};

use crate::maps::{
    NET_ECN, NET_RMEM, NET_SACK, NET_TIMESTAMPS, NET_WINDOW_SCALING, SOCK_NET, SOCK_RCVBUF, SOCK_USERLOCKS, TCP_MAXSEG,
    TCP_SCALING_RATIO, TCP_WINDOW_CLAMP,
};

/// `net.ipv4.tcp_timestamps`: timestamps begin at the clock, and not at an offset for each pair of addresses. Only those can
/// be made here, and hide options.
const PLAIN_TIMESTAMPS: u8 = 2;
/// In `sk_userlocks`: somebody has set the size of the receive buffer (`SO_RCVBUF`).
const RCVBUF_LOCK: u8 = 2;
/// Of three numbers of the size of receive buffers, the greatest.
const RMEM_MAX: usize = 2 * size_of::<u32>();
/// What `scaling_ratio` is a part of.
const RATIO_SHIFT: u32 = 8;
/// RFC 7323 section 2.3.
const MAX_WINDOW_SCALE: u32 = 14;
const MAX_WINDOW: u32 = u16::MAX as u32;

/// What a listener grants; the default: nothing, since nothing is known of it. Numbers, because the programs hand it from one function to
/// the other; those that say whether are not 0 if so.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Terms {
    /// Timestamps, which can hide the other options.
    pub timestamps: u8,
    pub sack: u8,
    pub ecn: u8,
    /// Windows that are shifted.
    pub scales: u8,
    /// By how much the stack will shift those of the connection.
    pub window_scale: u32,
    /// How much there is room for, in bytes; 0: not known.
    pub space: u32,
    /// The largest segment that it wants (`TCP_MAXSEG`); 0: whatever fits.
    pub max_segment: u32,
}

/// The terms of a listener for a connection with segments of `mss` bytes, where buffers are at most so large.
#[inline(always)]
pub fn terms(listener: *mut bpf_sock, mss: u32, largest_buffer: u32) -> Terms {
    if SOCK_NET.load() == 0 {
        return Terms::default();
    }
    // SAFETY: the socket is not null, and the caller holds a reference.
    let socket = unsafe { bpf_skc_to_tcp_sock(listener.cast()) }.cast::<u8>().cast_const();
    if socket.is_null() {
        return Terms::default();
    }
    // SAFETY: as above; a socket is in a namespace, which outlives it. The offsets are those of fields of these types.
    unsafe {
        let net: *const u8 = field(socket, &SOCK_NET, 0);
        if net.is_null() {
            return Terms::default();
        }
        let ecn: u8 = field(net, &NET_ECN, 0);
        let space = space(socket);
        let (is_known, window_scale) = window_scale(socket, net, space, mss, largest_buffer);
        Terms {
            timestamps: u8::from(field::<u8>(net, &NET_TIMESTAMPS, 0) == PLAIN_TIMESTAMPS),
            sack: field(net, &NET_SACK, 0),
            // Asked for by itself, too, or only granted. There are newer kinds, which the stack is to see to.
            ecn: u8::from(ecn == 1 || ecn == 2),
            scales: u8::from(is_known && field::<u8>(net, &NET_WINDOW_SCALING, 0) != 0),
            window_scale,
            space,
            max_segment: field::<u16>(socket, &TCP_MAXSEG, 0).into(),
        }
    }
}

/// The part of a listener's receive buffer that is for data (`tcp_full_space`); 0 where the kernel does not tell (before 6.6).
///
/// # Safety
///
/// `socket` must be one of TCP.
#[inline(always)]
unsafe fn space(socket: *const u8) -> u32 {
    if TCP_SCALING_RATIO.load() == 0 {
        return 0;
    }
    // SAFETY: the caller vouches for the socket.
    unsafe {
        let buffer: u32 = field(socket, &SOCK_RCVBUF, 0);
        let ratio: u8 = field(socket, &TCP_SCALING_RATIO, 0);
        ((u64::from(buffer) * u64::from(ratio)) >> RATIO_SHIFT) as u32
    }
}

/// What `tcp_select_initial_window` will choose when the cookie comes back, and before it, whether that can be known: otherwise
/// no window is to be scaled.
///
/// It has to be right: told more than the stack shifts by, the client takes windows for larger than they are, and sends what is
/// thrown away; told less, for so small that it may not send at all. One thing that the stack looks at can't be seen from here: a
/// route with a `window` of its own.
///
/// # Safety
///
/// `socket` must be one of TCP, and `net` its namespace.
#[inline(always)]
unsafe fn window_scale(socket: *const u8, net: *const u8, space: u32, mss: u32, largest_buffer: u32) -> (bool, u32) {
    // SAFETY: the caller vouches for both.
    let (mut clamp, locked, buffer, largest) = unsafe {
        (
            field::<u32>(socket, &TCP_WINDOW_CLAMP, 0),
            is_buffer_set(socket),
            field::<u32>(socket, &SOCK_RCVBUF, 0),
            field::<u32>(net, &NET_RMEM, RMEM_MAX),
        )
    };
    let largest = if largest_buffer > largest { largest_buffer } else { largest };
    if largest_buffer == 0 || TCP_SCALING_RATIO.load() == 0 && (locked || buffer > largest) {
        return (false, 0);
    }
    if locked && (clamp > space || clamp == 0) {
        clamp = space;
    }
    if clamp == 0 {
        clamp = MAX_WINDOW << MAX_WINDOW_SCALE;
    }
    let mut room = if space < clamp { space } else { clamp };
    if mss != 0 && room > mss {
        room -= room % mss;
    }
    if room < largest {
        room = largest;
    }
    if room > clamp {
        room = clamp;
    }
    let mut scale = 0;
    for _ in 0..MAX_WINDOW_SCALE {
        if room <= MAX_WINDOW {
            break;
        }
        room >>= 1;
        scale += 1;
    }
    (true, scale)
}

/// Whether somebody has set the size of a socket's receive buffer. That bit stands alone or among others.
///
/// # Safety
///
/// `socket` must be a socket.
#[inline(always)]
unsafe fn is_buffer_set(socket: *const u8) -> bool {
    let bits = SOCK_USERLOCKS.load();
    // SAFETY: the caller vouches for the socket; the byte is that which has these bits.
    let byte = unsafe { socket.add((bits / 8) as usize).read_volatile() };
    (byte >> (bits % 8)) & RCVBUF_LOCK != 0
}

/// A field of one of the kernel's structures.
///
/// # Safety
///
/// The structure must have a `T` at that offset, and `further` bytes behind it.
#[inline(always)]
unsafe fn field<T>(structure: *const u8, offset: &Global<u32>, further: usize) -> T {
    // SAFETY: the caller vouches for it; the verifier checks it, and where there is no memory, reads 0.
    unsafe { structure.add(offset.load() as usize + further).cast::<T>().read_volatile() }
}
