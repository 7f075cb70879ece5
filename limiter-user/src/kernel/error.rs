//! What can go wrong between user space and the kernel, said so that the reader knows what to do next.

use std::{io, path::PathBuf};

/// An error of the kernel's side.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The process lacks the capabilities.
    #[error("no privilege to {action}: run as root (sudo), or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON")]
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
    /// Anything that has no better name; the text says what was tried, on what, and what to do.
    #[error("{what}")]
    Failed {
        /// What was tried, on what, and what to do.
        what: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}
