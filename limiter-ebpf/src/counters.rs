//! Counting what happened.

use limiter_common::{Counter, abi};

use crate::{atomic, maps::COUNTERS};

/// Adds one to a counter of a service, on this CPU. For what happens as packets come: nothing interrupts a program there that
/// counts as well.
#[inline(always)]
pub fn count(service: u16, counter: Counter) {
    if let Some(value) = counter_of(service, counter as u32) {
        // SAFETY: the pointer is into this CPU's element, and nobody else writes to it meanwhile.
        unsafe { *value += 1 };
    }
}

/// The same for what a process may do itself, such as to close a socket: packets come in between, and close others. With a
/// counter's number, which the caller has checked.
#[inline(always)]
pub fn count_at(service: u16, counter: u32) {
    if let Some(value) = counter_of(service, counter) {
        // SAFETY: the pointer is into a map value, and aligned.
        unsafe { atomic::fetch_add(value, 1) };
    }
}

#[inline(always)]
fn counter_of(service: u16, counter: u32) -> Option<*mut u64> {
    COUNTERS.get_ptr_mut(u32::from(service) * abi::COUNTERS_PER_SERVICE + counter)
}
