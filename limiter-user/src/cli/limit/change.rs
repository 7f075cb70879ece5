//! Which limits become what, and how to go back.

use std::{collections::BTreeSet, fmt};

use serde::Serialize;

use super::super::Usage;
use crate::{
    config::LimitKey,
    kernel::{KernelError, Pinned, ServiceRow},
    policy::Limits,
};

/// `KEY=VALUE`.
pub(super) fn parse_assignment(text: &str) -> Result<(LimitKey, u32), String> {
    let names = || LimitKey::ALL.map(LimitKey::name).join(", ");
    let (name, value) = text.split_once('=').ok_or("expected KEY=VALUE, such as connections_per_source=20")?;
    let key = LimitKey::ALL
        .into_iter()
        .find(|key| key.name() == name)
        .ok_or_else(|| format!("there is no limit {name:?}; there are {}", names()))?;
    let (least, greatest) = key.range();
    value
        .parse()
        .ok()
        .filter(|value| (least..=greatest).contains(value))
        .map(|value| (key, value))
        .ok_or_else(|| format!("{name}: found {value:?}, expected a whole number from {least} to {greatest}"))
}

/// The same, if no key is there twice.
pub(super) fn once_each(values: &[(LimitKey, u32)]) -> Result<Vec<(LimitKey, u32)>, Usage> {
    let mut seen = BTreeSet::new();
    match values.iter().find(|(key, _)| !seen.insert(*key)) {
        Some((key, _)) => Err(Usage(format!("{} is given twice", key.name()))),
        None => Ok(values.to_vec()),
    }
}

/// Where limits are in force.
pub(super) trait Store {
    /// Puts limits in force for the services of these indexes: all of them or none.
    fn set_limits(&self, limits: &[(u32, Limits)]) -> Result<(), KernelError>;
}

impl Store for Pinned {
    fn set_limits(&self, limits: &[(u32, Limits)]) -> Result<(), KernelError> {
        Self::set_limits(self, limits)
    }
}

/// The services that change, with the limits before and after.
#[derive(Debug)]
pub(super) struct Plan(Vec<Step>);

#[derive(Debug)]
struct Step {
    index: u32,
    service: String,
    old: Limits,
    new: Limits,
}

impl Plan {
    /// `service`: the name of the one that changes, or else all.
    pub(super) fn new(
        services: &[ServiceRow],
        service: Option<&str>,
        values: &[(LimitKey, u32)],
    ) -> Result<Self, Usage> {
        if let (Some(_), Some((key, _))) = (service, values.iter().find(|(key, _)| key.is_of_all_services())) {
            return Err(Usage(format!("{} is one number for all services: leave out --service", key.name())));
        }
        let steps: Vec<Step> = services
            .iter()
            .filter(|row| service.is_none_or(|name| row.name == name))
            .map(|row| {
                let mut new = row.limits;
                for &(key, value) in values {
                    // `parse_assignment` lets no other value through.
                    key.set(&mut new, value).ok_or_else(|| Usage(format!("{}={value} is out of range", key.name())))?;
                }
                if let Err((key, why)) = new.check() {
                    return Err(Usage(format!("{}: {key}: {why}", row.name)));
                }
                Ok(Step { index: row.index, service: row.name.clone(), old: row.limits, new })
            })
            .collect::<Result<_, Usage>>()?;
        if steps.is_empty() {
            let names: Vec<_> = services.iter().map(|row| row.name.as_str()).collect();
            let service = service.unwrap_or_default();
            return Err(Usage(format!("there is no service {service:?}; there are: {}", names.join(", "))));
        }
        Ok(Self(steps))
    }

    /// How many services change.
    pub(super) fn services(&self) -> usize {
        self.0.len()
    }

    /// Puts the new limits in force for all services, or leaves the old ones.
    pub(super) fn apply(&self, store: &impl Store) -> Result<(), KernelError> {
        let new: Vec<_> = self.0.iter().map(|step| (step.index, step.new)).collect();
        store.set_limits(&new)
    }

    /// Puts the old limits in force again, because of `error`, which it gives back.
    pub(super) fn undo(&self, store: &impl Store, error: anyhow::Error) -> anyhow::Error {
        let old: Vec<_> = self.0.iter().map(|step| (step.index, step.old)).collect();
        match store.set_limits(&old) {
            Ok(()) => error.context("nothing was changed"),
            Err(failed) => error.context(format!(
                "the new limits are in force and couldn't be taken back: {:#}",
                anyhow::Error::from(failed)
            )),
        }
    }

    /// What changes, key by key.
    pub(super) fn changes(&self, values: &[(LimitKey, u32)]) -> Vec<Change> {
        let of_step = |step: &Step| {
            let (service, old, new) = (step.service.clone(), step.old, step.new);
            values
                .iter()
                .map(move |&(key, _)| Change {
                    service: service.clone(),
                    key: key.name(),
                    old: key.get(&old),
                    new: key.get(&new),
                })
                .collect::<Vec<_>>()
        };
        self.0.iter().flat_map(of_step).collect()
    }
}

