//! Which rule lies around a prefix, and which lie within it.

use super::RuleInForce;
use crate::policy::Cidr;

/// Of rules that are sorted, that which holds for the whole of a prefix.
pub(in crate::kernel) fn around(rules: &[RuleInForce], network: Cidr) -> Option<&RuleInForce> {
    let place = |cidr: Cidr| rules.binary_search_by_key(&cidr, |rule| rule.rule.cidr).ok();
    (0..=network.prefix())
        .rev()
        .filter_map(|prefix| Cidr::new(network.address(), prefix))
        .find_map(place)
        .map(|place| &rules[place])
}

/// Of rules that are sorted, those for parts of a prefix.
pub(in crate::kernel) fn within(rules: &[RuleInForce], network: Cidr) -> &[RuleInForce] {
    let rest = &rules[rules.partition_point(|rule| rule.rule.cidr <= network)..];
    &rest[..rest.partition_point(|rule| network.contains(rule.rule.cidr))]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{Action, Rule};

    #[test]
    fn the_rules_around_a_prefix_and_within_it_are_found() {
        let rule = |cidr: &str| RuleInForce {
            rule: Rule::new(cidr.parse().unwrap(), Action::Deny),
            left: None,
            from_file: false,
        };
        let mut rules = [
            "192.0.0.0/16",
            "192.0.2.0/24",
            "192.0.2.0/30",
            "192.0.2.7/32",
            "192.0.3.0/24",
            "::/0",
            "2001:db8::/32",
            "2001:db8::7/128",
        ]
        .map(rule);
        rules.sort_by_key(|rule| rule.rule.cidr);
        let text = |rules: &[RuleInForce]| rules.iter().map(|rule| rule.rule.cidr.to_string()).collect::<Vec<_>>();
        for (network, around_it, within_it) in [
            ("192.0.2.0/24", Some("192.0.2.0/24"), &["192.0.2.0/30", "192.0.2.7/32"][..]),
            ("192.0.2.0/25", Some("192.0.2.0/24"), &["192.0.2.0/30", "192.0.2.7/32"]),
            ("192.0.2.7/32", Some("192.0.2.7/32"), &[]),
            ("192.0.9.0/24", Some("192.0.0.0/16"), &[]),
            ("198.51.100.0/24", None, &[]),
            ("2001:db8::/64", Some("2001:db8::/32"), &["2001:db8::7/128"]),
            ("2001:db9::/64", Some("::/0"), &[]),
        ] {
            let network = network.parse().unwrap();
            let found = around(&rules, network).map(|rule| rule.rule.cidr.to_string());
            assert_eq!(found.as_deref(), around_it, "around {network}");
            assert_eq!(text(within(&rules, network)), within_it, "within {network}");
        }
    }
}
