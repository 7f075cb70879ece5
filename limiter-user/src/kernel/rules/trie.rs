//! The two copies of the rules, element by element.

use aya::maps::{
    Map, MapData, MapError,
    lpm_trie::{Key, LpmTrie},
};
use limiter_common::{Address, abi, policy::InForce, rule::RuleEntry};

use super::entry::cidr;
use crate::kernel::{KernelError, error::Errno as _, maps::open, pins::Pins};

/// Both copies; a word says which of them is meant.
pub(super) struct Copies {
    copies: [LpmTrie<MapData, Address, RuleEntry>; 2],
    /// How many rules each has room for.
    room: u32,
}

impl Copies {
    /// Opens the pinned maps.
    pub(super) fn open(pins: &Pins) -> Result<Self, KernelError> {
        let copy = |name| open(&pins.map(name), Map::LpmTrie);
        let [first, second] = abi::MAP_RULES;
        let info =
            MapData::from_pin(pins.map(first)).and_then(|map| map.info()).map_err(KernelError::failed(NO_SIZE))?;
        Ok(Self { copies: [copy(first)?, copy(second)?], room: info.max_entries() })
    }

    /// How many rules there is room for.
    pub(super) fn room(&self) -> u32 {
        self.room
    }

    /// How many rules a copy has, ended or not.
    pub(super) fn count(&self, copy: InForce) -> Result<u64, KernelError> {
        let mut count = 0;
        for key in self.copies[copy.rules()].keys() {
            key.map_err(KernelError::failed(CANNOT_READ))?;
            count += 1;
            // Whoever changes rules all the while must not keep this going for ever.
            if count >= u64::from(self.room) {
                break;
            }
        }
        Ok(count)
    }

    /// Empties a copy, which must not be in force.
    pub(super) fn clear(&mut self, copy: InForce) -> Result<(), KernelError> {
        // Always from the start: the kernel has no place to go on from that is gone.
        loop {
            let first = self.copies[copy.rules()].keys().next();
            match first {
                None => return Ok(()),
                Some(key) => self.delete(copy, &key.map_err(KernelError::failed(CANNOT_READ))?)?,
            };
        }
    }

    /// Every rule of a copy.
    pub(super) fn entries(&self, in_force: InForce) -> Result<Vec<(Key<Address>, RuleEntry)>, KernelError> {
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
            if entries.len() > self.room as usize {
                break;
            }
        }
        Ok(entries)
    }

    /// The rule with the longest prefix around that of `key`, ended or not.
    pub(super) fn look_up(&self, in_force: InForce, key: &Key<Address>) -> Result<Option<RuleEntry>, KernelError> {
        match self.copies[in_force.rules()].get(key, 0) {
            Ok(entry) => Ok(Some(entry)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(KernelError::failed("can't look up a rule")(error)),
        }
    }

    /// Puts a rule into a copy, in the place of another of the same prefix.
    pub(super) fn insert(&mut self, copy: InForce, key: &Key<Address>, entry: &RuleEntry) -> Result<(), KernelError> {
        self.copies[copy.rules()].insert(key, entry, 0).map_err(|error| {
            if error.errno() == Some(libc::ENOSPC) {
                let room = self.room;
                return KernelError::TooManyRules { count: room as usize + 1, room };
            }
            let cidr = cidr(key).map_or_else(|| "a prefix".to_owned(), |cidr| cidr.to_string());
            KernelError::failed(format!("can't put the rule for {cidr} in force"))(error)
        })
    }

    /// Takes a rule out of a copy. `false` if there is none of that prefix.
    pub(super) fn delete(&mut self, copy: InForce, key: &Key<Address>) -> Result<bool, KernelError> {
        match self.copies[copy.rules()].remove(key) {
            Ok(()) => Ok(true),
            Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(MapError::KeyNotFound) => Ok(false),
            Err(error) => Err(KernelError::failed("can't take a rule away")(error)),
        }
    }
}

const CANNOT_READ: &str = "can't read the rules";
const NO_SIZE: &str = "can't tell how many rules there is room for";
