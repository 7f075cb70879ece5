//! The kernel programs of limiter.
//!
//! - `limiter_xdp` ([`admission`]) sees every packet that a device receives. It refuses the SYNs of sources at their
//!   limit, and reserves a slot in the ledger when a segment proves that it completes a handshake.
//! - `limiter_tc` does the same for a device that XDP is not to be had on, and `limiter_tc_l3` for one without link headers
//!   ([`context`]).
//! - `limiter_sockops` ([`sockets`]) is told by the TCP stack of connections that opened and closed, and confirms and
//!   removes their entries.
//! - `limiter_delivery` ([`delivery`]) reserves the slots of connections whose sockets XDP can't look up.
//! - `limiter_control` ([`control`]) is run by user space, and makes and removes entries on its behalf.
//! - `limiter_watch` ([`watch`]) goes through the sockets that are open already, and has the stack tell of their end.
//!
//! They meet in the maps of [`maps`]; what changes a count goes through [`ledger`].
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]
#![expect(unstable_features, reason = "inline assembly for BPF is not stable yet")]
#![expect(
    clippy::needless_borrows_for_generic_args,
    reason = "a key handed over by value is copied once more, and the stack has 512 bytes"
)]

mod admission;
mod atomic;
mod challenge;
mod completion;
mod context;
mod control;
mod counters;
mod delivery;
mod expiry;
mod flows;
mod handed;
mod handshake;
mod headers;
mod ledger;
mod listener;
mod locate;
mod maps;
mod members;
mod options;
mod packet;
mod policy;
mod rates;
mod reply;
mod report;
mod rules;
mod sockets;
mod sources;
mod tally;
mod watch;

use admission::Verdict;
use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC, xdp_action},
    macros::{cgroup_skb, classifier, sock_ops, xdp},
    programs::{SkBuffContext, SockOpsContext, TcContext, XdpContext},
};
use context::Skb;

#[xdp]
pub fn limiter_xdp(ctx: XdpContext) -> u32 {
    let (verdict, service) = admission::admit(&ctx);
    match verdict {
        Verdict::Pass => xdp_action::XDP_PASS,
        Verdict::Drop | Verdict::JudgeAgain => xdp_action::XDP_DROP,
        Verdict::Reset => reply::limiter_reset(ctx.ctx, service.into()),
        Verdict::Challenge => challenge::limiter_challenge(ctx.ctx, service.into()),
    }
}

#[classifier]
pub fn limiter_tc(ctx: TcContext) -> i32 {
    tc_action(&Skb::new(ctx.skb.skb, true))
}

#[classifier]
pub fn limiter_tc_l3(ctx: TcContext) -> i32 {
    tc_action(&Skb::new(ctx.skb.skb, false))
}

/// To pass is to leave the decision to whoever comes next (`TCX_NEXT`).
#[inline(always)]
fn tc_action(ctx: &Skb) -> i32 {
    let (verdict, service) = admission::admit(ctx);
    match verdict {
        Verdict::Pass => TC_ACT_UNSPEC,
        Verdict::Drop | Verdict::JudgeAgain => TC_ACT_SHOT,
        Verdict::Reset => ctx.reset(service),
        Verdict::Challenge => ctx.challenge(service),
    }
}

#[sock_ops]
pub fn limiter_sockops(ctx: SockOpsContext) -> u32 {
    sockets::account(&ctx);
    // Anything else would be an answer to the stack, and overrule that of another program on the same cgroup.
    1
}

#[cgroup_skb(ingress)]
pub fn limiter_delivery(ctx: SkBuffContext) -> i32 {
    delivery::deliver(&ctx)
}

#[xdp]
pub fn limiter_control(ctx: XdpContext) -> u32 {
    control::serve(&ctx)
}

// There is no macro for iterators.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/tcp")]
extern "C" fn limiter_watch(ctx: *const watch::Context) -> i32 {
    watch::watch(ctx)
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // No path leads here: the verifier would refuse the endless loop.
    loop {}
}

// The helpers that look up sockets are for GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
