//! Records of the ring buffer.

use crate::Endpoints;

/// A refusal, as it is reported to user space: the first of each source in each [`crate::source::REPORT_INTERVAL_SECONDS`], and
/// every one at [`Stage::Open`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Refusal {
    /// When, in nanoseconds of `CLOCK_MONOTONIC` (to a jiffy).
    pub time_ns: u64,
    /// Refusals of the same source (or of the same service, if that was full) since the last report, this one not
    /// counted.
    pub unreported: u64,
    /// The packet's addresses and ports; at [`Stage::Open`], those of the socket.
    pub connection: Endpoints,
    /// Index of the service.
    pub service: u16,
    /// A [`crate::DenyReason`].
    pub reason: u8,
    /// A [`Stage`].
    pub stage: u8,
    /// 1 if the service only observes, and the packet passed; otherwise 0.
    pub observed: u8,
    /// Always 0.
    pub reserved: [u8; 7],
}

/// At which point of the handshake something was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Stage {
    /// At the SYN; its source address is not proven.
    Syn = 0,
    /// At the segment that completed the handshake; its source address is proven.
    Handshake = 1,
    /// When the stack had opened the connection already, on a way that XDP doesn't see. A daemon cuts it.
    Open = 2,
}

impl Stage {
    /// The name in logs and `--json`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Syn => "syn",
            Self::Handshake => "handshake",
            Self::Open => "open",
        }
    }

    /// The stage of that number, if there is one.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::Syn),
            1 => Some(Self::Handshake),
            2 => Some(Self::Open),
            _ => None,
        }
    }
}

#[cfg(feature = "user")]
// SAFETY: repr(C), integers only, padding spelled out, every bit pattern valid.
unsafe impl aya::Pod for Refusal {}
