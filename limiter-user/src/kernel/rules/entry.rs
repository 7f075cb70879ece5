//! A rule as it lies in the map.

use std::{
    net::IpAddr,
    time::{Duration, SystemTime},
};

use aya::maps::lpm_trie::Key;
use limiter_common::{
    Address,
    bucket::Rate,
    rule::{MAPPED_BITS, OWN_CONNECTIONS, OWN_RATE, OWN_WIDE_CONNECTIONS, RuleAction, RuleEntry, RuleOrigin},
};

use super::RuleInForce;
use crate::policy::{Action, Cidr, OwnLimits, Rule};

/// How far apart two ends may be that are meant to be the same.
const SAME_END: Duration = Duration::from_secs(1);

/// What a rule lies under: the length of its prefix, and its first address.
pub(super) type Place = (u32, Address);

pub(super) fn key(cidr: Cidr) -> Key<Address> {
    Key::new(length(cidr).into(), cidr.address().into())
}

/// The length of a prefix in the 16-byte form of its addresses.
fn length(cidr: Cidr) -> u8 {
    if cidr.address().is_ipv4() { cidr.prefix() + MAPPED_BITS } else { cidr.prefix() }
}

pub(super) fn place(key: &Key<Address>) -> Place {
    (key.prefix_len(), key.data())
}

pub(super) fn cidr(key: &Key<Address>) -> Option<Cidr> {
    let address = key.data();
    let mut prefix = u8::try_from(key.prefix_len()).ok()?;
    if address.is_v4() && prefix >= MAPPED_BITS {
        prefix -= MAPPED_BITS;
        return Cidr::new(address.into(), prefix);
    }
    // Not by way of IpAddr, which would take ::ffff:0:0/40 for IPv4.
    let words = address.words().map(u32::from_be);
    let bits = words.into_iter().fold(0_u128, |bits, word| bits << 32 | u128::from(word));
    Cidr::new(IpAddr::V6(bits.into()), prefix)
}

pub(super) fn entry(rule: &Rule, expires_ns: u64, from_file: bool) -> RuleEntry {
    let mut entry = RuleEntry {
        expires_ns,
        length: length(rule.cidr),
        origin: if from_file { RuleOrigin::File } else { RuleOrigin::Command } as u8,
        ..RuleEntry::default()
    };
    match rule.action {
        Action::Allow => entry.action = RuleAction::Allow as u8,
        Action::Deny => entry.action = RuleAction::Deny as u8,
        Action::Limit(own) => {
            entry.action = RuleAction::Limit as u8;
            if let Some(connections) = own.connections_per_source {
                entry.own |= OWN_CONNECTIONS;
                entry.connections_per_source = connections;
            }
            if let Some(connections) = own.connections_per_wide_source {
                entry.own |= OWN_WIDE_CONNECTIONS;
                entry.connections_per_wide_source = connections;
            }
            if let Some((rate, burst)) = own.rate {
                entry.own |= OWN_RATE;
                (entry.connection_rate, entry.connection_burst) = (rate, burst);
                entry.rate = Rate::new(rate, burst);
            }
        }
    }
    entry
}

/// `None` if it has ended.
pub(super) fn from_entry(cidr: Cidr, entry: &RuleEntry, now: Duration) -> Option<RuleInForce> {
    let left = match entry.expires_ns {
        0 => None,
        expires_ns => Some(Duration::from_nanos(expires_ns).checked_sub(now).filter(|left| !left.is_zero())?),
    };
    Some(RuleInForce {
        rule: Rule { cidr, action: action(entry), expires: left.and_then(|left| SystemTime::now().checked_add(left)) },
        left,
        from_file: entry.origin == RuleOrigin::File as u8,
    })
}

