//! Listening sockets on their way from one process to the next: with them goes the queue of whoever has connected meanwhile, so that
//! nobody is refused.
//!
//! Both processes hold the same socket for a while. So what goes with it in the file system belongs to one of them at any time:
//! [`Spare::claim`] and [`Spare::leave`] say to which.

use std::{
    net::SocketAddr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use serde::{Deserialize, Serialize};
use socket2::Socket;

use super::{
    address::{Identity, SocketFile},
    inherited,
};
use crate::config::Listen;

/// What is told of a socket that is handed over, beside its descriptor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Label {
    /// What it was opened for, as in `gateway.listen`; one of the service manager's is `fd:NAME` here, whatever entry took it.
    listen: String,
    /// Of a unix socket that limiter has made: which file is its.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    file: Option<Identity>,
}

impl Label {
    pub(super) fn new(listen: &Listen, file: Option<Identity>) -> Self {
        Self { listen: listen.to_string(), file }
    }

    /// The socket of an address.
    pub fn tcp(address: SocketAddr) -> Self {
        Self::new(&Listen::Tcp(address), None)
    }

    fn tcp_address(&self) -> Option<SocketAddr> {
        self.listen.parse().ok()
    }
}

/// A second hand on a listening socket of this process, to give it to the next one. It keeps the socket open.
#[derive(Debug)]
pub struct Spare {
    label: Label,
    socket: OwnedFd,
    /// Whether the file is this process's to remove.
    file: Option<Arc<AtomicBool>>,
}

impl Spare {
    /// A hand on a socket that no file goes with.
    pub fn new(label: Label, socket: OwnedFd) -> Self {
        Self { label, socket, file: None }
    }

    pub(super) fn with_file(self, file: Option<Arc<AtomicBool>>) -> Self {
        Self { file, ..self }
    }

    /// What to tell of it.
    pub fn label(&self) -> &Label {
        &self.label
    }

    /// What goes with the socket is this process's from now on.
    pub fn claim(&self) {
        self.set_owner(true);
    }

    /// What goes with the socket is the next process's from now on: it stays when this one ends.
    pub fn leave(&self) {
        self.set_owner(false);
    }

    fn set_owner(&self, is_ours: bool) {
        if let Some(file) = &self.file {
            file.store(is_ours, Ordering::Release);
        }
    }
}

impl AsFd for Spare {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Sockets that the process before has handed over, and that nobody has taken yet.
#[derive(Debug, Default)]
pub struct Handed(Vec<(Label, Socket)>);

impl Handed {
    /// These, and those of the service manager among them for the entries that name such.
    pub fn new(sockets: impl IntoIterator<Item = (Label, OwnedFd)>) -> Self {
        let mut handed = Vec::new();
        let mut of_manager = Vec::new();
        for (label, socket) in sockets {
            match label.listen.strip_prefix("fd:") {
                Some(name) => of_manager.push((name.to_owned(), socket)),
                None => handed.push((label, Socket::from(socket))),
            }
        }
        if !of_manager.is_empty() {
            inherited::give(of_manager);
        }
        Self(handed)
    }

    /// The one for that entry of the configuration: what was opened for the same entry, be its port the kernel's choice, or what
    /// has that very address.
    pub fn take_tcp(&mut self, address: SocketAddr) -> Option<Socket> {
        let is_at = |socket: &Socket| {
            socket.local_addr().is_ok_and(|local| local.as_socket() == Some(address)) && address.port() != 0
        };
        self.take(|label, _| label.tcp_address() == Some(address)).or_else(|| self.take(|_, socket| is_at(socket)))
    }

    /// The one at that path, unless another file is there by now: nobody could connect to it. The file is still that of the process
    /// before.
    pub(super) fn take_unix(&mut self, path: &Path) -> Option<(Socket, SocketFile)> {
        let listen = Listen::Unix(path.to_owned()).to_string();
        let file = SocketFile::handed(path).ok()?;
        let socket = self.take(|label, _| label.listen == listen && label.file == Some(file.identity()))?;
        Some((socket, file))
    }

    fn take(&mut self, wanted: impl Fn(&Label, &Socket) -> bool) -> Option<Socket> {
        let found = self.0.iter().position(|(label, socket)| {
            wanted(label, socket) && socket.is_listener().unwrap_or(false) && socket.set_nonblocking(true).is_ok()
        })?;
        Some(self.0.remove(found).1)
    }

    /// Closes those that nobody wants any more, and removes their files. Returns what they were opened for.
    pub fn close(self) -> Vec<String> {
        let close = |(label, socket): (Label, Socket)| {
            if let (Some(path), Some(identity)) = (label.listen.strip_prefix("unix:"), label.file)
                && let Ok(file) = SocketFile::handed(Path::new(path))
                && file.identity() == identity
            {
                file.owner().store(true, Ordering::Release);
            }
            drop(socket);
            label.listen
        };
        self.0.into_iter().map(close).collect()
    }
}

#[cfg(test)]
#[path = "handed_tests.rs"]
mod tests;
