//! What of the host the kernel's side needs: a bpffs, a cgroup v2 hierarchy, interfaces, the network namespace.

use std::{
    ffi::CString,
    fs::{self, File},
    io, mem,
    net::UdpSocket,
    ops::Not as _,
    os::fd::{AsFd, AsRawFd as _},
    path::{Path, PathBuf},
};

use super::KernelError;

/// `BPF_FS_MAGIC` of linux/magic.h.
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;
/// `SO_NETNS_COOKIE` of asm-generic/socket.h (kernel 5.14).
const SO_NETNS_COOKIE: libc::c_int = 71;

/// `CAP_NET_ADMIN`, `CAP_SYS_ADMIN` (the cgroup's side; and all of it before 5.8), `CAP_PERFMON` and `CAP_BPF` of
/// linux/capability.h, as bits.
const CAPABILITIES: u64 = 1 << 12 | 1 << 21 | 1 << 38 | 1 << 39;

/// That the process may work with kernel programs.
pub fn require_privilege(action: &'static str) -> Result<(), KernelError> {
    let status = fs::read_to_string("/proc/self/status")
        .map_err(KernelError::failed("can't read /proc/self/status to learn this process's capabilities"))?;
    if effective_capabilities(&status) & CAPABILITIES == CAPABILITIES {
        Ok(())
    } else {
        Err(KernelError::NoPrivilege { action })
    }
}

/// The effective capabilities in the text of /proc/self/status, as bits.
fn effective_capabilities(status: &str) -> u64 {
    status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok())
        .unwrap_or(0)
}

/// Whether kernel programs may read the kernel's memory: not where it is locked down so that its secrets stay its own
/// (`lockdown=confidentiality`).
pub fn lets_programs_read_its_memory() -> bool {
    // Where there is no lockdown there is no such file.
    fs::read_to_string("/sys/kernel/security/lockdown").is_ok_and(|levels| keeps_its_secrets(&levels)).not()
}

/// Of `none integrity [confidentiality]`, the one in brackets is in force.
fn keeps_its_secrets(levels: &str) -> bool {
    levels.contains("[confidentiality]")
}

