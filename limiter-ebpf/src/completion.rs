//! The end of a handshake: whether a segment completes one, whether its connection may be, and what becomes of it if not.

use aya_ebpf::{
    bindings::{__sk_buff, xdp_md},
    helpers::bpf_ktime_get_ns,
    programs::XdpContext,
};
use aya_log_ebpf::debug;
use limiter_common::{
    Counter, DenyReason, Endpoints, ServicePolicy, SourceKey,
    event::Stage,
    policy::{InForce, OnDeny, ServiceState},
};

use crate::{
    context::{Packet, Skb},
    counters::count,
    handshake::{self, Proof},
    ledger::{self, Reserved},
    maps::SERVICE_STATE,
    packet, policy,
    report::{Refused, Sampler, report, sampler_of, service_sampler},
    rules,
};

/// What [`limiter_prove`] answers: the segment completes a handshake, and by a SYN cookie.
const BY_REQUEST: u32 = 1;
const BY_COOKIE: u32 = 2;

/// Whether a segment of a connection that is not in the ledger completes a handshake: 0 if not, otherwise [`BY_REQUEST`] or
/// [`BY_COOKIE`].
///
/// A global function, like [`crate::locate::limiter_locate`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn limiter_prove(ctx: *mut xdp_md, service: u32) -> u32 {
    prove(&XdpContext::new(ctx), service as u16)
}

/// The same for the packets of TC.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn limiter_prove_skb(skb: *mut __sk_buff, has_ethernet: u32, service: u32) -> u32 {
    prove(&Skb::new(skb, has_ethernet != 0), service as u16)
}

#[inline(always)]
fn prove(ctx: &impl Packet, service: u16) -> u32 {
    let Ok(segment) = packet::segment(ctx) else { return 0 };
    match handshake::prove(ctx, &segment) {
        Proof::NoHandshake => 0,
        Proof::Unproven => {
            count(service, Counter::HandshakeUnproven);
            0
        }
        Proof::Completes => BY_REQUEST,
        Proof::CompletesByCookie => BY_COOKIE,
    }
}

/// In what [`limiter_handshake`] answers: the [`DenyReason`]; whether it is only observed; and, for [`limiter_refuse`], the
/// proof.
const REASON: u32 = 0xff;
const OBSERVED: u32 = 0x100;
pub const PROOF_SHIFT: u32 = 16;

/// A segment that completes a handshake: this is where the slot is reserved. Returns 0 if it passes, and otherwise why it is
/// refused.
///
/// A global function, like [`crate::locate::limiter_locate`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn limiter_handshake(ctx: *mut xdp_md, service: u32, in_force: u64) -> u32 {
    completed(&XdpContext::new(ctx), service as u16, InForce(in_force)).unwrap_or(0)
}

/// The same for the packets of TC.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn limiter_handshake_skb(skb: *mut __sk_buff, has_ethernet: u32, service: u32, in_force: u64) -> u32 {
    completed(&Skb::new(skb, has_ethernet != 0), service as u16, InForce(in_force)).unwrap_or(0)
}

#[inline(always)]
fn completed(ctx: &impl Packet, service: u16, in_force: InForce) -> Option<u32> {
    complete(&packet::segment(ctx).ok()?.endpoints(), service, in_force)
}

/// A handshake between these ends is complete: reserves its slot. `None` if it passes, and otherwise why it is refused.
#[inline(always)]
pub fn complete(ends: &Endpoints, service: u16, in_force: InForce) -> Option<u32> {
    let state = SERVICE_STATE.get_ptr_mut(u32::from(service))?;
    let policy = policy::of_service(service, in_force)?;
    // SAFETY: the helper has no precondition.
    let now_ns = unsafe { bpf_ktime_get_ns() };
    let limits = rules::limits_for(&ends.remote, policy, in_force);
    let observe = policy.on_deny == OnDeny::Observe as u8;
    match ledger::reserve(ends, service, policy, &limits, state, observe, now_ns) {
        Reserved::Yes | Reserved::Uncounted => None,
        Reserved::Observed(reason) => Some(reason as u32 | OBSERVED),
        Reserved::Refused(reason) => Some(reason as u32),
    }
}

/// Sees to a handshake that was refused. Whatever comes of it, the segment passes, perhaps changed. Returns 0; the kernel
/// wants a number.
///
/// A global function, like [`crate::locate::limiter_locate`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn limiter_refuse(ctx: *mut xdp_md, service: u32, in_force: u64, refused: u32) -> u32 {
    let _ = refuse(&XdpContext::new(ctx), service as u16, InForce(in_force), refused);
    0
}

/// The same for the packets of TC.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn limiter_refuse_skb(
    skb: *mut __sk_buff,
    has_ethernet: u32,
    service: u32,
    in_force: u64,
    refused: u32,
) -> u32 {
    let _ = refuse(&Skb::new(skb, has_ethernet != 0), service as u16, InForce(in_force), refused);
    0
}

#[inline(always)]
fn refuse(ctx: &impl Packet, service: u16, in_force: InForce, refused: u32) -> Option<()> {
    let segment = &packet::segment(ctx).ok()?;
    let observed = note(&segment.endpoints(), service, in_force, refused)?;
    debug!(ctx, "service {}: handshake refused, reason {}", service, refused & REASON);
    if !observed {
        if refused >> PROOF_SHIFT == BY_COOKIE {
            // There is nothing to forget: the stack finds no valid cookie, and answers with a RST of its own.
            segment.spoil_cookie(ctx);
        } else {
            // The stack forgets the half-open connection, and answers whatever the client sends next with a RST of its own.
            segment.turn_into_reset(ctx);
        }
    }
    Some(())
}

/// Counts and reports that a handshake is refused. Returns whether that is only observed.
#[inline(always)]
pub fn note(ends: &Endpoints, service: u16, in_force: InForce, refused: u32) -> Option<bool> {
    let policy = policy::of_service(service, in_force)?;
    let state = SERVICE_STATE.get_ptr_mut(u32::from(service))?;
    let reason = DenyReason::from_number((refused & REASON) as u8)?;
    let observed = refused & OBSERVED != 0;
    count(service, Counter::of_refusal(reason, Stage::Handshake, observed));
    report(
        handshake_sampler(ends, service, policy, state, reason),
        &Refused { connection: ends, service, reason, stage: Stage::Handshake, observed },
    );
    Some(observed)
}

/// Who the refusal of a handshake is noted for.
#[inline(always)]
fn handshake_sampler(
    ends: &Endpoints,
    service: u16,
    policy: &ServicePolicy,
    state: *mut ServiceState,
    reason: DenyReason,
) -> Sampler {
    if matches!(reason, DenyReason::SourceLimit | DenyReason::RateLimit | DenyReason::Rule) {
        return sampler_of(&SourceKey::new(service, &ends.remote, policy.ipv4_prefix, policy.ipv6_prefix), state);
    }
    if matches!(reason, DenyReason::WideSourceLimit) {
        return sampler_of(&SourceKey::wide(service, &ends.remote, policy.wide_prefix(&ends.remote)), state);
    }
    service_sampler(state)
}
