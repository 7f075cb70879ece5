//! A policy without a kernel: what the configuration says, kept by the gateway alone.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    time::SystemTime,
};

use super::{Action, Cidr, Connection, Limits, Policy, Rule};

/// Limits and rules that stay as they are, for a gateway without the kernel's part.
#[derive(Clone, Debug, Default)]
pub struct Fixed {
    limits: Limits,
    /// By the length of the prefix: as many look-ups as there are lengths, however many rules.
    rules: BTreeMap<u8, HashMap<Cidr, Rule>>,
    observes: bool,
}

impl Fixed {
    /// Of two rules for one prefix, the last holds.
    pub fn new(limits: Limits, rules: &[Rule]) -> Self {
        let mut by_length: BTreeMap<u8, HashMap<Cidr, Rule>> = BTreeMap::new();
        for rule in rules {
            by_length.entry(rule.cidr.prefix()).or_default().insert(rule.cidr, *rule);
        }
        Self { limits, rules: by_length, observes: false }
    }

    /// The same, where `observes` says whether nobody is refused for them (`on_deny = "observe"`).
    #[must_use]
    pub fn observing(self, observes: bool) -> Self {
        Self { observes, ..self }
    }

    /// What the rule says with the longest prefix that an address is in, of those that have not ended.
    fn holding(&self, client: IpAddr) -> Option<Action> {
        self.holding_at(client, SystemTime::now())
    }

    fn holding_at(&self, client: IpAddr, now: SystemTime) -> Option<Action> {
        let client = client.to_canonical();
        let holding = |(length, rules): (&u8, &HashMap<Cidr, Rule>)| {
            rules.get(&Cidr::new(client, *length)?).filter(|rule| !rule.has_ended(now)).map(|rule| rule.action)
        };
        self.rules.iter().rev().find_map(holding)
    }
}

impl Policy for Fixed {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn limits_for(&self, client: IpAddr) -> Limits {
        self.holding(client).map_or(self.limits, |action| self.limits.under(action))
    }

    fn denies(&self, client: IpAddr) -> bool {
        matches!(self.holding(client), Some(Action::Deny))
    }

    fn is_kept_below(&self) -> bool {
        false
    }

    fn observes(&self) -> bool {
        self.observes
    }

    fn closed(&self, _: &Connection) {}
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::policy::OwnLimits;

    fn rule(cidr: &str, action: Action) -> Rule {
        Rule::new(cidr.parse().unwrap(), action)
    }

    #[test]
    fn the_longest_prefix_holds_in_its_own_family() {
        let own = OwnLimits { connections_per_source: Some(7), rate: Some((1, 2)), ..OwnLimits::default() };
        let service = Limits {
            connections_total_all: 9,
            service_connection_rate: 9,
            connections_per_wide_source: 9,
            ..Limits::default()
        };
        let fixed = Fixed::new(
            service,
            &[
                rule("::/0", Action::Deny),
                rule("192.0.2.0/24", Action::Deny),
                rule("192.0.2.128/25", Action::Limit(own)),
                rule("192.0.2.129", Action::Allow),
            ],
        );
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        assert!(
            fixed.denies(ip("192.0.2.1")) && fixed.denies(ip("::ffff:192.0.2.1")) && fixed.denies(ip("2001:db8::1"))
        );
        assert!(!fixed.denies(ip("198.51.100.1")) && !fixed.denies(ip("192.0.2.128")));
        let limits = fixed.limits_for(ip("192.0.2.128"));
        assert_eq!((limits.connections_per_source, limits.connection_rate, limits.connection_burst), (7, 1, 2));
        assert_eq!((limits.connections_total, limits.connections_total_all), (service.connections_total, 9));
        let limits = fixed.limits_for(ip("192.0.2.129"));
        assert_eq!((limits.connections_per_source, limits.connections_per_wide_source), (0, 0));
        assert_eq!((limits.connections_total, limits.connections_total_all), (0, 0));
        assert_eq!((limits.connection_rate, limits.service_connection_rate), (0, 0));
        assert_eq!(fixed.limits_for(ip("198.51.100.1")), service);
    }

    #[test]
    fn a_rule_that_has_ended_leaves_the_one_around_it() {
        let end = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        let ends = Rule { expires: Some(end), ..rule("192.0.2.7", Action::Allow) };
        let fixed = Fixed::new(Limits::default(), &[rule("192.0.2.0/24", Action::Deny), ends]);
        let at = |seconds| {
            let now = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
            fixed.holding_at("192.0.2.7".parse().unwrap(), now)
        };
        assert_eq!((at(999), at(1000)), (Some(Action::Allow), Some(Action::Deny)));
        assert!(fixed.denies("192.0.2.7".parse().unwrap()), "it ended long ago");
    }
}
