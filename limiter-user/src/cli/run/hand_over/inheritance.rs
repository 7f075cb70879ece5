//! The new process's side: what it has been given, and when it begins.

use std::{
    collections::HashSet,
    env, io,
    os::{
        fd::{FromRawFd as _, OwnedFd, RawFd},
        unix::{net::UnixStream, process::parent_id},
    },
};

use anyhow::{Context as _, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{Item, LETTER, Letter, READY};
use crate::gateway::{Handed, Label};

/// What the process before has handed over; nothing, if there is none.
#[derive(Debug, Default)]
pub(in crate::cli::run) struct Inheritance {
    pub(in crate::cli::run) sockets: Handed,
    pub(in crate::cli::run) admin: Handed,
    pub(in crate::cli::run) lock: Option<OwnedFd>,
    pub(in crate::cli::run) predecessor: Option<Predecessor>,
}

/// The process that serves until this one does.
#[derive(Debug)]
pub(in crate::cli::run) struct Predecessor {
    channel: UnixStream,
    id: u32,
}

impl Inheritance {
    /// Takes it. To be called once, and before there is a second thread.
    pub(in crate::cli::run) fn take() -> anyhow::Result<Self> {
        let Some(letter) = env::var_os(LETTER) else { return Ok(Self::default()) };
        // SAFETY: there is no other thread yet that could read the environment, as the caller sees to.
        unsafe { env::remove_var(LETTER) };
        let letter = letter.to_str().context("it is no text").and_then(|text| Ok(serde_json::from_str(text)?));
        let Letter { sockets, admin, lock, channel } = letter.with_context(|| {
            format!("{LETTER}: the process before has written something that this version can't read: restart instead")
        })?;
        let mut owned = Owned::default();
        let mut named = |Item { fd, label }| -> anyhow::Result<(Label, OwnedFd)> { Ok((label, owned.take(fd)?)) };
        let sockets = sockets.into_iter().map(&mut named).collect::<anyhow::Result<Vec<_>>>()?;
        let admin = admin.into_iter().map(&mut named).collect::<anyhow::Result<Vec<_>>>()?;
        let lock = lock.map(|fd| owned.take(fd)).transpose()?;
        let channel = owned.take(channel)?.into();
        Ok(Self {
            sockets: Handed::new(sockets),
            admin: Handed::new(admin),
            lock,
            predecessor: Some(Predecessor { channel, id: parent_id() }),
        })
    }
}

/// Sees to it that each descriptor has one owner.
#[derive(Default)]
struct Owned(HashSet<RawFd>);

impl Owned {
    fn take(&mut self, fd: RawFd) -> anyhow::Result<OwnedFd> {
        ensure!(
            fd > libc::STDERR_FILENO && self.0.insert(fd),
            "{LETTER}: the descriptor {fd} can't have been handed over"
        );
        // SAFETY: fcntl takes two numbers; it fails if there is no such descriptor. From here on no child of this process inherits it.
        if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
            return Err(io::Error::last_os_error())
                .with_context(|| format!("{LETTER}: the descriptor {fd} was not handed over"));
        }
        // SAFETY: it is open, the process before has handed it over to be owned, and it is taken once.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

impl Predecessor {
    /// Says that this process could begin, and completes when it is to. Gives the id of the one before.
    pub(in crate::cli::run) async fn relieve(self) -> u32 {
        let Self { channel, id } = self;
        if let Err(error) = tell_and_wait(channel).await {
            // It is gone, then, and nobody else serves.
            tracing::warn!(%error, pid = id, "the process before has ended without a word; taking its place");
        }
        id
    }
}

async fn tell_and_wait(channel: UnixStream) -> io::Result<()> {
    channel.set_nonblocking(true)?;
    let mut channel = tokio::net::UnixStream::from_std(channel)?;
    channel.write_u8(READY).await?;
    channel.read_u8().await.map(|_| ())
}
