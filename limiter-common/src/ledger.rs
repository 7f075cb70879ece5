//! The ledger: one entry per connection that is counted.
//!
//! A count changes only together with an entry: whoever adds an entry adds one to its source and its service, whoever
//! removes it takes one away. An entry has an [owner](LedgerEntry::owner), and to remove it is to swap that owner for
//! [`OWNER_REMOVED`] in one atomic step, so of any number of hands that try, one succeeds.

use crate::{Address, SourceKey};

/// Both ends of a TCP connection, from the point of view of the host that accepted it. Addresses mean something in one network
/// namespace, so it is among them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Endpoints {
    /// The client.
    pub remote: Address,
    /// The address it connected to.
    pub local: Address,
    /// The client's port, in host order.
    pub remote_port: u16,
    /// The port that its socket has, in host order.
    pub local_port: u16,
    /// The network namespace that its socket is in.
    pub netns: Netns,
}

impl Endpoints {
    /// The key of the connection's entry.
    #[inline(always)]
    pub const fn key(&self, secret: &TagSecret) -> ConnectionKey {
        if !self.netns.is_own() {
            return ConnectionKey::of_other(self, secret);
        }
        let ports = ports_word(self.remote_port, self.local_port);
        if self.remote.is_v4() {
            ConnectionKey::of_v4(self.remote.v4_word(), self.local.v4_word(), ports)
        } else {
            ConnectionKey::of_v6(&self.remote.words(), &self.local.words(), ports, secret)
        }
    }
}

/// The key of a connection's entry in the ledger: twelve bytes for both families.
///
/// To hash and compare the key is most of what a packet of an open connection costs. That of an IPv4 connection is its
/// addresses and ports. The addresses of an IPv6 connection stand in it as a tag of 60 bits, and whole in the
/// [entry](LedgerEntry::remote). The tag is made with a [secret](TagSecret), so nobody can look for two connections that
/// have the same one; by chance two of the same ports do once in 2^60. The second then finds no room.
///
/// A connection of another network namespace than the programs of admission work in may have the addresses and ports of one
/// in theirs. All of it but the client's port is in a tag of 64 bits, with the namespace, and in the place of its own port there
/// is 0: no service has that, so nobody looks such a key up for a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct ConnectionKey {
    /// IPv4: the client's address and the one that it connected to, in network order. IPv6: the tag.
    addresses: [u32; 2],
    /// The client's port and the service's (or 0), in network order, as they lie in a TCP header.
    ports: u32,
}

/// In the first word of an IPv6 connection's tag: what tells it from an address. 224.0.0.0/4 is for multicast, so it never is
/// the address of a client.
const TAG_MARK: u32 = 0xe000_0000_u32.to_be();
const TAG_MARK_MASK: u32 = 0xf000_0000_u32.to_be();

impl ConnectionKey {
    /// From the words of the packet's headers, in memory order.
    #[inline(always)]
    pub const fn of_v4(remote: u32, local: u32, ports: u32) -> Self {
        Self { addresses: [remote, local], ports }
    }

    /// From the words of the packet's headers, in memory order.
    ///
    /// The tag is a sum of products modulo 2^64, of which two different pairs of addresses have the same with a chance of
    /// 2^-29 at most, whatever the pairs are, as long as the secret is one (multilinear hashing; Carter and Wegman 1979).
    #[expect(clippy::cast_possible_truncation, reason = "both halves are taken")]
    #[inline(always)]
    pub const fn of_v6(remote: &[u32; 4], local: &[u32; 4], ports: u32, secret: &TagSecret) -> Self {
        let sum = tag(remote, local, secret);
        Self { addresses: [(sum >> 32) as u32 & !TAG_MARK_MASK | TAG_MARK, sum as u32], ports }
    }

