//! The services: what user space says of each, and the maps that hold it.

use std::{
    collections::BTreeMap,
    fmt, io,
    net::IpAddr,
    sync::{Mutex, PoisonError},
};

use aya::maps::{Array, IterableMap as _, Map, MapData, PerCpuArray};
use limiter_common::{
    Counter, ServicePolicy, abi,
    bucket::Rate,
    policy::{self, InForce, ServiceName, ServiceState},
    rule::RuleEntry,
};

use super::{Counters, KernelError, batch, copies::Word, maps::open, pins::Pins, rules::Rules};
use crate::{
    config::{OnDeny, OnFull},
    policy::Limits,
};

/// A service as user space says it to the kernel.
#[derive(Clone, Debug, PartialEq)]
pub struct ServiceEntry {
    /// Its name.
    pub name: String,
    /// Its limits.
    pub limits: Limits,
    /// What a refused SYN gets.
    pub on_deny: OnDeny,
    /// What happens to a connection that the ledger has no room for.
    pub on_full: OnFull,
    /// Whether some of its sockets are in other namespaces, or at other ports than its clients connect to.
    pub is_elsewhere: bool,
}

impl ServiceEntry {
    /// As it lies in the map.
    pub(super) fn to_policy(&self) -> Result<ServicePolicy, KernelError> {
        // The configuration bounds the length of names.
        let name = ServiceName::new(&self.name).ok_or_else(|| KernelError::Failed {
            what: format!("the name of the service {} is too long", self.name),
            source: format!("at most {} bytes", limiter_common::policy::SERVICE_NAME_BYTES).into(),
        })?;
        Ok(ServicePolicy {
            connections_per_source: self.limits.connections_per_source,
            connections_per_wide_source: self.limits.connections_per_wide_source,
            connections_total: self.limits.connections_total,
            connections_total_all: self.limits.connections_total_all,
            connection_rate: self.limits.connection_rate,
            connection_burst: self.limits.connection_burst,
            rate: Rate::new(self.limits.connection_rate, self.limits.connection_burst),
            ipv4_prefix: self.limits.ipv4_prefix,
            service_connection_rate: self.limits.service_connection_rate,
            service_connection_burst: self.limits.service_connection_burst,
            service_rate: Rate::new(self.limits.service_connection_rate, self.limits.service_connection_burst),
            ipv6_prefix: self.limits.ipv6_prefix,
            wide_ipv4_prefix: self.limits.wide_ipv4_prefix,
            wide_ipv6_prefix: self.limits.wide_ipv6_prefix,
            on_deny: match self.on_deny {
                OnDeny::Drop => policy::OnDeny::Drop as u8,
                OnDeny::Reset => policy::OnDeny::Reset as u8,
                OnDeny::Observe => policy::OnDeny::Observe as u8,
            },
            on_full: match self.on_full {
                OnFull::Open => policy::OnFull::Open as u8,
                OnFull::Closed => policy::OnFull::Closed as u8,
            },
            is_elsewhere: self.is_elsewhere.into(),
            reserved: 0,
            name,
        })
    }

    fn from_policy(found: &ServicePolicy) -> Option<Self> {
        (!found.name.is_empty()).then(|| Self {
            name: found.name.to_string_lossy(),
            limits: Limits {
                connections_per_source: found.connections_per_source,
                connections_per_wide_source: found.connections_per_wide_source,
                connections_total: found.connections_total,
                connections_total_all: found.connections_total_all,
                connection_rate: found.connection_rate,
                connection_burst: found.connection_burst,
                ipv4_prefix: found.ipv4_prefix,
                service_connection_rate: found.service_connection_rate,
                service_connection_burst: found.service_connection_burst,
                ipv6_prefix: found.ipv6_prefix,
                wide_ipv4_prefix: found.wide_ipv4_prefix,
                wide_ipv6_prefix: found.wide_ipv6_prefix,
            },
            on_deny: match found.on_deny {
                number if number == policy::OnDeny::Observe as u8 => OnDeny::Observe,
                number if number == policy::OnDeny::Reset as u8 => OnDeny::Reset,
                _ => OnDeny::Drop,
            },
            on_full: if found.on_full == policy::OnFull::Closed as u8 { OnFull::Closed } else { OnFull::Open },
            is_elsewhere: found.is_elsewhere != 0,
        })
    }
}

/// Ports of services, each with the index of its service.
type Ports = Vec<(u16, u32)>;

/// Which services count the sockets of a port, by index.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketPort {
    /// In the network namespace that limiter was attached in.
    pub own: Option<u16>,
    /// In the others.
    pub others: Option<u16>,
}

