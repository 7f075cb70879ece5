//! The ledger: one entry per connection that is counted.
//!
//! A count changes only together with an entry: whoever adds an entry adds one to its source and its service, whoever
//! removes it takes one away. An entry has an [owner](LedgerEntry::owner), and to remove it is to swap that owner for
//! [`OWNER_REMOVED`] in one atomic step, so of any number of hands that try, one succeeds.

use crate::{Address, SourceKey};

/// Both ends of a TCP connection, from the point of view of the host that accepted it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Endpoints {
    /// The client.
    pub remote: Address,
    /// The address it connected to.
    pub local: Address,
    /// The client's port, in host order.
    pub remote_port: u16,
    /// The service's port, in host order.
    pub local_port: u16,
}

impl Endpoints {
    /// The key of the connection's entry.
    #[inline(always)]
    pub const fn key(&self) -> ConnectionKey {
        ConnectionKey {
            remote: self.remote,
            local_tag: tag(&self.local),
            remote_port: self.remote_port,
            local_port: self.local_port,
        }
    }
}

/// The key of a connection's entry in the ledger.
///
/// To hash and compare the key is most of what a packet of an open connection costs, so the own address, of which a host has
/// few, stands in it as a tag; the whole address is in the [entry](LedgerEntry::local). The tag of an IPv4 address is the
/// address. That two IPv6 addresses of one host have the same tag, and one client connects to both from the same port, is
/// one chance in four billion; the second connection then finds no room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct ConnectionKey {
    /// The client.
    pub remote: Address,
    /// A tag of the address it connected to.
    pub local_tag: u32,
    /// The client's port, in host order.
    pub remote_port: u16,
    /// The service's port, in host order.
    pub local_port: u16,
}

/// The tag of an own address: an IPv4 address itself; the upper half of a sum of products for IPv6.
#[inline(always)]
const fn tag(local: &Address) -> u32 {
    if local.is_v4() {
        return local.v4_word();
    }
    let [a, b, c, d] = local.words();
    let first = (a as u64 | (b as u64) << 32) ^ 0x9e37_79b9_7f4a_7c15;
    let second = (c as u64 | (d as u64) << 32) ^ 0xbf58_476d_1ce4_e5b9;
    let sum = first.wrapping_mul(0x94d0_49bb_1331_11eb).wrapping_add(second.wrapping_mul(0xd6e8_feb8_6659_fd93));
    (sum >> 32) as u32
}

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
    pub flags: u32,
    /// The address that the client connected to.
    pub local: Address,
}

/// In [`LedgerEntry::flags`]: the connection was open before the limiter was attached. It is never cut.
pub const FLAG_ADOPTED: u32 = 1;

/// In [`LedgerEntry::flags`]: the connection got past XDP and past its limits, and is to be cut.
pub const FLAG_PAST_LIMIT: u32 = 2;

/// A slot that was reserved when a handshake completed and that the stack has yet to confirm.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Reservation {
    /// The entry.
    pub key: ConnectionKey,
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

#[cfg(feature = "user")]
mod host {
    use super::{ConnectionKey, Endpoints, LedgerEntry, Reservation};
    use core::net::{IpAddr, SocketAddr};

    // SAFETY: repr(C), integers only, no padding, every bit pattern valid.
    unsafe impl aya::Pod for ConnectionKey {}
    // SAFETY: repr(C), integers only, padding spelled out, every bit pattern valid.
    unsafe impl aya::Pod for LedgerEntry {}
    // SAFETY: repr(C), integers only, no padding, every bit pattern valid.
    unsafe impl aya::Pod for Reservation {}

    impl Endpoints {
        /// The ends of the connection that a client at `remote` opened to `local`.
        pub fn new(remote: SocketAddr, local: SocketAddr) -> Self {
            Self {
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
