//! The rule that holds for an address.

use aya_ebpf::{helpers::bpf_ktime_get_ns, maps::lpm_trie::Key};
use limiter_common::{
    Address,
    rule::{RuleEntry, RuleKey},
};

use crate::maps::RULES;

/// How many rules are looked at, one around the other, until one is found that has not ended. User space removes those that
/// have.
const ATTEMPTS: usize = 4;

/// The rule with the longest prefix around an address, of those that have not ended.
#[inline(always)]
pub fn rule_for(address: &Address) -> Option<&'static RuleEntry> {
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
