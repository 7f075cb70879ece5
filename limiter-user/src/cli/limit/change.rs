//! Which settings become what, and how to go back.

use std::{collections::BTreeSet, fmt};

use clap::ValueEnum as _;
use serde::Serialize;

use super::super::Usage;
use crate::{
    config::{OnDeny, Setting},
    kernel::{KernelError, Pinned, ServiceRow},
    policy::Limits,
};

/// The same settings, if no key is there twice.
pub(super) fn once_each(settings: &[Setting]) -> Result<Vec<Setting>, Usage> {
    let mut seen = BTreeSet::new();
    match settings.iter().find(|setting| !seen.insert(setting.name())) {
        Some(setting) => Err(Usage(format!("{} is given twice", setting.name()))),
        None => Ok(settings.to_vec()),
    }
}

/// Where settings are in force.
pub(super) trait Store {
    /// Puts these in force for the services of these indexes: all of them or none.
    fn set_limits(&self, limits: &[(u32, Limits, OnDeny)]) -> Result<(), KernelError>;
}

impl Store for Pinned {
    fn set_limits(&self, limits: &[(u32, Limits, OnDeny)]) -> Result<(), KernelError> {
        Self::set_limits(self, limits)
    }
}

/// The services that change, with what holds before and after.
#[derive(Debug)]
pub(super) struct Plan(Vec<Step>);

#[derive(Debug)]
struct Step {
    index: u32,
    service: String,
    old: (Limits, OnDeny),
    new: (Limits, OnDeny),
}

impl Plan {
    /// `service`: the name of the one that changes, or else all.
    pub(super) fn new(services: &[ServiceRow], service: Option<&str>, settings: &[Setting]) -> Result<Self, Usage> {
        if let (Some(_), Some(setting)) = (service, settings.iter().find(|setting| setting.is_of_all_services())) {
            return Err(Usage(format!("{} is one number for all services: leave out --service", setting.name())));
        }
        let steps: Vec<Step> = services
            .iter()
            .filter(|row| service.is_none_or(|name| row.name == name))
            .map(|row| {
                let old = (row.limits, on_deny(row));
                let (mut limits, mut on_deny) = old;
                for &setting in settings {
                    match setting {
                        // `Setting::parse` lets no other value through.
                        Setting::Limit(key, value) => key
                            .set(&mut limits, value)
                            .ok_or_else(|| Usage(format!("{}={value} is out of range", key.name())))?,
                        Setting::OnDeny(value) => on_deny = value,
                    }
                }
                if let Err((key, why)) = limits.check() {
                    return Err(Usage(format!("{}: {key}: {why}", row.name)));
                }
                Ok(Step { index: row.index, service: row.name.clone(), old, new: (limits, on_deny) })
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
        let new: Vec<_> = self.0.iter().map(|step| (step.index, step.new.0, step.new.1)).collect();
        store.set_limits(&new)
    }

    /// Puts the old limits in force again, because of `error`, which it gives back.
    pub(super) fn undo(&self, store: &impl Store, error: anyhow::Error) -> anyhow::Error {
        let old: Vec<_> = self.0.iter().map(|step| (step.index, step.old.0, step.old.1)).collect();
        match store.set_limits(&old) {
            Ok(()) => error.context("nothing was changed"),
            Err(failed) => error.context(format!(
                "the new limits are in force and couldn't be taken back: {:#}",
                anyhow::Error::from(failed)
            )),
        }
    }

    /// What changes, key by key.
    pub(super) fn changes(&self, settings: &[Setting]) -> Vec<Change> {
        let of_step = |step: &Step| {
            let of_setting = |setting: &Setting| Change {
                service: step.service.clone(),
                key: setting.name(),
                old: Held::of(*setting, &step.old),
                new: Held::of(*setting, &step.new),
            };
            settings.iter().map(of_setting).collect::<Vec<_>>()
        };
        self.0.iter().flat_map(of_step).collect()
    }
}

/// What the refused SYNs of a service get. The name comes from [`OnDeny::name`].
fn on_deny(row: &ServiceRow) -> OnDeny {
    OnDeny::from_str(row.on_deny, false).unwrap_or(OnDeny::Drop)
}

/// One setting of one service, before and after.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct Change {
    service: String,
    key: &'static str,
    old: Held,
    new: Held,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} {} → {}", self.service, self.key, self.old, self.new)
    }
}

