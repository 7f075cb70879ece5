//! When a service answers SYNs by cookies: while it is flooded. Decided by the kernel programs alone.

/// How a service stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Challenge {
    /// How many SYNs in a second are a flood, refused ones not counted; 0: none are, and 1: the first is. Written by user
    /// space.
    pub threshold: u32,
    /// The largest receive buffer that a socket may ask for (`net.core.rmem_max`), in bytes, on which depends how the stack shifts
    /// windows; 0: not known. Written by user space, since no program can read it.
    pub largest_buffer: u32,
    /// When the window began in which SYNs are counted, in nanoseconds of `CLOCK_MONOTONIC` (to a jiffy).
    pub window_ns: u64,
    /// How many there were in it. Changed by atomic operations, but for the beginning of a window.
    pub syns: u64,
    /// Until when SYNs are answered by cookies, in nanoseconds of `CLOCK_MONOTONIC` (to a jiffy).
    pub until_ns: u64,
}

/// How long SYNs are counted together.
pub const WINDOW_NS: u64 = 1_000_000_000;
/// How long cookies go on after the last sign of a flood. Longer than a window, so that a flood that goes on keeps them on.
pub const HOLD_NS: u64 = 5_000_000_000;

/// Whether so many SYNs in one window are a flood. What has begun is one until it is less than half as much, so that a
/// rate near the threshold does not switch it on and off.
#[inline(always)]
pub const fn is_flood(threshold: u32, on: bool, syns: u64) -> bool {
    let enough = if on { threshold.div_ceil(2) } else { threshold };
    threshold != 0 && syns >= enough as u64
}

#[cfg(feature = "user")]
// SAFETY: repr(C), integers only, padding spelled out, every bit pattern valid.
unsafe impl aya::Pod for Challenge {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_begins_at_the_threshold_and_ends_below_half_of_it() {
        assert_eq!([99, 100, 101].map(|syns| is_flood(100, false, syns)), [false, true, true]);
        assert_eq!([49, 50, 51].map(|syns| is_flood(100, true, syns)), [false, true, true]);
    }

    #[test]
    fn without_a_threshold_nothing_is_a_flood_and_with_one_of_1_everything() {
        assert!(!is_flood(0, false, u64::MAX) && !is_flood(0, true, u64::MAX));
        assert!(is_flood(1, false, 1) && is_flood(1, true, 1));
    }
}
