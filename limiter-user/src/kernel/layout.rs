//! Whether what is pinned is what this version would pin.
//!
//! aya opens an existing pin and believes what the object file says of it, not the kernel. With another size of key or
//! value, reading would overrun a buffer; so each pinned map is compared before it is used. The version in the pin path
//! should make a difference impossible; this is for the day when somebody forgot to raise it.

use std::{io, mem};

use aya::maps::{MapData, MapType};
use limiter_common::{
    ConnectionKey, LedgerEntry, ServicePolicy, SourceEntry, SourceKey, TagSecret, abi,
    audit::AuditReport,
    challenge::Challenge,
    ledger::Reservation,
    policy::{InForce, ServiceState},
    rule::{RuleEntry, RuleKey},
    user::Member,
};

use super::{KernelError, pins::Pins};

struct Shape {
    name: &'static str,
    kind: MapType,
    key_bytes: usize,
    value_bytes: usize,
    /// `None`: as configured when it was made.
    max_entries: Option<u32>,
}

const fn shape<K, V>(name: &'static str, kind: MapType, max_entries: Option<u32>) -> Shape {
    Shape { name, kind, key_bytes: mem::size_of::<K>(), value_bytes: mem::size_of::<V>(), max_entries }
}

const SHAPES: [Shape; abi::PINNED_MAPS.len()] = [
    shape::<ConnectionKey, LedgerEntry>(abi::MAP_LEDGER, MapType::Hash, None),
    shape::<SourceKey, SourceEntry>(abi::MAP_SOURCES, MapType::Hash, None),
    shape::<u32, u32>(abi::MAP_PORTS, MapType::Array, Some(65_536)),
    shape::<u32, u64>(abi::MAP_SOCKET_PORTS, MapType::Array, Some(65_536)),
    shape::<u32, ServicePolicy>(abi::MAP_SERVICES, MapType::Array, Some(2 * abi::MAX_SERVICES)),
    shape::<u32, ServiceState>(abi::MAP_SERVICE_STATE, MapType::Array, Some(abi::MAX_SERVICES + 1)),
    shape::<u32, u64>(abi::MAP_COUNTERS, MapType::PerCpuArray, Some(abi::MAX_SERVICES * abi::COUNTERS_PER_SERVICE)),
    shape::<(), ()>(abi::MAP_EVENTS, MapType::RingBuf, Some(abi::EVENTS_BYTES)),
    shape::<(), Reservation>(abi::MAP_RESERVATIONS, MapType::Queue, Some(abi::MAX_RESERVATIONS)),
    shape::<SourceKey, u64>(abi::MAP_RATES, MapType::LruHash, Some(abi::MAX_RATES)),
    shape::<RuleKey, RuleEntry>(abi::MAP_RULES[0], MapType::LpmTrie, None),
    shape::<RuleKey, RuleEntry>(abi::MAP_RULES[1], MapType::LpmTrie, None),
    shape::<u32, AuditReport>(abi::MAP_AUDIT, MapType::Array, Some(abi::MAX_SERVICES)),
    shape::<u32, InForce>(abi::MAP_IN_FORCE, MapType::Array, Some(1)),
    shape::<u32, TagSecret>(abi::MAP_TAG_SECRET, MapType::Array, Some(1)),
    shape::<u64, Member>(abi::MAP_MEMBERS, MapType::Hash, None),
    shape::<u32, Challenge>(abi::MAP_CHALLENGES, MapType::Array, Some(abi::MAX_SERVICES)),
    shape::<u32, u64>(abi::MAP_FLOWS, MapType::Array, Some(abi::FLOW_SLOTS)),
];

/// What the maps have room for that are made as configured.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sizes {
    /// Connections in the ledger.
    pub ledger: u32,
    /// Rules.
    pub rules: u32,
}

/// Checks every pinned map.
pub fn check(pins: &Pins) -> Result<Sizes, KernelError> {
    let mut sizes = Sizes::default();
    for shape in &SHAPES {
        let path = pins.map(shape.name);
        let info = match MapData::from_pin(&path).and_then(|map| map.info()) {
            Ok(info) => info,
            Err(error) => {
                if !path.exists() {
                    return Err(different(pins, format!("{} is missing", shape.name)));
                }
                return Err(KernelError::failed(format!("can't open the map pinned at {}", path.display()))(error));
            }
        };
        let kind = info.map_type().map_err(KernelError::failed("can't tell the type of a pinned map"))?;
        let found = (kind, info.key_size() as usize, info.value_size() as usize);
        let meant = (shape.kind, shape.key_bytes, shape.value_bytes);
        if found != meant || shape.max_entries.is_some_and(|entries| entries != info.max_entries()) {
            return Err(different(
                pins,
                format!(
                    "{} is a {:?} of {} entries with keys of {} and values of {} bytes",
                    shape.name,
                    found.0,
                    info.max_entries(),
                    found.1,
                    found.2,
                ),
            ));
        }
        if shape.name == abi::MAP_LEDGER {
            sizes.ledger = info.max_entries();
        } else if shape.name == abi::MAP_RULES[0] {
            sizes.rules = info.max_entries();
        }
    }
    Ok(sizes)
}

/// That there is nothing of another version under the pin path.
pub fn check_version(pins: &Pins) -> Result<(), KernelError> {
    let others = match pins.other_versions() {
        Ok(others) => others,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(KernelError::failed(format!("can't list {}", pins.root().display()))(error)),
    };
    if others.is_empty() {
        return Ok(());
    }
    Err(different(pins, format!("it is {}, this version's is v{}", others.join(", "), abi::ABI_VERSION)))
}

fn different(pins: &Pins, difference: String) -> KernelError {
    KernelError::Layout { pin_path: pins.root().to_owned(), difference }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pinned_map_has_a_shape() {
        let names: Vec<_> = SHAPES.iter().map(|shape| shape.name).collect();
        assert_eq!(names, abi::PINNED_MAPS);
    }
}
