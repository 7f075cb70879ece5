//! Limits as the kernel programs read them, and which of two copies they are to read.

use crate::{Address, abi::MAX_SERVICES, bucket::Rate};

/// The limits of one service. Read by the kernel programs at every SYN and every handshake, and never written where they
/// read ([`InForce`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct ServicePolicy {
    /// Connections that one source may hold; 0: any number.
    pub connections_per_source: u32,
    /// Connections that one source of the wider tier may hold; 0: any number.
    pub connections_per_wide_source: u32,
    /// Connections that the service may hold in all; 0: any number.
    pub connections_total: u32,
    /// Connections that all services may hold together; 0: any number. The same in each.
    pub connections_total_all: u32,
    /// Length of the prefix that makes a source of an IPv4 address, 1 to 32.
    pub ipv4_prefix: u8,
    /// Length of the prefix that makes a source of an IPv6 address, 1 to 128.
    pub ipv6_prefix: u8,
    /// Length of the prefix that makes a source of the wider tier of an IPv4 address, shorter than `ipv4_prefix`; 0: there
    /// is no such tier.
    pub wide_ipv4_prefix: u8,
    /// The same for IPv6.
    pub wide_ipv6_prefix: u8,
    /// An [`OnDeny`].
    pub on_deny: u8,
    /// An [`OnFull`].
    pub on_full: u8,
    /// 1: some of its sockets are not where its packets seem to go, but behind a translation, or in another network namespace; 0: none.
    /// Who answers a SYN in the name of a socket here may then answer for the wrong one.
    pub is_elsewhere: u8,
    /// Always 0.
    pub reserved: u8,
    /// New connections per second that one source may open; 0: any number. For user space; the programs go by `rate`.
    pub connection_rate: u32,
    /// How many of them it may open at once. For user space, like `connection_rate`.
    pub connection_burst: u32,
    /// New connections per second that the service takes; 0: any number. For user space; the programs go by
    /// `service_rate`.
    pub service_connection_rate: u32,
    /// How many of them it takes at once. For user space, like `service_connection_rate`.
    pub service_connection_burst: u32,
    /// The bucket of new connections of each source: [`Rate::new`] of its two numbers.
    pub rate: Rate,
    /// The service's own bucket of new connections.
    pub service_rate: Rate,
    /// The service's name in UTF-8, filled up with zeros; for user space alone. All zero: there is no such service.
    pub name: ServiceName,
}

impl ServicePolicy {
    /// Length of the prefix of the wider source that `address` belongs to; 0: there is no such tier for its family.
    #[inline(always)]
    pub const fn wide_prefix(&self, address: &Address) -> u8 {
        if address.is_v4() { self.wide_ipv4_prefix } else { self.wide_ipv6_prefix }
    }
}

/// Which copy of the policy is in force.
///
/// There are two copies of each part: of the limits of the services, of the services of the ports, and of the rules. A
/// program reads this word once for a packet and goes by what it says. User space writes into the copies that nobody reads,
/// waits until every program has ended that may have looked there before, and then writes this word: no packet meets half of
/// a change. A rule by itself is put into the copy that is in force, or taken out of it, in one step of the trie's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct InForce(pub u64);

impl InForce {
    /// Which copy of the limits is in force.
    const LIMITS: u64 = 1;
    /// Which copy of the ports' services is in force.
    const PORTS: u64 = 2;
    /// Which copy of the rules is in force.
    const RULES: u64 = 4;
    /// Set if there may be a rule in that copy: nobody pays for what is not used.
    const HAS_RULES: u64 = 8;
    /// Counts the changes, so that who reads several parts by system calls can tell that he has read one policy. The
    /// programs go by the lowest byte alone, which can't be read half-written.
    const CHANGE: u64 = 1 << 8;

    /// Where the limits of a service are.
    #[inline(always)]
    pub const fn place_of(self, service: u16) -> u32 {
        let copy = (self.0 & Self::LIMITS) as u32;
        copy * MAX_SERVICES + service as u32
    }

    /// The service of a port, from the port's word: in each half that of one copy, plus 1, and what a [`Port`] says besides; 0 for
    /// none.
    #[inline(always)]
    pub const fn service(self, word: u32) -> Option<u16> {
        let half = self.half(word) & !Port::NOT_HERE;
        if half == 0 { None } else { Some(((half - 1) & 0xffff) as u16) }
    }

    #[inline(always)]
    const fn half(self, word: u32) -> u32 {
        if self.0 & Self::PORTS == 0 { word & 0xffff } else { word >> 16 }
    }

