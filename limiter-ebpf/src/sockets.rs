//! What the TCP stack tells of its sockets (`sock_ops`; kernel 4.16 for the change of state).

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_TCP_CLOSE,
        bpf_sock_ops,
    },
    helpers::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_ktime_get_ns},
    programs::SockOpsContext,
};
use limiter_common::{Address, Counter, Endpoints, Netns};

use crate::{
    ledger,
    maps::NETNS_COOKIE,
    policy::{in_force, word_of_sockets},
};

const AF_INET: u32 = 2;

/// Confirms the connections that the stack opens for a service, and releases them when it closes them.
#[inline(always)]
pub fn account(ctx: &SockOpsContext) {
    let op = ctx.op();
    if op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB {
        limiter_opened(ctx.ops);
    } else if op == BPF_SOCK_OPS_STATE_CB && ctx.arg(1) == BPF_TCP_CLOSE {
        limiter_closed(ctx.ops);
    }
}

/// A connection is open. Returns 0; the kernel wants a number.
///
/// A global function, like [`crate::locate::limiter_locate`]: it takes most of the stack, and what its counterpart calls takes much.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn limiter_opened(ops: *mut bpf_sock_ops) -> u32 {
    let _ = opened(&SockOpsContext::new(ops));
    0
}

#[inline(always)]
fn opened(ctx: &SockOpsContext) -> Option<()> {
    let word = word_of_sockets(ctx.local_port() as u16)?;
    let in_force = in_force();
    let netns = netns(ctx);
    let service = in_force.service_of_socket(word, netns.is_own())?;
    let (ends, cookie) = connection(ctx, netns);
    // From now on the stack tells of this socket's changes of state.
    let _ = ctx.set_cb_flags((ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG) as i32);
    // SAFETY: the helper has no precondition.
    let now_ns = unsafe { bpf_ktime_get_ns() };
    ledger::confirm(&ends, service, in_force, cookie, now_ns);
    Some(())
}

/// A socket closes. Whether a service still has its port makes no difference: what was counted is to be released.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn limiter_closed(ops: *mut bpf_sock_ops) -> u32 {
    let ctx = SockOpsContext::new(ops);
    let (ends, cookie) = connection(&ctx, netns(&ctx));
    u32::from(ledger::release(&ledger::key_of(&ends), cookie, Counter::ClosedSocket as u32))
}

/// The network namespace that the socket is in.
#[inline(always)]
fn netns(ctx: &SockOpsContext) -> Netns {
    // SAFETY: the context is that of a sock_ops program.
    netns_of(unsafe { bpf_get_netns_cookie(ctx.as_ptr()) })
}

/// The namespace of a cookie, which the kernel has told.
#[inline(always)]
pub fn netns_of(cookie: u64) -> Netns {
    if cookie == NETNS_COOKIE.load() { Netns::OWN } else { Netns::other(cookie) }
}

/// The ends and the socket's cookie.
#[inline(always)]
fn connection(ctx: &SockOpsContext, netns: Netns) -> (Endpoints, u64) {
    // Each field is read at a constant offset, whatever the family is: the verifier takes no arithmetic on this context,
    // and the compiler would make some of two reads in two branches.
    macro_rules! read {
        ($field:ident$([$index:literal])?) => {
            // SAFETY: a field of the context, which the kernel keeps valid.
            unsafe { (&raw const (*ctx.ops).$field$([$index])?).read_volatile() }
        };
    }
    let family = read!(family);
    let (remote_v4, local_v4) = (read!(remote_ip4), read!(local_ip4));
    let remote_v6 = [read!(remote_ip6[0]), read!(remote_ip6[1]), read!(remote_ip6[2]), read!(remote_ip6[3])];
    let local_v6 = [read!(local_ip6[0]), read!(local_ip6[1]), read!(local_ip6[2]), read!(local_ip6[3])];
    let (remote, local) = if family == AF_INET {
        (Address::from_v4_word(remote_v4), Address::from_v4_word(local_v4))
    } else {
        (Address::from_v6_words(remote_v6), Address::from_v6_words(local_v6))
    };
    // The remote port comes in network order, in a word of its own.
    let remote_port = u32::from_be(read!(remote_port)) as u16;
    // SAFETY: the context is that of a sock_ops program.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    (Endpoints { remote, local, remote_port, local_port: ctx.local_port() as u16, netns }, cookie)
}
