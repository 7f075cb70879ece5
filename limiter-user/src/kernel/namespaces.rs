//! The network namespaces of this host, and the sockets in each.
//!
//! The kernel has no list of namespaces. What can be found is what a process is in (`/proc/PID/ns/net`) and what is mounted
//! somewhere (`/run/netns/NAME`, those of container engines). Each is entered by a thread of its own, which ends with that; the
//! socket that it has opened there stays there. As long as one is open it keeps the namespace from going, so nobody holds it for
//! longer than a pass takes.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    fs::{self, File},
    io,
    os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use limiter_common::Netns;

use super::{host, sock_diag::SockDiag};

/// A namespace that was found, as people know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// The name that it is mounted under, if it is: that of `ip netns`, for example.
    pub name: Option<String>,
    /// Its inode, as in `net:[4026532281]`.
    pub inode: u64,
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            Some(name) => f.write_str(name),
            None => write!(f, "net:[{}]", self.inode),
        }
    }
}

/// A namespace other than this process's.
struct Other {
    named: Named,
    file: File,
    sockets: SockDiag,
}

/// The sockets of every namespace.
pub(super) struct Sockets {
    own: SockDiag,
    others: BTreeMap<Netns, Other>,
    /// Whether the others have been looked for.
    looked: bool,
}

impl fmt::Debug for Sockets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sockets").field("others", &self.others.len()).finish_non_exhaustive()
    }
}

impl Sockets {
    /// With the namespace of the calling thread for that which limiter was attached in.
    pub(super) fn open() -> io::Result<Self> {
        Ok(Self { own: SockDiag::open()?, others: BTreeMap::new(), looked: false })
    }

    /// Those of one namespace; `None` if it can't be found.
    pub(super) fn of(&mut self, netns: Netns) -> io::Result<Option<&mut SockDiag>> {
        if netns.is_own() {
            return Ok(Some(&mut self.own));
        }
        self.look()?;
        Ok(self.others.get_mut(&netns).map(|other| &mut other.sockets))
    }

    /// Those of every other namespace that can be found.
    pub(super) fn others(&mut self) -> io::Result<Vec<Netns>> {
        self.look()?;
        Ok(self.others.keys().copied().collect())
    }

    /// Every other namespace that can be found, by its name.
    pub(super) fn names(&mut self) -> io::Result<HashMap<Netns, Named>> {
        self.look()?;
        Ok(self.others.iter().map(|(netns, other)| (*netns, other.named.clone())).collect())
    }

    /// Does something on a thread in that namespace; `None` if it can't be found.
    pub(super) fn inside<T: Send>(&mut self, netns: Netns, work: impl FnOnce() -> T + Send) -> io::Result<Option<T>> {
        if netns.is_own() {
            return Ok(Some(work()));
        }
        self.look()?;
        self.others.get(&netns).map(|other| inside(&other.file, work)).transpose()
    }

    /// Forgets the others, which may go from now on. They are looked for anew when somebody asks.
    pub(super) fn let_go(&mut self) {
        self.others.clear();
        self.looked = false;
    }

    fn look(&mut self) -> io::Result<()> {
        if self.looked {
            return Ok(());
        }
        let own = fs::metadata("/proc/thread-self/ns/net")?.ino();
        for (inode, places) in found(own) {
            // Whoever was there may be gone by now; another place leads to the same one, or there is none any more.
            let entered = places.iter().find_map(|place| match enter(&place.path, inode) {
                Ok(entered) => Some((entered, place.name.clone())),
                Err(error) => {
                    tracing::debug!(%error, path = %place.path.display(), "can't enter a network namespace");
                    None
                }
            });
            if let Some(((file, cookie, mut sockets), name)) = entered {
                let netns = Netns::other(cookie);
                sockets.be_in(netns);
                self.others.insert(netns, Other { named: Named { name, inode }, file, sockets });
            }
        }
        self.looked = true;
        Ok(())
    }
}

/// Where a namespace can be entered.
struct Place {
    path: PathBuf,
    name: Option<String>,
}

/// The namespaces of this host but that of inode `own`, by inode. Those that are mounted have a name, and come by it.
fn found(own: u64) -> BTreeMap<u64, Vec<Place>> {
    let mut found: BTreeMap<u64, Vec<Place>> = BTreeMap::new();
    let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for (inode, path) in mounted(&mountinfo) {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
        found.entry(inode).or_default().push(Place { path, name });
    }
    let mut with_process = HashSet::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        if !entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit) {
            continue;
        }
        let path = entry.path().join("ns/net");
        // A process that has just ended, or one of the kernel's, has none.
        let inode = fs::read_link(&path).ok().and_then(|link| inode_of(&link.to_string_lossy()));
        if let Some(inode) = inode
            && with_process.insert(inode)
        {
            found.entry(inode).or_default().push(Place { path, name: None });
        }
    }
    found.remove(&own);
    found
}

