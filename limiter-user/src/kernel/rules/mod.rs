//! The rules in force, as typed methods of their maps.

mod entry;
mod limits;
mod nesting;
mod trie;

pub(super) use entry::nanoseconds;
pub(super) use limits::{apply, is_allow, is_deny, with_rule};
pub(super) use nesting::{around, within};

use std::{collections::HashMap, fmt, net::IpAddr, time::Duration};

use aya::maps::lpm_trie::Key;
use limiter_common::{
    Address,
    policy::InForce,
    rule::{RuleEntry, RuleOrigin},
};

use super::{KernelError, copies::Word, host, pins::Pins, services::count_rules_full};
use crate::policy::{Cidr, Rule};
use entry::{Place, cidr, ends_ns, entry, from_entry, has_ended, is_same, key, place};
use trie::Copies;

/// A rule that is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RuleInForce {
    /// What it says.
    pub rule: Rule,
    /// How long it will hold yet; `None`: until it is forgotten.
    pub left: Option<Duration>,
    /// Whether it comes from the configuration file, and goes with it.
    pub from_file: bool,
}

/// The rules.
pub struct Rules {
    in_force: Word,
    copies: Copies,
    pins: Pins,
}

impl fmt::Debug for Rules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rules").finish_non_exhaustive()
    }
}

impl Rules {
    /// Opens the pinned maps.
    pub(super) fn open(pins: &Pins) -> Result<Self, KernelError> {
        Ok(Self { in_force: Word::open(pins)?, copies: Copies::open(pins)?, pins: pins.clone() })
    }

    /// Every rule that has not ended, by address.
    pub fn all(&self) -> Result<Vec<RuleInForce>, KernelError> {
        let now = host::monotonic();
        let entries = self.in_force.read_with(|in_force| self.copies.entries(in_force))?;
        let mut rules: Vec<_> = entries.iter().filter_map(|(key, entry)| from_entry(cidr(key)?, entry, now)).collect();
        rules.sort_by_key(|rule| rule.rule.cidr);
        Ok(rules)
    }

    /// The rule of exactly that prefix, if it has not ended.
    pub fn get(&self, cidr: Cidr) -> Result<Option<RuleInForce>, KernelError> {
        let key = key(cidr);
        let entry = self.in_force.read_with(|in_force| self.copies.look_up(in_force, &key))?;
        let entry = entry.filter(|entry| u32::from(entry.length) == key.prefix_len());
        Ok(entry.and_then(|entry| from_entry(cidr, &entry, host::monotonic())))
    }

    /// The rule that holds for an address, as the programs find it.
    pub(super) fn holding(&self, ip: IpAddr) -> Result<Option<(Cidr, RuleEntry)>, KernelError> {
        self.in_force.read_with(|in_force| self.holding_in(in_force, ip))
    }

    /// The same in the copy that this word says.
    pub(super) fn holding_in(&self, in_force: InForce, ip: IpAddr) -> Result<Option<(Cidr, RuleEntry)>, KernelError> {
        if !in_force.has_rules() {
            return Ok(None);
        }
        let address = Address::from(ip);
        let now_ns = nanoseconds(host::monotonic());
        let mut length = 128;
        loop {
            let key = Key::new(length, address);
            let Some(entry) = self.copies.look_up(in_force, &key)? else { return Ok(None) };
            if entry.holds(&address, || now_ns) {
                return Ok(cidr(&Key::new(entry.length.into(), address)).map(|cidr| (cidr, entry)));
            }
            match u32::from(entry.length).checked_sub(1) {
                Some(shorter) => length = shorter,
                None => return Ok(None),
            }
        }
    }

    /// The same as it is shown.
    pub(super) fn holding_shown(&self, ip: IpAddr) -> Result<Option<RuleInForce>, KernelError> {
        let now = host::monotonic();
        Ok(self.holding(ip)?.and_then(|(cidr, entry)| from_entry(cidr, &entry, now)))
    }

