//! The maps as typed methods: those of connections and of who has them. (Of the services: [`super::services`].)

use std::{collections::HashMap as StdHashMap, fmt, path::Path};

use aya::maps::{Array, HashMap, Map, MapData, MapError};
use limiter_common::{
    ConnectionKey, Endpoints, LedgerEntry, SourceEntry, SourceKey, TagSecret, abi, audit::AuditReport, source::is_gone,
    user::Member,
};

use super::{KernelError, host, pins::Pins};

/// The ledger, to look at. Only kernel programs write to it.
pub struct Ledger {
    entries: HashMap<MapData, ConnectionKey, LedgerEntry>,
    secret: TagSecret,
    members: HashMap<MapData, u64, Member>,
}

impl fmt::Debug for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ledger").finish_non_exhaustive()
    }
}

impl Ledger {
    /// Opens the pinned maps.
    pub fn open(pins: &Pins) -> Result<Self, KernelError> {
        let secret: Array<_, TagSecret> = open(&pins.map(abi::MAP_TAG_SECRET), Map::Array)?;
        Ok(Self {
            entries: open(&pins.map(abi::MAP_LEDGER), Map::HashMap)?,
            secret: secret.get(&0, 0).map_err(KernelError::failed("can't read the ledger's secret"))?,
            members: open(&pins.map(abi::MAP_MEMBERS), Map::HashMap)?,
        })
    }

    /// The entry of a connection, if there is one; its source is the user's if it counts against one.
    pub fn get(&self, connection: &Endpoints) -> Result<Option<LedgerEntry>, KernelError> {
        let entry = there(self.entries.get(&connection.key(&self.secret), 0), "can't read the ledger")?;
        // The key has but a tag of IPv6 addresses.
        let Some(mut entry) = entry.filter(|entry| entry.is_of(connection)) else { return Ok(None) };
        if let Some(member) = there(self.members.get(&entry.owner, 0), MEMBERS_UNREADABLE)? {
            entry.source = member.source;
        }
        Ok(Some(entry))
    }

    /// The names of the users that connections count against.
    pub fn users(&self) -> Result<StdHashMap<SourceKey, String>, KernelError> {
        let members = collect(self.members.keys(), |cookie| self.members.get(cookie, 0), MEMBERS_UNREADABLE)?;
        Ok(members.into_iter().map(|(_, member)| (member.source, member.name.to_string_lossy())).collect())
    }

    /// The same of every entry there is, with the ends of its connection; entries that come and go meanwhile may or may not be among
    /// them.
    pub fn entries(&self) -> Result<Vec<(Endpoints, LedgerEntry)>, KernelError> {
        let entries = collect(self.entries.keys(), |key| self.entries.get(key, 0), "can't read the ledger")?;
        let members = collect(self.members.keys(), |cookie| self.members.get(cookie, 0), MEMBERS_UNREADABLE)?;
        let members: StdHashMap<u64, SourceKey> =
            members.into_iter().map(|(cookie, member)| (cookie, member.source)).collect();
        let counted = |entry: LedgerEntry| LedgerEntry {
            source: members.get(&entry.owner).copied().unwrap_or(entry.source),
            ..entry
        };
        Ok(entries.into_iter().map(|(key, entry)| (entry.ends(&key), counted(entry))).collect())
    }
}

/// The sources, to look at. Only kernel programs write to them.
pub struct Sources(HashMap<MapData, SourceKey, SourceEntry>);

impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sources").finish_non_exhaustive()
    }
}

impl Sources {
    /// Opens the pinned map.
    pub fn open(pins: &Pins) -> Result<Self, KernelError> {
        open(&pins.map(abi::MAP_SOURCES), Map::HashMap).map(Self)
    }

    /// How many connections a source holds.
    pub fn held(&self, source: &SourceKey) -> Result<u64, KernelError> {
        let entry = there(self.0.get(source, 0), "can't read the sources")?;
        Ok(entry.map_or(0, |entry| if is_gone(entry.connections) { 0 } else { entry.connections }))
    }

