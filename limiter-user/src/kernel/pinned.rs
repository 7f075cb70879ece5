//! The pinned state, opened by name.

use std::{
    collections::{HashMap, HashSet},
    path::Path,
    time::Duration,
};

use limiter_common::{
    Netns, SourceKey, abi,
    ledger::is_reservation,
    source::{WIDE, is_gone},
};

use super::{
    AttachedInterface, ConnectionRow, Control, Delivery, EventLog, Exception, KernelError, REPAIRS, ServiceRow,
    SourceRow, Status,
    audit::no_list,
    challenge::{self, Challenges},
    change::Change,
    copies::Word,
    delivery, host, in_force,
    layout::{self, Sizes},
    maps::{Audits, Ledger, Sources},
    namespaces::Sockets,
    pins::Pins,
    placement::Pin,
    rules::{self, Rules},
    services::{ServiceEntry, Services, SocketPort},
    sysctl::{LeftChanged, SYNCOOKIES, TIMESTAMPS},
};
use crate::{
    config::{Namespaces, OnDeny, OnFull, Service},
    policy::{Cidr, Limits, Rule},
};

/// See [`Pinned::policy_mark`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PolicyMark(u64);

/// The state of an attached limiter, whether a daemon runs on it or not.
#[derive(Debug)]
pub struct Pinned {
    pins: Pins,
    sizes: Sizes,
    services: Services,
}

impl Pinned {
    /// Opens what is pinned at `pin_path`.
    ///
    /// # Errors
    ///
    /// [`KernelError::NotAttached`] if nothing is there, [`KernelError::Layout`] if it is of another version,
    /// [`KernelError::NoPrivilege`] without the right to look.
    pub fn open(pin_path: &Path) -> Result<Self, KernelError> {
        let pins = Pins::new(pin_path);
        host::require_privilege("look at what is attached")?;
        if !pins.exist() {
            layout::check_version(&pins)?;
            return Err(KernelError::NotAttached { pin_path: pin_path.to_owned() });
        }
        let sizes = layout::check(&pins)?;
        Ok(Self { services: Services::open(&pins)?, pins, sizes })
    }

    /// What is in force.
    pub fn status(&self) -> Result<Status, KernelError> {
        self.end_overdue(&self.services)?;
        let services = self.services()?;
        let maps = &self.services;
        let mut sources = 0;
        for service in &services {
            sources += maps.state(service.index)?.sources;
        }
        let mut drift = 0;
        let mut audited = None;
        let audits = Audits::open(&self.pins)?;
        for service in &services {
            if let Some(report) = audits.get(service.index)? {
                drift += report.drift;
                audited = audited.max(Some(report.audited_ns));
            }
        }
        Ok(Status {
            pin_path: self.pins.root().display().to_string(),
            abi: abi::ABI_VERSION,
            daemon: self.daemon(),
            accounting: "socket",
            counts_on_delivery: services
                .iter()
                .any(ServiceRow::has_sockets_elsewhere)
                .then(|| self.pins.delivery().exists()),
            interfaces: self.interfaces()?,
            syncookies_before: SYNCOOKIES.before(&self.pins),
            timestamps_before: TIMESTAMPS.before(&self.pins),
            ledger_entries: services.iter().map(|service| service.connections).sum(),
            ledger_size: self.sizes.ledger,
            rules_size: self.sizes.rules,
            rules_full: self.services.rules_full()?,
            repairs: services
                .iter()
                .flat_map(|service| REPAIRS.iter().map(|(counter, _)| service.counters.get(*counter)))
                .sum(),
            services,
            sources,
            headers_unreadable: self.services.headers_unreadable()?,
            audited: audited.map(|at| host::monotonic().saturating_sub(Duration::from_nanos(at))),
            drift,
        })
    }

    /// The interfaces that are attached.
    pub fn interfaces(&self) -> Result<Vec<AttachedInterface>, KernelError> {
        let pins = self
            .pins
            .placements()
            .map_err(KernelError::failed(format!("can't list {}", self.pins.links().display())))?;
        // An index means something else in another network namespace.
        let here = self.pins.netns(host::netns_cookie()?).is_dir();
        Ok(pins
            .into_iter()
            .map(|Pin { placement, .. }| AttachedInterface {
                name: here.then(|| host::interface_name(placement.interface)).flatten(),
                index: placement.interface,
                mode: placement.mode.name(),
                hook: placement.mode.hook(),
                why: placement.why.map(|why| why.to_string()),
            })
            .collect())
    }

