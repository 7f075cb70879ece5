//! Which connections have an entry in the ledger, remembered for those that talk.
//!
//! To look a packet's connection up in the ledger is three calls and half a dozen cache lines, which a packet that brings data finds
//! evicted by the data of those before it. Here it is one number, in an array that is looked up without a call.
//!
//! A number in the array says that there is an entry, and so has to be gone when the entry is. Who finds an entry writes its
//! number and then looks again whether the entry is there; who removes an entry does so and then takes its number away. Both steps
//! of either are in this order for all CPUs (an atomic operation that fetches is a full barrier), so one of the two sees what
//! the other one did. In between, for as long as it takes, a connection that is just closed may count as one that is open: no
//! more than its last packets would.

use limiter_common::{ConnectionKey, abi};

use crate::{
    atomic,
    maps::{FLOWS, LEDGER, TAG_SECRET},
};

/// Whether there is an entry in the ledger for a connection.
#[inline(always)]
pub fn has_entry(key: &ConnectionKey) -> bool {
    let Some((slot, flow)) = place_of(key) else { return LEDGER.get_ptr(key).is_some() };
    // SAFETY: the pointer comes from a look-up in an array; its elements stay, and are aligned.
    let found = unsafe { atomic::load(slot) };
    if found == flow {
        return true;
    }
    if LEDGER.get_ptr(key).is_none() {
        return false;
    }
    // Whoever has the slot keeps it as long as his connection is open: two that talk at the same time would only drive each other
    // out.
    // SAFETY: as above.
    if found == 0 && unsafe { atomic::compare_exchange(slot, 0, flow) } && LEDGER.get_ptr(key).is_none() {
        // SAFETY: as above.
        unsafe { atomic::compare_exchange(slot, flow, 0) };
    }
    true
}

/// To be called when the entry of a connection has been removed.
#[inline(always)]
pub fn forget(key: &ConnectionKey) {
    let Some((slot, flow)) = place_of(key) else { return };
    // SAFETY: the pointer comes from a look-up in an array; its elements stay, and are aligned.
    unsafe {
        // An exchange that fails need not be a barrier; an addition always is.
        if atomic::fetch_add(slot, 0) == flow {
            atomic::compare_exchange(slot, flow, 0);
        }
    }
}

/// The place for a connection, and the number that stands for it there.
#[inline(always)]
fn place_of(key: &ConnectionKey) -> Option<(*mut u64, u64)> {
    let flow = key.flow(TAG_SECRET.get(0)?);
    Some((FLOWS.get_ptr_mut(abi::flow_slot(flow))?, flow))
}
