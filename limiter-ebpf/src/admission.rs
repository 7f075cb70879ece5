//! Who may connect. Decides on two kinds of packets: the SYN, which asks, and the segment that completes the handshake,
//! which proves who asks. Everything else passes untouched.

use aya_ebpf::{
    bindings::{__sk_buff, xdp_md},
    helpers::bpf_ktime_get_ns,
    programs::XdpContext,
};
use aya_log_ebpf::debug;
use limiter_common::{
    Counter, DenyReason, Endpoints, ServicePolicy, SourceKey, abi,
    event::Stage,
    ledger::EXPIRE_INTERVAL_NS,
    policy::{InForce, OnDeny, ServiceState, at_limit},
};

use crate::{
    atomic, challenge,
    completion::PROOF_SHIFT,
    context::{Packet, Skb},
    counters::count,
    expiry, flows,
    headers::{ACK, FIN, RST, SYN},
    maps::{SERVICE_STATE, SOURCES, TAG_SECRET},
    packet::{self, Segment, Unread},
    policy, rates,
    report::{Refused, Sampler, report, reported_lately, sampler_of, service_sampler, source_sampler},
    rules, sources,
};

/// What becomes of a packet.
#[derive(Clone, Copy)]
#[repr(u32)]
pub enum Verdict {
    Pass,
    Drop,
    /// It is answered by a RST.
    Reset,
    /// It is answered by a SYN cookie; counted by who does that.
    Challenge,
    /// It is a SYN that would be refused, and is to be judged again when what is overdue was looked for. Nothing was counted.
    JudgeAgain,
}

const DROP: u32 = Verdict::Drop as u32;
const RESET: u32 = Verdict::Reset as u32;
const CHALLENGE: u32 = Verdict::Challenge as u32;
const JUDGE_AGAIN: u32 = Verdict::JudgeAgain as u32;

/// The verdict on a packet of this service, if it is one's.
#[inline(always)]
pub fn admit(ctx: &impl Packet) -> (Verdict, u16) {
    try_admit(ctx).unwrap_or((Verdict::Pass, 0))
}

/// What is done for every packet is done here; the rest, which takes much of the stack, in functions that are called one
/// after the other and not one in the other.
#[inline(always)]
fn try_admit(ctx: &impl Packet) -> Option<(Verdict, u16)> {
    let segment = match packet::segment(ctx) {
        Ok(segment) => segment,
        Err(Unread::Other) => return None,
        Err(Unread::Hidden(port)) => return hidden(port),
    };
    let word = policy::word_of(segment.local_port())?;
    let flags = segment.flags();
    if flags & (SYN | ACK | RST | FIN) == SYN {
        let in_force = policy::in_force();
        let service = in_force.service(word)?;
        if refused_again(ctx, &segment, service, in_force) {
            return Some((Verdict::Drop, service));
        }
        let mut verdict = ctx.syn(service, in_force);
        if verdict == JUDGE_AGAIN {
            expiry::limiter_expire_for_refused();
            verdict = ctx.syn(service, in_force);
        }
        match verdict {
            // Not a third time, should the looking have taken so long.
            DROP | JUDGE_AGAIN => Some((Verdict::Drop, service)),
            RESET => Some((Verdict::Reset, service)),
            CHALLENGE => Some((Verdict::Challenge, service)),
            _ => None,
        }
    } else if flags & (SYN | ACK | RST) == ACK {
        // Nearly every packet ends here.
        if flows::has_entry(&segment.key(TAG_SECRET.get(0)?)) {
            return None;
        }
        let in_force = policy::in_force();
        let service = in_force.service_here(word)?;
        let proof = ctx.prove(service);
        if proof != 0 {
            let refused = ctx.handshake(service, in_force);
            if refused != 0 {
                ctx.refuse(service, in_force, refused | (proof << PROOF_SHIFT));
            }
            expiry::limiter_expire();
        }
        None
    } else {
        None
    }
}

