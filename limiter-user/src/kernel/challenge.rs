//! SYN cookies made by the programs: when, and what the host needs for it.
//!
//! The stack takes a cookie that it has not made itself only if `net.ipv4.tcp_syncookies` is 2, and finds more options in it than
//! the MSS only if `net.ipv4.tcp_timestamps` is. As long as that is configured, they are.

use std::{fmt, fs};

use aya::maps::{Array, Map, MapData};
use limiter_common::{abi, challenge::Challenge};

use super::{
    ChallengeRow, KernelError, host,
    maps::open,
    pins::Pins,
    sysctl::{self, LeftChanged, SYNCOOKIES, TIMESTAMPS},
};
use crate::config::{ChallengeMode, Kernel};

/// Puts the configuration in force for every service, and the host in order for it.
pub fn put(pins: &Pins, config: &Kernel) -> Result<(), KernelError> {
    let threshold = match config.challenge {
        ChallengeMode::Never => 0,
        ChallengeMode::Auto => config.challenge_threshold,
        ChallengeMode::Always => 1,
    };
    // The stack is ready before the first cookie, and until after the last.
    if threshold != 0 {
        SYNCOOKIES.set(pins)?;
        // The programs look at this one at each SYN.
        if config.challenge_timestamps {
            TIMESTAMPS.set(pins)?;
        }
    }
    let mut challenges = Challenges::open(pins)?;
    let largest_buffer = largest_buffer();
    for index in 0..abi::MAX_SERVICES {
        challenges.set(index, threshold, largest_buffer)?;
    }
    if threshold == 0 {
        SYNCOOKIES.restore(pins)?;
    }
    if threshold == 0 || !config.challenge_timestamps {
        TIMESTAMPS.restore(pins)?;
    }
    Ok(())
}

/// Puts back what limiter has changed on the host. Returns what it could not, because that is a setting of another network
/// namespace.
pub fn restore(pins: &Pins) -> Result<Vec<LeftChanged>, KernelError> {
    let mut left = Vec::new();
    for sysctl in sysctl::ALL {
        left.extend(sysctl.restore(pins)?);
    }
    Ok(left)
}

/// Every service's challenge.
pub struct Challenges(Array<MapData, Challenge>);

impl fmt::Debug for Challenges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Challenges").finish_non_exhaustive()
    }
}

impl Challenges {
    /// Opens the pinned map.
    pub fn open(pins: &Pins) -> Result<Self, KernelError> {
        open(&pins.map(abi::MAP_CHALLENGES), Map::Array).map(Self)
    }

    /// How the service of that index stands.
    pub fn get(&self, index: u32) -> Result<ChallengeRow, KernelError> {
        let challenge = self.0.get(&index, 0).map_err(KernelError::failed("can't read a service's challenge"))?;
        Ok(ChallengeRow {
            challenge_threshold: challenge.threshold,
            challenging: challenge.threshold != 0 && u128::from(challenge.until_ns) > host::monotonic().as_nanos(),
        })
    }

    /// Tells the programs again what they can't see for themselves, if it has changed.
    pub fn keep_up(&mut self) -> Result<(), KernelError> {
        let largest_buffer = largest_buffer();
        for index in 0..abi::MAX_SERVICES {
            let found = self.0.get(&index, 0).map_err(KernelError::failed(WHAT))?;
            if found.threshold != 0 {
                self.set(index, found.threshold, largest_buffer)?;
            }
        }
        Ok(())
    }

    fn set(&mut self, index: u32, threshold: u32, largest_buffer: u32) -> Result<(), KernelError> {
        let found = self.0.get(&index, 0).map_err(KernelError::failed(WHAT))?;
        let wanted = if found.threshold == threshold {
            Challenge { largest_buffer, ..found }
        } else {
            Challenge { threshold, largest_buffer, ..Challenge::default() }
        };
        // What the programs have counted meanwhile is lost where this is written.
        if wanted == found {
            return Ok(());
        }
        self.0.set(index, wanted, 0).map_err(KernelError::failed(WHAT))
    }
}

const WHAT: &str = "can't put a service's challenge in force";

/// `net.core.rmem_max`; 0 where the kernel does not tell (before 6.9, in any network namespace but the first).
fn largest_buffer() -> u32 {
    fs::read_to_string("/proc/sys/net/core/rmem_max").ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}