/// Services: their limits, their ports, what they hold and what was counted.
pub struct Services {
    in_force: Word,
    policies: Array<MapData, ServicePolicy>,
    states: Array<MapData, ServiceState>,
    ports: Array<MapData, u32>,
    socket_ports: Array<MapData, u64>,
    /// The ports of the services as of that word: to read them takes a system call for each there could be.
    known_ports: Mutex<Option<(InForce, Ports)>>,
    known_sockets: Mutex<Option<(InForce, BTreeMap<u16, SocketPort>)>>,
    counters: PerCpuArray<MapData, u64>,
}

impl fmt::Debug for Services {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Services").finish_non_exhaustive()
    }
}

impl Services {
    /// Opens the pinned maps.
    pub fn open(pins: &Pins) -> Result<Self, KernelError> {
        Ok(Self {
            in_force: Word::open(pins)?,
            policies: open(&pins.map(abi::MAP_SERVICES), Map::Array)?,
            states: open(&pins.map(abi::MAP_SERVICE_STATE), Map::Array)?,
            ports: open(&pins.map(abi::MAP_PORTS), Map::Array)?,
            socket_ports: open(&pins.map(abi::MAP_SOCKET_PORTS), Map::Array)?,
            known_ports: Mutex::default(),
            known_sockets: Mutex::default(),
            counters: open(&pins.map(abi::MAP_COUNTERS), Map::PerCpuArray)?,
        })
    }

    /// The service of that index, if there is one.
    pub fn get(&self, index: u32) -> Result<Option<ServiceEntry>, KernelError> {
        self.policy(index).map(|policy| ServiceEntry::from_policy(&policy))
    }

    /// The limits of the service of that index as the programs read them; all zero if there is none.
    pub(super) fn policy(&self, index: u32) -> Result<ServicePolicy, KernelError> {
        self.in_force.read_with(|in_force| self.policy_in(in_force, index))
    }

    /// The service of that index, and the rule that holds for an address, both of one policy.
    pub(super) fn with_rule(
        &self,
        index: u32,
        rules: &Rules,
        ip: IpAddr,
    ) -> Result<(Option<ServiceEntry>, Option<RuleEntry>), KernelError> {
        self.in_force.read_with(|in_force| {
            let service = ServiceEntry::from_policy(&self.policy_in(in_force, index)?);
            Ok((service, rules.holding_in(in_force, ip)?.map(|(_, rule)| rule)))
        })
    }

    /// The same in one of the copies.
    pub(super) fn policy_in(&self, in_force: InForce, index: u32) -> Result<ServicePolicy, KernelError> {
        let place = in_force.place_of(u16::try_from(index).unwrap_or(u16::MAX));
        self.policies.get(&place, 0).map_err(KernelError::failed("can't read a service's limits"))
    }

    /// Every service with its index, in the order of the index.
    pub fn all(&self) -> Result<Vec<(u32, ServiceEntry)>, KernelError> {
        self.in_force.read_with(|in_force| {
            let mut services = Vec::new();
            for index in 0..abi::MAX_SERVICES {
                let policy = self.policy_in(in_force, index)?;
                services.extend(ServiceEntry::from_policy(&policy).map(|service| (index, service)));
            }
            Ok(services)
        })
    }

    /// Puts limits into one of the copies, which must not be in force.
    pub(super) fn set_in(&mut self, copy: InForce, index: u32, policy: ServicePolicy) -> Result<(), KernelError> {
        let place = copy.place_of(u16::try_from(index).unwrap_or(u16::MAX));
        self.policies
            .set(place, policy, 0)
            .map_err(KernelError::failed(format!("can't write the limits of {}", policy.name.to_string_lossy())))
    }

    /// What a service holds.
    pub fn state(&self, index: u32) -> Result<ServiceState, KernelError> {
        self.states.get(&index, 0).map_err(KernelError::failed("can't read what a service holds"))
    }

