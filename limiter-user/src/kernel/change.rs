//! Changes of the policy. Nothing that is prepared holds until it is put in force, and then all of it does: [`InForce`] says
//! how, and for whom.

use std::collections::{BTreeMap, HashMap};

use limiter_common::{
    ServicePolicy, abi,
    policy::{InForce, Port},
};

use super::{
    KernelError,
    copies::{Word, wait_for_programs},
    pins::{Pins, PolicyLock},
    rules::Rules,
    services::{ServiceEntry, Services, SocketPort},
};
use crate::policy::Rule;

/// A change on its way.
#[derive(Debug)]
pub(super) struct Change {
    // First, so that the next one starts when everything of this one is done.
    word: Word,
    services: Services,
    rules: Rules,
    old: InForce,
    new: InForce,
    /// The ports that a service has in either copy.
    ports: Option<BTreeMap<u16, u32>>,
    /// The ports of sockets, likewise.
    sockets: Option<BTreeMap<u16, u64>>,
    _lock: PolicyLock,
}

impl Change {
    /// Keeps everybody else from changing the policy, and waits until nobody reads the copies that are not in force.
    pub(super) fn begin(pins: &Pins) -> Result<Self, KernelError> {
        let lock = pins.lock_policy()?;
        let word = Word::open(pins)?;
        let old = word.read()?;
        // A change may have been put in force just now by a process that died before it had waited.
        wait_for_programs();
        Ok(Self {
            word,
            services: Services::open(pins)?,
            rules: Rules::open(pins)?,
            old,
            new: old,
            ports: None,
            sockets: None,
            _lock: lock,
        })
    }

    /// Every service that is in force, with its index.
    pub(super) fn services(&self) -> Result<Vec<(u32, ServiceEntry)>, KernelError> {
        self.services.all()
    }

    /// These services and no others, each at its index.
    pub(super) fn set_services(&mut self, services: &[(u32, ServiceEntry)]) -> Result<(), KernelError> {
        let wanted: HashMap<u32, &ServiceEntry> = services.iter().map(|(index, service)| (*index, service)).collect();
        self.new = self.new.other_limits();
        for index in 0..abi::MAX_SERVICES {
            let policy = match wanted.get(&index) {
                Some(service) => service.to_policy()?,
                None => ServicePolicy::default(),
            };
            self.services.set_in(self.new, index, policy)?;
        }
        Ok(())
    }

    /// These ports belong to services, and no others. Once, and before the sockets.
    pub(super) fn set_ports(&mut self, wanted: &BTreeMap<u16, Port>) -> Result<(), KernelError> {
        let mut words: BTreeMap<u16, u32> = self.services.port_words()?.into_iter().collect();
        for &port in wanted.keys() {
            words.entry(port).or_default();
        }
        self.new = self.new.other_ports();
        for (&port, word) in &mut words {
            let new = self.new.with_port(*word, wanted.get(&port).copied());
            if new != *word {
                self.services.set_port_word(port, new)?;
                *word = new;
            }
        }
        self.ports = Some(words);
        Ok(())
    }

    /// Sockets of these ports are counted for services, and no others. They go with the ports: there is one copy of both in force.
    pub(super) fn set_sockets(&mut self, wanted: &BTreeMap<u16, SocketPort>) -> Result<(), KernelError> {
        let mut words: BTreeMap<u16, u64> = self.services.socket_words()?.into_iter().collect();
        for &port in wanted.keys() {
            words.entry(port).or_default();
        }
        for (&port, word) in &mut words {
            let SocketPort { own, others } = wanted.get(&port).copied().unwrap_or_default();
            let new = self.new.with_sockets(*word, own, others);
            if new != *word {
                self.services.set_socket_word(port, new)?;
                *word = new;
            }
        }
        self.sockets = Some(words);
        Ok(())
    }

    /// These rules of the configuration file, and those of commands.
    pub(super) fn set_rules_of_file(&mut self, rules: &[Rule]) -> Result<(), KernelError> {
        if let Some(has_rules) = self.rules.prepare(self.old, rules)? {
            self.new = self.new.other_rules().with_rules(has_rules);
        }
        Ok(())
    }

    /// Puts in force what was prepared. When this returns, no packet is judged by the old policy any more.
    pub(super) fn commit(mut self) -> Result<(), KernelError> {
        // Who has begun by now to read the copies may have seen them half-written, and must not be told to go by them.
        wait_for_programs();
        self.new = self.new.changed();
        self.word.write(self.new)?;
        wait_for_programs();
        self.tidy()
    }

    /// Brings the copies that are out of force to where the next change expects them.
    fn tidy(&mut self) -> Result<(), KernelError> {
        // A port that has no service in either copy is nobody's at the first look.
        for (port, word) in self.ports.take().unwrap_or_default() {
            let both = self.old.with_port(word, self.new.port(word));
            if both != word {
                self.services.set_port_word(port, both)?;
            }
        }
        for (port, word) in self.sockets.take().unwrap_or_default() {
            let [own, others] = [true, false].map(|is_own| self.new.service_of_socket(word, is_own));
            let both = self.old.with_sockets(word, own, others);
            if both != word {
                self.services.set_socket_word(port, both)?;
            }
        }
        if self.new.rules() != self.old.rules() {
            self.rules.clear(self.old)?;
        }
        Ok(())
    }
}