    /// Services, in the order of their index.
    pub fn services(&self) -> Result<Vec<ServiceRow>, KernelError> {
        let maps = &self.services;
        let ports = maps.ports()?;
        let sockets = maps.sockets()?;
        let challenges = Challenges::open(&self.pins)?;
        maps.all()?
            .into_iter()
            .map(|(index, service)| {
                let counts = |service: Option<u16>| service.is_some_and(|service| u32::from(service) == index);
                let own = sockets.values().any(|socket| counts(socket.own));
                let others = sockets.values().any(|socket| counts(socket.others));
                let of_service = |socket: &SocketPort| counts(socket.own) || counts(socket.others);
                Ok(ServiceRow {
                    index,
                    socket_ports: sockets
                        .iter()
                        .filter(|(_, socket)| of_service(socket))
                        .map(|(port, _)| *port)
                        .collect(),
                    namespaces: match (own, others) {
                        (true, true) => Namespaces::All,
                        (false, true) => Namespaces::Others,
                        (_, false) => Namespaces::Host,
                    }
                    .name(),
                    ports: ports.iter().filter(|(_, owner)| *owner == index).map(|(port, _)| *port).collect(),
                    on_deny: service.on_deny.name(),
                    name: service.name,
                    limits: service.limits,
                    challenge: challenges.get(index)?,
                    connections: maps.state(index)?.connections,
                    counters: maps.counters(index)?,
                })
            })
            .collect()
    }

    /// Every source that holds a connection, those with most connections first.
    pub fn sources(&self) -> Result<Vec<SourceRow>, KernelError> {
        self.end_overdue(&self.services)?;
        let services = self.names()?;
        let mut sources = Sources::open(&self.pins)?.entries()?;
        sources.retain(|(_, entry)| entry.connections != 0 && !is_gone(entry.connections));
        sources.sort_by_key(|(key, entry)| (std::cmp::Reverse(entry.connections), key.service, key.to_string()));
        let rules = Rules::open(&self.pins)?;
        let users = Ledger::open(&self.pins)?.users()?;
        let all_rules = rules.all()?;
        sources
            .into_iter()
            .map(|(key, entry)| {
                if key.is_user() {
                    return Ok(SourceRow {
                        service: service_name(services.get(&u32::from(key.service)), &key),
                        source: source_name(&key, &users),
                        tier: "user",
                        connections: entry.connections,
                        limit: 0,
                        exceptions: Vec::new(),
                    });
                }
                let service = services.get(&u32::from(key.service));
                let limit = |rule: Option<&Rule>| {
                    service.map_or(0, |service| limit_of_tier(key.tier, &rules::with_rule(service.limits, rule)))
                };
                let network = Cidr::new(key.address.into(), key.prefix);
                let around = network.and_then(|network| rules::around(&all_rules, network));
                let usual = limit(around.map(|rule| &rule.rule));
                let within = network.map_or(&[][..], |network| rules::within(&all_rules, network));
                Ok(SourceRow {
                    service: service_name(service, &key),
                    source: key.to_string(),
                    tier: if key.tier == WIDE { "wide" } else { "narrow" },
                    connections: entry.connections,
                    limit: usual,
                    exceptions: within
                        .iter()
                        .map(|rule| Exception { cidr: rule.rule.cidr.to_string(), limit: limit(Some(&rule.rule)) })
                        .filter(|exception| exception.limit != usual)
                        .collect(),
                })
            })
            .collect()
    }

    /// Attaches the program that sees what is delivered if one of these services needs it, and takes it away if none does.
    pub fn put_delivery(&self, control: &Control, services: &[Service]) -> Result<Delivery, KernelError> {
        control.with_programs(|loaded| delivery::put(loaded, &self.pins, services))
    }

