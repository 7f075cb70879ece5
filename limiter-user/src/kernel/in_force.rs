//! Putting a configuration in force: its services, their ports and its rules, in one step.

use limiter_common::abi;

use super::{KernelError, change::Change, maps::ServiceEntry, pins::Pins};
use crate::{
    config::{OnFull, Service},
    policy::Rule,
};

/// Puts services and the rules of the file in force, and takes away what is not among them, but for the rules of commands.
/// Returns the services with their indexes.
pub fn put(
    pins: &Pins,
    services: &[Service],
    rules: &[Rule],
    on_full: OnFull,
) -> Result<Vec<(u32, Service)>, KernelError> {
    let mut change = Change::begin(pins)?;
    let placed = place(&change.services()?, services)?;
    let entry = |service: &Service| ServiceEntry {
        name: service.name.clone(),
        limits: service.limits,
        on_deny: service.on_deny,
        on_full,
    };
    let entries: Vec<_> = placed.iter().map(|(index, service)| (*index, entry(service))).collect();
    let ports: Vec<_> =
        placed.iter().flat_map(|(index, service)| service.ports.iter().map(|port| (*port, *index))).collect();
    change.set_services(&entries)?;
    change.set_ports(&ports)?;
    change.set_rules_of_file(rules)?;
    change.commit()?;
    Ok(placed)
}

/// The index of each service. One keeps its index as long as it keeps its name, because open connections are counted by
/// it; for the same reason none gets that of another that has just gone.
fn place(known: &[(u32, ServiceEntry)], services: &[Service]) -> Result<Vec<(u32, Service)>, KernelError> {
    let mut taken: Vec<u32> = known.iter().map(|(index, _)| *index).collect();
    services
        .iter()
        .map(|service| {
            let index = match known.iter().find(|(_, entry)| entry.name == service.name) {
                Some((index, _)) => *index,
                None => (0..abi::MAX_SERVICES)
                    .find(|index| !taken.contains(index))
                    .ok_or(KernelError::TooManyServices { count: taken.len() + 1 })?,
            };
            taken.push(index);
            Ok((index, service.clone()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::OnDeny, policy::Limits};

    fn service(name: &str) -> Service {
        Service { name: name.into(), ports: vec![1], limits: Limits::default(), on_deny: OnDeny::Drop }
    }

    fn known(index: u32, name: &str) -> (u32, ServiceEntry) {
        let service = service(name);
        let entry = ServiceEntry {
            name: service.name,
            limits: service.limits,
            on_deny: service.on_deny,
            on_full: OnFull::Open,
        };
        (index, entry)
    }

    fn indexes(known: &[(u32, ServiceEntry)], names: &[&str]) -> Option<Vec<u32>> {
        let services: Vec<Service> = names.iter().map(|name| service(name)).collect();
        place(known, &services).ok().map(|placed| placed.into_iter().map(|(index, _)| index).collect())
    }

    #[test]
    fn a_service_keeps_its_index_and_a_new_one_gets_none_that_was_used() {
        let known = [known(0, "chat"), known(1, "game")];
        assert_eq!(indexes(&known, &["game", "feed", "chat"]), Some(vec![1, 2, 0]));
        assert_eq!(indexes(&known, &["feed", "relay"]), Some(vec![2, 3]));
        assert_eq!(indexes(&[], &["feed", "relay"]), Some(vec![0, 1]));
    }

    #[test]
    fn where_every_index_is_taken_nothing_is_placed() {
        let known: Vec<_> = (0..abi::MAX_SERVICES).map(|index| known(index, &format!("s{index}"))).collect();
        assert_eq!(indexes(&known, &["s3"]), Some(vec![3]));
        assert_eq!(indexes(&known, &["another"]), None);
    }
}
