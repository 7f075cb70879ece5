//! The rule that holds for an address.

use aya_ebpf::{helpers::bpf_ktime_get_ns, maps::lpm_trie::Key};
use limiter_common::{
    Address, ServicePolicy,
    rule::{Effective, RuleEntry, RuleKey},
};

use crate::maps::{RULES, RULES_USED};

/// How many rules are looked at, one around the other, until one is found that has not ended. User space removes those that
/// have.
const ATTEMPTS: usize = 4;

/// The limits of a service as they hold for an address.
#[inline(always)]
pub fn limits_for(address: &Address, policy: &ServicePolicy) -> Effective {
    let mut limits = Effective::default();
    limiter_limits(&raw const *address, &raw const *policy, &raw mut limits);
    limits
}

/// Whether there has been a rule since the programs were attached. Nobody pays for what is not used.
#[inline(always)]
pub fn are_used() -> bool {
    !matches!(RULES_USED.get(0), None | Some(0))
}

/// Writes the limits of a service as they hold for an address. Returns 0; the kernel wants a number.
///
/// A global function, like [`crate::packet::limiter_locate`]: inlined, the verifier would follow what comes afterwards once
/// for each way through the rules. (With pointers to memory: kernel 5.13.)
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn limiter_limits(address: *const Address, policy: *const ServicePolicy, limits: *mut Effective) -> u32 {
    if address.is_null() || policy.is_null() || limits.is_null() {
        return 0;
    }
    // SAFETY: the verifier has checked that this is what is behind the pointers.
    unsafe {
        let address = *address;
        let rule = if are_used() { find(&address) } else { None };
        *limits = Effective::new(&*policy, rule);
    }
    0
}

#[inline(always)]
fn find(address: &Address) -> Option<&'static RuleEntry> {
    let mut key = RuleKey::of(*address);
    for _ in 0..ATTEMPTS {
        // SAFETY: the two types are the same five words; the map's is packed, and so takes any alignment.
        let entry = RULES.get(unsafe { &*(&raw const key).cast::<Key<Address>>() })?;
        // SAFETY: the helper has no precondition.
        if entry.holds(address, || unsafe { bpf_ktime_get_ns() }) {
            return Some(entry);
        }
        key = key.around(entry)?;
    }
    None
}
