//! How fast each source opens connections.
//!
//! A bucket is made and changed only when a handshake completes, so nobody can spend another's tokens by forged SYNs. The
//! map is an LRU one: it never fills, and a bucket that gives way was not used for long, so it was full.
//!
//! The kernel may hand a bucket that gave way to another source between our look and our exchange. That costs somebody a
//! token at most, since the exchange only succeeds on the word that was seen.

use aya_ebpf::bindings::BPF_NOEXIST;
use limiter_common::{SourceKey, bucket::Rate, policy::ServiceState};

use crate::{
    atomic,
    handed::on_stack,
    maps::{EEXIST, RATES, SERVICE_STATE},
};

/// How often a step is tried again that another CPU was faster with.
const ATTEMPTS: usize = 4;
/// The same for the one bucket of a service, at which all CPUs meet.
const SERVICE_ATTEMPTS: usize = 8;

/// Whether the source may open one more connection now. Spends nothing.
#[inline(always)]
pub fn allows(source: &SourceKey, rate: &Rate, now_ns: u64) -> bool {
    let Some(bucket) = RATES.get_ptr_mut(source) else { return true };
    // SAFETY: the pointer comes from a look-up in this map; the word is aligned.
    unsafe { may_take(bucket, rate, now_ns) }
}

/// Whether the service takes one more connection now. Spends nothing.
#[inline(always)]
pub fn service_allows(state: *mut ServiceState, rate: &Rate, now_ns: u64) -> bool {
    // SAFETY: the pointer comes from a look-up in an array; its elements stay, and the word is aligned.
    unsafe { may_take(&raw mut (*state).bucket, rate, now_ns) }
}

/// Takes a token from the service's bucket. `false` if there is none.
#[inline(always)]
pub fn service_spend(service: u16, rate: &Rate, now_ns: u64) -> bool {
    limiter_spend_service(service.into(), &raw const *rate, now_ns) != 0
}

/// The same as a global function, like [`limiter_spend`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn limiter_spend_service(service: u32, rate: *const Rate, now_ns: u64) -> u32 {
    if rate.is_null() {
        return 1;
    }
    // SAFETY: the verifier has checked that this is what is behind the pointer.
    let rate = unsafe { *rate };
    match SERVICE_STATE.get_ptr_mut(service) {
        Some(state) => u32::from(take_from_service(state, &rate, now_ns)),
        None => 1,
    }
}

#[inline(always)]
fn take_from_service(state: *mut ServiceState, rate: &Rate, now_ns: u64) -> bool {
    for _ in 0..SERVICE_ATTEMPTS {
        // SAFETY: as above.
        match unsafe { try_take(&raw mut (*state).bucket, rate, now_ns) } {
            Taken::Yes => return true,
            Taken::Empty => return false,
            Taken::Again => {}
        }
    }
    false
}

/// Gives a token back to the service's bucket.
#[inline(always)]
pub fn service_give_back(state: *mut ServiceState, rate: &Rate) {
    // SAFETY: as above.
    unsafe { atomic::fetch_add(&raw mut (*state).bucket, rate.token_ns.wrapping_neg()) };
}

/// Takes a token from the source's bucket. `false` if there is none.
#[inline(always)]
pub fn spend(source: &SourceKey, rate: &Rate, now_ns: u64) -> bool {
    limiter_spend(&raw const *source, &raw const *rate, now_ns) != 0
}

/// The same as a global function, which the verifier looks at once; it is called once for each connection.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn limiter_spend(source: *const SourceKey, rate: *const Rate, now_ns: u64) -> u32 {
    if source.is_null() || rate.is_null() {
        return 1;
    }
    // SAFETY: the verifier has checked that this is what is behind the pointers.
    let (source, rate) = unsafe { (&on_stack(source), &*rate) };
    u32::from(take(source, rate, now_ns))
}

#[inline(always)]
fn take(source: &SourceKey, rate: &Rate, now_ns: u64) -> bool {
    for _ in 0..ATTEMPTS {
        let Some(bucket) = RATES.get_ptr_mut(source) else {
            match RATES.insert(source, &rate.spent(0, now_ns), u64::from(BPF_NOEXIST)) {
                Err(error) if error == -EEXIST => continue,
                // Any other failure is the kernel's being out of free elements for a moment: nobody is refused for that.
                _ => return true,
            }
        };
        // SAFETY: the pointer comes from a look-up in this map; the word is aligned.
        match unsafe { try_take(bucket, rate, now_ns) } {
            Taken::Yes => return true,
            Taken::Empty => return false,
            Taken::Again => {}
        }
    }
    // So many others are spending at once that the bucket is as good as empty.
    false
}

/// Whether a bucket holds a token.
///
/// # Safety
///
/// `bucket` must point to a word of a map.
#[inline(always)]
unsafe fn may_take(bucket: *mut u64, rate: &Rate, now_ns: u64) -> bool {
    // SAFETY: the caller vouches for the pointer.
    unsafe {
        let word = atomic::load(bucket);
        if rate.has_token(word, now_ns) {
            return true;
        }
        if let Some(forgiven) = rate.forgiven(word, now_ns) {
            atomic::compare_exchange(bucket, word, forgiven);
        }
    }
    false
}

/// What came of reaching for a token.
enum Taken {
    /// It was taken.
    Yes,
    /// There is none.
    Empty,
    /// Another CPU was faster.
    Again,
}

/// Takes a token from a bucket, if there is one and nobody is faster.
///
/// # Safety
///
/// `bucket` must point to a word of a map.
#[inline(always)]
unsafe fn try_take(bucket: *mut u64, rate: &Rate, now_ns: u64) -> Taken {
    // SAFETY: the caller vouches for the pointer.
    unsafe {
        let seen = atomic::load(bucket);
        let word = match rate.forgiven(seen, now_ns) {
            Some(forgiven) => forgiven,
            None => seen,
        };
        if !rate.has_token(word, now_ns) {
            Taken::Empty
        } else if atomic::compare_exchange(bucket, seen, rate.spent(word, now_ns)) {
            Taken::Yes
        } else {
            Taken::Again
        }
    }
}

/// Gives a token back that was spent for a connection that then was not opened.
#[inline(always)]
pub fn give_back(source: &SourceKey, rate: &Rate) {
    if let Some(bucket) = RATES.get_ptr_mut(source) {
        // SAFETY: the pointer comes from a look-up in this map; the word is aligned.
        unsafe { atomic::fetch_add(bucket, rate.token_ns.wrapping_neg()) };
    }
}
