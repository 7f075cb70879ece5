//! An upgrade while the daemon runs: it starts the binary that is in its place by now, hands its sockets over, and goes.
//!
//! 1. The old process starts the new one with its listening sockets, the lock of its pin path and a channel between the two, and
//!    serves on. [`Letter`] says which descriptor is what.
//! 2. The new one starts as ever, on the sockets that it has been given, and puts its programs in the place of the old ones. Then it
//!    says that it is ready, and waits: it accepts nobody yet, and does nothing else of a daemon's work.
//! 3. The old one stops accepting and working, and tells the new one to begin. Should it die instead, that is as good.
//! 4. The new one begins, and the old one drains.
//!
//! So there is always one that accepts and one that works on the kernel's side, never two. Whoever connects in between waits in the
//! queues of the sockets, which are the same all the while. Until step 3 the old one can go on as if nothing had been: what both
//! hold (the lock, the files of unix sockets) is still its own.

mod attempt;
mod inheritance;
mod succession;

use std::{
    env,
    ffi::OsString,
    os::fd::RawFd,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::gateway::{Label, Spare};
pub(super) use attempt::Attempt;
pub(super) use inheritance::Inheritance;
pub(super) use succession::Succession;

/// The environment variable that has the letter. The new process takes it out at once, so that nobody else ever reads it.
const LETTER: &str = "LIMITER_HANDED_OVER";

/// What the new process says when it could begin.
const READY: u8 = b'r';

/// What the old one says then.
const BEGIN: u8 = b'b';

/// How long a new process may take until it is ready: what its start takes on a busy host with a great many connections, and
/// more.
const LONGEST_START: Duration = Duration::from_mins(1);

/// Which of its descriptors are what, to the new process. Fields may be added, and must have a default then: the two processes are of
/// different versions.
#[derive(Debug, Serialize, Deserialize)]
struct Letter {
    sockets: Vec<Item>,
    #[serde(default)]
    admin: Option<Item>,
    #[serde(default)]
    lock: Option<RawFd>,
    channel: RawFd,
}

#[derive(Debug, Serialize, Deserialize)]
struct Item {
    fd: RawFd,
    #[serde(flatten)]
    label: Label,
}

/// What the daemon listens on, kept for the process that comes after it.
#[derive(Debug, Default)]
struct Offer {
    sockets: Vec<Spare>,
    admin: Option<Spare>,
}

impl Offer {
    fn all(&self) -> impl Iterator<Item = &Spare> {
        self.sockets.iter().chain(&self.admin)
    }
}

/// How this process was started, to start the next one likewise.
#[derive(Clone, Debug)]
pub(super) struct Program {
    /// `None`: nobody could tell.
    path: Option<PathBuf>,
    /// The first is its name.
    arguments: Vec<OsString>,
}

impl Program {
    /// Asked at the start: once another file is in its place, the kernel calls this one deleted.
    pub(super) fn this() -> Self {
        let arguments: Vec<OsString> = env::args_os().collect();
        let file = env::current_exe().ok();
        // As it was typed, if that says where it is: a symbolic link may lead to the new version's file by then.
        let typed = arguments
            .first()
            .map(Path::new)
            .filter(|typed| typed.components().nth(1).is_some() && typed.canonicalize().ok() == file)
            .and_then(|typed| std::path::absolute(typed).ok());
        Self { path: typed.or(file), arguments }
    }
}
