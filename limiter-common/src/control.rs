//! What user space says to the control program, as the "packet" of a `BPF_PROG_TEST_RUN`.
//!
//! User space can't change a count and the ledger in one step; a program can. So user space never writes to either map.

use crate::ConnectionKey;

/// A request to the control program.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Request {
    /// One of [`op`].
    pub op: u32,
    /// With [`op::RELEASE`]: the [`crate::Counter`] to count a removal in.
    pub counter: u32,
    /// With [`op::RELEASE`]: the entry's owner, which is the socket's cookie or that of a reservation.
    pub owner: u64,
    /// With [`op::RELEASE`]: the connection.
    pub key: ConnectionKey,
}

/// What a [`Request`] asks for.
pub mod op {
    /// Take a connection out of the ledger, if its entry has that owner.
    pub const RELEASE: u32 = 1;
    /// Look through reservations, oldest first, and take out those that the stack did not confirm in time. One request
    /// looks at [`super::EXPIRE_BATCH`] at most.
    pub const EXPIRE: u32 = 2;
}

/// How many reservations one [`op::EXPIRE`] looks at.
pub const EXPIRE_BATCH: u32 = 64;

/// What the control program answers.
pub mod answer {
    /// The entry was removed; every reservation that was due was looked at.
    pub const DONE: u32 = 0;
    /// There is no such entry, or it has another owner.
    pub const NOT_THERE: u32 = 1;
    /// There may be more to do: ask again.
    pub const AGAIN: u32 = 2;
    /// The request was not understood.
    pub const MALFORMED: u32 = 3;
}

#[cfg(feature = "user")]
// SAFETY: repr(C), integers only, no padding.
unsafe impl bytemuck::NoUninit for Request {}
