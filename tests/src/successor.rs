//! Processes that limiter itself has started to take its place: no children of the test's.

use std::{ffi::OsStr, fs, os::unix::ffi::OsStrExt as _, path::Path, time::Duration};

use anyhow::{Result, ensure};

use crate::wait::{SOON, eventually};

/// Longest that one may take to end.
const LONGEST_DRAIN: Duration = Duration::from_secs(30);

/// A `limiter run` that another one has started to take its place: no child of the test's. It is killed with its
/// [`Limiter`](crate::limiter::Limiter).
#[derive(Debug)]
pub struct Successor {
    id: u32,
}

impl Successor {
    pub(crate) fn new(id: u32) -> Self {
        Self { id }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Sends a signal.
    pub fn signal(&self, signal: i32) -> Result<()> {
        kill(self.id, signal)
    }

    /// Waits for its end.
    pub fn wait_gone(&self) -> Result<()> {
        eventually(LONGEST_DRAIN, &format!("the process {} has ended", self.id), || Ok(!is_alive(self.id)))
    }
}

/// Ends whatever works on such a pin path. The name of one says that a test has started it.
pub(crate) fn end_processes(is_meant: impl Fn(&Path) -> bool) {
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let line = fs::read(entry.path().join("cmdline")).ok()?;
        let mut words = line.split(|byte| *byte == 0).map(|word| Path::new(OsStr::from_bytes(word)));
        (pid != std::process::id() && words.any(&is_meant)).then_some(pid)
    });
    for pid in pids.collect::<Vec<u32>>() {
        let ended = kill(pid, libc::SIGKILL)
            .and_then(|()| eventually(SOON, &format!("the process {pid} is gone"), || Ok(!is_alive(pid))));
        if let Err(error) = ended {
            eprintln!("cannot end what was left: {error:#}");
        }
    }
}

/// Sends a signal.
pub(crate) fn kill(pid: u32, signal: i32) -> Result<()> {
    let number = i32::try_from(pid)?;
    // SAFETY: kill takes two integers.
    let outcome = unsafe { libc::kill(number, signal) };
    ensure!(outcome == 0, "cannot signal {pid}: {}", std::io::Error::last_os_error());
    Ok(())
}

/// Whether there is such a process; one that has ended and whose parent does not care is none.
fn is_alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().and_then(|rest| rest.trim_start().chars().next()).is_some_and(|state| state != 'Z')
}
