//! The end of reservations that the stack does not confirm.

use aya_ebpf::{bindings::BPF_EXIST, helpers::bpf_ktime_get_ns};
use limiter_common::{Counter, ledger::RESERVATION_NS};

use crate::{
    atomic,
    ledger::release,
    maps::{LEDGER, RESERVATIONS},
};

/// How many reservations are looked through for each one that is made; more than one, so that the queue drains.
const EXPIRE_ON_RESERVE: usize = 2;

/// Looks through reservations for each one that was made, in a global function: it comes after all else, with a stack of its
/// own. Returns 0; the kernel wants a number.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn limiter_expire() -> u32 {
    // SAFETY: the helper has no precondition.
    let now_ns = unsafe { bpf_ktime_get_ns() };
    for _ in 0..EXPIRE_ON_RESERVE {
        if !expire_one(now_ns) {
            break;
        }
    }
    0
}

/// Looks at the oldest reservation: forgets it if it was confirmed, takes it out if its time is up. `false` if it was
/// neither, or there was none.
#[inline(always)]
pub fn expire_one(now_ns: u64) -> bool {
    let Ok(Some(reservation)) = RESERVATIONS.pop() else { return false };
    let pending = match LEDGER.get_ptr(&reservation.key) {
        // SAFETY: the pointer comes from a look-up in this map; the field is aligned.
        Some(entry) => unsafe { atomic::load(&raw const (*entry).owner) == reservation.owner },
        None => false,
    };
    if !pending {
        return true;
    }
    if now_ns.wrapping_sub(reservation.opened_ns) < RESERVATION_NS || now_ns < reservation.opened_ns {
        // Not due. It goes to the end of the queue, which costs the order and nothing else.
        let _ = RESERVATIONS.push(&reservation, u64::from(BPF_EXIST));
        return false;
    }
    release(&reservation.key, reservation.owner, Counter::ClosedExpired as u32);
    true
}
