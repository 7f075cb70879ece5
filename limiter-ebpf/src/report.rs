//! Reports of refusals to user space, one per source and second.

use aya_ebpf::helpers::{bpf_jiffies64, bpf_ktime_get_coarse_ns};
use limiter_common::{
    Counter, DenyReason, Endpoints, SourceEntry, SourceKey,
    event::{Refusal, Stage},
    policy::ServiceState,
};

use crate::{
    atomic,
    counters::count,
    maps::{EVENTS, REPORT_INTERVAL_JIFFIES, SOURCES},
};

/// Where it is noted when somebody's refusals were last reported. Several CPUs may race here, which costs a report too
/// many, or a few refusals in the count of those left out; atomics would cost every refusal of a flood.
#[derive(Clone, Copy)]
pub struct Sampler {
    pub reported_jiffies: *mut u64,
    pub unreported: *mut u64,
}

/// What was refused.
pub struct Refused<'a> {
    pub connection: &'a Endpoints,
    pub service: u16,
    pub reason: DenyReason,
    pub stage: Stage,
    pub observed: bool,
}

/// Whether the same source's last refusal was reported less than a second ago. Then this one is left out, and counted as
/// such.
#[inline(always)]
pub fn reported_lately(sampler: Sampler) -> bool {
    is_left_out(sampler, now_jiffies())
}

/// The time in ticks, which never is 0. The kernel turns this helper into a load, where each of those that tell nanoseconds takes
/// two calls: that is too much for every refusal of a flood.
#[inline(always)]
fn now_jiffies() -> u64 {
    // SAFETY: the helper has no precondition.
    unsafe { bpf_jiffies64() }
}

#[inline(always)]
fn is_left_out(sampler: Sampler, now_jiffies: u64) -> bool {
    // SAFETY: both pointers are into a map value and aligned.
    unsafe {
        let last = atomic::load(sampler.reported_jiffies);
        let is_left_out = last != 0 && now_jiffies.wrapping_sub(last) < REPORT_INTERVAL_JIFFIES.load();
        if is_left_out {
            sampler.unreported.write_volatile(atomic::load(sampler.unreported).wrapping_add(1));
        }
        is_left_out
    }
}

/// Reports a refusal, unless the same source's last one was reported less than a second ago: then it is only counted.
#[inline(always)]
pub fn report(sampler: Sampler, refused: &Refused<'_>) {
    let now_jiffies = now_jiffies();
    if is_left_out(sampler, now_jiffies) {
        return;
    }
    // SAFETY: both pointers are into a map value and aligned.
    unsafe {
        sampler.reported_jiffies.write_volatile(now_jiffies);
        let unreported = atomic::load(sampler.unreported);
        sampler.unreported.write_volatile(0);
        if !submit(refused, unreported) {
            sampler.unreported.write_volatile(unreported.wrapping_add(1));
        }
    }
}

/// Reports a refusal whatever came before: somebody has to act on each of them.
#[inline(always)]
pub fn report_each(refused: &Refused<'_>) {
    submit(refused, 0);
}

/// Writes a record. `false`, and counted, if there is no room for it.
#[inline(always)]
fn submit(refused: &Refused<'_>, unreported: u64) -> bool {
    let Some(mut record) = EVENTS.reserve::<Refusal>(0) else {
        count(refused.service, Counter::EventsLost);
        return false;
    };
    record.write(Refusal {
        // SAFETY: the helper has no precondition.
        time_ns: unsafe { bpf_ktime_get_coarse_ns() },
        unreported,
        connection: *refused.connection,
        service: refused.service,
        reason: refused.reason as u8,
        stage: refused.stage as u8,
        observed: u8::from(refused.observed),
        reserved: [0; 7],
    });
    record.submit(0);
    true
}

/// Where that of a source is noted; with the service if the source holds no connection, and so has no entry.
#[inline(always)]
pub fn sampler_of(source: &SourceKey, state: *mut ServiceState) -> Sampler {
    match SOURCES.get_ptr_mut(source) {
        Some(entry) => source_sampler(entry),
        None => service_sampler(state),
    }
}

#[inline(always)]
pub fn source_sampler(entry: *mut SourceEntry) -> Sampler {
    // SAFETY: the pointer comes from a look-up; an element that got another key meanwhile costs a report.
    unsafe {
        Sampler { reported_jiffies: &raw mut (*entry).reported_jiffies, unreported: &raw mut (*entry).unreported }
    }
}

#[inline(always)]
pub fn service_sampler(state: *mut ServiceState) -> Sampler {
    // SAFETY: the pointer comes from a look-up in an array; its elements stay.
    unsafe {
        Sampler { reported_jiffies: &raw mut (*state).reported_jiffies, unreported: &raw mut (*state).unreported }
    }
}