pub(super) fn action(entry: &RuleEntry) -> Action {
    if entry.action == RuleAction::Allow as u8 {
        Action::Allow
    } else if entry.action == RuleAction::Deny as u8 {
        Action::Deny
    } else {
        Action::Limit(OwnLimits {
            connections_per_source: (entry.own & OWN_CONNECTIONS != 0).then_some(entry.connections_per_source),
            connections_per_wide_source: (entry.own & OWN_WIDE_CONNECTIONS != 0)
                .then_some(entry.connections_per_wide_source),
            rate: (entry.own & OWN_RATE != 0).then_some((entry.connection_rate, entry.connection_burst)),
        })
    }
}

/// When a rule ends, as the programs count time, of which it is `now`: 0 for never; `None` if it has ended.
pub(super) fn ends_ns(rule: &Rule, now: Duration) -> Option<u64> {
    let Some(expires) = rule.expires else { return Some(0) };
    let left = expires.duration_since(SystemTime::now()).ok().filter(|left| !left.is_zero())?;
    Some(nanoseconds(now.saturating_add(left)).max(1))
}

/// Whether two entries say the same. An end is computed anew from the clock on the wall every time, and so is never quite the
/// same.
pub(super) fn is_same(one: &RuleEntry, other: &RuleEntry) -> bool {
    let same_end = (one.expires_ns == 0) == (other.expires_ns == 0)
        && one.expires_ns.abs_diff(other.expires_ns) <= nanoseconds(SAME_END);
    same_end && RuleEntry { expires_ns: other.expires_ns, ..*one } == *other
}

pub(super) fn has_ended(entry: &RuleEntry, now_ns: u64) -> bool {
    entry.expires_ns != 0 && entry.expires_ns <= now_ns
}

/// As the programs count time.
pub(in crate::kernel) fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_comes_back_as_it_went_in() {
        let own =
            OwnLimits { connections_per_source: Some(0), connections_per_wide_source: Some(7), rate: Some((10, 20)) };
        for cidr in ["192.0.2.0/24", "0.0.0.0/0", "::/0", "2001:db8::/32", "::fffe:0:0/95", "2001:db8::7/128"] {
            for action in [Action::Allow, Action::Deny, Action::Limit(own), Action::Limit(OwnLimits::default())] {
                let rule = Rule::new(cidr.parse().unwrap(), action);
                let entry = entry(&rule, 0, true);
                let found = from_entry(super::cidr(&key(rule.cidr)).unwrap(), &entry, Duration::ZERO).unwrap();
                assert_eq!(found, RuleInForce { rule, left: None, from_file: true });
            }
        }
    }

    #[test]
    fn an_end_goes_from_the_one_clock_to_the_other() {
        let now = Duration::from_secs(1000);
        let rule = |expires| Rule { expires, ..Rule::new("192.0.2.0/24".parse().unwrap(), Action::Deny) };
        assert_eq!(ends_ns(&rule(None), now), Some(0));
        assert_eq!(ends_ns(&rule(Some(SystemTime::UNIX_EPOCH)), now), None);
        let hour = Duration::from_hours(1);
        let first = ends_ns(&rule(Some(SystemTime::now() + hour)), now).unwrap();
        assert!((nanoseconds(now + hour) - 60_000_000_000..=nanoseconds(now + hour)).contains(&first), "{first}");
        let with = |ns| entry(&rule(None), ns, true);
        assert!(is_same(&with(first), &with(first + 1)) && is_same(&with(0), &with(0)));
        assert!(!is_same(&with(0), &with(1)) && !is_same(&with(first), &with(first + 2_000_000_000)));
        assert!(!is_same(&with(first), &entry(&rule(None), first, false)));
    }

    #[test]
    fn a_rule_that_has_ended_is_none() {
        let rule = Rule::new("192.0.2.0/24".parse().unwrap(), Action::Deny);
        let entry = entry(&rule, 5, false);
        assert_eq!(from_entry(rule.cidr, &entry, Duration::from_nanos(5)), None);
        let left = from_entry(rule.cidr, &entry, Duration::from_nanos(2)).unwrap().left;
        assert_eq!(left, Some(Duration::from_nanos(3)));
    }
}
