//! The old process's side: starting the new one, and what comes of it.

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _, OwnedFd, RawFd},
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    process::{Child, Command},
    time::{Instant, sleep_until},
};

use super::{BEGIN, Item, LETTER, Letter, Offer, Program, READY};
use crate::gateway::Spare;

/// A new process that was started and is not ready yet. It is ended if this is dropped.
#[derive(Debug)]
pub(in crate::cli::run) struct Attempt {
    /// `None` once it is on its own.
    child: Option<Child>,
    id: u32,
    channel: UnixStream,
    deadline: Instant,
}

impl Attempt {
    /// Starts the program with all of the offer. `lock`: that of the pin path, if there is one. `longest`: how long it may take until it
    /// is ready.
    pub(super) fn start(
        program: &Program,
        offer: &Offer,
        lock: Option<&OwnedFd>,
        longest: Duration,
    ) -> anyhow::Result<Self> {
        ensure!(
            std::process::id() != 1,
            "this is process 1 of its container, which ends with it: start a new container, and stop this one when that \
             is ready"
        );
        let path = program.path.as_deref().context("can't tell which file this program was started from")?;
        let (name, arguments) = program.arguments.split_first().context("this process was started without a name")?;
        let (channel, theirs) = std::os::unix::net::UnixStream::pair()?;
        channel.set_nonblocking(true)?;
        let channel = UnixStream::from_std(channel)?;

        let item = |spare: &Spare| Item { fd: spare.as_fd().as_raw_fd(), label: spare.label().clone() };
        let letter = Letter {
            sockets: offer.sockets.iter().map(item).collect(),
            admin: offer.admin.as_ref().map(item),
            lock: lock.map(OwnedFd::as_raw_fd),
            channel: theirs.as_raw_fd(),
        };
        let handed: Vec<RawFd> =
            offer.all().map(|spare| spare.as_fd().as_raw_fd()).chain(letter.lock).chain([letter.channel]).collect();

        let mut command = Command::new(path);
        command.arg0(name).args(arguments).env(LETTER, serde_json::to_string(&letter)?);
        // What the service manager says there is for this process.
        for name in ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"] {
            command.env_remove(name);
        }
        // SAFETY: between fork and exec there are system calls only, which take numbers; the descriptors are open as long as
        // `offer`, `lock` and `theirs` are, and those of the child are its own copies.
        unsafe { command.pre_exec(move || hand_over(&handed)) };
        let child = command.spawn().with_context(|| format!("can't start {}", path.display()))?;
        let id = child.id().context("the new process ended at once")?;
        Ok(Self { child: Some(child), id, channel, deadline: Instant::now() + longest })
    }

    /// The id of the new process.
    pub(in crate::cli::run) fn id(&self) -> u32 {
        self.id
    }

    /// Completes when the new process is ready.
    ///
    /// # Errors
    ///
    /// Why it never will be; it is gone then.
    pub(in crate::cli::run) async fn ready(&mut self) -> anyhow::Result<()> {
        let Self { child: Some(child), channel, deadline, .. } = self else { return Ok(()) };
        tokio::select! {
            biased;
            said = channel.read_u8() => match said {
                Ok(READY) => return Ok(()),
                Ok(other) => {
                    child.kill().await?;
                    bail!("the new process said {other:#x}, which this version does not understand");
                }
                // It has ended, or is just about to: without the channel it can't say anything.
                Err(_) => {}
            },
            ended = child.wait() => bail!("the new process ended ({})", ended?),
            () = sleep_until(*deadline) => {}
        }
        if let Ok(ended) = tokio::time::timeout_at(*deadline, child.wait()).await {
            bail!("the new process ended ({})", ended?);
        }
        child.kill().await?;
        bail!("the new process was not ready in time, and was killed");
    }

    /// Tells the new process to begin, and leaves it to itself. `reload`: it is to read its configuration again.
    pub(in crate::cli::run) async fn begin(mut self, reload: bool) {
        // If it can't be told, it sees the end of the channel, which is the same.
        let _ = self.channel.write_u8(BEGIN).await;
        if reload && let Ok(pid) = libc::pid_t::try_from(self.id) {
            // It was ready, so the signal does not end it.
            // SAFETY: it takes two numbers. The child has not been waited for, so the id is still its own.
            let _ = unsafe { libc::kill(pid, libc::SIGHUP) };
        }
        self.child = None;
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // It fails if the process is gone.
            let _ = child.start_kill();
        }
    }
}

/// Has these descriptors, and no others but the first three, outlive the exec.
fn hand_over(handed: &[RawFd]) -> io::Result<()> {
    // All are opened to be closed at an exec. Should a library have forgotten it for one, this sees to it, where the kernel can (5.11).
    // SAFETY: it takes three numbers, and changes flags alone.
    let _ = unsafe { libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    for &fd in handed {
        // SAFETY: it takes three numbers.
        if unsafe { libc::fcntl(fd, libc::F_SETFD, 0) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "attempt_tests.rs"]
mod tests;
