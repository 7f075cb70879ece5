//! Atomic operations on map values.
//!
//! They are inline assembly, because the BPF target has no `AtomicU32`, its `AtomicU64` has no `fetch_add`, and the
//! intrinsic with `Relaxed` order compiles to an addition that does not fetch. Both instructions are of the v3 instruction
//! set (kernel 5.12).

use core::arch::asm;

/// Adds `value` (wrapping) and returns what was there before.
///
/// # Safety
///
/// `target` must point into a map value and be aligned to 8 bytes.
#[inline(always)]
pub unsafe fn fetch_add(target: *mut u64, value: u64) -> u64 {
    let mut register = value;
    // SAFETY: the caller vouches for the pointer; the instruction touches nothing else.
    unsafe {
        asm!(
            "{value} = atomic_fetch_add((u64 *)({target} + 0), {value})",
            value = inout(reg) register,
            target = in(reg) target,
        );
    }
    register
}

/// Puts `new` in the place of `current` if that is what is there. Returns whether it was.
///
/// # Safety
///
/// `target` must point into a map value and be aligned to 8 bytes.
#[inline(always)]
pub unsafe fn compare_exchange(target: *mut u64, current: u64, new: u64) -> bool {
    let found: u64;
    // SAFETY: the caller vouches for the pointer; the instruction touches nothing else.
    unsafe {
        asm!(
            "r0 = cmpxchg_64({target} + 0, r0, {new})",
            target = in(reg) target,
            new = in(reg) new,
            inout("r0") current => found,
        );
    }
    found == current
}

/// Reads a number that others change meanwhile, once.
///
/// # Safety
///
/// `source` must point into a map value and be aligned.
#[inline(always)]
pub unsafe fn load<T: Copy>(source: *const T) -> T {
    // SAFETY: the caller vouches for the pointer.
    unsafe { source.read_volatile() }
}
