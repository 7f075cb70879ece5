//! Has the stack tell of the end of connections that were open before anybody listened (`bpf_iter` over TCP sockets; kernel
//! 5.15, and 6.12 to succeed).
//!
//! `sock_ops` is told of a socket's changes of state only if the socket has a flag. A new connection gets it when it opens;
//! one that is open already can get it only here, where the stack holds the socket's lock.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{BPF_SOCK_OPS_STATE_CB_FLAG, BPF_TCP_LISTEN, seq_file},
    helpers::{bpf_getsockopt, bpf_seq_write, bpf_setsockopt, bpf_skc_to_tcp_sock},
};
use limiter_common::control::watch;

use crate::policy::word_of_sockets;

/// The kernel's `struct bpf_iter__tcp`.
#[repr(C)]
pub struct Context {
    meta: *const Meta,
    /// A `struct sock_common`, or null after the last one.
    socket: *mut c_void,
}

/// The beginning of the kernel's `struct bpf_iter_meta`.
#[repr(C)]
struct Meta {
    output: *mut seq_file,
}

/// Where the local port and the state are in `struct sock_common`; its beginning has been the same since 3.x.
const LOCAL_PORT_OFFSET: usize = 14;
const STATE_OFFSET: usize = 18;

const SOL_TCP: i32 = 6;
/// `TCP_BPF_SOCK_OPS_CB_FLAGS` of linux/bpf.h (kernel 6.12).
const TCP_BPF_SOCK_OPS_CB_FLAGS: i32 = 1008;

/// Sees to one socket. What came of it goes to the iterator's output, as one byte of [`watch`].
#[inline(always)]
pub fn watch(ctx: *const Context) -> i32 {
    // SAFETY: the kernel's context has these two fields first; the pointers behind them may be followed after a check for
    // null, which the verifier sees to.
    unsafe {
        let socket = (&raw const (*ctx).socket).read_volatile();
        if socket.is_null() {
            return 0;
        }
        let port = socket.byte_add(LOCAL_PORT_OFFSET).cast::<u16>().read_volatile();
        let state = socket.byte_add(STATE_OFFSET).cast::<u8>().read_volatile();
        if word_of_sockets(port).is_none() || u32::from(state) == BPF_TCP_LISTEN {
            return 0;
        }
        // Neither a request nor a socket in TIME_WAIT is one.
        let tcp: *mut c_void = bpf_skc_to_tcp_sock(socket).cast();
        if tcp.is_null() {
            return 0;
        }
        let outcome = [if has_flag_now(tcp) { watch::WATCHED } else { watch::REFUSED }];
        let meta = (&raw const (*ctx).meta).read_volatile();
        let output = (&raw const (*meta).output).read_volatile();
        bpf_seq_write(output, outcome.as_ptr().cast(), 1);
    }
    0
}

/// Adds the flag to those that other programs have set. `false` where the kernel doesn't know the option.
///
/// # Safety
///
/// `tcp` must be what `bpf_skc_to_tcp_sock` has given.
#[inline(always)]
unsafe fn has_flag_now(tcp: *mut c_void) -> bool {
    // The size of the option.
    const BYTES: i32 = 4;
    let mut flags = 0_u32;
    // SAFETY: the caller vouches for the socket; the value has the size that is said.
    unsafe {
        if bpf_getsockopt(tcp, SOL_TCP, TCP_BPF_SOCK_OPS_CB_FLAGS, (&raw mut flags).cast(), BYTES) != 0 {
            return false;
        }
        flags |= BPF_SOCK_OPS_STATE_CB_FLAG;
        bpf_setsockopt(tcp, SOL_TCP, TCP_BPF_SOCK_OPS_CB_FLAGS, (&raw mut flags).cast(), BYTES) == 0
    }
}
