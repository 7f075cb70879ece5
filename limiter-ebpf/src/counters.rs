//! Counting what happened.

use limiter_common::{Counter, abi};

use crate::maps::COUNTERS;

/// Adds one to a counter of a service, on this CPU.
#[inline(always)]
pub fn count(service: u16, counter: Counter) {
    count_at(service, counter as u32);
}

/// The same with a counter's number, which the caller has checked.
#[inline(always)]
pub fn count_at(service: u16, counter: u32) {
    let index = u32::from(service) * abi::COUNTERS_PER_SERVICE + counter;
    if let Some(value) = COUNTERS.get_ptr_mut(index) {
        // SAFETY: the pointer is into this CPU's element, and nothing else runs a program on this CPU meanwhile but an
        // interrupt, which can cost a count and nothing more.
        unsafe { *value += 1 };
    }
}
