//! Where everything is pinned, and who may change it.
//!
//! ```text
//! PIN_PATH/            locked (flock) by the daemon as long as it runs
//!   v4/                layout version (abi::ABI_VERSION)
//!     LEDGER …         the maps, by name
//!     netns-7          an empty folder: cookie of the network namespace that it was attached in
//!     syncookies-1     an empty folder: what net.ipv4.tcp_syncookies was before it was changed, if it was
//!     timestamps-1     the same of net.ipv4.tcp_timestamps
//!     links/
//!       sockops        the link of the sock_ops program
//!       delivery       the link of the program that sees what is delivered, if a service needs it
//!       native-2       the link of the XDP program on the interface of index 2, and how it is attached
//!       tcx-7-taken    the same of the TC program, and why it is not XDP
//!       clsact-9       a folder: on that interface, it is a filter, which no link holds
//!         qdisc        an empty folder: the qdisc was made for it
//! ```
//!
//! File names on a bpffs have no dots, so interfaces, whose names may have some, stand there by index.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use limiter_common::abi;

use super::{
    KernelError, host, link,
    placement::{Mode, Pin, Placement},
};

/// Longest that a change of the policy is waited for. A million rules take some seconds.
const LONGEST_CHANGE: Duration = Duration::from_secs(30);
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// The places under one pin path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pins {
    root: PathBuf,
}