/// Whether a SYN is one more of those that a flood from one source is made of: the source is at its limit, as it was a moment
/// ago when that was reported, and there is nothing to do but to count. It is [`syn`] without all that it seldom has to do, and
/// so without a call and a second look at the headers.
#[inline(always)]
fn refused_again(ctx: &impl Packet, segment: &Segment, service: u16, in_force: InForce) -> bool {
    let (Some(policy), Some(state)) =
        (policy::of_service(service, in_force), SERVICE_STATE.get_ptr_mut(u32::from(service)))
    else {
        return false;
    };
    if policy.connections_per_source == 0
        || in_force.has_rules()
        || policy.on_deny != OnDeny::Drop as u8
        // SAFETY: the pointer comes from a look-up in an array; its elements stay.
        || unsafe { atomic::load(&raw const (*state).unconfirmed) } != 0
    {
        return false;
    }
    let source = SourceKey::new(service, &segment.remote(), policy.ipv4_prefix, policy.ipv6_prefix);
    // An element of SOURCES that got another key after its look-up costs a wrong answer to one SYN.
    let Some(entry) = SOURCES.get_ptr_mut(&source) else { return false };
    if !at_limit(sources::held(entry), policy.connections_per_source) || !reported_lately(source_sampler(entry)) {
        return false;
    }
    count(service, Counter::of_refusal(DenyReason::SourceLimit, Stage::Syn, false));
    debug!(ctx, "service {}: SYN refused, reason {}", service, DenyReason::SourceLimit as u8);
    true
}

/// What only the stack can read is dropped, unless it is for no service. Where not even the port can be read, it may be for any,
/// and counts for none; the first one's `on_deny` decides.
#[inline(always)]
fn hidden(port: u16) -> Option<(Verdict, u16)> {
    let in_force = policy::in_force();
    let service = if port == 0 { 0 } else { policy::service_on(port, in_force)? };
    count(service, if port == 0 { Counter::HeadersUnreadable } else { Counter::HeadersHidden });
    let observed = policy::of_service(service, in_force)?.on_deny == OnDeny::Observe as u8;
    (!observed).then_some((Verdict::Drop, service))
}

/// Somebody asks a service for a connection; who it is remains to be seen. Nothing is stored, and nothing counted against
/// anyone. Returns a [`Verdict`].
///
/// A global function, like [`crate::locate::limiter_locate`]: it has a stack and a judgement of the verifier for itself.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn limiter_syn(ctx: *mut xdp_md, service: u32, in_force: u64) -> u32 {
    syn(&XdpContext::new(ctx), service as u16, InForce(in_force)).unwrap_or(Verdict::Pass) as u32
}

/// The same for the packets of TC.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn limiter_syn_skb(skb: *mut __sk_buff, has_ethernet: u32, service: u32, in_force: u64) -> u32 {
    syn(&Skb::new(skb, has_ethernet != 0), service as u16, InForce(in_force)).unwrap_or(Verdict::Pass) as u32
}

#[inline(always)]
fn syn(ctx: &impl Packet, service: u16, in_force: InForce) -> Option<Verdict> {
    let segment = packet::segment(ctx).ok()?;
    let ends = &segment.endpoints();
    let state = SERVICE_STATE.get_ptr_mut(u32::from(service))?;
    let policy = policy::of_service(service, in_force)?;
    let Some((reason, sampler)) = refusal(ends, service, policy, in_force, state) else {
        // Opened at the SYN, a connection would be open before it is counted, and before its sender has proved itself.
        if segment.has_options() && policy.on_deny != OnDeny::Observe as u8 {
            ctx.void_fast_open(&segment);
        }
        // The stack takes a cookie for the socket whose listener has made it.
        if policy.is_elsewhere == 0 && challenge::is_on(service) {
            return Some(Verdict::Challenge);
        }
        count(service, Counter::SynAdmitted);
        return None;
    };
    if is_time_to_expire(state) {
        return Some(Verdict::JudgeAgain);
    }
    let observed = policy.on_deny == OnDeny::Observe as u8;
    count(service, Counter::of_refusal(reason, Stage::Syn, observed));
    report(sampler, &Refused { connection: ends, service, reason, stage: Stage::Syn, observed });
    debug!(ctx, "service {}: SYN refused, reason {}", service, reason as u8);
    if observed {
        None
    } else if policy.on_deny == OnDeny::Reset as u8 {
        Some(Verdict::Reset)
    } else {
        Some(Verdict::Drop)
    }
}

