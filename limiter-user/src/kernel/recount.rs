//! Counts the ledger's entries anew, and says by how much the counts that the programs keep differ.

use std::{collections::HashMap, thread, time::Duration};

use limiter_common::{
    Counter, LedgerEntry, SourceKey, abi,
    policy::ServiceState,
    source::{NARROW, WIDE, is_gone},
};

use super::{
    Counters, KernelError,
    maps::{Ledger, Sources},
    services::Services,
};

/// How often a difference must show before it is believed, and how long to wait in between: for a moment, a connection
/// that comes or goes is in one map and not in the other.
const LOOKS: usize = 3;
const PAUSE: Duration = Duration::from_millis(20);

/// What changes the number of a service's entries.
const CHANGES: [Counter; 8] = [
    Counter::OpenedReserved,
    Counter::OpenedUnseen,
    Counter::OpenedAdopted,
    Counter::OpenedAudit,
    Counter::ClosedSocket,
    Counter::ClosedGateway,
    Counter::ClosedExpired,
    Counter::ClosedAudit,
];

/// The drift of each service, by its index.
pub(super) fn drift(services: &Services, ledger: &Ledger, sources: &Sources) -> Result<HashMap<u32, u64>, KernelError> {
    let mut drift = look(services, ledger, sources)?;
    for _ in 1..LOOKS {
        if drift.values().all(|&drift| drift == 0) {
            break;
        }
        thread::sleep(PAUSE);
        let again = look(services, ledger, sources)?;
        for (service, drift) in &mut drift {
            *drift = (*drift).min(again.get(service).copied().unwrap_or(0));
        }
    }
    Ok(drift)
}

fn look(services: &Services, ledger: &Ledger, sources: &Sources) -> Result<HashMap<u32, u64>, KernelError> {
    let indexes: Vec<u32> = services.all()?.into_iter().map(|(index, _)| index).collect();
    let changes = || -> Result<Vec<u64>, KernelError> {
        indexes.iter().map(|&index| Ok(changes(&services.counters(index)?))).collect()
    };
    let before = changes()?;
    let entries = ledger.entries()?;
    let counted = sources.entries()?;
    let states = indexes.iter().map(|&index| services.state(index)).collect::<Result<Vec<_>, _>>()?;
    let after = changes()?;

    let counted: HashMap<SourceKey, u64> = counted
        .into_iter()
        .filter(|(_, entry)| !is_gone(entry.connections))
        .map(|(key, entry)| (key, entry.connections))
        .collect();
    let by_source = by_source(entries.iter().map(|(_, entry)| entry));
    let entries = entries.len() as u64;
    let meanwhile: u64 = before.iter().zip(&after).map(|(before, after)| after.saturating_sub(*before)).sum();
    let over_all = entries.abs_diff(services.state(abi::ALL_SERVICES)?.connections).saturating_sub(meanwhile);
    let mut drift: HashMap<u32, u64> = indexes
        .iter()
        .zip(before.iter().zip(&after))
        .zip(&states)
        .map(|((&index, (before, after)), state)| {
            (index, difference(index, &by_source, &counted, state, after.saturating_sub(*before)))
        })
        .collect();
    // What all services hold together is the first one's to tell.
    if let Some(first) = indexes.first() {
        *drift.entry(*first).or_default() += over_all;
    }
    Ok(drift)
}

fn changes(counters: &Counters) -> u64 {
    let entries: u64 = CHANGES.iter().map(|&counter| counters.get(counter)).sum();
    // Which takes one from a source and gives it to another.
    entries + 2 * counters.get(Counter::CountedForUser)
}

fn by_source<'a>(entries: impl Iterator<Item = &'a LedgerEntry>) -> HashMap<SourceKey, u64> {
    let mut sources = HashMap::new();
    for entry in entries {
        for source in [Some(entry.source), entry.wide_source()].into_iter().flatten() {
            *sources.entry(source).or_default() += 1;
        }
    }
    sources
}

/// By how much one service's counts differ from its entries, but for `changes`: each entry that came or went while these
/// were read explains a difference of one in each count.
fn difference(
    service: u32,
    entries: &HashMap<SourceKey, u64>,
    counted: &HashMap<SourceKey, u64>,
    state: &ServiceState,
    changes: u64,
) -> u64 {
    let of_service = |map: &HashMap<SourceKey, u64>| -> HashMap<SourceKey, u64> {
        map.iter().filter(|(key, _)| u32::from(key.service) == service).map(|(key, count)| (*key, *count)).collect()
    };
    let (entries, counted) = (of_service(entries), of_service(counted));
    let of_tier = |tier: u8| -> u64 {
        let all = entries.keys().chain(counted.keys().filter(|key| !entries.contains_key(key)));
        let count = |map: &HashMap<SourceKey, u64>, key| map.get(key).copied().unwrap_or(0);
        all.filter(|key| key.tier == tier).map(|key| count(&entries, key).abs_diff(count(&counted, key))).sum()
    };
    // Each entry is in one source, and in one of the wider tier at most.
    let held: u64 = entries.iter().filter(|(key, _)| key.tier == NARROW).map(|(_, count)| count).sum();
    let differences = [of_tier(NARROW), of_tier(WIDE), held.abs_diff(state.connections)];
    differences.map(|difference| difference.saturating_sub(changes)).iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(last: u8, service: u16) -> SourceKey {
        SourceKey::new(service, &std::net::IpAddr::from([192, 0, 2, last]).into(), 32, 64)
    }

    #[test]
    fn counts_that_agree_have_no_drift() {
        let counts = HashMap::from([(source(1, 0), 2), (source(2, 0), 1), (source(1, 1), 9)]);
        let state = ServiceState { connections: 3, ..ServiceState::default() };
        assert_eq!(difference(0, &counts, &counts, &state, 0), 0);
    }

    #[test]
    fn each_count_that_is_off_shows_and_what_changed_meanwhile_explains_it() {
        let entries = HashMap::from([(source(1, 0), 2), (source(2, 0), 1)]);
        let state = ServiceState { connections: 3, ..ServiceState::default() };
        // One too many, one that has no entry, one that is missing.
        let counted = HashMap::from([(source(1, 0), 3), (source(3, 0), 1)]);
        assert_eq!(difference(0, &entries, &counted, &state, 0), 3);
        assert_eq!(difference(0, &entries, &counted, &state, 2), 1);
        assert_eq!(difference(0, &entries, &counted, &state, 3), 0);
        let state = ServiceState { connections: 7, ..ServiceState::default() };
        assert_eq!(difference(0, &entries, &entries, &state, 0), 4);
    }

    #[test]
    fn a_wider_source_is_counted_beside_the_narrow_one() {
        let wide = SourceKey::wide(0, &std::net::IpAddr::from([192, 0, 2, 1]).into(), 24);
        let entries = HashMap::from([(source(1, 0), 2), (source(2, 0), 1), (wide, 3)]);
        let state = ServiceState { connections: 3, ..ServiceState::default() };
        assert_eq!(difference(0, &entries, &entries, &state, 0), 0);
        let counted = HashMap::from([(source(1, 0), 2), (source(2, 0), 1), (wide, 5)]);
        assert_eq!(difference(0, &entries, &counted, &state, 0), 2);
    }
}