    /// That of a connection of another namespace.
    #[expect(clippy::cast_possible_truncation, reason = "both halves are taken")]
    #[inline(always)]
    const fn of_other(ends: &Endpoints, secret: &TagSecret) -> Self {
        let sum = tag(&ends.remote.words(), &ends.local.words(), secret)
            .wrapping_add(secret.0[8].wrapping_mul(ends.netns.0[0] as u64))
            .wrapping_add(secret.0[9].wrapping_mul(ends.netns.0[1] as u64))
            .wrapping_add(secret.0[10].wrapping_mul(ends.local_port as u64));
        Self { addresses: [(sum >> 32) as u32, sum as u32], ports: ports_word(ends.remote_port, 0) }
    }

    /// The number that stands for the connection among those that were seen lately ([`crate::abi::MAP_FLOWS`]); never 0.
    ///
    /// Two keys have the same one with a chance of 2^-46 at most if they are of the same service, and of 2^-62 if the client's port is
    /// the same, too: to multiply by an odd number is to permute, and the product with a random number is spread over as many
    /// values as there are bits above the lowest in which the ports differ.
    #[inline(always)]
    pub const fn flow(&self, secret: &TagSecret) -> u64 {
        let addresses = self.addresses[0] as u64 | (self.addresses[1] as u64) << 32;
        let ports = self.ports as u64;
        addresses.wrapping_mul(secret.0[11] | 1).wrapping_add(ports.wrapping_mul(secret.0[12])) | 1
    }

    /// The client's port, in host order.
    #[inline(always)]
    pub const fn remote_port(&self) -> u16 {
        let [a, b, _, _] = self.ports.to_ne_bytes();
        u16::from_be_bytes([a, b])
    }

    /// The service's port, in host order; 0 if the connection is one of another namespace.
    #[inline(always)]
    pub const fn local_port(&self) -> u16 {
        let [_, _, a, b] = self.ports.to_ne_bytes();
        u16::from_be_bytes([a, b])
    }
}

/// The sum that tags are cut from.
#[inline(always)]
const fn tag(remote: &[u32; 4], local: &[u32; 4], secret: &TagSecret) -> u64 {
    let mut sum = 0_u64;
    let mut word = 0;
    while word < 4 {
        sum = sum
            .wrapping_add(secret.0[word].wrapping_mul(remote[word] as u64))
            .wrapping_add(secret.0[4 + word].wrapping_mul(local[word] as u64));
        word += 1;
    }
    sum
}

/// Both ports as they lie in a TCP header.
#[inline(always)]
const fn ports_word(remote: u16, local: u16) -> u32 {
    let ([a, b], [c, d]) = (remote.to_be_bytes(), local.to_be_bytes());
    u32::from_ne_bytes([a, b, c, d])
}

/// A network namespace, as seen from the one that limiter was attached in: its cookie (`SO_NETNS_COOKIE`, never used again as
/// long as the host runs), or 0 for that one itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Netns([u32; 2]);

impl Netns {
    /// The namespace that limiter was attached in.
    pub const OWN: Self = Self([0; 2]);

    /// That of this cookie, which is not the one that limiter was attached in.
    #[expect(clippy::cast_possible_truncation, reason = "both halves are taken")]
    #[inline(always)]
    pub const fn other(cookie: u64) -> Self {
        Self([cookie as u32, (cookie >> 32) as u32])
    }

    /// Its cookie; 0 for the one that limiter was attached in.
    #[inline(always)]
    pub const fn cookie(self) -> u64 {
        self.0[0] as u64 | (self.0[1] as u64) << 32
    }

    /// Whether it is the one that limiter was attached in.
    #[inline(always)]
    pub const fn is_own(self) -> bool {
        self.0[0] == 0 && self.0[1] == 0
    }
}

/// What the tags are made with: random numbers, chosen once for a ledger, and known to nobody else. Eight for the addresses, two
/// for the namespace, one for the port; and two for [`ConnectionKey::flow`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct TagSecret(pub [u64; 13]);

