//! How many connections each source holds.
//!
//! An entry exists as long as its count is above zero: the first connection makes it, the last one's end takes it away.
//! The kernel hands the memory of a removed element to another key at once, so a pointer to an entry proves nothing. That
//! is why whoever takes an entry away first swaps its count for [`SOURCE_GONE`], why nobody writes to one that is marked so,
//! and why whoever has added to a count looks up whose it is, and takes the addition back if it was the wrong one: what counts
//! more than none stays where it is.

use core::hint;

use aya_ebpf::bindings::BPF_NOEXIST;
use limiter_common::{
    SourceEntry, SourceKey,
    policy::ServiceState,
    source::{NARROW, SOURCE_GONE, is_gone},
};

use crate::{
    atomic,
    handed::on_stack,
    maps::{E2BIG, EEXIST, SERVICE_STATE, SOURCES},
};

/// How often an element is tried to be taken away that another CPU's doings are in the way of.
const ATTEMPTS: usize = 4;

/// How often an addition is tried again that met another CPU's half-done removal, or its addition: for a microsecond or two.
const ATTEMPTS_TO_ADD: usize = 32;

/// How many connections a source holds now.
#[inline(always)]
pub fn held(entry: *const SourceEntry) -> u64 {
    // SAFETY: the pointer comes from a look-up in this map.
    let connections = unsafe { atomic::load(&raw const (*entry).connections) };
    if is_gone(connections) { 0 } else { connections }
}

/// Why a connection can't be counted, or entered.
#[derive(Clone, Copy)]
pub enum NotAdded {
    /// There is no room for it.
    Full,
    /// There may be. Other CPUs were in the way each time.
    Busy,
}

impl NotAdded {
    /// What an insertion has answered.
    #[inline(always)]
    pub fn from_error(error: i32) -> Self {
        if error == -E2BIG { Self::Full } else { Self::Busy }
    }
}

/// Adds a connection to a source and returns how many it held before.
#[inline(always)]
pub fn add(key: &SourceKey) -> Result<u64, NotAdded> {
    match limiter_add(&raw const *key) {
        NO_ROOM => Err(NotAdded::Full),
        BUSY => Err(NotAdded::Busy),
        before => Ok(before),
    }
}

/// Takes a connection away from a source; the last one takes the source along. Only for a connection that was added: as
/// long as it counts, the entry stays where it is.
#[inline(always)]
pub fn subtract(key: &SourceKey) {
    limiter_subtract(&raw const *key);
}

/// No source holds so many.
const NO_ROOM: u64 = u64::MAX;
const BUSY: u64 = u64::MAX - 1;

/// [`add`] as a global function, which the verifier looks at once; it is called once or twice for each connection.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn limiter_add(key: *const SourceKey) -> u64 {
    if key.is_null() {
        return NO_ROOM;
    }
    // Hidden from the compiler, which would call a function to write both, and that takes stack.
    let none = hint::black_box(0);
    // SAFETY: the verifier has checked that this is what is behind the pointer.
    let key = unsafe { on_stack(key) };
    // The key is looked up where it lies in this: the stack has no room for two of them.
    let first = &SourceEntry { connections: 1, reported_jiffies: none, unreported: none, key, reserved: 0 };
    let key = &first.key;
    let before = match add_to_entry(first) {
        Ok(before) => before,
        Err(NotAdded::Full) => return NO_ROOM,
        Err(NotAdded::Busy) => return BUSY,
    };
    if before == 0
        && let Some(state) = state_of(key)
    {
        // SAFETY: the pointer comes from a look-up in an array; its elements stay.
        unsafe { atomic::fetch_add(&raw mut (*state).sources, 1) };
    }
    before
}

/// [`subtract`] as a global function. Returns 0; the kernel wants a number.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn limiter_subtract(key: *const SourceKey) -> u64 {
    if !key.is_null() {
        // SAFETY: the verifier has checked that this is what is behind the pointer.
        subtract_here(&unsafe { on_stack(key) });
    }
    0
}

/// Where a source is counted itself: that of its service. Those of the wider tier are not.
#[inline(always)]
fn state_of(key: &SourceKey) -> Option<*mut ServiceState> {
    if key.tier == NARROW { SERVICE_STATE.get_ptr_mut(u32::from(key.service)) } else { None }
}

#[inline(always)]
fn add_to_entry(first: &SourceEntry) -> Result<u64, NotAdded> {
    let key = &first.key;
    for _ in 0..ATTEMPTS_TO_ADD {
        if let Some(entry) = SOURCES.get_ptr_mut(key) {
            // SAFETY: the pointer comes from a look-up in this map; the field is aligned.
            unsafe {
                let connections = &raw mut (*entry).connections;
                let before = atomic::load(connections);
                if is_gone(before) || !atomic::compare_exchange(connections, before, before + 1) {
                    continue;
                }
                // Looked up, and not read from the entry: another CPU may be about to fill it for another source.
                if SOURCES.get_ptr_mut(key).is_some_and(|now| now == entry) {
                    return Ok(before);
                }
                take_away(entry, &(*entry).key);
            }
        } else {
            match SOURCES.insert(key, first, u64::from(BPF_NOEXIST)) {
                Ok(()) => return Ok(0),
                Err(error) if error == -EEXIST => {}
                Err(error) => return Err(NotAdded::from_error(error)),
            }
        }
    }
    Err(NotAdded::Busy)
}

/// [`subtract`] without a call, for who is at the end of a long chain of them: each takes 32 bytes of the stack at least.
#[inline(always)]
pub fn subtract_here(key: &SourceKey) {
    let Some(entry) = SOURCES.get_ptr_mut(key) else { return };
    // SAFETY: it counts the connection that is taken away, and so stays that source's until then.
    unsafe { take_away(entry, key) }
}

/// Takes a connection away from the entry of a source.
///
/// # Safety
///
/// The entry must come from a look-up in this map, and count that connection.
#[inline(always)]
unsafe fn take_away(entry: *mut SourceEntry, key: &SourceKey) {
    // SAFETY: the caller vouches for the pointer; the field is aligned.
    unsafe {
        let connections = &raw mut (*entry).connections;
        if atomic::fetch_add(connections, 1_u64.wrapping_neg()) != 1 {
            return;
        }
        if let Some(state) = state_of(key) {
            atomic::fetch_add(&raw mut (*state).sources, 1_u64.wrapping_neg());
        }
        if !atomic::compare_exchange(connections, 0, SOURCE_GONE) {
            return;
        }
        for _ in 0..ATTEMPTS {
            if SOURCES.remove(key).is_ok() {
                return;
            }
        }
        // The kernel was busy with this bucket each time: leave an entry that counts 0, for the next one to use.
        atomic::fetch_add(connections, SOURCE_GONE.wrapping_neg());
    }
}