    /// What to call these network namespaces, none of which is the one that limiter was attached in: their names, or `net:[INODE]`, or
    /// `cookie COOKIE` where they can't be found.
    pub fn namespaces<'n>(
        &self,
        others: impl IntoIterator<Item = &'n Netns>,
    ) -> Result<HashMap<Netns, String>, KernelError> {
        let mut others = others.into_iter().peekable();
        if others.peek().is_none() {
            return Ok(HashMap::new());
        }
        let found = Sockets::open().and_then(|mut sockets| sockets.names()).map_err(no_list)?;
        let name =
            |netns: &Netns| found.get(netns).map_or_else(|| format!("cookie {}", netns.cookie()), ToString::to_string);
        Ok(others.map(|netns| (*netns, name(netns))).collect())
    }

    /// The refusals that were reported, to be read beside whoever reads them already.
    pub fn event_log(&self) -> Result<EventLog, KernelError> {
        EventLog::open(&self.pins)
    }

    /// The process that works on this state, if one does.
    pub fn daemon(&self) -> Option<u32> {
        self.pins.lock_holder()
    }

    /// Every connection in the ledger, oldest first.
    pub fn connections(&self) -> Result<Vec<ConnectionRow>, KernelError> {
        self.end_overdue(&self.services)?;
        let services = self.names()?;
        let ledger = Ledger::open(&self.pins)?;
        let mut entries = ledger.entries()?;
        let users = ledger.users()?;
        entries.sort_by_key(|(_, entry)| entry.opened_ns);
        let others: HashSet<Netns> =
            entries.iter().map(|(ends, _)| ends.netns).filter(|netns| !netns.is_own()).collect();
        let names = self.namespaces(&others)?;
        let now = host::monotonic();
        Ok(entries
            .into_iter()
            .map(|(ends, entry)| ConnectionRow {
                service: service_name(services.get(&u32::from(entry.source.service)), &entry.source),
                source: source_name(&entry.source, &users),
                user: users.get(&entry.source).cloned(),
                remote: ends.remote(),
                local: ends.local(),
                namespace: names.get(&ends.netns).cloned(),
                state: if is_reservation(entry.owner) { "reserved" } else { "open" },
                age: now.saturating_sub(Duration::from_nanos(entry.opened_ns)),
            })
            .collect())
    }

    /// That the state is of the network namespace that this process is in: addresses mean something else in another.
    pub(super) fn require_this_namespace(&self) -> Result<(), KernelError> {
        if self.pins.netns(host::netns_cookie()?).is_dir() {
            Ok(())
        } else {
            Err(KernelError::OtherNamespace { pin_path: self.pins.root().to_owned() })
        }
    }

    /// Connections that the ledger has room for.
    pub(super) fn ledger_size(&self) -> u64 {
        self.sizes.ledger.into()
    }

    /// Where the maps are.
    pub(super) fn pins(&self) -> &Pins {
        &self.pins
    }

    /// Puts new limits in force for the services of these indexes, and what their refused SYNs get, in one step; connections
    /// that are open stay open.
    pub fn set_limits(&self, limits: &[(u32, Limits, OnDeny)]) -> Result<(), KernelError> {
        let mut change = Change::begin(&self.pins)?;
        let mut services = change.services()?;
        for (index, limits, on_deny) in limits {
            let known = services.iter_mut().find(|(known, _)| known == index);
            let (_, service) = known.ok_or_else(|| KernelError::Failed {
                what: format!("there is no service number {index} any more; nothing was changed"),
                source: "it was taken away meanwhile".into(),
            })?;
            service.limits = *limits;
            service.on_deny = *on_deny;
        }
        change.set_services(&services)?;
        change.commit()
    }

    /// Puts the services and the rules of a configuration in force, in one step and in the place of those that are. The
    /// programs and what they are attached to stay as they are. Returns the services with their indexes.
    pub fn put(
        &self,
        services: &[Service],
        rules: &[Rule],
        on_full: OnFull,
    ) -> Result<Vec<(u32, Service)>, KernelError> {
        in_force::put(&self.pins, services, rules, on_full)
    }

    /// Which policy is in force: another after every change.
    pub fn policy_mark(&self) -> Result<PolicyMark, KernelError> {
        Ok(PolicyMark(Word::open(&self.pins)?.read()?.0))
    }

    /// The rules.
    pub fn rules(&self) -> Result<Rules, KernelError> {
        Rules::open(&self.pins)
    }

    fn names(&self) -> Result<HashMap<u32, ServiceEntry>, KernelError> {
        Ok(self.services.all()?.into_iter().collect())
    }
}

/// What detaching did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Detached {
    /// How many pins there were.
    pub removed: usize,
    /// Settings that limiter had changed in another network namespace than this process's, where they stay as they are.
    pub left_changed: Vec<LeftChanged>,
}

/// Removes every pin under `pin_path`, of whatever version, and with them programs, links and maps.
///
/// # Errors
///
/// [`KernelError::NotAttached`] if nothing is there, [`KernelError::AlreadyRunning`] while a daemon works on it.
pub fn detach(pin_path: &Path) -> Result<Detached, KernelError> {
    let pins = Pins::new(pin_path);
    host::require_privilege("detach")?;
    if !pin_path.exists() {
        return Err(KernelError::NotAttached { pin_path: pin_path.to_owned() });
    }
    let _lock = pins.lock()?;
    let left_changed = challenge::restore(&pins)?;
    Ok(Detached { removed: pins.remove()?, left_changed })
}

/// How many connections a source of that tier may hold.
fn limit_of_tier(tier: u8, limits: &Limits) -> u32 {
    if tier == WIDE { limits.connections_per_wide_source } else { limits.connections_per_source }
}

/// The name of a source's service; its number, if the service was taken away and the connection has outlived it.
fn service_name(service: Option<&ServiceEntry>, key: &SourceKey) -> String {
    service.map_or_else(|| format!("#{}", key.service), |service| service.name.clone())
}

/// A source as people know it: `192.0.2.7/32`, or `user:alice`.
fn source_name(key: &SourceKey, users: &HashMap<SourceKey, String>) -> String {
    users.get(key).map_or_else(|| key.to_string(), |name| format!("user:{name}"))
}