/// What the ledger holds of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct LedgerEntry {
    /// Who may remove the entry: [`reservation_owner`] until the stack confirms the connection, then the cookie of its
    /// socket (`SO_COOKIE`, `bpf_get_socket_cookie`), and [`OWNER_REMOVED`] once somebody has begun to remove it.
    pub owner: u64,
    /// When the entry was made, in nanoseconds of `CLOCK_MONOTONIC`.
    pub opened_ns: u64,
    /// The source that it counts against. Kept here, because the prefix lengths can change while it is open.
    pub source: SourceKey,
    /// [`FLAG_ADOPTED`], [`FLAG_PAST_LIMIT`]; set when the entry is made.
    pub flags: u8,
    /// Length of the prefix of the wider source that it counts against, too; 0: of none.
    pub wide_prefix: u8,
    /// The port of its socket, in host order.
    pub local_port: u16,
    /// The client.
    pub remote: Address,
    /// The address that it connected to.
    pub local: Address,
    /// The network namespace of its socket.
    pub netns: Netns,
}

impl LedgerEntry {
    /// Whether it is the entry of that connection, and not that of another with the same key.
    #[inline(always)]
    pub fn is_of(&self, connection: &Endpoints) -> bool {
        self.remote == connection.remote
            && self.local == connection.local
            && self.local_port == connection.local_port
            && self.netns == connection.netns
    }

    /// Both ends of its connection, of which the client's port is in the key alone.
    #[inline(always)]
    pub const fn ends(&self, key: &ConnectionKey) -> Endpoints {
        Endpoints {
            remote: self.remote,
            local: self.local,
            remote_port: key.remote_port(),
            local_port: self.local_port,
            netns: self.netns,
        }
    }

    /// The source of the wider tier that it counts against, if it does.
    #[inline(always)]
    pub const fn wide_source(&self) -> Option<SourceKey> {
        if self.wide_prefix == 0 {
            return None;
        }
        Some(SourceKey::wide(self.source.service, &self.remote, self.wide_prefix))
    }
}

/// In [`LedgerEntry::flags`]: the connection was open before the limiter was attached. It is never cut.
pub const FLAG_ADOPTED: u8 = 1;

/// In [`LedgerEntry::flags`]: the connection got past XDP and past its limits, and is to be cut.
pub const FLAG_PAST_LIMIT: u8 = 2;

/// A slot that was reserved when a handshake completed and that the stack has yet to confirm.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Reservation {
    /// The entry.
    pub key: ConnectionKey,
    /// Always 0.
    pub reserved: u32,
    /// The owner that it was made with; any other means that it was confirmed or removed since.
    pub owner: u64,
    /// When it was made, in nanoseconds of `CLOCK_MONOTONIC`.
    pub opened_ns: u64,
}

/// [`LedgerEntry::owner`] of an entry that is being removed.
pub const OWNER_REMOVED: u64 = u64::MAX;

/// Set in [`LedgerEntry::owner`] as long as the stack has not confirmed the connection. Socket cookies count up from 1
/// and never get here.
pub const OWNER_RESERVED: u64 = 1 << 63;

/// How long a reservation waits for the stack, in nanoseconds. Confirmation follows within microseconds on a host that
/// keeps up; what is lost on the way (a full accept queue) comes back with the client's next segment and is reserved anew.
pub const RESERVATION_NS: u64 = 3_000_000_000;

/// Least time between two looks through the reservations on behalf of refused SYNs, in nanoseconds.
pub const EXPIRE_INTERVAL_NS: u64 = 100_000_000;

/// The owner of a reservation that is made now.
#[inline(always)]
pub const fn reservation_owner(now_ns: u64) -> u64 {
    // 62 bits of nanoseconds last 146 years; the cap keeps it apart from OWNER_REMOVED.
    OWNER_RESERVED | (now_ns & (OWNER_RESERVED / 2 - 1))
}