    /// Puts a rule in force, in the place of another of the same prefix. `from_file`: whether the configuration file has it.
    pub fn set(&mut self, rule: &Rule, from_file: bool) -> Result<(), KernelError> {
        // One that ends now has ended: it is what remains of it.
        let expires_ns = ends_ns(rule, host::monotonic()).unwrap_or(1);
        let _lock = self.pins.lock_policy()?;
        let in_force = self.in_force.read()?;
        if !in_force.has_rules() {
            self.in_force.write(in_force.with_rules(true))?;
        }
        let (key, entry) = (key(rule.cidr), entry(rule, expires_ns, from_file));
        let put = self.copies.insert(in_force, &key, &entry);
        self.count_if_full(put)
    }

    /// Takes a rule away. `false` if there is none of that prefix.
    pub fn remove(&mut self, cidr: Cidr) -> Result<bool, KernelError> {
        let _lock = self.pins.lock_policy()?;
        let copy = self.in_force.read()?;
        self.copies.delete(copy, &key(cidr))
    }

    /// Removes what has ended. The programs do without, but every look-up that meets one looks twice, and it takes room. Looks
    /// at every rule there is.
    pub fn remove_ended(&mut self) -> Result<(), KernelError> {
        let _lock = self.pins.lock_policy()?;
        let now = nanoseconds(host::monotonic());
        let in_force = self.in_force.read()?;
        for (key, entry) in self.copies.entries(in_force)? {
            if has_ended(&entry, now) {
                self.copies.delete(in_force, &key)?;
            }
        }
        Ok(())
    }

    /// How many rules there are, ended or not.
    pub fn count(&self) -> Result<u64, KernelError> {
        self.in_force.read_with(|in_force| self.copies.count(in_force))
    }

    /// Writes the rules of the configuration file that have not ended, and those of commands that are in force, into the copy
    /// that is not. Where the file has a rule of the same prefix as a command's, it is the file's. Says whether there is any;
    /// `None`: they are those in force, and nothing is to be done.
    pub(super) fn prepare(&mut self, in_force: InForce, rules: &[Rule]) -> Result<Option<bool>, KernelError> {
        let clock = host::monotonic();
        let now = nanoseconds(clock);
        let known: HashMap<Place, RuleEntry> =
            self.copies.entries(in_force)?.into_iter().map(|(key, entry)| (place(&key), entry)).collect();
        let mut wanted: HashMap<Place, RuleEntry> = known
            .iter()
            .filter(|(_, entry)| entry.origin == RuleOrigin::Command as u8 && !has_ended(entry, now))
            .map(|(place, entry)| (*place, *entry))
            .collect();
        wanted.extend(rules.iter().filter_map(|rule| {
            let (place, new) = (place(&key(rule.cidr)), entry(rule, ends_ns(rule, clock)?, true));
            Some((place, known.get(&place).filter(|old| is_same(old, &new)).copied().unwrap_or(new)))
        }));
        if wanted == known {
            return Ok(None);
        }
        let room = self.copies.room();
        if wanted.len() > room as usize {
            return self.count_if_full(Err(KernelError::TooManyRules { count: wanted.len(), room }));
        }
        let other = in_force.other_rules();
        // Left over from a change that died half-way.
        self.clear(other)?;
        for (&(length, address), entry) in &wanted {
            if let Err(error) = self.copies.insert(other, &Key::new(length, address), entry) {
                // The first error is the one to tell; what is left is cleared by the next change.
                let _ = self.clear(other);
                return Err(error);
            }
        }
        Ok(Some(!wanted.is_empty()))
    }

    /// Counts a change that there was no room for; `changed`: what came of it. Under the lock of changes.
    fn count_if_full<T>(&self, changed: Result<T, KernelError>) -> Result<T, KernelError> {
        if matches!(changed, Err(KernelError::TooManyRules { .. }))
            && let Err(error) = count_rules_full(&self.pins)
        {
            // That there was no room is what is to be told.
            tracing::warn!(%error, "a change of the rules that found no room is not counted");
        }
        changed
    }

    /// Empties the copy that this word says, which must not be in force.
    pub(super) fn clear(&mut self, copy: InForce) -> Result<(), KernelError> {
        self.copies.clear(copy)
    }
}
