//! Rules: what holds for a prefix of addresses, whatever the limits of the services are.
//!
//! All lie in one trie, IPv4 in its mapped form ([`crate::Address`]), and the longest prefix wins. A rule may end at a time;
//! the programs look at the clock themselves, so it ends without anybody's help, and the next shorter prefix holds again.

use crate::{Address, ServicePolicy, bucket::Rate};

/// The key of a rule in the trie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct RuleKey {
    /// How many bits of the address count, in its 16-byte form: 96 more than in its own for IPv4.
    pub length: u32,
    /// The first address of the prefix.
    pub address: Address,
}

/// How many bits of an IPv4 address in mapped form are the same for all of them.
pub const MAPPED_BITS: u8 = 96;

/// A rule as it lies in the trie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct RuleEntry {
    /// When it ends, in nanoseconds of `CLOCK_MONOTONIC`; 0: never.
    pub expires_ns: u64,
    /// With [`OWN_RATE`]: the bucket of new connections of each source.
    pub rate: Rate,
    /// With [`OWN_CONNECTIONS`]: connections that one source may hold; 0: any number.
    pub connections_per_source: u32,
    /// With [`OWN_RATE`]: new connections per second and source; 0: any number. For user space; the programs go by `rate`.
    pub connection_rate: u32,
    /// With [`OWN_RATE`]: how many of them at once. For user space.
    pub connection_burst: u32,
    /// With [`OWN_WIDE_CONNECTIONS`]: connections that one source of the wider tier may hold; 0: any number.
    pub connections_per_wide_source: u32,
    /// A [`RuleAction`].
    pub action: u8,
    /// [`OWN_CONNECTIONS`], [`OWN_WIDE_CONNECTIONS`] and [`OWN_RATE`]: which limits are the rule's own.
    pub own: u8,
    /// The [length](RuleKey::length) of its own key, which a look-up does not tell.
    pub length: u8,
    /// A [`RuleOrigin`]; for user space.
    pub origin: u8,
    /// Always 0.
    pub reserved: u32,
}

/// [`RuleEntry::own`]: it has a `connections_per_source` of its own.
pub const OWN_CONNECTIONS: u8 = 1;
/// [`RuleEntry::own`]: it has a `connections_per_wide_source` of its own.
pub const OWN_WIDE_CONNECTIONS: u8 = 4;
/// [`RuleEntry::own`]: it has a rate of its own.
pub const OWN_RATE: u8 = 2;

/// What a rule does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum RuleAction {
    /// It has limits of its own.
    Limit = 0,
    /// No limit holds; connections are counted all the same.
    Allow = 1,
    /// Nobody gets in.
    Deny = 2,
}

/// Who made a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum RuleOrigin {
    /// The configuration file: it goes when the file does not have it any more.
    File = 0,
    /// A command: it stays until it ends or is forgotten.
    Command = 1,
}

impl RuleKey {
    /// What to look up for an address: the rule with the longest prefix that it is in.
    #[inline(always)]
    pub const fn of(address: Address) -> Self {
        Self { length: 128, address }
    }

    /// The next thing to look up if this entry, found by this key, does not hold: the rule around it. `None`: there is none.
    #[inline(always)]
    #[must_use]
    pub const fn around(self, entry: &RuleEntry) -> Option<Self> {
        if entry.length == 0 { None } else { Some(Self { length: entry.length as u32 - 1, address: self.address }) }
    }
}

impl RuleEntry {
    /// Whether it holds for an address that it was found for. `now_ns` is asked for only if it matters.
    #[inline(always)]
    pub fn holds(&self, address: &Address, now_ns: impl FnOnce() -> u64) -> bool {
        // A prefix that has IPv4 addresses in it only because they are written as IPv6 ones, such as ::/0.
        if self.length < MAPPED_BITS && address.is_v4() {
            return false;
        }
        self.expires_ns == 0 || now_ns() < self.expires_ns
    }
}

/// The limits that hold for one address, the service's and the rule's together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Effective {
    /// Not 0: nobody gets in. A number, because the programs hand it from one to the other.
    pub denied: u32,
    /// Connections that its source may hold; 0: any number.
    pub connections_per_source: u32,
    /// Connections that its source of the wider tier may hold; 0: any number.
    pub connections_per_wide_source: u32,
    /// Not 0: the limits of the service as a whole, and of all services, hold for it as for others.
    pub of_service: u32,
    /// The bucket of new connections of its source.
    pub rate: Rate,
}

impl Effective {
    /// What a service's limits and the rule that holds come to.
    #[inline(always)]
    pub const fn new(policy: &ServicePolicy, rule: Option<&RuleEntry>) -> Self {
        let mut limits = Self {
            denied: 0,
            connections_per_source: policy.connections_per_source,
            connections_per_wide_source: policy.connections_per_wide_source,
            of_service: 1,
            rate: policy.rate,
        };
        if let Some(rule) = rule {
            if rule.action == RuleAction::Allow as u8 {
                limits.connections_per_source = 0;
                limits.connections_per_wide_source = 0;
                limits.of_service = 0;
                limits.rate.token_ns = 0;
            } else if rule.action == RuleAction::Deny as u8 {
                limits.denied = 1;
            } else {
                if rule.own & OWN_CONNECTIONS != 0 {
                    limits.connections_per_source = rule.connections_per_source;
                }
                if rule.own & OWN_WIDE_CONNECTIONS != 0 {
                    limits.connections_per_wide_source = rule.connections_per_wide_source;
                }
                if rule.own & OWN_RATE != 0 {
                    limits.rate = rule.rate;
                }
            }
        }
        limits
    }
}

#[cfg(feature = "user")]
// SAFETY: repr(C), integers only, no padding, every bit pattern valid.
unsafe impl aya::Pod for RuleEntry {}
