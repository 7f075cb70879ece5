//! Settings of the host that limiter changes, and puts back.
//!
//! What one was before stands in the name of an empty folder beside the maps, which outlives every process.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::{KernelError, host, pins::Pins};

/// A setting of `net.ipv4` in a network namespace, which `kernel.challenge` needs at 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sysctl {
    /// Its name below `net.ipv4`.
    name: &'static str,
    /// Begins the name of the folder; the value follows.
    remembered: &'static str,
    /// What needs it.
    key: &'static str,
}

/// The stack takes cookies that it has not made itself only if it makes them "unconditionally".
pub const SYNCOOKIES: Sysctl = Sysctl {
    name: "tcp_syncookies",
    remembered: "syncookies-",
    key: "kernel.challenge needs it; set that to \"never\"",
};
/// Cookies can hide options in timestamps only if these begin at no offset that nobody else knows.
pub const TIMESTAMPS: Sysctl = Sysctl {
    name: "tcp_timestamps",
    remembered: "timestamps-",
    key: "kernel.challenge_timestamps needs it; set that to false",
};

/// Every one of them.
pub const ALL: [Sysctl; 2] = [SYNCOOKIES, TIMESTAMPS];

/// What it takes.
const WANTED: u8 = 2;

/// A setting that stays changed, because it is that of another network namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeftChanged {
    /// Its whole name.
    pub name: &'static str,
    /// What it was before.
    pub before: u8,
}

impl Sysctl {
    /// Its whole name.
    pub fn full_name(self) -> &'static str {
        if self == SYNCOOKIES { "net.ipv4.tcp_syncookies" } else { "net.ipv4.tcp_timestamps" }
    }

    /// Sets it, unless it is as wanted.
    pub fn set(self, pins: &Pins) -> Result<(), KernelError> {
        let found = self.read()?;
        if found == WANTED {
            return Ok(());
        }
        // First remembered, then changed: whoever dies in between has changed nothing. What was remembered first counts.
        if self.before(pins).is_none() {
            let folder = pins.version().join(format!("{}{found}", self.remembered));
            fs::create_dir(&folder)
                .map_err(KernelError::failed(format!("can't make the folder {}", folder.display())))?;
        }
        self.write(WANTED)
    }

    /// What it was before; `None` if limiter has not changed it.
    pub fn before(self, pins: &Pins) -> Option<u8> {
        self.remembered(&pins.version()).map(|(_, before)| before)
    }

    /// Puts back what limiter has changed, in whichever version's state that stands. What somebody else has changed since
    /// stays. Says so if it can't be put back, because it is that of another network namespace.
    pub fn restore(self, pins: &Pins) -> Result<Option<LeftChanged>, KernelError> {
        let mut elsewhere = None;
        let cookie = host::netns_cookie()?;
        for version in fs::read_dir(pins.root()).into_iter().flatten().flatten() {
            let Some((folder, before)) = self.remembered(&version.path()) else { continue };
            // In another namespace the same file is another setting.
            if !version.path().join(Pins::netns_name(cookie)).is_dir() {
                elsewhere = Some(LeftChanged { name: self.full_name(), before });
            } else if self.read()? == WANTED {
                self.write(before)?;
            }
            fs::remove_dir(&folder).map_err(KernelError::failed(format!("can't remove {}", folder.display())))?;
        }
        Ok(elsewhere)
    }

    /// The folder in that of a version, and what it says.
    fn remembered(self, version: &Path) -> Option<(PathBuf, u8)> {
        fs::read_dir(version).ok()?.flatten().find_map(|entry| {
            let value = entry.file_name().to_str()?.strip_prefix(self.remembered)?.parse().ok()?;
            Some((entry.path(), value))
        })
    }

    /// Of this process's network namespace.
    fn path(self) -> PathBuf {
        Path::new("/proc/sys/net/ipv4").join(self.name)
    }

    fn read(self) -> Result<u8, KernelError> {
        let path = self.path();
        let failed = |source: io::Error| KernelError::Failed {
            what: format!("can't read {} ({})", path.display(), self.key),
            source: source.into(),
        };
        let text = fs::read_to_string(&path).map_err(failed)?;
        text.trim().parse().map_err(|error| failed(io::Error::other(error)))
    }

    fn write(self, value: u8) -> Result<(), KernelError> {
        fs::write(self.path(), value.to_string()).map_err(KernelError::failed(format!(
            "can't set {} to {value} (where /proc/sys is read-only, set it to {WANTED} from outside; {}, and it is left alone)",
            self.full_name(),
            self.key
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_it_was_before_is_found_by_the_name_of_a_folder() {
        let place = tempfile::tempdir().unwrap();
        let pins = Pins::new(place.path());
        assert_eq!(SYNCOOKIES.before(&pins), None);
        for folder in ["netns-7", "syncookies-x", "timestamps-0"] {
            fs::create_dir_all(pins.version().join(folder)).unwrap();
        }
        assert_eq!(ALL.map(|sysctl| sysctl.before(&pins)), [None, Some(0)]);
        fs::create_dir_all(pins.version().join("syncookies-1")).unwrap();
        assert_eq!(ALL.map(|sysctl| sysctl.before(&pins)), [Some(1), Some(0)]);
    }

    /// No process has that cookie's namespace, so the setting of this one is left alone.
    #[test]
    fn in_another_namespace_nothing_is_put_back() {
        for sysctl in ALL {
            let place = tempfile::tempdir().unwrap();
            let pins = Pins::new(place.path());
            let found = sysctl.read().unwrap();
            let before = u8::from(found == 0);
            fs::create_dir_all(pins.version().join(Pins::netns_name(u64::MAX))).unwrap();
            fs::create_dir_all(pins.version().join(format!("{}{before}", sysctl.remembered))).unwrap();
            let left = LeftChanged { name: sysctl.full_name(), before };
            assert_eq!(sysctl.restore(&pins).unwrap(), Some(left), "it is told");
            assert_eq!((sysctl.before(&pins), sysctl.read().unwrap()), (None, found));
        }
    }

    #[test]
    fn a_name_is_that_of_the_file() {
        for sysctl in ALL {
            assert_eq!(sysctl.full_name(), format!("net.ipv4.{}", sysctl.name));
        }
    }
}
