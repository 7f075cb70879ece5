//! Keeps interfaces attached that go away and come back.
//!
//! The kernel tells of each change of an interface (rtnetlink's group for links). What it tells is not read: each time, what
//! there is is compared with what is attached. So it makes no difference if some of it was lost.

use std::{
    collections::HashMap,
    fmt, io,
    sync::{Arc, Mutex, PoisonError},
};

use netlink_sys::{Socket as Netlink, SocketAddr as NetlinkAddr, protocols::NETLINK_ROUTE};
use tokio::{io::unix::AsyncFd, sync::Notify, task::spawn_blocking};

use super::{
    KernelError,
    control::Control,
    host,
    interfaces::{InterfaceReport, Interfaces},
    pins::Pins,
};
use crate::config::AttachMode;

/// `RTMGRP_LINK` of linux/rtnetlink.h.
const LINKS: u32 = 1;

/// Longest message that is taken off the socket, in bytes; what is cut off was not going to be read.
const MESSAGE_BYTES: usize = 4096;

/// Something that happened to an interface.
#[derive(Debug)]
pub enum Change {
    /// One that was attached is gone.
    Gone {
        /// The index that it had.
        index: u32,
    },
    /// One that was not there, or another of the same name, is attached.
    Attached(InterfaceReport),
    /// One that was not there can't be attached; said once, and tried again with the next change.
    Failed {
        /// Its name.
        name: String,
        /// Why not.
        error: KernelError,
    },
}

/// Whoever keeps the interfaces of a configuration attached.
pub struct Keeper {
    netlink: Netlink,
    work: Arc<Mutex<Work>>,
    resumed: Arc<Notify>,
}

/// A hand on a [`Keeper`], to have it wait while another process attaches: what that takes off an interface must stay off.
#[derive(Clone)]
pub struct KeeperPause {
    work: Arc<Mutex<Work>>,
    resumed: Arc<Notify>,
}

impl fmt::Debug for KeeperPause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeeperPause").finish_non_exhaustive()
    }
}

impl KeeperPause {
    /// From when this returns, nothing is attached any more. Blocks while that is being done.
    pub fn pause(&self) {
        self.set(true);
    }

    /// Goes on, with all that has changed meanwhile.
    pub fn resume(&self) {
        self.set(false);
        self.resumed.notify_one();
    }

    fn set(&self, is_paused: bool) {
        self.work.lock().unwrap_or_else(PoisonError::into_inner).is_paused = is_paused;
    }
}

impl fmt::Debug for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keeper").finish_non_exhaustive()
    }
}

struct Work {
    pins: Pins,
    names: Vec<String>,
    mode: AttachMode,
    control: Arc<Control>,
    /// The interfaces that could not be attached, by name, with the index that they had then.
    failed: HashMap<String, u32>,
    /// Another process attaches.
    is_paused: bool,
}

impl Keeper {
    /// For these interfaces in the network namespace of the calling thread.
    pub(super) fn new(
        pins: &Pins,
        names: &[String],
        mode: AttachMode,
        control: Arc<Control>,
    ) -> Result<Self, KernelError> {
        const WHAT: &str = "can't have the kernel tell of interfaces that come and go";
        let mut netlink = Netlink::new(NETLINK_ROUTE).map_err(KernelError::failed(WHAT))?;
        netlink.bind(&NetlinkAddr::new(0, LINKS)).map_err(KernelError::failed(WHAT))?;
        netlink.set_non_blocking(true).map_err(KernelError::failed(WHAT))?;
        let work =
            Work { pins: pins.clone(), names: names.to_vec(), mode, control, failed: HashMap::new(), is_paused: false };
        Ok(Self { netlink, work: Arc::new(Mutex::new(work)), resumed: Arc::default() })
    }

    /// A hand on it, to have it wait.
    pub fn pauser(&self) -> KeeperPause {
        KeeperPause { work: Arc::clone(&self.work), resumed: Arc::clone(&self.resumed) }
    }

    /// Hands every change to `handle`, once it was seen to. Ends only with an error. Runs on a tokio runtime.
    pub async fn run(self, mut handle: impl FnMut(Change)) -> io::Error {
        // SAFETY: the socket owns its descriptor, returns the same one every time, and is dropped only after it was taken
        // off the reactor.
        let netlink = match unsafe { AsyncFd::register(self.netlink) } {
            Ok(netlink) => netlink,
            Err(error) => return error.into(),
        };
        loop {
            // First of all for what changed before anybody listened.
            let work = Arc::clone(&self.work);
            let looked = spawn_blocking(move || work.lock().unwrap_or_else(PoisonError::into_inner).compare()).await;
            match looked {
                Ok(changes) => changes.into_iter().for_each(&mut handle),
                Err(error) => return io::Error::other(error),
            }
            let mut ready = tokio::select! {
                ready = netlink.readable() => match ready {
                    Ok(ready) => ready,
                    Err(error) => return error,
                },
                () = self.resumed.notified() => continue,
            };
            if let Err(error) = drain(ready.get_inner()) {
                return error;
            }
            ready.clear_ready();
        }
    }
}

/// Takes off the socket what there is.
fn drain(netlink: &Netlink) -> io::Result<()> {
    let mut buffer = vec![0; MESSAGE_BYTES];
    loop {
        match netlink.recv(&mut &mut buffer[..], 0) {
            Ok(_) => {}
            Err(error) => match error.raw_os_error() {
                Some(libc::EAGAIN) => return Ok(()),
                // Some were lost; the others are still there.
                Some(libc::EINTR | libc::ENOBUFS) => {}
                _ => return Err(error),
            },
        }
    }
}

impl Work {
    /// Compares what there is with what is attached, and attaches what is not.
    fn compare(&mut self) -> Vec<Change> {
        let mut changes = Vec::new();
        if self.is_paused {
            return changes;
        }
        let interfaces = Interfaces::new(&self.pins, self.mode);
        let Ok(pinned) = interfaces.pinned() else { return changes };
        let mut attached = Vec::new();
        for pin in pinned {
            let index = pin.placement.interface;
            if host::interface_name(index).is_some() {
                attached.push(index);
                continue;
            }
            // Its link leads nowhere any more.
            match pin.remove() {
                Ok(()) => changes.push(Change::Gone { index }),
                Err(error) => {
                    tracing::warn!(%error, pin = %pin.path.display(), "can't remove what is left of an interface");
                }
            }
        }
        for name in &self.names {
            let Ok(index) = host::interface_index(name) else {
                self.failed.remove(name);
                continue;
            };
            if attached.contains(&index) {
                self.failed.remove(name);
                continue;
            }
            let result = self
                .control
                .with_programs(|loaded| interfaces.attach(loaded, &[(name.clone(), index)]))
                .and_then(|attachments| interfaces.keep(attachments));
            match result {
                Ok(reports) => {
                    self.failed.remove(name);
                    changes.extend(reports.into_iter().map(Change::Attached));
                }
                Err(error) => {
                    if self.failed.insert(name.clone(), index) != Some(index) {
                        changes.push(Change::Failed { name: name.clone(), error });
                    }
                }
            }
        }
        changes
    }
}
