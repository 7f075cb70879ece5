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
    apply_action(&action(entry), limits);
}

/// A service's limits with what a rule says in their place.
pub(in crate::kernel) fn with_rule(mut limits: Limits, rule: Option<&Rule>) -> Limits {
    if let Some(rule) = rule {
        apply_action(&rule.action, &mut limits);
    }
    limits
}

fn apply_action(action: &Action, limits: &mut Limits) {
    match action {
        Action::Allow => {
            *limits = Limits {
                connections_per_source: 0,
                connections_per_wide_source: 0,
                connections_total: 0,
                connections_total_all: 0,
                connection_rate: 0,
                service_connection_rate: 0,
                ..*limits
            }
        }
        Action::Deny => {}
        Action::Limit(own) => {
            limits.connections_per_source = own.connections_per_source.unwrap_or(limits.connections_per_source);
            limits.connections_per_wide_source =
                own.connections_per_wide_source.unwrap_or(limits.connections_per_wide_source);
            if let Some(rate) = own.rate {
                (limits.connection_rate, limits.connection_burst) = rate;
            }
        }
    }
}