    /// The same, but none where no packet is for a socket of this port in this namespace ([`Port::is_not_here`]).
    #[inline(always)]
    pub const fn service_here(self, word: u32) -> Option<u16> {
        let half = self.half(word);
        if half.wrapping_sub(1) >= Port::NOT_HERE - 1 { None } else { Some(((half - 1) & 0xffff) as u16) }
    }

    /// All that a port's word says in the copy in force.
    pub const fn port(self, word: u32) -> Option<Port> {
        match self.service(word) {
            None => None,
            Some(service) => Some(Port { service, is_not_here: self.half(word) & Port::NOT_HERE != 0 }),
        }
    }

    /// The service that counts sockets of a port, from the port's word in [`crate::abi::MAP_SOCKET_PORTS`].
    #[inline(always)]
    pub const fn service_of_socket(self, word: u64, is_own: bool) -> Option<u16> {
        let half = if self.0 & Self::PORTS == 0 { (word & 0xffff_ffff) as u32 } else { (word >> 32) as u32 };
        let number = if is_own { half & 0xffff } else { half >> 16 };
        if number == 0 { None } else { Some(((number - 1) & 0xffff) as u16) }
    }

    /// Which copy of the rules is in force, 0 or 1.
    #[inline(always)]
    pub const fn rules(self) -> usize {
        if self.0 & Self::RULES == 0 { 0 } else { 1 }
    }

    /// Whether there may be a rule.
    #[inline(always)]
    pub const fn has_rules(self) -> bool {
        self.0 & Self::HAS_RULES != 0
    }

    /// With the other copy of the limits in force.
    #[must_use]
    pub const fn other_limits(self) -> Self {
        Self(self.0 ^ Self::LIMITS)
    }

    /// With the other copy of the ports' services in force.
    #[must_use]
    pub const fn other_ports(self) -> Self {
        Self(self.0 ^ Self::PORTS)
    }

    /// With the other copy of the rules in force.
    #[must_use]
    pub const fn other_rules(self) -> Self {
        Self(self.0 ^ Self::RULES)
    }

    /// With rules to be looked up, or none.
    #[must_use]
    pub const fn with_rules(self, rules: bool) -> Self {
        Self(self.0 & !Self::HAS_RULES | if rules { Self::HAS_RULES } else { 0 })
    }

    /// The word that says the same and is not equal to any of the last 2^56.
    #[must_use]
    pub const fn changed(self) -> Self {
        Self(self.0.wrapping_add(Self::CHANGE))
    }

    /// A port's word with that in this copy, and whatever it had in the other.
    #[must_use]
    pub const fn with_port(self, word: u32, port: Option<Port>) -> u32 {
        let half = match port {
            Some(port) => (port.service as u32 + 1) | if port.is_not_here { Port::NOT_HERE } else { 0 },
            None => 0,
        };
        if self.0 & Self::PORTS == 0 { word & 0xffff_0000 | half } else { word & 0xffff | half << 16 }
    }

    /// The word of a port of sockets with these services in this copy, and whatever it had in the other.
    #[must_use]
    pub const fn with_sockets(self, word: u64, own: Option<u16>, others: Option<u16>) -> u64 {
        let half = number(own) | number(others) << 16;
        if self.0 & Self::PORTS == 0 { word & !0xffff_ffff | half } else { word & 0xffff_ffff | half << 32 }
    }
}

/// A service's index plus 1; 0 for none.
const fn number(service: Option<u16>) -> u64 {
    match service {
        Some(service) => service as u64 + 1,
        None => 0,
    }
}

/// A port of packets, as the programs of admission know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Port {
    /// The index of its service.
    pub service: u16,
    /// None of its packets is for a socket of this port in this namespace. There is no need to look for one.
    pub is_not_here: bool,
}

impl Port {
    /// In each half of a port's word. Indexes of services are far below.
    const NOT_HERE: u32 = 1 << 15;

    /// One whose sockets are all here.
    pub const fn here(service: u16) -> Self {
        Self { service, is_not_here: false }
    }
}

/// What a refused SYN gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum OnDeny {
    /// Nothing: the packet is dropped.
    Drop = 0,
    /// A RST, as long as there are not more than [`RESET_RATE`] of them; past that, nothing.
    Reset = 1,
    /// It is counted and passes.
    Observe = 2,
}

/// How many RSTs a service answers refused SYNs with: a thousand a second, and as many at once. A client that is told
/// spares itself the wait; a flood, whose source addresses may be anybody's, is not to be answered one for one.
pub const RESET_RATE: Rate = Rate::new(1000, 1000);

/// What happens to a connection that the ledger has no room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum OnFull {
    /// It passes, uncounted.
    Open = 0,
    /// It is refused.
    Closed = 1,
}