/// Time since boot, as the kernel programs see it (`CLOCK_MONOTONIC`).
pub fn monotonic() -> std::time::Duration {
    // SAFETY: an all-zero timespec is a valid one.
    let mut time: libc::timespec = unsafe { mem::zeroed() };
    // SAFETY: the pointer is valid for the call, which can't fail for this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    // The clock is never negative.
    std::time::Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// How many ticks the kernel counts in a second (`CONFIG_HZ`): its coarse clocks move at each, and say so.
pub fn jiffies_per_second() -> u64 {
    // SAFETY: an all-zero timespec is a valid one.
    let mut tick: libc::timespec = unsafe { mem::zeroed() };
    // SAFETY: the pointer is valid for the call, which can't fail for this clock.
    unsafe { libc::clock_getres(libc::CLOCK_MONOTONIC_COARSE, &raw mut tick) };
    // In whole nanoseconds, so it does not always come out even; and never 0.
    let tick_ns = tick.tv_nsec.unsigned_abs().max(1);
    (1_000_000_000 + tick_ns / 2) / tick_ns
}

/// Whether a path, or the nearest of its ancestors that is there, lies on a bpffs.
pub fn is_on_bpffs(path: &Path) -> bool {
    path.ancestors().find(|ancestor| ancestor.exists()).is_some_and(|ancestor| {
        let Ok(path) = CString::new(ancestor.as_os_str().as_encoded_bytes()) else { return false };
        // SAFETY: an all-zero statfs is a valid one.
        let mut stat: libc::statfs = unsafe { mem::zeroed() };
        // SAFETY: both pointers are valid for the call.
        let answer = unsafe { libc::statfs(path.as_ptr(), &raw mut stat) };
        #[expect(clippy::cast_sign_loss, reason = "the type's sign differs between C libraries")]
        let magic = stat.f_type as u64;
        answer == 0 && magic & 0xffff_ffff == BPF_FS_MAGIC
    })
}

/// The root of the cgroup v2 hierarchy, wherever it is mounted.
pub fn cgroup() -> Result<File, KernelError> {
    let mountinfo = fs::read_to_string("/proc/self/mountinfo")
        .map_err(KernelError::failed("can't read /proc/self/mountinfo to find the cgroup v2 hierarchy"))?;
    let path = cgroup_mount(&mountinfo).ok_or(KernelError::NoCgroup)?;
    File::open(&path).map_err(KernelError::failed(format!("can't open the cgroup at {}", path.display())))
}

/// The mount point of the cgroup v2 hierarchy; the one that shows its root, if there are several.
pub fn cgroup_mount(mountinfo: &str) -> Option<PathBuf> {
    let mut found = None;
    for line in mountinfo.lines() {
        // 31 23 0:27 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw
        let (mount, source) = line.split_once(" - ")?;
        if source.split(' ').next() != Some("cgroup2") {
            continue;
        }
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        let point = PathBuf::from(unescape(point));
        if root == "/" {
            return Some(point);
        }
        found.get_or_insert(point);
    }
    found
}

/// Undoes the octal escapes of /proc/self/mountinfo (space, tab, newline, backslash).
pub(super) fn unescape(field: &str) -> String {
    field.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

/// The index of an interface in this network namespace.
pub fn interface_index(name: &str) -> Result<u32, KernelError> {
    let index = CString::new(name).map_or(0, |name| {
        // SAFETY: the pointer is valid for the call.
        unsafe { libc::if_nametoindex(name.as_ptr()) }
    });
    if index == 0 {
        return Err(KernelError::NoSuchInterface { name: name.to_owned(), present: interfaces().join(", ") });
    }
    Ok(index)
}

/// The name of the interface of that index in this network namespace.
pub fn interface_name(index: u32) -> Option<String> {
    let mut name = [0_u8; libc::IF_NAMESIZE];
    // SAFETY: the buffer has the size that the call asks for.
    let answer = unsafe { libc::if_indextoname(index, name.as_mut_ptr().cast()) };
    if answer.is_null() {
        return None;
    }
    let end = name.iter().position(|&byte| byte == 0)?;
    Some(String::from_utf8_lossy(&name[..end]).into_owned())
}

/// What kind of link an interface is on (`ARPHRD_…` of `linux/if_arp.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkType(pub u16);

impl LinkType {
    /// Whether its packets begin with an Ethernet header (14 bytes), or at once with that of IP; `None` if with something
    /// else, for all that is known.
    pub const fn has_ethernet(self) -> Option<bool> {
        match self.0 {
            libc::ARPHRD_ETHER | libc::ARPHRD_LOOPBACK => Some(true),
            // tun and WireGuard, raw IP of modems, PPP, tunnels: IPIP, IP6TNL, SIT, GRE over IPv4 and IPv6
            libc::ARPHRD_NONE
            | libc::ARPHRD_VOID
            | RAW_IP
            | libc::ARPHRD_PPP
            | libc::ARPHRD_TUNNEL
            | libc::ARPHRD_TUNNEL6
            | libc::ARPHRD_SIT
            | libc::ARPHRD_IPGRE
            | IP6_GRE => Some(false),
            _ => None,
        }
    }
}

/// `ARPHRD_RAWIP` and `ARPHRD_IP6GRE`.
const RAW_IP: u16 = 519;
const IP6_GRE: u16 = 823;

/// The kind of an interface in this network namespace.
pub fn link_type(name: &str) -> io::Result<LinkType> {
    // SAFETY: an all-zero ifreq is a valid one.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    // One byte stays zero, which ends the name.
    for (to, from) in request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    let socket = std::os::unix::net::UnixDatagram::unbound()?;
    // SAFETY: the descriptor is open, and the request holds a name that ends with a zero.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFHWADDR, &raw mut request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has filled in the address.
    Ok(LinkType(unsafe { request.ifr_ifru.ifru_hwaddr.sa_family }))
}

/// The names of the interfaces in this network namespace.
fn interfaces() -> Vec<String> {
    // SAFETY: no precondition.
    let list = unsafe { libc::if_nameindex() };
    let mut names = Vec::new();
    if list.is_null() {
        return names;
    }
    let mut entry = list;
    // SAFETY: the list ends with an entry of index 0; its names are C strings; it is freed once, by its own call.
    unsafe {
        while (*entry).if_index != 0 {
            names.push(std::ffi::CStr::from_ptr((*entry).if_name).to_string_lossy().into_owned());
            entry = entry.add(1);
        }
        libc::if_freenameindex(list);
    }
    names
}

/// The cookie of this network namespace (kernel 5.14).
pub fn netns_cookie() -> Result<u64, KernelError> {
    let socket = UdpSocket::bind("127.0.0.1:0")
        .or_else(|_| UdpSocket::bind("[::]:0"))
        .map_err(KernelError::failed("can't open a socket to ask for the network namespace"))?;
    socket_option_u64(&socket, SO_NETNS_COOKIE).map_err(KernelError::failed(
        "the kernel does not tell its network namespace's cookie: it is too old for limiter, which needs Linux 5.15 or later",
    ))
}

/// A socket option of `SOL_SOCKET` that is a 64-bit number.
pub(crate) fn socket_option_u64(socket: &impl AsFd, option: libc::c_int) -> io::Result<u64> {
    let mut value = 0_u64;
    // The bytes of a u64.
    let mut length: libc::socklen_t = 8;
    // SAFETY: the descriptor is open; value and length are valid for the call, and the length is that of the value.
    let answer = unsafe {
        libc::getsockopt(socket.as_fd().as_raw_fd(), libc::SOL_SOCKET, option, (&raw mut value).cast(), &raw mut length)
    };
    if answer == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_ticks_as_often_as_kernels_do() {
        let hz = jiffies_per_second();
        assert!([100, 200, 250, 300, 500, 1000].contains(&hz), "{hz}");
    }

    #[test]
    fn finds_a_unified_hierarchy() {
        let mountinfo = "24 1 0:22 / /proc rw - proc proc rw\n31 23 0:27 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(cgroup_mount(mountinfo), Some("/sys/fs/cgroup".into()));
    }

    #[test]
    fn finds_a_hybrid_hierarchy() {
        let mountinfo = "30 23 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n31 23 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        assert_eq!(cgroup_mount(mountinfo), Some("/sys/fs/cgroup/unified".into()));
    }

    #[test]
    fn prefers_the_root_of_the_hierarchy_and_unescapes() {
        let mountinfo = "31 23 0:27 /docker/x /mnt/part rw - cgroup2 cgroup2 rw\n32 23 0:27 / /mnt/the\\040whole rw - cgroup2 cgroup2 rw\n";
        assert_eq!(cgroup_mount(mountinfo), Some("/mnt/the whole".into()));
    }

    #[test]
    fn without_cgroup_v2_there_is_none() {
        assert_eq!(cgroup_mount("30 23 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"), None);
    }

    #[test]
    fn a_kernel_that_keeps_its_secrets_says_so() {
        assert!(keeps_its_secrets("none integrity [confidentiality]\n"));
        assert!(!keeps_its_secrets("none [integrity] confidentiality\n"));
    }

    #[test]
    fn capabilities_are_read_from_the_status() {
        assert_eq!(effective_capabilities("Name:\tx\nCapEff:\t000001ffffffffff\n"), 0x1ff_ffff_ffff);
        assert_eq!(effective_capabilities("Name:\tx\n"), 0);
    }

    #[test]
    fn loopback_has_an_index_and_a_name() {
        let index = interface_index("lo").unwrap();
        assert_eq!(interface_name(index).as_deref(), Some("lo"));
        assert!(matches!(interface_index("no-such-device"), Err(KernelError::NoSuchInterface { .. })));
    }

    #[test]
    fn the_loopback_device_has_an_ethernet_header_and_a_tunnel_none() {
        assert_eq!(link_type("lo").unwrap().has_ethernet(), Some(true));
        assert_eq!(LinkType(libc::ARPHRD_NONE).has_ethernet(), Some(false));
        assert_eq!(LinkType(libc::ARPHRD_INFINIBAND).has_ethernet(), None);
        assert!(link_type("no-such-device").is_err());
    }

    #[test]
    fn proc_is_not_on_a_bpffs() {
        assert!(!is_on_bpffs(Path::new("/proc/limiter")));
    }
}
