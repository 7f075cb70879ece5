//! Whether a segment proves that its sender has received our SYN-ACK.
//!
//! A segment that acknowledges the sequence number of our SYN-ACK can only come from one who saw it (or guessed 32 bits).
//! So its source address is not spoofed, and the stack is about to open the connection.

use core::{
    ffi::c_void,
    mem::{self, MaybeUninit},
};

use aya_ebpf::{
    bindings::{
        BPF_F_CURRENT_NETNS, BPF_TCP_LISTEN, BPF_TCP_NEW_SYN_RECV, bpf_sock, bpf_sock_tuple,
        bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 as V4, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 as V6, tcphdr,
    },
    helpers::{
        bpf_probe_read_kernel, bpf_sk_release, bpf_skc_lookup_tcp, bpf_skc_to_tcp_request_sock, bpf_tcp_check_syncookie,
    },
};

use limiter_common::{Address, Endpoints};

use crate::{
    context::Packet,
    maps::{READS_KERNEL_MEMORY, SNT_ISN_OFFSET},
    packet::{Network, Segment},
};

/// What a segment says of the handshake that it belongs to.
pub enum Proof {
    /// It completes it.
    Completes,
    /// It completes one that nothing is stored of: it brings back a SYN cookie.
    CompletesByCookie,
    /// It belongs to a handshake, and proves nothing.
    Unproven,
    /// It belongs to none: the connection is open already, or there is nothing for it.
    NoHandshake,
}

/// Looks up who the segment is for.
#[inline(always)]
pub fn prove(ctx: &impl Packet, segment: &Segment) -> Proof {
    // Without BTF the offset is not known, and sock_ops counts alone.
    if SNT_ISN_OFFSET.load() == 0 {
        return Proof::NoHandshake;
    }
    let socket = lookup(ctx, segment);
    if socket.is_null() {
        return Proof::NoHandshake;
    }
    // SAFETY: the socket is not null, and we hold a reference.
    let state = unsafe { (*socket).state };
    let proof = if state == BPF_TCP_NEW_SYN_RECV {
        acknowledges_request(socket, segment.acknowledgement())
    } else if state == BPF_TCP_LISTEN {
        // A valid cookie, or a stray segment to a listener. The stack answers that one with a RST.
        if has_cookie(socket, segment) { Proof::CompletesByCookie } else { Proof::NoHandshake }
    } else {
        Proof::NoHandshake
    };
    // SAFETY: we hold the reference, and use the socket no more.
    unsafe { bpf_sk_release(socket.cast()) };
    proof
}

/// The same for a segment between these ends, as far as it can be told without a packet that can be read: not by a cookie.
#[inline(always)]
pub fn prove_between(ctx: *mut c_void, ends: &Endpoints, is_v4: bool, acknowledgement: u32) -> Proof {
    if SNT_ISN_OFFSET.load() == 0 {
        return Proof::NoHandshake;
    }
    let socket = lookup_between(ctx, ends.remote, ends.local, (ends.remote_port, ends.local_port), is_v4);
    if socket.is_null() {
        return Proof::NoHandshake;
    }
    // SAFETY: the socket is not null, and we hold a reference.
    let proof = if unsafe { (*socket).state } == BPF_TCP_NEW_SYN_RECV {
        acknowledges_request(socket, acknowledgement)
    } else {
        Proof::NoHandshake
    };
    // SAFETY: we hold the reference, and use the socket no more.
    unsafe { bpf_sk_release(socket.cast()) };
    proof
}

#[inline(always)]
pub fn lookup(ctx: &impl Packet, segment: &Segment) -> *mut bpf_sock {
    let is_v4 = matches!(segment.network, Network::V4(_));
    let ports = (segment.remote_port(), segment.local_port());
    lookup_between(ctx.as_ptr(), segment.remote(), segment.local(), ports, is_v4)
}

#[inline(always)]
fn lookup_between(
    ctx: *mut c_void,
    remote: Address,
    local: Address,
    (remote_port, local_port): (u16, u16),
    is_v4: bool,
) -> *mut bpf_sock {
    // Not zeroed: the compiler would call a function for it, and that takes stack. The kernel reads as much as is written.
    let mut tuple = MaybeUninit::<bpf_sock_tuple>::uninit();
    let ends = tuple.as_mut_ptr();
    let (sport, dport) = (remote_port.to_be(), local_port.to_be());
    // SAFETY: a tuple has room for either family.
    let size = unsafe {
        if is_v4 {
            let ends = &raw mut (*ends).__bindgen_anon_1.ipv4;
            ends.write(V4 { saddr: remote.v4_word(), daddr: local.v4_word(), sport, dport });
            mem::size_of::<V4>()
        } else {
            let ends = &raw mut (*ends).__bindgen_anon_1.ipv6;
            ends.write(V6 { saddr: remote.words(), daddr: local.words(), sport, dport });
            mem::size_of::<V6>()
        }
    };
    // SAFETY: so much of the tuple is written; the namespace is that of the packet's device.
    unsafe { bpf_skc_lookup_tcp(ctx, ends, size as u32, BPF_F_CURRENT_NETNS as i64 as u64, 0) }
}

/// Whether the segment acknowledges the SYN-ACK of a half-open connection.
#[inline(always)]
fn acknowledges_request(socket: *mut bpf_sock, acknowledgement: u32) -> Proof {
    match sent_sequence(socket) {
        Some(sent) if acknowledgement == sent.wrapping_add(1) => Proof::Completes,
        _ => Proof::Unproven,
    }
}

/// The sequence number of the SYN-ACK of a half-open connection.
#[inline(always)]
fn sent_sequence(socket: *mut bpf_sock) -> Option<u32> {
    let offset = SNT_ISN_OFFSET.load() as usize;
    // SAFETY: the socket is not null, and we hold a reference.
    let request = unsafe { bpf_skc_to_tcp_request_sock(socket.cast()) }.cast::<u8>().cast_const();
    if request.is_null() {
        return sent_sequence_of_other(socket, offset);
    }
    // SAFETY: the offset is that of a u32 within this kernel's struct; the verifier checks it.
    Some(unsafe { request.add(offset).cast::<u32>().read_volatile() })
}

/// The same where the kernel does not take it for plain TCP: the listener is one of MPTCP, or in a map of sockets. In the
/// table of TCP sockets, whatever is in this state begins with a `tcp_request_sock` all the same.
#[inline(always)]
fn sent_sequence_of_other(socket: *mut bpf_sock, offset: usize) -> Option<u32> {
    if READS_KERNEL_MEMORY.load() == 0 {
        return None;
    }
    // SAFETY: the kernel checks that the address can be read. It comes by way of a copy because the verifier lets nobody
    // reckon with a pointer to a socket, and takes what a helper wrote for a number.
    unsafe {
        let address = bpf_probe_read_kernel((&raw const socket).cast::<usize>()).ok()?;
        bpf_probe_read_kernel((address + offset) as *const u32).ok()
    }
}

/// Whether the segment acknowledges a SYN cookie that the stack would accept.
#[inline(always)]
fn has_cookie(listener: *mut bpf_sock, segment: &Segment) -> bool {
    let (ip, ip_length) = match segment.network {
        Network::V4(ip) => (ip.cast_mut().cast(), 20),
        Network::V6(ip) => (ip.cast_mut().cast(), 40),
    };
    // SAFETY: we hold a reference to the listener; both headers lie in the packet, with these lengths.
    let answer =
        unsafe { bpf_tcp_check_syncookie(listener.cast(), ip, ip_length, segment.tcp_header().cast::<tcphdr>(), 20) };
    answer == 0
}
