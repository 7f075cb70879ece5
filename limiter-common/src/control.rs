//! What user space says to the control program, as the "packet" of a `BPF_PROG_TEST_RUN`.
//!
//! User space can't change a count and the ledger in one step; a program can. So user space never writes to either map.

use crate::{Counter, ConnectionKey};

/// Takes a connection out of the ledger, if its entry has that owner.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Release {
    /// The entry's owner: the socket's cookie, or that of a reservation.
    pub owner: u64,
    /// The connection.
    pub key: ConnectionKey,
    /// The [`Counter`] to count a removal in.
    pub counter: u32,
}

/// What the control program answers to a [`Release`].
pub mod answer {
    /// The entry was removed.
    pub const RELEASED: u32 = 0;
    /// There is no such entry, or another owner has it.
    pub const NOT_THERE: u32 = 1;
    /// The request was malformed.
    pub const MALFORMED: u32 = 2;
}

impl Release {
    /// A release by the gateway.
    pub const fn by_gateway(key: ConnectionKey, cookie: u64) -> Self {
        Self { owner: cookie, key, counter: Counter::ClosedGateway as u32 }
    }
}

#[cfg(feature = "user")]
// SAFETY: repr(C), integers only, no padding, every bit pattern valid.
unsafe impl bytemuck::NoUninit for Release {}