/// What a SYN would be refused for now, if it came. Nothing is counted or reported.
#[inline(always)]
pub fn judge(ends: &Endpoints, service: u16, in_force: InForce) -> Option<DenyReason> {
    let policy = policy::of_service(service, in_force)?;
    let state = SERVICE_STATE.get_ptr_mut(u32::from(service))?;
    refusal(ends, service, policy, in_force, state).map(|(reason, _)| reason)
}

/// Why a SYN is to be refused, if it is.
#[inline(always)]
fn refusal(
    ends: &Endpoints,
    service: u16,
    policy: &ServicePolicy,
    in_force: InForce,
    state: *mut ServiceState,
) -> Option<(DenyReason, Sampler)> {
    // An element of SOURCES that got another key after its look-up costs a wrong answer to one SYN.
    let source = SourceKey::new(service, &ends.remote, policy.ipv4_prefix, policy.ipv6_prefix);
    // What rules there may be is asked for only where there are any.
    if policy.connections_per_source != 0
        && !in_force.has_rules()
        && let Some(entry) = SOURCES.get_ptr_mut(&source)
        && at_limit(sources::held(entry), policy.connections_per_source)
    {
        return Some((DenyReason::SourceLimit, source_sampler(entry)));
    }
    let limits = rules::limits_for(&ends.remote, policy, in_force);
    if limits.denied != 0 {
        return Some((DenyReason::Rule, sampler_of(&source, state)));
    }
    if limits.connections_per_source != 0
        && let Some(entry) = SOURCES.get_ptr_mut(&source)
        && at_limit(sources::held(entry), limits.connections_per_source)
    {
        return Some((DenyReason::SourceLimit, source_sampler(entry)));
    }
    let wide_prefix = policy.wide_prefix(&ends.remote);
    if limits.connections_per_wide_source != 0
        && wide_prefix != 0
        && let Some(entry) = SOURCES.get_ptr_mut(&SourceKey::wide(service, &ends.remote, wide_prefix))
        && at_limit(sources::held(entry), limits.connections_per_wide_source)
    {
        return Some((DenyReason::WideSourceLimit, source_sampler(entry)));
    }
    // SAFETY: the pointer comes from a look-up in an array; its elements stay.
    if limits.of_service != 0 && at_limit(unsafe { connections(state) }, policy.connections_total) {
        return Some((DenyReason::ServiceLimit, service_sampler(state)));
    }
    if limits.of_service != 0
        && policy.connections_total_all != 0
        && let Some(all) = SERVICE_STATE.get_ptr_mut(abi::ALL_SERVICES)
        // SAFETY: as above.
        && at_limit(unsafe { connections(all) }, policy.connections_total_all)
    {
        return Some((DenyReason::TotalLimit, service_sampler(state)));
    }
    let of_service = limits.of_service != 0 && policy.service_rate.is_limited();
    if limits.rate.is_limited() || of_service {
        // SAFETY: the helper has no precondition.
        let now_ns = unsafe { bpf_ktime_get_ns() };
        if limits.rate.is_limited() && !rates::allows(&source, &limits.rate, now_ns) {
            return Some((DenyReason::RateLimit, sampler_of(&source, state)));
        }
        if of_service && !rates::service_allows(state, &policy.service_rate, now_ns) {
            return Some((DenyReason::ServiceRateLimit, service_sampler(state)));
        }
    }
    None
}

/// How many connections are held.
///
/// # Safety
///
/// `state` must come from a look-up in the map of states.
#[inline(always)]
unsafe fn connections(state: *const ServiceState) -> u64 {
    // SAFETY: the caller vouches for the pointer.
    unsafe { atomic::load(&raw const (*state).connections) }
}

/// Whether a SYN that is to be refused is to wait until what is overdue is looked for: there are slots that the stack has not
/// confirmed, and nobody has looked just now. They keep nobody out once their time is up, whether a daemon is there to look or not.
#[inline(always)]
fn is_time_to_expire(state: *mut ServiceState) -> bool {
    // SAFETY: the helper has no precondition; the pointer comes from a look-up in an array.
    unsafe {
        if atomic::load(&raw const (*state).unconfirmed) == 0 {
            return false;
        }
        let now_ns = bpf_ktime_get_ns();
        let last_ns = atomic::load(&raw const (*state).expired_ns);
        if now_ns.wrapping_sub(last_ns) < EXPIRE_INTERVAL_NS {
            return false;
        }
        (&raw mut (*state).expired_ns).write_volatile(now_ns);
        true
    }
}