    /// Whether there may be connections that the stack has yet to confirm, of any service that there is or was.
    pub(super) fn have_unconfirmed(&self) -> Result<bool, KernelError> {
        for index in 0..abi::MAX_SERVICES {
            if self.state(index)?.unconfirmed != 0 {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// What was counted for a service, summed over the CPUs.
    pub fn counters(&self, index: u32) -> Result<Counters, KernelError> {
        Counter::ALL
            .into_iter()
            .filter(|counter| !matches!(counter, Counter::HeadersUnreadable | Counter::RulesFull))
            .map(|counter| Ok((counter.name(), self.counter(index, counter)?)))
            .collect::<Result<_, _>>()
            .map(Counters)
    }

    /// How many packets there were of which nobody can know what service they are for.
    pub fn headers_unreadable(&self) -> Result<u64, KernelError> {
        self.counter(0, Counter::HeadersUnreadable)
    }

    /// How many changes of the rules there was no room for.
    pub fn rules_full(&self) -> Result<u64, KernelError> {
        self.counter(0, Counter::RulesFull)
    }

    fn counter(&self, index: u32, counter: Counter) -> Result<u64, KernelError> {
        let values = self
            .counters
            .get(&(index * abi::COUNTERS_PER_SERVICE + counter as u32), 0)
            .map_err(KernelError::failed("can't read a service's counters"))?;
        Ok(values.iter().sum())
    }

    /// The ports that belong to a service, with its index; ascending.
    pub fn ports(&self) -> Result<Vec<(u16, u32)>, KernelError> {
        self.in_force.read_with(|in_force| {
            let mut known = self.known_ports.lock().unwrap_or_else(PoisonError::into_inner);
            match &*known {
                Some((at, ports)) if *at == in_force => Ok(ports.clone()),
                _ => {
                    let words = self.port_words()?.into_iter();
                    let ports: Vec<_> =
                        words.filter_map(|(port, word)| Some((port, in_force.service(word)?.into()))).collect();
                    *known = Some((in_force, ports.clone()));
                    Ok(ports)
                }
            }
        })
    }

    /// The ports whose sockets are counted, with their services.
    pub fn sockets(&self) -> Result<BTreeMap<u16, SocketPort>, KernelError> {
        self.in_force.read_with(|in_force| {
            let mut known = self.known_sockets.lock().unwrap_or_else(PoisonError::into_inner);
            match &*known {
                Some((at, sockets)) if *at == in_force => Ok(sockets.clone()),
                _ => {
                    let service = |word, is_own| in_force.service_of_socket(word, is_own);
                    let sockets: BTreeMap<_, _> = self
                        .socket_words()?
                        .into_iter()
                        .map(|(port, word)| {
                            (port, SocketPort { own: service(word, true), others: service(word, false) })
                        })
                        .filter(|(_, socket)| *socket != SocketPort::default())
                        .collect();
                    *known = Some((in_force, sockets.clone()));
                    Ok(sockets)
                }
            }
        })
    }

    /// The same as they lie in the map, in either copy; ascending.
    pub(super) fn socket_words(&self) -> Result<Vec<(u16, u64)>, KernelError> {
        let words: Vec<(u32, u64)> = batch::read(self.socket_ports.map(), usize::from(u16::MAX) + 1)
            .map_err(KernelError::failed("can't read which sockets are counted"))?;
        let ports = words.into_iter().filter(|(_, word)| *word != 0);
        Ok(ports.filter_map(|(port, word)| Some((u16::try_from(port).ok()?, word))).collect())
    }

    /// Writes the word of a port of sockets, whose half that is in force must stay as it is.
    pub(super) fn set_socket_word(&mut self, port: u16, word: u64) -> Result<(), KernelError> {
        self.socket_ports
            .set(u32::from(port), word, 0)
            .map_err(KernelError::failed(format!("can't have sockets at port {port} counted for a service")))
    }

    /// The ports that a service has in either copy, with their words; ascending.
    pub(super) fn port_words(&self) -> Result<Vec<(u16, u32)>, KernelError> {
        let words: Vec<(u32, u32)> = batch::read(self.ports.map(), usize::from(u16::MAX) + 1)
            .map_err(KernelError::failed("can't read which ports belong to services"))?;
        let ports = words.into_iter().filter(|(_, word)| *word != 0);
        Ok(ports.filter_map(|(port, word)| Some((u16::try_from(port).ok()?, word))).collect())
    }

    /// Writes the word of a port, whose half that is in force must stay as it is.
    pub(super) fn set_port_word(&mut self, port: u16, word: u32) -> Result<(), KernelError> {
        self.ports
            .set(u32::from(port), word, 0)
            .map_err(KernelError::failed(format!("can't give port {port} to a service")))
    }
}

/// Counts a change of the rules that there was no room for. Under the lock of changes: nobody else writes to this counter.
pub(super) fn count_rules_full(pins: &Pins) -> Result<(), KernelError> {
    const WHAT: &str = "can't count that there was no room for a rule";
    let place = Counter::RulesFull as u32;
    let mut counters: PerCpuArray<_, u64> = open(&pins.map(abi::MAP_COUNTERS), Map::PerCpuArray)?;
    let mut values = counters.get(&place, 0).map_err(KernelError::failed(WHAT))?.to_vec();
    if let Some(value) = values.first_mut() {
        *value += 1;
    }
    let values = values.try_into().map_err(KernelError::failed::<io::Error>(WHAT))?;
    counters.set(place, values, 0).map_err(KernelError::failed(WHAT))
}