    /// Every source there is; those that come and go meanwhile may or may not be among them.
    pub fn entries(&self) -> Result<Vec<(SourceKey, SourceEntry)>, KernelError> {
        collect(self.0.keys(), |key| self.0.get(key, 0), "can't read the sources")
    }
}

/// The buckets of new connections, to look at.
pub struct Rates(HashMap<MapData, SourceKey, u64>);

impl fmt::Debug for Rates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rates").finish_non_exhaustive()
    }
}

impl Rates {
    /// Opens the pinned map.
    pub fn open(pins: &Pins) -> Result<Self, KernelError> {
        open(&pins.map(abi::MAP_RATES), Map::LruHashMap).map(Self)
    }

    /// The word of a source's bucket; that of a full one if it has none.
    pub fn word(&self, source: &SourceKey) -> Result<u64, KernelError> {
        Ok(there(self.0.get(source, 0), "can't read how fast a source opens connections")?.unwrap_or(0))
    }
}

/// What the last audit found of each service.
pub struct Audits(Array<MapData, AuditReport>);

impl fmt::Debug for Audits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Audits").finish_non_exhaustive()
    }
}

impl Audits {
    /// Opens the pinned map.
    pub fn open(pins: &Pins) -> Result<Self, KernelError> {
        open(&pins.map(abi::MAP_AUDIT), Map::Array).map(Self)
    }

    /// What was found of the service of that index; `None` if it was never looked at.
    pub fn get(&self, service: u32) -> Result<Option<AuditReport>, KernelError> {
        let report = self.0.get(&service, 0).map_err(KernelError::failed("can't read what the audit found"))?;
        Ok((report.audited_ns != 0).then_some(report))
    }

    /// Leaves the drift of each service, found now.
    pub(super) fn set(&mut self, drift: &StdHashMap<u32, u64>) -> Result<(), KernelError> {
        let audited_ns = u64::try_from(host::monotonic().as_nanos()).unwrap_or(u64::MAX);
        for (&service, &drift) in drift {
            self.0
                .set(service, AuditReport { audited_ns, drift }, 0)
                .map_err(KernelError::failed("can't leave what the audit found"))?;
        }
        Ok(())
    }
}

/// What to say where it can't be read.
const MEMBERS_UNREADABLE: &str = "can't read which connections count against users";

/// A value, or `None` if there is nothing under its key.
fn there<V>(value: Result<V, MapError>, what: &str) -> Result<Option<V>, KernelError> {
    match value {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(error) => Err(KernelError::failed(what)(error)),
    }
}

/// Reads the value of each key. A key that is gone by then is left out, and so is one that comes twice: the kernel starts
/// over when the key it stands at is removed.
fn collect<K: Copy + Eq + std::hash::Hash, V>(
    keys: impl Iterator<Item = Result<K, MapError>>,
    get: impl Fn(&K) -> Result<V, MapError>,
    what: &str,
) -> Result<Vec<(K, V)>, KernelError> {
    let mut seen = std::collections::HashSet::new();
    let mut entries = Vec::new();
    for key in keys {
        let key = key.map_err(KernelError::failed(what))?;
        if !seen.insert(key) {
            continue;
        }
        if let Some(value) = there(get(&key), what)? {
            entries.push((key, value));
        }
    }
    Ok(entries)
}

/// Opens a pinned map as one of aya's types.
pub(super) fn open<M>(path: &Path, kind: impl FnOnce(MapData) -> Map) -> Result<M, KernelError>
where
    M: TryFrom<Map, Error = MapError>,
{
    let what = format!("can't open the map pinned at {}", path.display());
    let data = MapData::from_pin(path).map_err(KernelError::failed(what.clone()))?;
    M::try_from(kind(data)).map_err(KernelError::failed(what))
}
