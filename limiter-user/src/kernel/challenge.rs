//! SYN cookies made in XDP: when, and what the host needs for it.
//!
//! The stack takes a cookie that it has not made itself only if `net.ipv4.tcp_syncookies` is 2. As long as a challenge is
//! configured, it is. What it was before stands in the name of an empty folder beside the maps, which outlives every
//! process, and is put back when the challenge is switched off or limiter is detached.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
};

use aya::maps::{Array, Map, MapData};
use limiter_common::{abi, challenge::Challenge};

use super::{ChallengeRow, KernelError, host, maps::open, pins::Pins};
use crate::config::{ChallengeMode, Kernel};

const SYSCTL: &str = "/proc/sys/net/ipv4/tcp_syncookies";
/// "Unconditionally": what the stack must be set to.
const ALWAYS: u8 = 2;

/// Puts the configuration in force for every service, and the host in order for it. `cookie` is that of this network
/// namespace.
pub fn put(pins: &Pins, config: &Kernel) -> Result<(), KernelError> {
    let threshold = match config.challenge {
        ChallengeMode::Never => 0,
        ChallengeMode::Auto => config.challenge_threshold,
        ChallengeMode::Always => 1,
    };
    // The stack is ready before the first cookie, and until after the last.
    if threshold != 0 {
        set_sysctl(pins)?;
    }
    let mut challenges = Challenges::open(pins)?;
    for index in 0..abi::MAX_SERVICES {
        challenges.set_threshold(index, threshold)?;
    }
    if threshold == 0 {
        restore(pins)?;
    }
    Ok(())
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

    fn set_threshold(&mut self, index: u32, threshold: u32) -> Result<(), KernelError> {
        let what = "can't put a service's challenge in force";
        let found = self.0.get(&index, 0).map_err(KernelError::failed(what))?;
        if found.threshold == threshold {
            return Ok(());
        }
        self.0.set(index, Challenge { threshold, ..Challenge::default() }, 0).map_err(KernelError::failed(what))
    }
}

/// What `net.ipv4.tcp_syncookies` was before; `None` if limiter has not changed it.
pub fn before(pins: &Pins) -> Option<u8> {
    remembered(&pins.version()).map(|(_, before)| before)
}

/// Puts back what limiter has changed, in whichever version's state that stands. What somebody else has changed since
/// stays. Returns what it was before if it can't be put back, because that is a setting of another network namespace.
pub fn restore(pins: &Pins) -> Result<Option<u8>, KernelError> {
    let mut elsewhere = None;
    let cookie = host::netns_cookie()?;
    for version in fs::read_dir(pins.root()).into_iter().flatten().flatten() {
        let Some((folder, before)) = remembered(&version.path()) else { continue };
        // In another namespace the same file is another setting.
        if !version.path().join(Pins::netns_name(cookie)).is_dir() {
            elsewhere = Some(before);
        } else if read_sysctl()? == ALWAYS {
            write_sysctl(before)?;
        }
        fs::remove_dir(&folder).map_err(KernelError::failed(format!("can't remove {}", folder.display())))?;
    }
    Ok(elsewhere)
}

fn set_sysctl(pins: &Pins) -> Result<(), KernelError> {
    let found = read_sysctl()?;
    if found == ALWAYS {
        return Ok(());
    }
    // First remembered, then changed: whoever dies in between has changed nothing. What was remembered first counts.
    if before(pins).is_none() {
        let folder = pins.version().join(format!("{REMEMBERED}{found}"));
        fs::create_dir(&folder).map_err(KernelError::failed(format!("can't make the folder {}", folder.display())))?;
    }
    write_sysctl(ALWAYS)
}

/// Begins the name of the folder; the value follows.
const REMEMBERED: &str = "syncookies-";

/// The folder in that of a version, and what it says.
fn remembered(version: &Path) -> Option<(PathBuf, u8)> {
    fs::read_dir(version).ok()?.flatten().find_map(|entry| {
        let value = entry.file_name().to_str()?.strip_prefix(REMEMBERED)?.parse().ok()?;
        Some((entry.path(), value))
    })
}

/// Of this process's network namespace.
fn read_sysctl() -> Result<u8, KernelError> {
    let failed = |source: io::Error| KernelError::Failed {
        what: format!("can't read {SYSCTL}, which kernel.challenge depends on"),
        source: source.into(),
    };
    let text = fs::read_to_string(SYSCTL).map_err(failed)?;
    text.trim().parse().map_err(|error| failed(io::Error::other(error)))
}

fn write_sysctl(value: u8) -> Result<(), KernelError> {
    fs::write(SYSCTL, value.to_string()).map_err(KernelError::failed(format!(
        "can't set net.ipv4.tcp_syncookies to {value} (kernel.challenge needs 2; where /proc/sys is read-only, set it from outside, or \
         leave kernel.challenge at \"never\")"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_it_was_before_is_found_by_the_name_of_a_folder() {
        let place = tempfile::tempdir().unwrap();
        let pins = Pins::new(place.path());
        assert_eq!(before(&pins), None);
        fs::create_dir_all(pins.version().join("netns-7")).unwrap();
        fs::create_dir_all(pins.version().join("syncookies-x")).unwrap();
        assert_eq!(before(&pins), None);
        fs::create_dir_all(pins.version().join("syncookies-1")).unwrap();
        assert_eq!(before(&pins), Some(1));
    }

    /// No process has that cookie's namespace, so the setting of this one is left alone.
    #[test]
    fn in_another_namespace_nothing_is_put_back() {
        let place = tempfile::tempdir().unwrap();
        let pins = Pins::new(place.path());
        let found = read_sysctl().unwrap();
        fs::create_dir_all(pins.version().join(Pins::netns_name(u64::MAX))).unwrap();
        fs::create_dir_all(pins.version().join(format!("syncookies-{}", u8::from(found == 0)))).unwrap();
        assert_eq!(restore(&pins).unwrap(), Some(u8::from(found == 0)), "it is told");
        assert_eq!((before(&pins), read_sysctl().unwrap()), (None, found));
    }
}
