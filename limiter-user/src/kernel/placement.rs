//! How the program of admission is on an interface, and how that is written in the names of pins.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
};

use super::{clsact, link, pins::remove_tree};

/// How the program is attached to an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// XDP in the driver.
    Native,
    /// XDP in the network stack.
    Generic,
    /// TC by a link (TCX, kernel 6.6).
    Tcx,
    /// TC by a filter of a clsact qdisc.
    Clsact,
}

impl Mode {
    /// As `attach_mode` has it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Generic => "generic",
            Self::Tcx | Self::Clsact => "tc",
        }
    }

    /// What of the kernel holds the program: `xdp`, `tcx` or `clsact`.
    pub const fn hook(self) -> &'static str {
        match self {
            Self::Native | Self::Generic => "xdp",
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        }
    }

    /// Whether it is one of XDP.
    pub const fn is_xdp(self) -> bool {
        matches!(self, Self::Native | Self::Generic)
    }

    const fn file_name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Generic => "generic",
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        }
    }
}

/// Why an interface is not attached in a faster mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// It refuses the faster one, with this error of the system.
    Refused(i32),
    /// Another program holds its XDP hook.
    Taken,
    /// Its packets have no Ethernet header.
    NoEthernet,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(errno) => {
                write!(f, "it refuses XDP in a faster mode: {}", io::Error::from_raw_os_error(*errno))
            }
            Self::Taken => f.write_str("another program holds its XDP hook"),
            Self::NoEthernet => f.write_str("its packets have no Ethernet header, which XDP would need"),
        }
    }
}

/// A program on an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// How.
    pub mode: Mode,
    /// The interface's index.
    pub interface: u32,
    /// Why not in a faster mode, if that was tried.
    pub why: Option<Why>,
}

/// A pinned one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pin {
    /// Where: a link; of [`Mode::Clsact`] a folder, since a filter stays by itself.
    pub path: PathBuf,
    /// What.
    pub placement: Placement,
}

impl Placement {
    /// The name of its pin: `native-2`, `tcx-7-taken`, `generic-3-e95`.
    pub fn file_name(&self) -> String {
        let name = format!("{}-{}", self.mode.file_name(), self.interface);
        match self.why {
            None => name,
            Some(Why::Refused(errno)) => format!("{name}-e{errno}"),
            Some(Why::Taken) => name + "-taken",
            Some(Why::NoEthernet) => name + "-noethernet",
        }
    }

    fn parse(name: &str) -> Option<Self> {
        let mut parts = name.split('-');
        let mode = match parts.next()? {
            "native" => Mode::Native,
            "generic" => Mode::Generic,
            "tcx" => Mode::Tcx,
            "clsact" => Mode::Clsact,
            _ => return None,
        };
        let interface = parts.next()?.parse().ok()?;
        let why = match parts.next() {
            None => None,
            Some("taken") => Some(Why::Taken),
            Some("noethernet") => Some(Why::NoEthernet),
            Some(text) => Some(Why::Refused(text.strip_prefix('e')?.parse().ok()?)),
        };
        parts.next().is_none().then_some(Self { mode, interface, why })
    }
}

impl Pin {
    /// What is pinned at a path, if it is a program on an interface.
    pub fn at(path: &Path) -> Option<Self> {
        Some(Self { path: path.to_owned(), placement: Placement::parse(path.file_name()?.to_str()?)? })
    }

    /// Takes the program off its interface, at once. The pin stays.
    pub fn detach(&self) -> io::Result<()> {
        match self.placement.mode {
            Mode::Clsact => clsact::remove(self.placement.interface, &self.path),
            Mode::Native | Mode::Generic | Mode::Tcx => link::detach(&self.path),
        }
    }

    /// Removes the pin, and with it what it holds.
    pub fn remove(&self) -> io::Result<()> {
        match self.placement.mode {
            Mode::Clsact => remove_tree(&self.path).map(|_| ()),
            Mode::Native | Mode::Generic | Mode::Tcx => fs::remove_file(&self.path),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_placement_is_read_from_the_name_of_its_pin() {
        for mode in [Mode::Native, Mode::Generic, Mode::Tcx, Mode::Clsact] {
            for why in [None, Some(Why::Refused(95)), Some(Why::Taken), Some(Why::NoEthernet)] {
                let placement = Placement { mode, interface: 17, why };
                let name = placement.file_name();
                assert!(!name.contains('.'), "a bpffs takes no dots: {name}");
                assert_eq!(Placement::parse(&name), Some(placement), "{name}");
            }
        }
        for name in ["sockops", "native", "native-eth0", "tcx-7-e", "tcx-7-taken-1", ""] {
            assert_eq!(Placement::parse(name), None, "{name}");
        }
    }
}
