//! What one more connection counts against, and what speaks against it.

use limiter_common::{
    DenyReason, ServicePolicy, SourceKey, abi,
    policy::{ServiceState, at_limit},
    rule::Effective,
};

use crate::{
    atomic,
    maps::SERVICE_STATE,
    rates,
    sources::{self, NotAdded},
};

/// How many connections are held by each of what one more counts against.
pub struct Held {
    source: u64,
    wide_source: u64,
    service: u64,
    all: u64,
}

/// Counts one more connection everywhere, or, if one of its sources can't be added to, nowhere.
#[inline(always)]
pub fn take(source: &SourceKey, wide: &SourceKey, state: *mut ServiceState) -> Result<Held, NotAdded> {
    let held_by_source = sources::add(source)?;
    let wide_source = if wide.prefix == 0 {
        0
    } else {
        match sources::add(wide) {
            Ok(held) => held,
            Err(why) => {
                sources::subtract(source);
                return Err(why);
            }
        }
    };
    let all = match SERVICE_STATE.get_ptr_mut(abi::ALL_SERVICES) {
        // SAFETY: the pointer comes from a look-up in an array; its elements stay.
        Some(all) => unsafe { atomic::fetch_add(&raw mut (*all).connections, 1) },
        None => 0,
    };
    // SAFETY: as above.
    let service = unsafe { atomic::fetch_add(&raw mut (*state).connections, 1) };
    Ok(Held { source: held_by_source, wide_source, service, all })
}

/// Takes back what [`take`] has counted, by [`sources::subtract`] or its like.
#[inline(always)]
pub fn put_back(source: &SourceKey, wide: &SourceKey, state: *mut ServiceState, subtract: impl Fn(&SourceKey)) {
    // SAFETY: the pointers come from look-ups in an array; its elements stay.
    unsafe {
        atomic::fetch_add(&raw mut (*state).connections, 1_u64.wrapping_neg());
        if let Some(all) = SERVICE_STATE.get_ptr_mut(abi::ALL_SERVICES) {
            atomic::fetch_add(&raw mut (*all).connections, 1_u64.wrapping_neg());
        }
    }
    if wide.prefix != 0 {
        subtract(wide);
    }
    subtract(source);
}

/// Which limit one more connection is past, if it is.
#[inline(always)]
pub fn past_limit(policy: &ServicePolicy, limits: &Effective, held: &Held) -> Option<DenyReason> {
    if limits.denied != 0 {
        Some(DenyReason::Rule)
    } else if at_limit(held.source, limits.connections_per_source) {
        Some(DenyReason::SourceLimit)
    } else if at_limit(held.wide_source, limits.connections_per_wide_source) {
        Some(DenyReason::WideSourceLimit)
    } else if limits.of_service == 0 {
        None
    } else if at_limit(held.service, policy.connections_total) {
        Some(DenyReason::ServiceLimit)
    } else if at_limit(held.all, policy.connections_total_all) {
        Some(DenyReason::TotalLimit)
    } else {
        None
    }
}

/// Takes the tokens that a new connection takes: one of its source's, and one of its service's. Both or none; says which
/// there was none of.
#[inline(always)]
pub fn spend(source: &SourceKey, policy: &ServicePolicy, limits: &Effective, now_ns: u64) -> Option<DenyReason> {
    if limits.rate.is_limited() && !rates::spend(source, &limits.rate, now_ns) {
        return Some(DenyReason::RateLimit);
    }
    if limits.of_service != 0
        && policy.service_rate.is_limited()
        && !rates::service_spend(source.service, &policy.service_rate, now_ns)
    {
        if limits.rate.is_limited() {
            rates::give_back(source, &limits.rate);
        }
        return Some(DenyReason::ServiceRateLimit);
    }
    None
}

/// Gives back what [`spend`] has taken.
#[inline(always)]
pub fn give_back(source: &SourceKey, policy: &ServicePolicy, limits: &Effective, state: *mut ServiceState) {
    if limits.rate.is_limited() {
        rates::give_back(source, &limits.rate);
    }
    if limits.of_service != 0 && policy.service_rate.is_limited() {
        rates::service_give_back(state, &policy.service_rate);
    }
}
