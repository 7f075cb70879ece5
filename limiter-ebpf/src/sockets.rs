//! What the TCP stack tells of its sockets (`sock_ops`; kernel 4.16 for the change of state).

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_TCP_CLOSE},
    helpers::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_ktime_get_ns},
    programs::SockOpsContext,
};
use limiter_common::{Address, Counter, Endpoints};

use crate::{
    ledger,
    maps::NETNS_COOKIE,
    policy::{in_force, service_on},
};

const AF_INET: u32 = 2;

/// Confirms the connections that the stack opens for a service, and releases them when it closes them.
#[inline(always)]
pub fn account(ctx: &SockOpsContext) {
    let op = ctx.op();
    if op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB {
        let in_force = in_force();
        let Some(service) = service_on(ctx.local_port() as u16, in_force) else { return };
        let Some((ends, cookie)) = connection(ctx) else { return };
        // From now on the stack tells of this socket's changes of state.
        let _ = ctx.set_cb_flags((ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG) as i32);
        // SAFETY: the helper has no precondition.
        let now_ns = unsafe { bpf_ktime_get_ns() };
        ledger::confirm(&ends, service, in_force, cookie, now_ns);
    } else if op == BPF_SOCK_OPS_STATE_CB && ctx.arg(1) == BPF_TCP_CLOSE {
        // Whether a service still listens on its port makes no difference: what was counted is to be released.
        let Some((ends, cookie)) = connection(ctx) else { return };
        ledger::release(&ledger::key_of(&ends), cookie, Counter::ClosedSocket as u32);
    }
}

/// The ends and the socket's cookie, if the socket is of the namespace that is counted.
#[inline(always)]
fn connection(ctx: &SockOpsContext) -> Option<(Endpoints, u64)> {
    // SAFETY: the context is that of a sock_ops program.
    if unsafe { bpf_get_netns_cookie(ctx.as_ptr()) } != NETNS_COOKIE.load() {
        return None;
    }
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
    Some((Endpoints { remote, local, remote_port, local_port: ctx.local_port() as u16 }, cookie))
}
