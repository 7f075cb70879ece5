//! The rule that holds for an address.

use core::hint;

use aya_ebpf::{helpers::bpf_ktime_get_ns, maps::lpm_trie::Key};
use limiter_common::{
    Address, ServicePolicy,
    policy::InForce,
    rule::{Effective, RuleEntry, RuleKey},
};

use crate::maps::{RULES_0, RULES_1};

/// How many rules are looked at, one around the other, until one is found that has not ended. User space removes those that
/// have.
const ATTEMPTS: usize = 4;

/// The limits of a service as they hold for an address.
#[inline(always)]
pub fn limits_for(address: &Address, policy: &ServicePolicy, in_force: InForce) -> Effective {
    let mut limits = Effective::default();
    // Hidden from the compiler, which would leave out what is written over anyway: kernels before 6.3 want it written before.
    let written = hint::black_box(&raw mut limits);
    limiter_limits(&raw const *address, &raw const *policy, written, in_force.0);
    limits
}

/// Writes the limits of a service as they hold for an address. Returns 0; the kernel wants a number.
///
/// A global function, like [`crate::locate::limiter_locate`]: inlined, the verifier would follow what comes afterwards once
/// for each way through the rules. (With pointers to memory: kernel 5.13.)
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn limiter_limits(
    address: *const Address,
    policy: *const ServicePolicy,
    limits: *mut Effective,
    in_force: u64,
) -> u32 {
    let in_force = InForce(in_force);
    if address.is_null() || policy.is_null() || limits.is_null() {
        return 0;
    }
    // SAFETY: the verifier has checked that this is what is behind the pointers.
    unsafe {
        write(&*address, &*policy, &mut *limits, in_force);
    }
    0
}

/// References, because they say that what is written is none of what is read.
#[inline(always)]
fn write(address: &Address, policy: &ServicePolicy, limits: &mut Effective, in_force: InForce) {
    *limits = Effective::new(policy, if in_force.has_rules() { find(address, in_force) } else { None });
}

#[inline(always)]
fn find(address: &Address, in_force: InForce) -> Option<&'static RuleEntry> {
    let mut key = RuleKey::of(*address);
    for _ in 0..ATTEMPTS {
        // SAFETY: the two types are the same five words; the map's is packed, and so takes any alignment.
        let trie_key = unsafe { &*(&raw const key).cast::<Key<Address>>() };
        let entry = if in_force.rules() == 0 { RULES_0.get(trie_key) } else { RULES_1.get(trie_key) }?;
        // SAFETY: the helper has no precondition.
        if entry.holds(address, || unsafe { bpf_ktime_get_ns() }) {
            return Some(entry);
        }
        key = key.around(entry)?;
    }
    None
}
