//! The rules in force, as typed methods of their map.

use std::{collections::HashMap, fmt, net::IpAddr, time::Duration};

use aya::maps::{
    Map, MapData, MapError,
    lpm_trie::{Key, LpmTrie},
};
use limiter_common::{
    Address, abi,
    bucket::Rate,
    policy::InForce,
    rule::{MAPPED_BITS, OWN_CONNECTIONS, OWN_RATE, OWN_WIDE_CONNECTIONS, RuleAction, RuleEntry, RuleOrigin},
};

use super::{KernelError, copies::Word, error::Errno as _, host, maps::open, pins::Pins};
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
    in_force: Word,
    copies: [Trie; 2],
    pins: Pins,
}

type Trie = LpmTrie<MapData, Address, RuleEntry>;

/// What a rule lies under: the length of its prefix, and its first address.
type Place = (u32, Address);

impl fmt::Debug for Rules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rules").finish_non_exhaustive()
    }
}

impl Rules {
    /// Opens the pinned maps.
    pub(super) fn open(pins: &Pins) -> Result<Self, KernelError> {
        let copy = |name| open(&pins.map(name), Map::LpmTrie);
        let [first, second] = abi::MAP_RULES;
        Ok(Self { in_force: Word::open(pins)?, copies: [copy(first)?, copy(second)?], pins: pins.clone() })
    }

    /// Every rule that has not ended, by address.
    pub fn all(&self) -> Result<Vec<RuleInForce>, KernelError> {
        let now = host::monotonic();
        let entries = self.in_force.read_with(|in_force| self.entries(in_force))?;
        let mut rules: Vec<_> = entries.iter().filter_map(|(key, entry)| from_entry(cidr(key)?, entry, now)).collect();
        rules.sort_by_key(|rule| rule.rule.cidr);
        Ok(rules)
    }

    /// The rule of exactly that prefix, if it has not ended.
    pub fn get(&self, cidr: Cidr) -> Result<Option<RuleInForce>, KernelError> {
        let key = key(cidr);
        let entry = self.in_force.read_with(|in_force| self.look_up(in_force, &key))?;
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
            let Some(entry) = self.look_up(in_force, &key)? else { return Ok(None) };
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
        let _lock = self.pins.lock_policy()?;
        let in_force = self.in_force.read()?;
        if !in_force.has_rules() {
            self.in_force.write(in_force.with_rules(true))?;
        }
        self.insert(in_force.rules(), &key(rule.cidr), &entry(rule, expires_ns, from_file))
    }

    /// Takes a rule away. `false` if there is none of that prefix.
    pub fn remove(&mut self, cidr: Cidr) -> Result<bool, KernelError> {
        let _lock = self.pins.lock_policy()?;
        let copy = self.in_force.read()?.rules();
        self.delete(copy, &key(cidr))
    }

    /// Removes what has ended. The programs do without, but every look-up that meets one looks twice.
    pub fn remove_ended(&mut self) -> Result<(), KernelError> {
        let _lock = self.pins.lock_policy()?;
        let now = nanoseconds(host::monotonic());
        let in_force = self.in_force.read()?;
        for (key, entry) in self.entries(in_force)? {
            if has_ended(&entry, now) {
                self.delete(in_force.rules(), &key)?;
            }
        }
        Ok(())
    }