/// What a service holds, whatever the limits are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct ServiceState {
    /// Ledger entries of the service. Changed by atomic operations only.
    pub connections: u64,
    /// Sources that hold one of them. Changed by atomic operations only.
    pub sources: u64,
    /// Those connections that the stack has yet to confirm; may be one or two off for a moment. Changed by atomic operations
    /// only.
    pub unconfirmed: u64,
    /// When reservations were last looked through for this service's sake, in nanoseconds of `CLOCK_MONOTONIC` (to a
    /// jiffy).
    pub expired_ns: u64,
    /// When the last refusal because the service was full was reported, in jiffies (`bpf_jiffies64`); 0: never.
    pub reported_jiffies: u64,
    /// Such refusals since then that were not reported; a few may be missing where several CPUs refuse at once.
    pub unreported: u64,
    /// The word of the [`crate::bucket`] of [`RESET_RATE`].
    pub resets_ns: u64,
    /// The word of the service's own [`bucket`](crate::bucket) of new connections. Changed by atomic operations only.
    pub bucket: u64,
}

/// A service's name as it lies in a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct ServiceName(pub [u8; SERVICE_NAME_BYTES]);

impl Default for ServiceName {
    fn default() -> Self {
        Self([0; SERVICE_NAME_BYTES])
    }
}

/// Longest name of a service, in bytes.
pub const SERVICE_NAME_BYTES: usize = 64;

/// One number that is at its limit or past it. A limit of 0 is none.
#[inline(always)]
pub const fn at_limit(count: u64, limit: u32) -> bool {
    limit != 0 && count >= limit as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_part_has_two_copies_and_changes_by_itself() {
        let first = InForce::default();
        assert_eq!((first.place_of(3), first.rules(), first.has_rules()), (3, 0, false));
        let limits = first.other_limits().changed();
        assert_eq!((limits.place_of(3), limits.rules(), limits.has_rules()), (MAX_SERVICES + 3, 0, false));
        let rules = limits.other_rules().with_rules(true);
        assert_eq!((rules.place_of(3), rules.rules(), rules.has_rules()), (MAX_SERVICES + 3, 1, true));
        let back = rules.other_rules().with_rules(false).other_limits();
        assert_eq!(back, first.changed());
    }

    #[test]
    fn a_port_has_a_service_in_each_copy() {
        let first = InForce::default();
        let second = first.other_ports();
        for (one, other) in [(None, Some(0)), (Some(63), Some(5)), (Some(7), None), (None, None)] {
            let [one_port, other_port] = [one, other].map(|service| service.map(Port::here));
            let word = second.with_port(first.with_port(0xdead_beef, one_port), other_port);
            assert_eq!((first.service(word), second.service(word)), (one, other));
            assert_eq!((first.service_here(word), second.service_here(word)), (one, other));
            let word = first.with_port(word, one_port.map(|port| Port { is_not_here: true, ..port }));
            assert_eq!((first.service(word), second.service(word)), (one, other));
            assert_eq!((first.service_here(word), second.service_here(word)), (None, other));
        }
    }

    #[test]
    fn a_port_of_sockets_has_services_here_and_in_other_namespaces_in_each_copy() {
        let first = InForce::default();
        let second = first.other_ports();
        for (own, others) in [(None, Some(0)), (Some(63), Some(5)), (Some(7), None), (None, None)] {
            let word = second.with_sockets(first.with_sockets(0xdead_beef_dead_beef, own, others), others, own);
            assert_eq!((first.service_of_socket(word, true), first.service_of_socket(word, false)), (own, others));
            assert_eq!((second.service_of_socket(word, true), second.service_of_socket(word, false)), (others, own));
        }
    }
}

#[cfg(feature = "user")]
mod host {
    use super::{SERVICE_NAME_BYTES, ServiceName, ServicePolicy, ServiceState};

    // SAFETY: repr(C), integers only, padding spelled out, every bit pattern valid.
    unsafe impl aya::Pod for ServicePolicy {}
    // SAFETY: repr(C), integers only, no padding, every bit pattern valid.
    unsafe impl aya::Pod for ServiceState {}

    impl ServiceName {
        /// `None` if the name is longer than [`SERVICE_NAME_BYTES`].
        pub fn new(name: &str) -> Option<Self> {
            let mut bytes = [0; SERVICE_NAME_BYTES];
            bytes.get_mut(..name.len())?.copy_from_slice(name.as_bytes());
            Some(Self(bytes))
        }

        /// Whether this is the name of no service.
        pub fn is_empty(&self) -> bool {
            self.0[0] == 0
        }

        /// The name; what is not UTF-8 is replaced.
        pub fn to_string_lossy(&self) -> String {
            let end = self.0.iter().position(|&byte| byte == 0).unwrap_or(self.0.len());
            String::from_utf8_lossy(&self.0[..end]).into_owned()
        }
    }
}
