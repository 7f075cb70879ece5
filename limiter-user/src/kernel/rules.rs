//! The rules in force, as typed methods of their map.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    net::IpAddr,
    time::Duration,
};

use aya::maps::{
    Array, Map, MapData, MapError,
    lpm_trie::{Key, LpmTrie},
};
use limiter_common::{
    Address, abi,
    bucket::Rate,
    rule::{MAPPED_BITS, OWN_CONNECTIONS, OWN_RATE, RuleAction, RuleEntry, RuleOrigin},
};

use super::{KernelError, host, maps::open, pins::Pins};
use crate::policy::{Action, Cidr, Limits, OwnLimits, Rule};

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
    trie: LpmTrie<MapData, Address, RuleEntry>,
    used: Array<MapData, u32>,
}

impl fmt::Debug for Rules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rules").finish_non_exhaustive()
    }
}

impl Rules {
    /// Opens the pinned map.
    pub(super) fn open(pins: &Pins) -> Result<Self, KernelError> {
        Ok(Self {
            trie: open(&pins.map(abi::MAP_RULES), Map::LpmTrie)?,
            used: open(&pins.map(abi::MAP_RULES_USED), Map::Array)?,
        })
    }

    /// Every rule that has not ended, by address.
    pub fn all(&self) -> Result<Vec<RuleInForce>, KernelError> {
        let now = host::monotonic();
        let mut rules: Vec<_> =
            self.entries()?.iter().filter_map(|(key, entry)| from_entry(cidr(key)?, entry, now)).collect();
        rules.sort_by_key(|rule| rule.rule.cidr);
        Ok(rules)
    }

    /// The rule of exactly that prefix, if it has not ended.
    pub fn get(&self, cidr: Cidr) -> Result<Option<RuleInForce>, KernelError> {
        let key = key(cidr);
        let entry = self.look_up(&key)?.filter(|entry| u32::from(entry.length) == key.prefix_len());
        Ok(entry.and_then(|entry| from_entry(cidr, &entry, host::monotonic())))
    }