    /// Writes the rules of the configuration file, and those of commands that are in force, into the copy that is not. Where
    /// the file has a rule of the same prefix as a command's, it is the file's. Says whether there is any; `None`: they are
    /// those in force, and nothing is to be done.
    pub(super) fn prepare(&mut self, in_force: InForce, rules: &[Rule]) -> Result<Option<bool>, KernelError> {
        let now = nanoseconds(host::monotonic());
        let known: HashMap<Place, RuleEntry> =
            self.entries(in_force)?.into_iter().map(|(key, entry)| (place(&key), entry)).collect();
        let mut wanted: HashMap<Place, RuleEntry> = known
            .iter()
            .filter(|(_, entry)| entry.origin == RuleOrigin::Command as u8 && !has_ended(entry, now))
            .map(|(place, entry)| (*place, *entry))
            .collect();
        wanted.extend(rules.iter().map(|rule| (place(&key(rule.cidr)), entry(rule, 0, true))));
        if wanted == known {
            return Ok(None);
        }
        if wanted.len() > abi::MAX_RULES as usize {
            return Err(KernelError::TooManyRules { count: wanted.len(), room: abi::MAX_RULES });
        }
        let other = in_force.other_rules();
        // Left over from a change that died half-way.
        self.clear(other)?;
        for (&(length, address), entry) in &wanted {
            if let Err(error) = self.insert(other.rules(), &Key::new(length, address), entry) {
                // The first error is the one to tell; what is left is cleared by the next change.
                let _ = self.clear(other);
                return Err(error);
            }
        }
        Ok(Some(!wanted.is_empty()))
    }

    /// Empties the copy that this word says, which must not be in force.
    pub(super) fn clear(&mut self, copy: InForce) -> Result<(), KernelError> {
        // Always from the start: the kernel has no place to go on from that is gone.
        loop {
            let first = self.copies[copy.rules()].keys().next();
            match first {
                None => return Ok(()),
                Some(key) => self.delete(copy.rules(), &key.map_err(KernelError::failed(CANNOT_READ))?)?,
            };
        }
    }

