//! Putting a configuration in force: its services, their ports and its rules, in one step.

use std::collections::BTreeMap;

use limiter_common::{abi, policy::Port};

use super::{
    KernelError,
    change::Change,
    pins::Pins,
    services::{ServiceEntry, SocketPort},
};
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
        is_elsewhere: service.has_sockets_elsewhere(),
    };
    let entries: Vec<_> = placed.iter().map(|(index, service)| (*index, entry(service))).collect();
    change.set_services(&entries)?;
    change.set_ports(&ports(&placed))?;
    change.set_sockets(&sockets(&placed))?;
    change.set_rules_of_file(rules)?;
    change.commit()?;
    Ok(placed)
}

/// Each port of packets, and what the programs of admission need to know of it.
fn ports(services: &[(u32, Service)]) -> BTreeMap<u16, Port> {
    let port = |index: u32, service: &Service, port: u16| Port {
        service: small(index),
        is_not_here: !service.ports_here().contains(&port),
    };
    services
        .iter()
        .flat_map(|(index, service)| service.ports.iter().map(move |&number| (number, port(*index, service, number))))
        .collect()
}

/// The services of each port of sockets.
fn sockets(services: &[(u32, Service)]) -> BTreeMap<u16, SocketPort> {
    let mut sockets = BTreeMap::<u16, SocketPort>::new();
    for (index, service) in services {
        for &port in service.ports_here() {
            sockets.entry(port).or_default().own = Some(small(*index));
        }
        for &port in service.ports_elsewhere() {
            sockets.entry(port).or_default().others = Some(small(*index));
        }
    }
    sockets
}

/// Indexes are below `MAX_SERVICES`.
fn small(index: u32) -> u16 {
    u16::try_from(index).unwrap_or(u16::MAX)
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
    use crate::config::Namespaces;

    fn service(name: &str) -> Service {
        Service::new(name, [1])
    }

    fn known(index: u32, name: &str) -> (u32, ServiceEntry) {
        let service = service(name);
        let entry = ServiceEntry {
            name: service.name,
            limits: service.limits,
            on_deny: service.on_deny,
            on_full: OnFull::Open,
            is_elsewhere: false,
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
    fn ports_lead_to_sockets_here_elsewhere_or_both() {
        let here = Service::new("here", [80]);
        let redirected = Service { socket_ports: vec![8443, 444], ..Service::new("redirected", [443, 444]) };
        let contained = Service { namespaces: Namespaces::Others, ..Service::new("contained", [8080]) };
        let both = Service { namespaces: Namespaces::All, ..Service::new("both", [9000]) };
        let services: Vec<_> = (0..).zip([here, redirected, contained, both]).collect();
        let flags: Vec<_> =
            ports(&services).into_iter().map(|(number, port)| (number, port.service, port.is_not_here)).collect();
        let expected = [(80, 0, false), (443, 1, true), (444, 1, false), (8080, 2, true), (9000, 3, false)];
        assert_eq!(flags, expected);
        let sockets: Vec<_> =
            sockets(&services).into_iter().map(|(number, socket)| (number, socket.own, socket.others)).collect();
        let expected = [
            (80, Some(0), None),
            (444, Some(1), None),
            (8080, None, Some(2)),
            (8443, Some(1), None),
            (9000, Some(3), Some(3)),
        ];
        assert_eq!(sockets, expected);
    }

    #[test]
    fn where_every_index_is_taken_nothing_is_placed() {
        let known: Vec<_> = (0..abi::MAX_SERVICES).map(|index| known(index, &format!("s{index}"))).collect();
        assert_eq!(indexes(&known, &["s3"]), Some(vec![3]));
        assert_eq!(indexes(&known, &["another"]), None);
    }
}
