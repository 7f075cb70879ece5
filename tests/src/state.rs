//! What limiter has pinned, opened to look at it and to spoil it: the faults that an audit is there for.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use aya::{
    Pod,
    maps::{Array, HashMap, Map, MapData, MapError},
};
use limiter_common::{
    ConnectionKey, Endpoints, LedgerEntry, ServicePolicy, SourceEntry, SourceKey, TagSecret, abi,
    audit::AuditReport,
    bucket::Rate,
    policy::{InForce, ServiceState},
    rule::{RuleEntry, RuleKey},
    source::SOURCE_GONE,
};

use crate::{bpf, limiter::Limiter, wait::eventually};

/// How long a look at every connection may take: a hundred thousand of them, without optimisation, on a busy host.
const AUDITED: Duration = Duration::from_mins(1);

/// The maps of the first service.
pub struct State {
    ledger: HashMap<MapData, ConnectionKey, LedgerEntry>,
    secret: TagSecret,
    sources: HashMap<MapData, SourceKey, SourceEntry>,
    service: Array<MapData, ServiceState>,
    audit: Array<MapData, AuditReport>,
    policy: Array<MapData, ServicePolicy>,
    /// Where the maps are pinned.
    root: PathBuf,
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State").finish_non_exhaustive()
    }
}

impl State {
    /// Opens what is pinned.
    pub fn open(limiter: &Limiter<'_>) -> Result<Self> {
        let root = limiter.pin_path().join(format!("v{}", abi::ABI_VERSION));
        Ok(Self {
            ledger: hash(&root.join(abi::MAP_LEDGER))?,
            secret: array(&root.join(abi::MAP_TAG_SECRET))?.get(&0, 0)?,
            sources: hash(&root.join(abi::MAP_SOURCES))?,
            service: array(&root.join(abi::MAP_SERVICE_STATE))?,
            audit: array(&root.join(abi::MAP_AUDIT))?,
            policy: array(&root.join(abi::MAP_SERVICES))?,
            root,
        })
    }

    /// Every entry of the ledger.
    pub fn entries(&self) -> Result<Vec<(ConnectionKey, LedgerEntry)>> {
        self.ledger.iter().map(|entry| entry.context("can't read the ledger")).collect()
    }

    /// How many connections the programs know to have an entry without looking it up.
    pub fn known_flows(&self) -> Result<usize> {
        let flows: Array<MapData, u64> = array(&self.root.join(abi::MAP_FLOWS))?;
        let known: Result<Vec<u64>, MapError> = flows.iter().filter(|flow| !matches!(flow, Ok(0))).collect();
        Ok(known.context("can't read the flows")?.len())
    }

    /// Makes an entry of those ports and counts it, as if its socket had been opened. Nobody else may change the counts
    /// meanwhile.
    pub fn enter(&mut self, entry: &LedgerEntry, remote_port: u16, local_port: u16) -> Result<()> {
        let ends = Endpoints { remote: entry.remote, local: entry.local, remote_port, local_port, netns: entry.netns };
        self.ledger.insert(ends.key(&self.secret), LedgerEntry { local_port, ..*entry }, 0)?;
        self.count(&entry.source, 1)
    }

    /// Takes an entry out and counts it no more, as if its socket had been closed. Nobody else may change the counts
    /// meanwhile.
    pub fn remove(&mut self, key: &ConnectionKey, entry: &LedgerEntry) -> Result<()> {
        self.ledger.remove(key)?;
        self.count(&entry.source, -1)
    }

    /// Adds to the count of a source that has connections, and leaves that of its service as it is.
    pub fn miscount(&mut self, source: &SourceKey, by: i64) -> Result<()> {
        let mut held = self.sources.get(source, 0).context("the source holds a connection")?;
        held.connections = held.connections.wrapping_add_signed(by);
        Ok(self.sources.insert(source, held, 0)?)
    }

    /// Has sources hold connections that are in no ledger, until there is room for no other source. Gives these sources.
    pub fn fill_sources(&mut self) -> Result<Vec<SourceKey>> {
        let mut made = Vec::new();
        for number in 1.. {
            let address = IpAddr::from(Ipv4Addr::from_bits(10 << 24 | number)).into();
            let key = SourceKey::new(0, &address, 32, 64);
            match self.sources.insert(key, SourceEntry { connections: 1, key, ..SourceEntry::default() }, 0) {
                Ok(()) => made.push(key),
                Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::E2BIG) => break,
                Err(error) => return Err(error).context("can't make a source"),
            }
        }
        Ok(made)
    }

    /// Has a source look as if another CPU were just taking it away, until it is [removed](Self::remove_sources).
    pub fn keep_busy(&mut self, source: SourceKey) -> Result<()> {
        let entry = SourceEntry { connections: SOURCE_GONE, key: source, ..SourceEntry::default() };
        Ok(self.sources.insert(source, entry, 0)?)
    }

    /// Takes sources away, whatever they hold.
    pub fn remove_sources(&mut self, sources: &[SourceKey]) -> Result<()> {
        sources.iter().try_for_each(|source| self.sources.remove(source)).context("can't take a source away")
    }

    /// Puts a rule in force for each of these addresses, where there is a rule already.
    pub fn fill_rules(&self, addresses: impl Iterator<Item = IpAddr>, rule: RuleEntry) -> Result<()> {
        let keys: Vec<RuleKey> = addresses.map(|address| RuleKey::of(address.into())).collect();
        let values = vec![RuleEntry { length: 128, ..rule }; keys.len()];
        let in_force: Array<MapData, u64> = array(&self.root.join(abi::MAP_IN_FORCE))?;
        let copy = InForce(in_force.get(&0, 0)?).rules();
        bpf::update_batch(&self.root.join(abi::MAP_RULES[usize::from(copy != 0)]), &keys, &values)
    }

    /// Gives every source a bucket of `burst` new connections that fills slower than any configuration can say.
    pub fn slow_down(&mut self, token: Duration, burst: u32) -> Result<()> {
        let token_ns = u64::try_from(token.as_nanos())?;
        // There are copies, of which one is in force.
        for index in 0..self.policy.len() {
            let mut policy = self.policy.get(&index, 0)?;
            policy.rate = Rate { token_ns, full_ns: token_ns * u64::from(burst) };
            self.policy.set(index, policy, 0)?;
        }
        Ok(())
    }

    fn count(&mut self, source: &SourceKey, by: i64) -> Result<()> {
        self.miscount(source, by)?;
        let mut state = self.service.get(&0, 0)?;
        state.connections = state.connections.wrapping_add_signed(by);
        Ok(self.service.set(0, state, 0)?)
    }

    /// Waits until the ledger was audited twice from beginning to end: that is what it takes to mend something.
    pub fn wait_audited(&self) -> Result<()> {
        // The first that ends may have begun before.
        for _ in 0..3 {
            let before = self.audit.get(&0, 0)?.audited_ns;
            eventually(AUDITED, "the ledger was audited", || Ok(self.audit.get(&0, 0)?.audited_ns != before))?;
        }
        Ok(())
    }
}

fn hash<K: Pod, V: Pod>(pin: &Path) -> Result<HashMap<MapData, K, V>> {
    Ok(HashMap::try_from(Map::HashMap(MapData::from_pin(pin)?))?)
}

fn array<V: Pod>(pin: &Path) -> Result<Array<MapData, V>> {
    Ok(Array::try_from(Map::Array(MapData::from_pin(pin)?))?)
}