/// One limit of one service, before and after.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct Change {
    service: String,
    key: &'static str,
    old: u32,
    new: u32,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} {} → {}", self.service, self.key, self.old, self.new)
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, io};

    use super::*;
    use crate::kernel::{ChallengeRow, Counters};

    const FIVE: &[(LimitKey, u32)] = &[(LimitKey::ConnectionsPerSource, 5)];

    fn service(index: u32, name: &str) -> ServiceRow {
        ServiceRow {
            index,
            name: name.into(),
            ports: vec![8080],
            on_deny: "drop",
            limits: Limits::default(),
            challenge: ChallengeRow::default(),
            connections: 0,
            counters: Counters::default(),
        }
    }

    /// Keeps what was set, service and connections per source; or refuses it.
    #[derive(Default)]
    struct Fake {
        set: RefCell<Vec<(u32, u32)>>,
        broken: bool,
    }

    impl Store for Fake {
        fn set_limits(&self, limits: &[(u32, Limits)]) -> Result<(), KernelError> {
            if self.broken {
                return Err(KernelError::Failed { what: "can't write".into(), source: io::Error::other("no").into() });
            }
            self.set.replace(limits.iter().map(|(index, limits)| (*index, limits.connections_per_source)).collect());
            Ok(())
        }
    }

    #[test]
    fn assignments_are_checked() {
        assert_eq!(parse_assignment("connections_per_source=0"), Ok((LimitKey::ConnectionsPerSource, 0)));
        assert_eq!(parse_assignment("ipv6_prefix=48"), Ok((LimitKey::Ipv6Prefix, 48)));
        for (text, complaint) in [
            ("connections_per_source", "expected KEY=VALUE"),
            ("burst=1", "there is no limit \"burst\"; there are connections_per_source, connections_per_wide_source"),
            ("connections_total=-1", "found \"-1\", expected a whole number from 0 to 4294967295"),
            ("connections_total=", "found \"\""),
            ("ipv4_prefix=0", "from 1 to 32"),
            ("ipv4_prefix=33", "from 1 to 32"),
            ("ipv6_prefix=129", "from 1 to 128"),
            ("wide_ipv4_prefix=32", "from 0 to 31"),
            ("ipv6_prefix=64=64", "found \"64=64\""),
        ] {
            let error = parse_assignment(text).unwrap_err();
            assert!(error.contains(complaint), "{text}: {error}");
        }
        assert!(once_each(&[FIVE[0], FIVE[0]]).is_err());
    }

    #[test]
    fn all_services_change_or_the_named_one() {
        let services = [service(0, "a"), service(1, "b")];
        let store = Fake::default();
        Plan::new(&services, Some("b"), FIVE).unwrap().apply(&store).unwrap();
        assert_eq!(store.set.take(), [(1, 5)]);

        let plan = Plan::new(&services, None, FIVE).unwrap();
        plan.apply(&store).unwrap();
        assert_eq!(store.set.take(), [(0, 5), (1, 5)]);
        let lines: Vec<_> = plan.changes(FIVE).iter().map(ToString::to_string).collect();
        assert_eq!(lines, ["a: connections_per_source 20 → 5", "b: connections_per_source 20 → 5"]);

        let error = Plan::new(&services, Some("c"), FIVE).unwrap_err().to_string();
        assert_eq!(error, "there is no service \"c\"; there are: a, b");
    }

    #[test]
    fn limits_that_do_not_go_together_are_refused() {
        let refused = |service_name, values: &[(LimitKey, u32)]| {
            Plan::new(&[service(0, "a")], service_name, values).unwrap_err().to_string()
        };
        let error = refused(None, &[(LimitKey::ConnectionsPerWideSource, 9)]);
        assert!(error.starts_with("a: connections_per_wide_source: there is no wider source"), "{error}");
        let error = refused(None, &[(LimitKey::WideIpv4Prefix, 24), (LimitKey::Ipv4Prefix, 24)]);
        assert!(error.starts_with("a: wide_ipv4_prefix: a wider source has a shorter prefix"), "{error}");
        let error = refused(Some("a"), &[(LimitKey::ConnectionsTotalAll, 9)]);
        assert_eq!(error, "connections_total_all is one number for all services: leave out --service");
        let both = [(LimitKey::WideIpv4Prefix, 24), (LimitKey::ConnectionsPerWideSource, 9)];
        assert!(Plan::new(&[service(0, "a")], None, &both).is_ok());
    }

    #[test]
    fn what_was_done_is_taken_back_or_it_is_said() {
        let plan = Plan::new(&[service(0, "a"), service(1, "b")], None, FIVE).unwrap();
        let store = Fake::default();
        plan.apply(&store).unwrap();
        let error = plan.undo(&store, anyhow::anyhow!("disk full"));
        assert_eq!(format!("{error:#}"), "nothing was changed: disk full");
        assert_eq!(store.set.take(), [(0, 20), (1, 20)]);

        let error = plan.undo(&Fake { broken: true, ..Fake::default() }, anyhow::anyhow!("disk full"));
        assert_eq!(
            format!("{error:#}"),
            "the new limits are in force and couldn't be taken back: can't write: no: disk full"
        );
    }
}