impl Pins {
    /// The places under `root`, the pin path of the configuration.
    pub fn new(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// The pin path.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The folder of this layout's version.
    pub fn version(&self) -> PathBuf {
        self.root.join(format!("v{}", abi::ABI_VERSION))
    }

    /// Where a map is pinned.
    pub fn map(&self, name: &str) -> PathBuf {
        self.version().join(name)
    }

    /// The folder of the links.
    pub fn links(&self) -> PathBuf {
        self.version().join("links")
    }

    /// The folder whose name says which network namespace the interfaces and the sockets are of.
    pub fn netns(&self, cookie: u64) -> PathBuf {
        self.version().join(Self::netns_name(cookie))
    }

    /// The name of that folder.
    pub fn netns_name(cookie: u64) -> String {
        format!("netns-{cookie}")
    }

    /// Where the link of the `sock_ops` program is pinned.
    pub fn sock_ops(&self) -> PathBuf {
        self.links().join(SOCK_OPS)
    }

    /// Where its successor is pinned until it takes that place.
    pub fn sock_ops_next(&self) -> PathBuf {
        self.links().join(SOCK_OPS_NEXT)
    }

    /// Where the link of the program is pinned that sees what is delivered.
    pub fn delivery(&self) -> PathBuf {
        self.links().join(DELIVERY)
    }

    /// Where its successor is pinned until it takes that place.
    pub fn delivery_next(&self) -> PathBuf {
        self.links().join(DELIVERY_NEXT)
    }

    /// Where a program on an interface is pinned.
    pub fn placement(&self, placement: &Placement) -> PathBuf {
        self.links().join(placement.file_name())
    }

    /// The programs on interfaces that are pinned, by the interface's index.
    pub fn placements(&self) -> io::Result<Vec<Pin>> {
        placements_in(&self.links())
    }

    /// Whether there is a whole state of this layout's version. The link of the `sock_ops` program is the first that is
    /// pinned, when every map is: without it, somebody has died on the way, and nothing is attached.
    pub fn exist(&self) -> bool {
        self.sock_ops().exists()
    }

    /// The version folders that are there and are not this one's.
    pub fn other_versions(&self) -> io::Result<Vec<String>> {
        let own = self.version();
        let mut others = Vec::new();
        for entry in fs::read_dir(&self.root)? {
            let path = entry?.path();
            if path != own && path.is_dir() {
                others.extend(path.file_name().map(|name| name.to_string_lossy().into_owned()));
            }
        }
        Ok(others)
    }

    /// Makes the folders, and takes the lock that says that a process works here. The lock ends with the process.
    pub fn lock(&self) -> Result<Lock, KernelError> {
        if !host::is_on_bpffs(&self.root) {
            return Err(KernelError::NoBpffs { pin_path: self.root.clone() });
        }
        let made = !self.root.exists();
        fs::create_dir_all(&self.root)
            .map_err(KernelError::failed(format!("can't make the folder {}", self.root.display())))?;
        let folder = File::open(&self.root)
            .map_err(KernelError::failed(format!("can't open the folder {}", self.root.display())))?;
        let Err(error) = flock(&folder, libc::LOCK_EX | libc::LOCK_NB) else {
            return Ok(Lock { folder, made, is_shared: AtomicBool::new(false) });
        };
        if error.kind() == io::ErrorKind::WouldBlock {
            Err(KernelError::AlreadyRunning { pin_path: self.root.clone(), pid: self.lock_holder() })
        } else {
            Err(KernelError::failed(format!("can't lock {}", self.root.display()))(error))
        }
    }

    /// The lock that the process before holds, and shares with this one. One of another pin path is closed, and this one's
    /// taken as by [`Self::lock`].
    pub fn lock_handed(&self, handed: OwnedFd) -> Result<Lock, KernelError> {
        let folder = File::from(handed);
        let is_ours = folder
            .metadata()
            .ok()
            .zip(fs::metadata(&self.root).ok())
            .is_some_and(|(handed, root)| (handed.dev(), handed.ino()) == (root.dev(), root.ino()));
        if is_ours { Ok(Lock { folder, made: false, is_shared: AtomicBool::new(true) }) } else { self.lock() }
    }

    /// Waits until no other process changes the policy, and keeps others from it. Everybody takes this lock for a moment,
    /// with or without a daemon.
    pub fn lock_policy(&self) -> Result<PolicyLock, KernelError> {
        let folder = self.version();
        let what = || format!("can't lock {}", folder.display());
        let file = File::open(&folder).map_err(KernelError::failed(what()))?;
        let deadline = Instant::now() + LONGEST_CHANGE;
        loop {
            let Err(error) = flock(&file, libc::LOCK_EX | libc::LOCK_NB) else {
                return Ok(PolicyLock { folder: file });
            };
            if error.kind() != io::ErrorKind::WouldBlock {
                return Err(KernelError::failed(what())(error));
            }
            if Instant::now() >= deadline {
                return Err(KernelError::PolicyBusy { pid: lock_holder_of(&folder) });
            }
            thread::sleep(LOCK_PAUSE);
        }
    }

    /// The process that holds the lock, as /proc/locks shows it; `None` if nobody does.
    pub fn lock_holder(&self) -> Option<u32> {
        lock_holder_of(&self.root)
    }

    /// Removes every pin under the pin path, and the folders. Returns how many pins there were. Links go first, so that
    /// nothing counts against a map that is gone.
    pub fn remove(&self) -> Result<usize, KernelError> {
        let versions = folders_in(&self.root);
        self.require_filters_in_reach(&versions)?;
        for version in &versions {
            Self::detach_all(version);
        }
        remove_tree(&self.root)
            .map_err(KernelError::failed(format!("can't remove what is pinned at {}", self.root.display())))
    }

    /// Removes what is pinned in this layout's version.
    pub fn clear(&self) -> Result<(), KernelError> {
        let version = self.version();
        if !version.exists() {
            return Ok(());
        }
        self.require_filters_in_reach(std::slice::from_ref(&version))?;
        Self::detach_all(&version);
        remove_tree(&version).map(|_| ()).map_err(KernelError::failed(format!("can't clear {}", version.display())))
    }

    fn detach_all(version: &Path) {
        let links = version.join("links");
        for pin in placements_in(&links).unwrap_or_default() {
            // What can't be detached (the interface is gone) ends with its pin.
            if let Err(error) = pin.detach() {
                tracing::debug!(%error, link = %pin.path.display(), "not detached before its pin is removed");
            }
        }
        for name in [DELIVERY, DELIVERY_NEXT, SOCK_OPS, SOCK_OPS_NEXT] {
            let path = links.join(name);
            if path.exists()
                && let Err(error) = link::detach(&path)
            {
                tracing::debug!(%error, link = %path.display(), "not detached before its pin is removed");
            }
        }
    }

    /// A filter doesn't end with a pin, and can be removed only from its own network namespace.
    fn require_filters_in_reach(&self, versions: &[PathBuf]) -> Result<(), KernelError> {
        for version in versions {
            let filters = placements_in(&version.join("links")).unwrap_or_default();
            if filters.iter().any(|pin| pin.placement.mode == Mode::Clsact) {
                let here = host::netns_cookie()?;
                if !version.join(format!("netns-{here}")).is_dir() {
                    return Err(KernelError::OtherNamespace { pin_path: self.root.clone() });
                }
            }
        }
        Ok(())
    }
}

/// Names of the pins of the `sock_ops` program.
const SOCK_OPS: &str = "sockops";
const SOCK_OPS_NEXT: &str = "sockops_next";
/// Names of those of the program that sees what is delivered.
const DELIVERY: &str = "delivery";
const DELIVERY_NEXT: &str = "delivery_next";

fn placements_in(links: &Path) -> io::Result<Vec<Pin>> {
    let mut pins: Vec<Pin> = match fs::read_dir(links) {
        Ok(entries) => {
            entries.collect::<io::Result<Vec<_>>>()?.into_iter().filter_map(|entry| Pin::at(&entry.path())).collect()
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error),
    };
    pins.sort_by_key(|pin| pin.placement.interface);
    Ok(pins)
}

fn folders_in(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

/// That this process, and no other, works on a pin path.
#[derive(Debug)]
pub struct Lock {
    // The lock lies on the descriptor and ends with it.
    folder: File,
    /// Whether the pin path was made by taking the lock.
    pub made: bool,
    /// Whether another process may hold the same lock: then it ends with the last descriptor.
    is_shared: AtomicBool,
}

impl Lock {
    /// A second hand on the lock, for another process. Both hold it until both are gone.
    pub fn share(&self) -> io::Result<OwnedFd> {
        let copy = self.folder.try_clone()?;
        self.is_shared.store(true, Ordering::Release);
        Ok(copy.into())
    }

    /// Has /proc/locks name this process, where another had taken the lock and shared it. Nobody gets in between: a lock that is
    /// changed stays on the descriptor, and whoever wants the whole one is kept off by either kind.
    pub fn claim(&self) -> io::Result<()> {
        flock(&self.folder, libc::LOCK_SH | libc::LOCK_NB)?;
        flock(&self.folder, libc::LOCK_EX | libc::LOCK_NB)
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        if !self.is_shared.load(Ordering::Acquire) {
            // Said aloud, because a child process may have inherited the descriptor.
            let _ = flock(&self.folder, libc::LOCK_UN);
        }
    }
}

fn flock(file: &File, operation: libc::c_int) -> io::Result<()> {
    // SAFETY: the descriptor is open.
    if unsafe { libc::flock(file.as_raw_fd(), operation) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// That this process, and no other, changes the policy.
#[derive(Debug)]
pub struct PolicyLock {
    // The lock lies on the descriptor and ends with it.
    folder: File,
}

impl Drop for PolicyLock {
    fn drop(&mut self) {
        // As above.
        let _ = flock(&self.folder, libc::LOCK_UN);
    }
}

/// The process that holds the lock of a folder.
fn lock_holder_of(folder: &Path) -> Option<u32> {
    let folder = fs::metadata(folder).ok()?;
    let locks = fs::read_to_string("/proc/locks").ok()?;
    let place = format!("{:02x}:{:02x}:{}", libc::major(folder.dev()), libc::minor(folder.dev()), folder.ino());
    lock_holder(&locks, &place)
}

/// The process that holds the lock of that `major:minor:inode` in the text of /proc/locks.
fn lock_holder(locks: &str, place: &str) -> Option<u32> {
    // 1: FLOCK  ADVISORY  WRITE 4711 00:1f:23 0 EOF
    locks.lines().find_map(|line| {
        let mut fields = line.split_whitespace();
        (fields.nth(1)? == "FLOCK").then_some(())?;
        let pid = fields.nth(2)?.parse().ok()?;
        (fields.next()? == place).then_some(pid)
    })
}

/// Removes a folder with what is in it, subfolders first. Returns how many files there were.
pub(super) fn remove_tree(folder: &Path) -> io::Result<usize> {
    let (folders, files): (Vec<_>, Vec<_>) = fs::read_dir(folder)?
        .collect::<io::Result<Vec<_>>>()?
        .into_iter()
        .map(|entry| entry.path())
        .partition(|path| path.is_dir());
    let mut removed = 0;
    for subfolder in folders {
        removed += remove_tree(&subfolder)?;
    }
    for file in files {
        fs::remove_file(file)?;
        removed += 1;
    }
    fs::remove_dir(folder)?;
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_holder_of_a_lock_is_found() {
        let locks = "1: POSIX  ADVISORY  WRITE 12 00:1f:23 0 EOF\n2: FLOCK  ADVISORY  WRITE 4711 00:1f:23 0 EOF\n2: -> FLOCK  ADVISORY  WRITE 4712 00:1f:23 0 EOF\n";
        assert_eq!(lock_holder(locks, "00:1f:23"), Some(4711));
        assert_eq!(lock_holder(locks, "00:1f:24"), None);
    }

    #[test]
    fn a_lock_that_is_shared_ends_with_the_last_hand_on_it() {
        let place = tempfile::tempdir().unwrap();
        let folder = || File::open(place.path()).unwrap();
        let take = |folder: File| -> io::Result<Lock> {
            flock(&folder, libc::LOCK_EX | libc::LOCK_NB)?;
            Ok(Lock { folder, made: false, is_shared: AtomicBool::new(false) })
        };
        let lock = take(folder()).unwrap();
        let next = Pins::new(place.path()).lock_handed(lock.share().unwrap()).unwrap();
        take(folder()).unwrap_err();
        drop(lock);
        take(folder()).expect_err("the next one still holds it");
        next.claim().unwrap();
        take(folder()).expect_err("and after it has taken it for its own");
        drop(next);
        take(folder()).unwrap();
    }

    #[test]
    fn a_tree_is_removed_whole() {
        let place = tempfile::tempdir().unwrap();
        let root = place.path().join("limiter");
        fs::create_dir_all(root.join("v1/links")).unwrap();
        fs::write(root.join("v1/LEDGER"), "").unwrap();
        fs::write(root.join("v1/links/sockops"), "").unwrap();
        assert_eq!(Pins::new(&root).remove().unwrap(), 2);
        assert!(!root.exists());
    }
}
