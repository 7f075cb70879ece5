//! How fast each source opens connections.
//!
//! A bucket is made and changed only when a handshake completes, so nobody can spend another's tokens by forged SYNs. The
//! map is an LRU one: it never fills, and a bucket that gives way was not used for long, so it was full.
//!
//! The kernel may hand a bucket that gave way to another source between our look and our exchange. That costs somebody a
//! token at most, since the exchange only succeeds on the word that was seen.

use aya_ebpf::bindings::BPF_NOEXIST;
use limiter_common::{SourceKey, bucket::Rate};

use crate::{
    atomic,
    maps::{EEXIST, RATES},
};

/// How often a step is tried again that another CPU was faster with.
const ATTEMPTS: usize = 4;

/// Whether the source may open one more connection now. Spends nothing.
#[inline(always)]
pub fn allows(source: &SourceKey, rate: &Rate, now_ns: u64) -> bool {
    let Some(bucket) = RATES.get_ptr_mut(source) else { return true };
    // SAFETY: the pointer comes from a look-up in this map; the word is aligned.
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
    let (source, rate) = unsafe { (*source, *rate) };
    u32::from(take(&source, &rate, now_ns))
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
        unsafe {
            let seen = atomic::load(bucket);
            let word = match rate.forgiven(seen, now_ns) {
                Some(forgiven) => forgiven,
                None => seen,
            };
            if !rate.has_token(word, now_ns) {
                return false;
            }
            if atomic::compare_exchange(bucket, seen, rate.spent(word, now_ns)) {
                return true;
            }
        }
    }
    // So many others are spending at once that the bucket is as good as empty.
    false
}

/// Gives a token back that was spent for a connection that then was not opened.
#[inline(always)]
pub fn give_back(source: &SourceKey, rate: &Rate) {
    if let Some(bucket) = RATES.get_ptr_mut(source) {
        // SAFETY: the pointer comes from a look-up in this map; the word is aligned.
        unsafe { atomic::fetch_add(bucket, rate.token_ns.wrapping_neg()) };
    }
}
