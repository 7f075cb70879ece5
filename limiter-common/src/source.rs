//! Sources: the address prefixes that connections are counted against.

use crate::Address;

/// What connections are counted against: a prefix of addresses, as one service sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct SourceKey {
    /// The prefix; bits after `prefix` are zero.
    pub address: Address,
    /// Index of the service.
    pub service: u16,
    /// Length of the prefix in bits, in the address's own family: 0 to 32 for IPv4, 0 to 128 for IPv6; or [`USER_PREFIX`].
    pub prefix: u8,
    /// [`NARROW`] or [`WIDE`]. Apart from each other, because prefixes can be changed while connections are open: what is
    /// narrow today may have been wide.
    pub tier: u8,
}

/// [`SourceKey::tier`] of the sources that `connections_per_source` is for.
pub const NARROW: u8 = 0;
/// [`SourceKey::tier`] of the sources that `connections_per_wide_source` is for.
pub const WIDE: u8 = 1;

impl SourceKey {
    /// The source that `address` belongs to.
    #[inline(always)]
    pub const fn new(service: u16, address: &Address, ipv4_prefix: u8, ipv6_prefix: u8) -> Self {
        let prefix = if address.is_v4() { ipv4_prefix } else { ipv6_prefix };
        Self { address: address.masked(prefix), service, prefix, tier: NARROW }
    }

    /// The source of the wider tier that `address` belongs to, with a prefix of this length.
    #[inline(always)]
    pub const fn wide(service: u16, address: &Address, prefix: u8) -> Self {
        Self { address: address.masked(prefix), service, prefix, tier: WIDE }
    }

    /// A user of a service, in the place of an address: `id` is a hash of its name.
    #[inline(always)]
    pub const fn of_user(service: u16, id: Address) -> Self {
        Self { address: id, service, prefix: USER_PREFIX, tier: NARROW }
    }

    /// Whether this is a user and no address.
    #[inline(always)]
    pub const fn is_user(&self) -> bool {
        self.prefix == USER_PREFIX
    }
}

/// [`SourceKey::prefix`] of a user; no address has so many bits.
pub const USER_PREFIX: u8 = u8::MAX;

/// What is known of a source. It exists as long as the source holds a connection, so there are never more sources than
/// connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct SourceEntry {
    /// How many ledger entries name this source, or [`SOURCE_GONE`] while the last one's closer takes the entry away.
    /// Changed by atomic operations only.
    pub connections: u64,
    /// When the last refusal of this source was reported, in jiffies (`bpf_jiffies64`); 0: never.
    pub reported_jiffies: u64,
    /// Refusals since then that were not reported; a few may be missing where several CPUs refuse at once.
    pub unreported: u64,
    /// The entry's own key. The kernel may reuse an element for another key at any time after it was removed: whoever has
    /// added to `connections` looks up whether it was the right one, and else takes the addition away from this one.
    pub key: SourceKey,
    /// Always 0.
    pub reserved: u32,
}

/// [`SourceEntry::connections`] of an entry that is being removed, far above any count. Nobody but its remover writes to such an
/// entry: by then it may be another's.
pub const SOURCE_GONE: u64 = 1 << 63;

/// Whether a value of [`SourceEntry::connections`] is that of an entry on its way out.
#[inline(always)]
pub const fn is_gone(connections: u64) -> bool {
    connections >= SOURCE_GONE / 2
}

/// Least time between two reported refusals of one source, in seconds.
pub const REPORT_INTERVAL_SECONDS: u64 = 1;

#[cfg(feature = "user")]
mod host {
    use super::{SourceEntry, SourceKey};
    use core::{fmt, net::IpAddr};

    // SAFETY: repr(C), integers only, padding spelled out, every bit pattern valid.
    unsafe impl aya::Pod for SourceKey {}
    // SAFETY: repr(C), integers only, padding spelled out, every bit pattern valid.
    unsafe impl aya::Pod for SourceEntry {}

    impl fmt::Display for SourceKey {
        /// As CIDR: `192.0.2.7/32`. A user, whose name is elsewhere, as `user:` and its hash.
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            if self.is_user() {
                f.write_str("user:")?;
                return self.address.words().into_iter().try_for_each(|word| write!(f, "{:08x}", u32::from_be(word)));
            }
            write!(f, "{}/{}", IpAddr::from(self.address), self.prefix)
        }
    }
}
