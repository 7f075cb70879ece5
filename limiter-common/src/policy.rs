//! Limits as the kernel programs read them.

use crate::bucket::Rate;

/// The limits of one service. Read by the kernel programs at every SYN and every handshake, written by user space at any
/// time; each field is read once per decision.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct ServicePolicy {
    /// Connections that one source may hold; 0: any number.
    pub connections_per_source: u32,
    /// Connections that the service may hold in all; 0: any number.
    pub connections_total: u32,
    /// Length of the prefix that makes a source of an IPv4 address, 1 to 32.
    pub ipv4_prefix: u8,
    /// Length of the prefix that makes a source of an IPv6 address, 1 to 128.
    pub ipv6_prefix: u8,
    /// An [`OnDeny`].
    pub on_deny: u8,
    /// An [`OnFull`].
    pub on_full: u8,
    /// New connections per second that one source may open; 0: any number. For user space; the programs go by `rate`.
    pub connection_rate: u32,
    /// How many of them it may open at once. For user space, like `connection_rate`.
    pub connection_burst: u32,
    /// Always 0.
    pub reserved: u32,
    /// The bucket of new connections of each source: [`Rate::new`] of the two above.
    pub rate: Rate,
    /// The service's name in UTF-8, filled up with zeros; for user space alone. All zero: there is no such service.
    pub name: ServiceName,
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
    /// When the last refusal because the service was full was reported, in nanoseconds of `CLOCK_MONOTONIC` (to a jiffy).
    pub reported_ns: u64,
    /// Such refusals since then that were not reported; a few may be missing where several CPUs refuse at once.
    pub unreported: u64,
    /// The word of the [`crate::bucket`] of [`RESET_RATE`].
    pub resets_ns: u64,
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
