//! The end of reservations that the stack does not confirm.

use aya_ebpf::{bindings::BPF_EXIST, helpers::bpf_ktime_get_ns};
use limiter_common::{
    Counter,
    control::EXPIRE_BATCH,
    ledger::{RESERVATION_NS, Reservation},
};

use crate::{
    atomic,
    ledger::release,
    maps::{LEDGER, RESERVATIONS},
};

/// How many reservations are looked through for each one that is made; more than one, so that the queue drains.
const EXPIRE_ON_RESERVE: usize = 2;

/// How many before a SYN is refused, once in [`EXPIRE_INTERVAL_NS`](limiter_common::ledger::EXPIRE_INTERVAL_NS).
const EXPIRE_ON_REFUSAL: usize = 64;

/// Looks through reservations for each one that was made, in a global function: it comes after all else, with a stack of its
/// own. Returns 0; the kernel wants a number.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn limiter_expire() -> u32 {
    // SAFETY: the helper has no precondition.
    let now_ns = unsafe { bpf_ktime_get_ns() };
    for _ in 0..EXPIRE_ON_RESERVE {
        if let Oldest::None | Oldest::Waits = expire_oldest(now_ns) {
            break;
        }
    }
    0
}

/// Looks through reservations on behalf of a SYN that would be refused. Returns 0; the kernel wants a number.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn limiter_expire_for_refused() -> u32 {
    // SAFETY: the helper has no precondition.
    let now_ns = unsafe { bpf_ktime_get_ns() };
    look_past_waiting::<EXPIRE_ON_REFUSAL>(now_ns);
    0
}

/// Looks through a batch of reservations on behalf of user space. Returns whether it is to ask again.
#[inline(always)]
pub fn expire_batch(now_ns: u64) -> bool {
    for _ in 0..EXPIRE_BATCH {
        match expire_oldest(now_ns) {
            Oldest::None => return false,
            Oldest::Waits => {
                look_past_waiting::<{ EXPIRE_BATCH as usize }>(now_ns);
                return false;
            }
            Oldest::Done => {}
        }
    }
    true
}

/// Looks at so many, since one that waits may be in front of others that are due.
#[inline(always)]
fn look_past_waiting<const COUNT: usize>(now_ns: u64) {
    for _ in 0..COUNT {
        if let Oldest::None = expire_oldest(now_ns) {
            break;
        }
    }
}

/// What became of the oldest reservation.
enum Oldest {
    /// There is none.
    None,
    /// Its time is not up. It is the last to be looked at now, which costs the order and nothing else.
    Waits,
    /// It is forgotten: it was confirmed or removed since, or its time was up and its slot is given back.
    Done,
}

/// Looks at the oldest reservation, and takes it out if its time is up.
#[inline(always)]
fn expire_oldest(now_ns: u64) -> Oldest {
    let Ok(Some(reservation)) = RESERVATIONS.pop() else { return Oldest::None };
    if !is_pending(&reservation) {
        return Oldest::Done;
    }
    let is_due = now_ns.wrapping_sub(reservation.opened_ns) >= RESERVATION_NS && now_ns >= reservation.opened_ns;
    if is_due && release(&reservation.key, reservation.owner, Counter::ClosedExpired as u32) {
        return Oldest::Done;
    }
    // Also one that the kernel was too busy to take out, or that was confirmed just now.
    let _ = RESERVATIONS.push(&reservation, u64::from(BPF_EXIST));
    Oldest::Waits
}

/// Whether its entry has the owner that it was made with.
#[inline(always)]
fn is_pending(reservation: &Reservation) -> bool {
    match LEDGER.get_ptr(&reservation.key) {
        // SAFETY: the pointer comes from a look-up in this map; the field is aligned.
        Some(entry) => unsafe { atomic::load(&raw const (*entry).owner) == reservation.owner },
        None => false,
    }
}
