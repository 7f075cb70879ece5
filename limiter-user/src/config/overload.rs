//! `[gateway.overload]`: from when on new clients are turned away for the sake of those that are in.

use std::time::Duration;

use super::{
    read::{Fault, Item, Section},
    value,
};

/// A timer is late by less than this on any host that does something else, too.
const SHORTEST_LAG: Duration = Duration::from_millis(10);

/// Past this, clients have given up.
const LONGEST_LAG: Duration = Duration::from_mins(1);

/// `[gateway.overload]`: when the host runs short of something, new clients are refused (503): some from these thresholds on, more
/// the further it goes, and at last all. Those that are in stay in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overload {
    /// Memory in use, in percent of what the cgroup may have, or of the host's where it has no limit; 0: not looked at.
    pub memory: u8,
    /// Percent of the time in which somebody waited for memory (PSI, over ten seconds); 0: not looked at.
    pub memory_pressure: u8,
    /// The same for the CPU; 0: not looked at.
    pub cpu_pressure: u8,
    /// Open files, in percent of `RLIMIT_NOFILE`; 0: not looked at.
    pub descriptors: u8,
    /// How late timers of the gateway's own are; zero: not looked at.
    pub lag: Duration,
}

impl Default for Overload {
    fn default() -> Self {
        Self {
            memory: 95,
            memory_pressure: 40,
            // Whatever else the host does counts there, and does no harm as long as the gateway gets its turn, which `lag` tells.
            cpu_pressure: 0,
            descriptors: 90,
            lag: Duration::from_millis(500),
        }
    }
}

impl Overload {
    /// Nothing is looked at.
    pub const OFF: Self = Self { memory: 0, memory_pressure: 0, cpu_pressure: 0, descriptors: 0, lag: Duration::ZERO };
}

pub(super) fn parse(mut section: Section, overload: &mut Overload) {
    let percent = |item: &Item| value::integer(item, 0..=99, "percent; 0: not looked at");
    section.read("memory", &mut overload.memory, percent);
    section.read("memory_pressure", &mut overload.memory_pressure, percent);
    section.read("cpu_pressure", &mut overload.cpu_pressure, percent);
    section.read("descriptors", &mut overload.descriptors, percent);
    section.read("lag", &mut overload.lag, |item| {
        let lag = value::duration(item, Duration::ZERO, LONGEST_LAG)?;
        if !lag.is_zero() && lag < SHORTEST_LAG {
            return Err(Fault::new(item, r#"expected "0s" (not looked at), or 10ms at least"#));
        }
        Ok(lag)
    });
    section.finish();
}