    fn entries(&self, in_force: InForce) -> Result<Vec<(Key<Address>, RuleEntry)>, KernelError> {
        let mut entries = Vec::new();
        for key in self.copies[in_force.rules()].keys() {
            let key = key.map_err(KernelError::failed(CANNOT_READ))?;
            // One that went meanwhile may lie in another.
            if let Some(entry) = self.look_up(in_force, &key)?
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

    fn look_up(&self, in_force: InForce, key: &Key<Address>) -> Result<Option<RuleEntry>, KernelError> {
        match self.copies[in_force.rules()].get(key, 0) {
            Ok(entry) => Ok(Some(entry)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(KernelError::failed("can't look up a rule")(error)),
        }
    }

    fn insert(&mut self, copy: usize, key: &Key<Address>, entry: &RuleEntry) -> Result<(), KernelError> {
        self.copies[copy].insert(key, entry, 0).map_err(|error| {
            if error.errno() == Some(libc::ENOSPC) {
                let room = abi::MAX_RULES;
                return KernelError::TooManyRules { count: room as usize + 1, room };
            }
            let cidr = cidr(key).map_or_else(|| "a prefix".to_owned(), |cidr| cidr.to_string());
            KernelError::failed(format!("can't put the rule for {cidr} in force"))(error)
        })
    }

    fn delete(&mut self, copy: usize, key: &Key<Address>) -> Result<bool, KernelError> {
        match self.copies[copy].remove(key) {
            Ok(()) => Ok(true),
            Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(MapError::KeyNotFound) => Ok(false),
            Err(error) => Err(KernelError::failed("can't take a rule away")(error)),
        }
    }
}

const CANNOT_READ: &str = "can't read the rules";

fn has_ended(entry: &RuleEntry, now_ns: u64) -> bool {
    entry.expires_ns != 0 && entry.expires_ns <= now_ns
}

fn key(cidr: Cidr) -> Key<Address> {
    Key::new(length(cidr).into(), cidr.address().into())
}

/// The length of a prefix in the 16-byte form of its addresses.
fn length(cidr: Cidr) -> u8 {
    if cidr.address().is_ipv4() { cidr.prefix() + MAPPED_BITS } else { cidr.prefix() }
}

fn place(key: &Key<Address>) -> Place {
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
            if let Some(connections) = own.connections_per_wide_source {
                entry.own |= OWN_WIDE_CONNECTIONS;
                entry.connections_per_wide_source = connections;
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

/// Whether the rule lets past every limit.
pub(super) fn is_allow(entry: &RuleEntry) -> bool {
    matches!(action(entry), Action::Allow)
}

/// Whether the rule denies.
pub(super) fn is_deny(entry: &RuleEntry) -> bool {
    matches!(action(entry), Action::Deny)
}

/// Puts what a rule says in the place of a service's limits. Whom it denies, the programs keep out.
pub(super) fn apply(entry: &RuleEntry, limits: &mut Limits) {
    apply_action(&action(entry), limits);
}

/// A service's limits with what a rule says in their place.
pub(super) fn with_rule(mut limits: Limits, rule: Option<&Rule>) -> Limits {
    if let Some(rule) = rule {
        apply_action(&rule.action, &mut limits);
    }
    limits
}

/// Of rules that are sorted, that which holds for the whole of a prefix.
pub(super) fn around(rules: &[RuleInForce], network: Cidr) -> Option<&RuleInForce> {
    let place = |cidr: Cidr| rules.binary_search_by_key(&cidr, |rule| rule.rule.cidr).ok();
    (0..=network.prefix())
        .rev()
        .filter_map(|prefix| Cidr::new(network.address(), prefix))
        .find_map(place)
        .map(|place| &rules[place])
}

/// Of rules that are sorted, those for parts of a prefix.
pub(super) fn within(rules: &[RuleInForce], network: Cidr) -> &[RuleInForce] {
    let rest = &rules[rules.partition_point(|rule| rule.rule.cidr <= network)..];
    &rest[..rest.partition_point(|rule| network.contains(rule.rule.cidr))]
}

fn apply_action(action: &Action, limits: &mut Limits) {
    match action {
        Action::Allow => {
            *limits = Limits {
                connections_per_source: 0,
                connections_per_wide_source: 0,
                connections_total: 0,
                connections_total_all: 0,
                connection_rate: 0,
                service_connection_rate: 0,
                ..*limits
            }
        }
        Action::Deny => {}
        Action::Limit(own) => {
            limits.connections_per_source = own.connections_per_source.unwrap_or(limits.connections_per_source);
            limits.connections_per_wide_source =
                own.connections_per_wide_source.unwrap_or(limits.connections_per_wide_source);
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
            connections_per_wide_source: (entry.own & OWN_WIDE_CONNECTIONS != 0)
                .then_some(entry.connections_per_wide_source),
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
        let own =
            OwnLimits { connections_per_source: Some(0), connections_per_wide_source: Some(7), rate: Some((10, 20)) };
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
    fn the_rules_around_a_prefix_and_within_it_are_found() {
        let rule = |cidr: &str| RuleInForce {
            rule: Rule { cidr: cidr.parse().unwrap(), action: Action::Deny },
            left: None,
            from_file: false,
        };
        let mut rules = [
            "192.0.0.0/16",
            "192.0.2.0/24",
            "192.0.2.0/30",
            "192.0.2.7/32",
            "192.0.3.0/24",
            "::/0",
            "2001:db8::/32",
            "2001:db8::7/128",
        ]
        .map(rule);
        rules.sort_by_key(|rule| rule.rule.cidr);
        let text = |rules: &[RuleInForce]| rules.iter().map(|rule| rule.rule.cidr.to_string()).collect::<Vec<_>>();
        for (network, around_it, within_it) in [
            ("192.0.2.0/24", Some("192.0.2.0/24"), &["192.0.2.0/30", "192.0.2.7/32"][..]),
            ("192.0.2.0/25", Some("192.0.2.0/24"), &["192.0.2.0/30", "192.0.2.7/32"]),
            ("192.0.2.7/32", Some("192.0.2.7/32"), &[]),
            ("192.0.9.0/24", Some("192.0.0.0/16"), &[]),
            ("198.51.100.0/24", None, &[]),
            ("2001:db8::/64", Some("2001:db8::/32"), &["2001:db8::7/128"]),
            ("2001:db9::/64", Some("::/0"), &[]),
        ] {
            let network = network.parse().unwrap();
            let found = around(&rules, network).map(|rule| rule.rule.cidr.to_string());
            assert_eq!(found.as_deref(), around_it, "around {network}");
            assert_eq!(text(within(&rules, network)), within_it, "within {network}");
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
