//! What can go wrong between user space and the kernel, said so that the reader knows what to do next.

use std::{io, path::PathBuf};

use aya::{EbpfError, maps::MapError, pin::PinError, programs::ProgramError};

/// An error of the kernel's side.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The process lacks the capabilities.
    #[error(
        "no privilege to {action}: run as root (sudo), or with CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON and CAP_SYS_ADMIN"
    )]
    NoPrivilege {
        /// What was tried.
        action: &'static str,
    },
    /// Nothing is pinned at the pin path.
    #[error("nothing is attached at {}: start with `limiter attach` or `limiter run`, or name the place with --pin-path", pin_path.display())]
    NotAttached {
        /// The pin path.
        pin_path: PathBuf,
    },
    /// There is no network interface of that name in this network namespace.
    #[error("no interface {name} in this network namespace: `ip link` lists those there are ({present})")]
    NoSuchInterface {
        /// The name.
        name: String,
        /// The names of those there are.
        present: String,
    },
    /// The kernel was built without what closes a socket from outside.
    #[error("this kernel can't close a connection on behalf of others: it was built without CONFIG_INET_DIAG_DESTROY")]
    NoDestroy,
    /// Another program holds the interface's XDP hook.
    #[error(
        "the XDP hook of {interface} is taken by another program: `ip -details link show {interface}` names it; detach it, leave {interface} out, or allow TC with --attach-mode auto or tc"
    )]
    InterfaceTaken {
        /// The interface.
        interface: String,
    },
    /// The driver has no XDP, and nothing else was allowed.
    #[error(
        "{interface} can't be attached in native mode: allow the slower generic mode with --attach-mode auto or generic"
    )]
    NoNativeXdp {
        /// The interface.
        interface: String,
        /// The driver's answer.
        #[source]
        source: io::Error,
    },
    /// XDP was asked for on an interface whose packets it can't read.
    #[error(
        "the packets of {interface} have no Ethernet header, so XDP can't read them: use TC with --attach-mode auto or tc"
    )]
    NoEthernet {
        /// The interface.
        interface: String,
    },
    /// An interface of a kind that is not known to begin its packets with an Ethernet or an IP header.
    #[error(
        "{interface} is of a kind that limiter can't read packets of (ARPHRD type {number}): leave it out; connections by it still count, and are cut past the limits by `limiter run`"
    )]
    UnknownLinkType {
        /// The interface.
        interface: String,
        /// Its `ARPHRD_…` number.
        number: u16,
    },
    /// The pin path is not on a bpffs.
    #[error("{} is not on a BPF file system: `mount -t bpf bpf /sys/fs/bpf`, or name a place on one with --pin-path", pin_path.display())]
    NoBpffs {
        /// The pin path.
        pin_path: PathBuf,
    },
    /// No cgroup v2 hierarchy is mounted.
    #[error(
        "no cgroup v2 hierarchy is mounted, and without one the kernel can't tell of connections that open and close: `mount -t cgroup2 none /sys/fs/cgroup/unified`"
    )]
    NoCgroup,
    /// Another daemon works on the same pin path.
    #[error("another limiter{} works on {}: stop it first, or choose another place with --pin-path", pid.map(|pid| format!(" (process {pid})")).unwrap_or_default(), pin_path.display())]
    AlreadyRunning {
        /// The pin path.
        pin_path: PathBuf,
        /// The daemon's process, if it could be found.
        pid: Option<u32>,
    },
    /// What is pinned is not what this version would pin.
    #[error("what is pinned at {} has another layout ({difference}): `limiter detach` removes it, and with it the limits in force, then attach again", pin_path.display())]
    Layout {
        /// The pin path.
        pin_path: PathBuf,
        /// How it differs.
        difference: String,
    },
    /// What is pinned was attached in another network namespace.
    #[error("what is pinned at {} was attached in another network namespace: work with it from there, or choose another place with --pin-path", pin_path.display())]
    OtherNamespace {
        /// The pin path.
        pin_path: PathBuf,
    },
    /// There are more services than the maps have room for.
    #[error("{count} services are too many: there is room for {}", limiter_common::abi::MAX_SERVICES)]
    TooManyServices {
        /// How many.
        count: usize,
    },
    /// There are more rules than the maps have room for.
    #[error(
        "{count} rules are too many: there is room for {room}; nothing was changed. `limiter forget` makes room, or a higher kernel.max_rules when it is attached again after `limiter detach`"
    )]
    TooManyRules {
        /// How many.
        count: usize,
        /// For how many there is room.
        room: u32,
    },
    /// Another process has been changing the policy for too long.
    #[error("another process{} has been changing the policy for half a minute: look what it is waiting for, and try again; nothing was changed", pid.map(|pid| format!(" ({pid})")).unwrap_or_default())]
    PolicyBusy {
        /// The process, if it could be found.
        pid: Option<u32>,
    },
    /// The kernel refused the programs.
    #[error("the kernel refused the program {program}; {}{log}", "`limiter doctor` tells what this kernel lacks")]
    Refused {
        /// The program.
        program: &'static str,
        /// The end of the verifier's log.
        log: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Anything that has no better name; the text says what was tried, on what, and what to do.
    #[error("{what}")]
    Failed {
        /// What was tried, on what, and what to do.
        what: String,
        /// The system's answer.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl KernelError {
    /// What failed, for errors that need no more words than the system's own.
    pub(super) fn failed<E>(what: impl Into<String>) -> impl FnOnce(E) -> Self
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>> + Errno,
    {
        let what = what.into();
        move |error| match error.errno() {
            Some(libc::EPERM | libc::EACCES) => Self::NoPrivilege { action: "work with the kernel's BPF objects" },
            _ => Self::Failed { what, source: error.into() },
        }
    }
}

/// How many lines of the verifier's log are worth showing: the reason is at its end.
const LOG_LINES: usize = 12;

/// The end of a verifier's log, indented.
pub(super) fn log_end(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    let start = lines.len().saturating_sub(LOG_LINES);
    lines[start..].iter().flat_map(|line| ["\n    ", line]).collect()
}

/// Errors that have the system's error number somewhere inside.
pub(super) trait Errno {
    /// The number, if there is one.
    fn errno(&self) -> Option<i32>;
}

impl Errno for io::Error {
    fn errno(&self) -> Option<i32> {
        self.raw_os_error()
    }
}

/// Walks down the sources of an error to one of the system.
fn errno_of_chain(error: &(dyn std::error::Error + 'static)) -> Option<i32> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(io_error) = error.downcast_ref::<io::Error>() {
            return io_error.raw_os_error();
        }
        next = error.source();
    }
    None
}

macro_rules! errno_of_source {
    ($($error:ty),+) => {
        $(impl Errno for $error {
            fn errno(&self) -> Option<i32> {
                errno_of_chain(self)
            }
        })+
    };
}

errno_of_source!(EbpfError, MapError, PinError, ProgramError, aya::programs::links::LinkError);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_end_of_the_log_is_shown() {
        let log = (0..100).map(|line| format!("line {line}")).collect::<Vec<_>>().join("\n");
        let shown = log_end(&log);
        assert!(shown.starts_with("\n    line 88"));
        assert!(shown.ends_with("line 99"));
    }
}