/// A value that a service has.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
enum Held {
    Number(u32),
    Name(&'static str),
}

impl Held {
    fn of(setting: Setting, (limits, on_deny): &(Limits, OnDeny)) -> Self {
        match setting {
            Setting::Limit(key, _) => Self::Number(key.get(limits)),
            Setting::OnDeny(_) => Self::Name(on_deny.name()),
        }
    }
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => number.fmt(f),
            Self::Name(name) => name.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, io};

    use super::*;
    use crate::{
        config::LimitKey,
        kernel::{ChallengeRow, Counters},
    };

    const FIVE: &[Setting] = &[Setting::Limit(LimitKey::ConnectionsPerSource, 5)];
    const OBSERVE: Setting = Setting::OnDeny(OnDeny::Observe);

    fn service(index: u32, name: &str) -> ServiceRow {
        ServiceRow {
            index,
            name: name.into(),
            ports: vec![8080],
            socket_ports: vec![8080],
            namespaces: "host",
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
        on_deny: RefCell<Vec<OnDeny>>,
        broken: bool,
    }

    impl Store for Fake {
        fn set_limits(&self, limits: &[(u32, Limits, OnDeny)]) -> Result<(), KernelError> {
            if self.broken {
                return Err(KernelError::Failed { what: "can't write".into(), source: io::Error::other("no").into() });
            }
            self.set.replace(limits.iter().map(|(index, limits, _)| (*index, limits.connections_per_source)).collect());
            self.on_deny.replace(limits.iter().map(|(_, _, on_deny)| *on_deny).collect());
            Ok(())
        }
    }

    #[test]
    fn a_key_is_given_once() {
        assert!(once_each(&[FIVE[0], FIVE[0]]).is_err());
        assert!(once_each(&[OBSERVE, Setting::OnDeny(OnDeny::Drop)]).is_err());
        assert!(once_each(&[FIVE[0], OBSERVE]).is_ok());
    }

    #[test]
    fn what_a_refused_syn_gets_changes_with_the_limits_and_goes_back_with_them() {
        let services = [service(0, "a"), service(1, "b")];
        let store = Fake::default();
        let plan = Plan::new(&services, Some("b"), &[OBSERVE, FIVE[0]]).unwrap();
        plan.apply(&store).unwrap();
        assert_eq!(store.on_deny.take(), [OnDeny::Observe]);
        assert_eq!(store.set.take(), [(1, 5)]);
        let lines: Vec<_> = plan.changes(&[OBSERVE, FIVE[0]]).iter().map(ToString::to_string).collect();
        assert_eq!(lines, ["b: on_deny drop → observe", "b: connections_per_source 20 → 5"]);
        let document = serde_json::to_value(plan.changes(&[OBSERVE])).unwrap();
        assert_eq!(document[0]["new"], "observe");
        plan.undo(&store, anyhow::anyhow!("disk full"));
        assert_eq!(store.on_deny.take(), [OnDeny::Drop]);
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
        let refused = |service_name, values: &[Setting]| {
            Plan::new(&[service(0, "a")], service_name, values).unwrap_err().to_string()
        };
        let error = refused(None, &[Setting::Limit(LimitKey::ConnectionsPerWideSource, 9)]);
        assert!(error.starts_with("a: connections_per_wide_source: there is no wider source"), "{error}");
        let error =
            refused(None, &[Setting::Limit(LimitKey::WideIpv4Prefix, 24), Setting::Limit(LimitKey::Ipv4Prefix, 24)]);
        assert!(error.starts_with("a: wide_ipv4_prefix: a wider source has a shorter prefix"), "{error}");
        let error = refused(Some("a"), &[Setting::Limit(LimitKey::ConnectionsTotalAll, 9)]);
        assert_eq!(error, "connections_total_all is one number for all services: leave out --service");
        let both =
            [Setting::Limit(LimitKey::WideIpv4Prefix, 24), Setting::Limit(LimitKey::ConnectionsPerWideSource, 9)];
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