    /// The rule that holds for an address, as the programs find it.
    pub(super) fn holding(&self, ip: IpAddr) -> Result<Option<(Cidr, RuleEntry)>, KernelError> {
        let address = Address::from(ip);
        let now_ns = nanoseconds(host::monotonic());
        let mut length = 128;
        loop {
            let key = Key::new(length, address);
            let Some(entry) = self.look_up(&key)? else { return Ok(None) };
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

    /// Puts a rule in force, in the place of another of the same prefix. `time`: how long it holds; `None`: for ever.
    pub fn set(&mut self, rule: &Rule, time: Option<Duration>, from_file: bool) -> Result<(), KernelError> {
        let expires_ns = time.map_or(0, |time| nanoseconds(host::monotonic().saturating_add(time)).max(1));
        self.insert(&key(rule.cidr), &entry(rule, expires_ns, from_file), rule.cidr)
    }

    /// Takes a rule away. `false` if there is none of that prefix.
    pub fn remove(&mut self, cidr: Cidr) -> Result<bool, KernelError> {
        self.delete(&key(cidr))
    }

    /// Removes what has ended. The programs do without, but every look-up that meets one looks twice.
    pub fn remove_ended(&mut self) -> Result<(), KernelError> {
        let now = nanoseconds(host::monotonic());
        for (key, entry) in self.entries()? {
            if entry.expires_ns != 0 && entry.expires_ns <= now {
                self.delete(&key)?;
            }
        }
        Ok(())
    }

    /// Puts the rules of the configuration file in force. Those of an older file go; those of commands stay, unless the
    /// file has one of the same prefix. Rules that stay as they are hold all the while.
    pub(super) fn set_from_file(&mut self, rules: &[Rule]) -> Result<(), KernelError> {
        self.remove_ended()?;
        let known: HashMap<_, _> = self.entries()?.iter().map(|(key, entry)| (words(key), *entry)).collect();
        let mut wanted = HashSet::with_capacity(rules.len());
        for rule in rules {
            let key = key(rule.cidr);
            let entry = entry(rule, 0, true);
            if known.get(&words(&key)) != Some(&entry) {
                self.insert(&key, &entry, rule.cidr)?;
            }
            wanted.insert(words(&key));
        }
        for (&(length, address), entry) in &known {
            if entry.origin == RuleOrigin::File as u8 && !wanted.contains(&(length, address)) {
                self.delete(&Key::new(length, address))?;
            }
        }
        Ok(())
    }

    fn entries(&self) -> Result<Vec<(Key<Address>, RuleEntry)>, KernelError> {
        const WHAT: &str = "can't read the rules";
        let mut entries = Vec::new();
        for key in self.trie.keys() {
            let key = key.map_err(KernelError::failed(WHAT))?;
            // One that went meanwhile may lie in another.
            if let Some(entry) = self.look_up(&key)?
                && u32::from(entry.length) == key.prefix_len()
            {
                entries.push((key, entry));
            }
            // Whoever changes rules all the while must not keep this going for ever.
            if entries.len() > abi::MAX_RULES as usize {
                break;
            }
        }
        Ok(entries)
    }

    fn look_up(&self, key: &Key<Address>) -> Result<Option<RuleEntry>, KernelError> {
        match self.trie.get(key, 0) {
            Ok(entry) => Ok(Some(entry)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(KernelError::failed("can't look up a rule")(error)),
        }
    }

    fn insert(&mut self, key: &Key<Address>, entry: &RuleEntry, cidr: Cidr) -> Result<(), KernelError> {
        // Never taken back: another process may be adding a rule.
        self.used.set(0, 1, 0).map_err(KernelError::failed("can't have rules looked up"))?;
        self.trie.insert(key, entry, 0).map_err(KernelError::failed(format!(
            "can't put the rule for {cidr} in force (there may be {} rules)",
            abi::MAX_RULES
        )))
    }

    fn delete(&mut self, key: &Key<Address>) -> Result<bool, KernelError> {
        match self.trie.remove(key) {
            Ok(()) => Ok(true),
            Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(MapError::KeyNotFound) => Ok(false),
            Err(error) => Err(KernelError::failed("can't take a rule away")(error)),
        }
    }
}

fn key(cidr: Cidr) -> Key<Address> {
    Key::new(length(cidr).into(), cidr.address().into())
}

/// The length of a prefix in the 16-byte form of its addresses.
fn length(cidr: Cidr) -> u8 {
    if cidr.address().is_ipv4() { cidr.prefix() + MAPPED_BITS } else { cidr.prefix() }
}

fn words(key: &Key<Address>) -> (u32, Address) {
    (key.prefix_len(), key.data())
}

fn cidr(key: &Key<Address>) -> Option<Cidr> {
    let address = key.data();
    let mut prefix = u8::try_from(key.prefix_len()).ok()?;
    if address.is_v4() && prefix >= MAPPED_BITS {
        prefix -= MAPPED_BITS;
        return Cidr::new(address.into(), prefix);
    }
    // Not by way of IpAddr, which would take ::ffff:0:0/40 for IPv4.
    let words = address.words().map(u32::from_be);
    let bits = words.into_iter().fold(0_u128, |bits, word| bits << 32 | u128::from(word));
    Cidr::new(IpAddr::V6(bits.into()), prefix)
}

fn entry(rule: &Rule, expires_ns: u64, from_file: bool) -> RuleEntry {
    let mut entry = RuleEntry {
        expires_ns,
        length: length(rule.cidr),
        origin: if from_file { RuleOrigin::File } else { RuleOrigin::Command } as u8,
        ..RuleEntry::default()
    };
    match rule.action {
        Action::Allow => entry.action = RuleAction::Allow as u8,
        Action::Deny => entry.action = RuleAction::Deny as u8,
        Action::Limit(own) => {
            entry.action = RuleAction::Limit as u8;
            if let Some(connections) = own.connections_per_source {
                entry.own |= OWN_CONNECTIONS;
                entry.connections_per_source = connections;
            }
            if let Some((rate, burst)) = own.rate {
                entry.own |= OWN_RATE;
                (entry.connection_rate, entry.connection_burst) = (rate, burst);
                entry.rate = Rate::new(rate, burst);
            }
        }
    }
    entry
}

/// Whether the rule denies.
pub(super) fn is_deny(entry: &RuleEntry) -> bool {
    matches!(action(entry), Action::Deny)
}

/// Puts what a rule says in the place of a service's limits. Whom it denies, the programs keep out.
pub(super) fn apply(entry: &RuleEntry, limits: &mut Limits) {
    match action(entry) {
        Action::Allow => (limits.connections_per_source, limits.connections_total, limits.connection_rate) = (0, 0, 0),
        Action::Deny => {}
        Action::Limit(own) => {
            limits.connections_per_source = own.connections_per_source.unwrap_or(limits.connections_per_source);
            if let Some(rate) = own.rate {
                (limits.connection_rate, limits.connection_burst) = rate;
            }
        }
    }
}

/// `None` if it has ended.
fn from_entry(cidr: Cidr, entry: &RuleEntry, now: Duration) -> Option<RuleInForce> {
    let left = match entry.expires_ns {
        0 => None,
        expires_ns => Some(Duration::from_nanos(expires_ns).checked_sub(now).filter(|left| !left.is_zero())?),
    };
    Some(RuleInForce {
        rule: Rule { cidr, action: action(entry) },
        left,
        from_file: entry.origin == RuleOrigin::File as u8,
    })
}

fn action(entry: &RuleEntry) -> Action {
    if entry.action == RuleAction::Allow as u8 {
        Action::Allow
    } else if entry.action == RuleAction::Deny as u8 {
        Action::Deny
    } else {
        Action::Limit(OwnLimits {
            connections_per_source: (entry.own & OWN_CONNECTIONS != 0).then_some(entry.connections_per_source),
            rate: (entry.own & OWN_RATE != 0).then_some((entry.connection_rate, entry.connection_burst)),
        })
    }
}

/// As the programs count time.
pub(super) fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_comes_back_as_it_went_in() {
        let own = OwnLimits { connections_per_source: Some(0), rate: Some((10, 20)) };
        for cidr in ["192.0.2.0/24", "0.0.0.0/0", "::/0", "2001:db8::/32", "::fffe:0:0/95", "2001:db8::7/128"] {
            for action in [Action::Allow, Action::Deny, Action::Limit(own), Action::Limit(OwnLimits::default())] {
                let rule = Rule { cidr: cidr.parse().unwrap(), action };
                let entry = entry(&rule, 0, true);
                let found = from_entry(super::cidr(&key(rule.cidr)).unwrap(), &entry, Duration::ZERO).unwrap();
                assert_eq!(found, RuleInForce { rule, left: None, from_file: true });
            }
        }
    }

    #[test]
    fn a_rule_that_has_ended_is_none() {
        let rule = Rule { cidr: "192.0.2.0/24".parse().unwrap(), action: Action::Deny };
        let entry = entry(&rule, 5, false);
        assert_eq!(from_entry(rule.cidr, &entry, Duration::from_nanos(5)), None);
        let left = from_entry(rule.cidr, &entry, Duration::from_nanos(2)).unwrap().left;
        assert_eq!(left, Some(Duration::from_nanos(3)));
    }
}