/// Whether an owner is that of a reservation.
#[inline(always)]
pub const fn is_reservation(owner: u64) -> bool {
    owner & OWNER_RESERVED != 0 && owner != OWNER_REMOVED
}

#[cfg(any(test, feature = "user"))]
mod host {
    #[cfg(feature = "user")]
    use super::{ConnectionKey, LedgerEntry, Reservation, TagSecret};
    use super::{Endpoints, Netns};
    use core::net::{IpAddr, SocketAddr};

    // SAFETY: repr(C), integers only, no padding, every bit pattern valid.
    #[cfg(feature = "user")]
    unsafe impl aya::Pod for ConnectionKey {}
    // SAFETY: repr(C), integers only, padding spelled out, every bit pattern valid.
    #[cfg(feature = "user")]
    unsafe impl aya::Pod for LedgerEntry {}
    // SAFETY: repr(C), integers only, padding spelled out, every bit pattern valid.
    #[cfg(feature = "user")]
    unsafe impl aya::Pod for Reservation {}
    // SAFETY: repr(C), integers only, no padding, every bit pattern valid.
    #[cfg(feature = "user")]
    unsafe impl aya::Pod for TagSecret {}

    impl Endpoints {
        /// The ends of the connection that a client at `remote` opened to `local`, in the namespace that limiter was attached in.
        pub fn new(remote: SocketAddr, local: SocketAddr) -> Self {
            Self {
                netns: Netns::OWN,
                remote: remote.ip().into(),
                local: local.ip().into(),
                remote_port: remote.port(),
                local_port: local.port(),
            }
        }

        /// The client.
        pub fn remote(&self) -> SocketAddr {
            SocketAddr::new(IpAddr::from(self.remote), self.remote_port)
        }

