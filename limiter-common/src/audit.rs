//! What the audit finds.

/// What the last audit found of one service. Written by the daemon that audits, read by whoever asks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct AuditReport {
    /// When it was, in nanoseconds of `CLOCK_MONOTONIC`; 0: there was none.
    pub audited_ns: u64,
    /// By how much the service's count and its sources' counts, summed up, differ from what the ledger's entries say. Never
    /// more than what can't be explained by connections that came and went meanwhile, so it should be 0.
    pub drift: u64,
}

#[cfg(feature = "user")]
// SAFETY: repr(C), integers only, no padding, every bit pattern valid.
unsafe impl aya::Pod for AuditReport {}
