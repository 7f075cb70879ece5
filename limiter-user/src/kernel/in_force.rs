//! Which services are in force: their limits and their ports in the kernel's maps.

use limiter_common::abi;

use super::{
    KernelError,
    maps::{ServiceEntry, Services},
    pins::Pins,
};
use crate::config::{OnFull, Service};

/// Puts services in force, and takes those away that are not among them. Returns them with their indexes.
///
/// Writes limits first and ports last, so that no port ever leads to a service without limits.
pub fn put(pins: &Pins, services: &[Service], on_full: OnFull) -> Result<Vec<(u32, Service)>, KernelError> {
    let mut maps = Services::open(pins)?;
    let known = maps.all()?;
    let placed = place(&known, services)?;
    for (index, service) in &placed {
        let entry =
            ServiceEntry { name: service.name.clone(), limits: service.limits, on_deny: service.on_deny, on_full };
        maps.set(*index, &entry)?;
    }
    let wanted: Vec<(u16, u32)> =
        placed.iter().flat_map(|(index, service)| service.ports.iter().map(|port| (*port, *index))).collect();
    for (port, _) in maps.ports()? {
        if !wanted.iter().any(|(wanted, _)| *wanted == port) {
            maps.set_port(port, None)?;
        }
    }
    for (port, index) in wanted {
        maps.set_port(port, Some(index))?;
    }
    for (index, _) in known {
        if !placed.iter().any(|(placed, _)| *placed == index) {
            maps.clear(index)?;
        }
    }
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