        /// What it connected to.
        pub fn local(&self) -> SocketAddr {
            SocketAddr::new(IpAddr::from(self.local), self.local_port)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi;
    use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
    use proptest::prelude::*;
    use std::collections::HashSet;

    fn ends(remote: IpAddr, local: IpAddr, remote_port: u16, local_port: u16) -> Endpoints {
        Endpoints { remote: remote.into(), local: local.into(), remote_port, local_port, netns: Netns::OWN }
    }

    proptest! {
        #[test]
        fn connections_of_different_ends_have_different_keys(
            a: (u128, u128, u16, u16),
            b: (u128, u128, u16, u16),
            v4: (u32, u32, u16, u16),
            flipped in 0..256_u32,
            secret: [u64; 13],
            cookie: u64,
        ) {
            let secret = TagSecret(secret);
            let v6 = |ends_: (u128, u128, u16, u16)| {
                // Outside ::ffff:0:0/96, where the address would be taken for IPv4.
                ends(Ipv6Addr::from(ends_.0 | 1 << 127).into(), Ipv6Addr::from(ends_.1).into(), ends_.2, ends_.3)
            };
            let key = v6(a).key(&secret);
            prop_assert_eq!((key.remote_port(), key.local_port()), (a.2, a.3));
            prop_assert_eq!(key == v6(b).key(&secret), v6(a) == v6(b));
            // One bit is enough to make a difference.
            let other = if flipped < 128 { (a.0 ^ 1 << flipped, a.1, a.2, a.3) } else { (a.0, a.1 ^ 1 << (flipped - 128), a.2, a.3) };
            prop_assert_eq!(key == v6(other).key(&secret), v6(a) == v6(other));

            // A client's address is never a multicast one.
            prop_assume!(!Ipv4Addr::from(v4.0).is_multicast());
            let v4 = ends(Ipv4Addr::from(v4.0).into(), Ipv4Addr::from(v4.1).into(), v4.2, v4.3);
            let of_v4 = v4.key(&secret);
            prop_assert_eq!((of_v4.remote_port(), of_v4.local_port()), (v4.remote_port, v4.local_port));
            let of_v6 = Endpoints { remote_port: v4.remote_port, local_port: v4.local_port, ..v6(a) }.key(&secret);
            prop_assert_ne!(of_v4, of_v6);

            // The same addresses and ports in three namespaces are three connections.
            prop_assume!(v4.local_port != 0 && a.3 != 0 && cookie != 0 && cookie != u64::MAX);
            for here in [v4, v6(a)] {
                let there = [cookie, cookie + 1].map(|cookie| Endpoints { netns: Netns::other(cookie), ..here });
                let [key, one, two] = [here, there[0], there[1]].map(|ends| ends.key(&secret));
                prop_assert!(key != one && key != two && one != two);
                prop_assert_eq!((one.remote_port(), one.local_port()), (here.remote_port, 0));
                let entry = LedgerEntry {
                    remote: here.remote,
                    local: here.local,
                    local_port: here.local_port,
                    netns: there[0].netns,
                    ..LedgerEntry::default()
                };
                prop_assert!(entry.is_of(&there[0]) && !entry.is_of(&there[1]) && !entry.is_of(&here));
                prop_assert_eq!(entry.ends(&one), there[0]);
                prop_assert_eq!(there[0].netns.cookie(), cookie);
            }
        }
    }

    proptest! {
        #[test]
        fn connections_of_different_keys_are_told_apart_by_their_flows(
            a: ([u32; 2], u32),
            b: ([u32; 2], u32),
            flipped in 0..96_u32,
            secret: [u64; 13],
        ) {
            // The odds are against secrets like these.
            prop_assume!(secret[11] >> 32 != 0 && secret[12] >> 32 != 0);
            let secret = TagSecret(secret);
            let key = |(addresses, ports)| ConnectionKey { addresses, ports };
            let flow = key(a).flow(&secret);
            prop_assert_ne!(flow, 0);
            prop_assert!(abi::flow_slot(flow) < abi::FLOW_SLOTS);
            prop_assert_eq!(flow == key(b).flow(&secret), a == b);
            let mut other = a;
            match flipped / 32 {
                2 => other.1 ^= 1 << (flipped % 32),
                word => other.0[word as usize] ^= 1 << (flipped % 32),
            }
            prop_assert_ne!(flow, key(other).flow(&secret));
        }
    }

    #[test]
    fn the_flows_of_a_service_are_spread_over_the_slots() {
        let secret = TagSecret([0xd6e8_feb8_6659_fd93; 13]);
        let taken = |key: &dyn Fn(u32) -> ConnectionKey| {
            let slots: HashSet<u32> = (0..abi::FLOW_SLOTS).map(|n| abi::flow_slot(key(n).flow(&secret))).collect();
            slots.len()
        };
        let local = u32::from_ne_bytes([192, 0, 2, 1]);
        let by_address = taken(&|n| ConnectionKey::of_v4((10 << 24 | n).to_be(), local, ports_word(40_000, 8080)));
        let by_port = taken(&|n| {
            ConnectionKey::of_v4((10 << 24 | n >> 16).to_be(), local, ports_word((n & 0xffff) as u16, 8080))
        });
        // Thrown at random, 63 % would be taken.
        let least = abi::FLOW_SLOTS as usize / 2;
        assert!(by_address > least && by_port > least, "{by_address} and {by_port} of {}", abi::FLOW_SLOTS);
    }

    #[test]
    fn the_tag_depends_on_the_secret() {
        let ends = ends(Ipv6Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into(), 1, 2);
        assert_ne!(ends.key(&TagSecret([1; 13])), ends.key(&TagSecret([2; 13])));
    }

    #[test]
    fn a_reservation_is_never_taken_for_a_removal_or_a_cookie() {
        for now in [0, 1, u64::MAX / 2, u64::MAX] {
            assert!(is_reservation(reservation_owner(now)));
        }
        assert!(!is_reservation(OWNER_REMOVED));
        assert!(!is_reservation(1));
        assert!(!is_reservation(u64::from(u32::MAX) << 16));
    }
}
