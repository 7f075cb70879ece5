//! What user space says to the control program, as the "packet" of a `BPF_PROG_TEST_RUN`.
//!
//! User space can't change a count and the ledger in one step; a program can. So user space never writes to either map.

use crate::{Endpoints, user::Member};

/// A request to the control program.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Request {
    /// One of [`op`].
    pub op: u32,
    /// The [`crate::Counter`] to count it in.
    pub counter: u32,
    /// The entry's owner: the socket's cookie, or (with [`op::RELEASE`]) that of a reservation.
    pub owner: u64,
    /// The connection.
    pub connection: Endpoints,
    /// Always 0.
    pub reserved: u32,
    /// With [`op::COUNT_FOR_USER`]: the user.
    pub member: Member,
    /// Always 0.
    pub reserved_too: u32,
}

/// What a [`Request`] asks for.
pub mod op {
    /// Take a connection out of the ledger, if its entry has that owner.
    pub const RELEASE: u32 = 1;
    /// Look through reservations, oldest first, and take out those that the stack did not confirm in time. One request
    /// looks at [`super::EXPIRE_BATCH`] of them, and at as many more from the first one on whose time is not up.
    pub const EXPIRE: u32 = 2;
    /// Enter a connection that is open already, whatever the limits say; it is no mistake if it is there already. Counted
    /// as [`crate::Counter::OpenedAdopted`], it is never cut; as [`crate::Counter::OpenedAudit`], it is marked if it is past
    /// its limits.
    pub const ADOPT: u32 = 3;
    /// Only count, for the service that counts the connection's socket.
    pub const COUNT: u32 = 4;
    /// Say what a SYN of the connection's client to its local port would get now. Counts nothing, reports nothing and
    /// changes nothing; only the client's address and the local port are looked at.
    pub const JUDGE: u32 = 5;
    /// Have a connection count against a user instead of its source, if its entry has that owner.
    pub const COUNT_FOR_USER: u32 = 6;
}

/// How many reservations one [`op::EXPIRE`] looks at, once or twice.
pub const EXPIRE_BATCH: u32 = 64;

/// What the control program answers.
pub mod answer {
    /// The entry was removed, or made; every reservation that was due was looked at; it was counted.
    pub const DONE: u32 = 0;
    /// There is no such entry, or it has another owner; no service has the port.
    pub const NOT_THERE: u32 = 1;
    /// There may be more to do: ask again.
    pub const AGAIN: u32 = 2;
    /// The request was not understood.
    pub const MALFORMED: u32 = 3;
    /// There is an entry for that connection already.
    pub const THERE_ALREADY: u32 = 4;
    /// The ledger has no room.
    pub const FULL: u32 = 5;
    /// To [`super::op::JUDGE`]: nothing speaks against the SYN. With the number of a [`crate::DenyReason`] added: that does.
    pub const ADMITTED: u32 = 0x100;
}

/// What the watching program writes for each socket of a service, one byte each.
pub mod watch {
    /// The stack will tell of the socket's end.
    pub const WATCHED: u8 = b'+';
    /// The kernel can't do that for a socket that is open already (before 6.12).
    pub const REFUSED: u8 = b'-';
}

#[cfg(feature = "user")]
// SAFETY: repr(C), integers only, padding spelled out.
unsafe impl bytemuck::NoUninit for Request {}
