//! What a rule makes of the limits of a service.

use limiter_common::rule::RuleEntry;

use super::entry::action;
use crate::policy::{Action, Limits, Rule};

/// Whether the rule lets past every limit.
pub(in crate::kernel) fn is_allow(entry: &RuleEntry) -> bool {
    matches!(action(entry), Action::Allow)
}

/// Whether the rule denies.
pub(in crate::kernel) fn is_deny(entry: &RuleEntry) -> bool {
    matches!(action(entry), Action::Deny)
}

/// Puts what a rule says in the place of a service's limits. Whom it denies, the programs keep out.
pub(in crate::kernel) fn apply(entry: &RuleEntry, limits: &mut Limits) {
    *limits = limits.under(action(entry));
}

/// A service's limits with what a rule says in their place.
pub(in crate::kernel) fn with_rule(limits: Limits, rule: Option<&Rule>) -> Limits {
    rule.map_or(limits, |rule| limits.under(rule.action))
}