/// The network namespaces that are mounted, in the text of /proc/self/mountinfo.
fn mounted(mountinfo: &str) -> Vec<(u64, PathBuf)> {
    // 310 24 0:4 net:[4026532281] /run/netns/web rw shared:160 - nsfs nsfs rw
    let mounted = mountinfo.lines().filter_map(|line| {
        let (mount, source) = line.split_once(" - ")?;
        (source.split(' ').next()? == "nsfs").then_some(())?;
        let mut fields = mount.split(' ').skip(3);
        let inode = inode_of(fields.next()?)?;
        Some((inode, PathBuf::from(host::unescape(fields.next()?))))
    });
    mounted.collect()
}

/// The inode in `net:[4026532281]`.
fn inode_of(name: &str) -> Option<u64> {
    name.strip_prefix("net:[")?.strip_suffix(']')?.parse().ok()
}

/// Opens the namespace at a path, which must be the one of that inode, and asks it for its cookie.
fn enter(path: &Path, inode: u64) -> io::Result<(File, u64, SockDiag)> {
    let file = File::open(path)?;
    if file.metadata()?.ino() != inode {
        return Err(io::Error::from(io::ErrorKind::NotFound));
    }
    let (cookie, sockets) = inside(&file, || -> io::Result<_> {
        Ok((host::netns_cookie().map_err(io::Error::other)?, SockDiag::open()?))
    })??;
    Ok((file, cookie, sockets))
}

/// Does something on a thread of its own in a namespace.
fn inside<T: Send>(namespace: &File, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let entered = scope.spawn(|| {
            // SAFETY: the descriptor is open; the call changes this thread alone.
            if unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(work())
        });
        entered.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// No socket that nobody has open any more lives longer: the kernel gives up after eight attempts to be heard, and
/// `FIN-WAIT-2` lasts a minute.
const ORPHANS_LIVE: Duration = Duration::from_mins(5);

/// Since when namespaces can't be found that there are entries of.
///
/// One that nobody is in and that is mounted nowhere lives on as long as its last sockets, whose end the stack will tell. So what is
/// counted of it is left alone, until there can be none any more.
#[derive(Debug, Default)]
pub(super) struct Absences {
    since: HashMap<Netns, Instant>,
}

impl Absences {
    /// Those of the namespaces with entries that were `missing` the whole time that a socket may live without them.
    pub(super) fn gone(&mut self, missing: &HashSet<Netns>, now: Instant) -> HashSet<Netns> {
        self.since.retain(|netns, _| missing.contains(netns));
        for &netns in missing {
            self.since.entry(netns).or_insert(now);
        }
        let gone = self.since.iter().filter(|(_, since)| now.saturating_duration_since(**since) >= ORPHANS_LIVE);
        gone.map(|(netns, _)| *netns).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounted_namespaces_are_found_by_name() {
        let mountinfo = "24 1 0:22 / /proc rw - proc proc rw\n\
                         310 24 0:4 net:[4026532281] /run/netns/web\\040one rw shared:160 - nsfs nsfs rw\n\
                         311 24 0:4 mnt:[4026532282] /run/other rw - nsfs nsfs rw\n";
        assert_eq!(mounted(mountinfo), [(4_026_532_281, PathBuf::from("/run/netns/web one"))]);
    }

    #[test]
    fn this_process_is_in_a_namespace_that_is_found() {
        let own = fs::metadata("/proc/thread-self/ns/net").unwrap().ino();
        assert!(found(0).contains_key(&own));
        assert!(!found(own).contains_key(&own));
    }

    #[test]
    fn a_namespace_is_gone_when_no_socket_can_be_left_of_it() {
        let start = Instant::now();
        let (one, two) = (Netns::other(1), Netns::other(2));
        let mut absences = Absences::default();
        assert_eq!(absences.gone(&[one].into(), start), HashSet::new());
        let almost = start + ORPHANS_LIVE.checked_sub(Duration::from_secs(1)).unwrap();
        assert_eq!(absences.gone(&[one, two].into(), almost), HashSet::new());
        assert_eq!(absences.gone(&[one, two].into(), start + ORPHANS_LIVE), [one].into());
        // One that comes back, and goes again, begins anew.
        assert_eq!(absences.gone(&[two].into(), start + ORPHANS_LIVE), HashSet::new());
        assert_eq!(absences.gone(&[one, two].into(), start + ORPHANS_LIVE), HashSet::new());
    }
}
