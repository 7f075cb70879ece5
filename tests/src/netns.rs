//! Network namespaces.

use std::{
    fs::{self, File},
    io::{self, Write},
    mem,
    net::{Ipv4Addr, UdpSocket},
    os::{
        fd::{AsRawFd, RawFd},
        unix::process::CommandExt,
    },
    path::PathBuf,
    process::{Command, Stdio},
    thread,
};

use anyhow::{Context, Result, bail, ensure};

use crate::wait::{SOON, eventually};

/// A network namespace of this process. It has no name, and goes with its last descriptor, process and socket.
#[derive(Debug)]
pub struct Namespace {
    file: File,
}

impl Namespace {
    /// A new namespace with its loopback interface up.
    pub fn new() -> Result<Self> {
        let file = thread::scope(|scope| {
            scope
                .spawn(|| -> io::Result<File> {
                    unshare_network()?;
                    // Kernels before 6.1 don't have it: there the namespace shares the host's table.
                    match fs::write("/proc/sys/net/ipv4/tcp_child_ehash_entries", TCP_TABLE_SIZE) {
                        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                        _ => {}
                    }
                    unshare_network()?;
                    File::open("/proc/thread-self/ns/net")
                })
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
        .context("cannot make a network namespace: the end to end tests need root (CAP_SYS_ADMIN)")?;
        let namespace = Self { file };
        // A new namespace may inherit these from the host's.
        for (name, value) in [
            ("net/ipv4/conf/all/rp_filter", "0"),
            ("net/ipv4/conf/default/rp_filter", "0"),
            ("net/ipv4/ip_forward", "0"),
            ("net/ipv6/conf/all/forwarding", "0"),
            ("net/ipv6/conf/all/keep_addr_on_down", "1"),
            ("net/ipv6/conf/default/keep_addr_on_down", "1"),
            ("net/ipv6/conf/default/accept_ra", "0"),
            ("net/ipv4/tcp_max_syn_backlog", "4096"),
            ("net/core/somaxconn", "4096"),
        ] {
            namespace.set_sysctl(name, value)?;
        }
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// Runs `work` on a thread of its own inside the namespace. Sockets that it opens stay there.
    ///
    /// # Panics
    /// If `work` does, or if the process has lost its privilege since it made the namespace.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            scope
                .spawn(|| {
                    set_namespace(self.file.as_raw_fd()).expect("a namespace that this process made can be entered");
                    work()
                })
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Starts a thread inside the namespace that may outlive the caller.
    ///
    /// # Panics
    /// The thread does if the process has lost its privilege since it made the namespace.
    pub fn spawn<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<thread::JoinHandle<T>> {
        let file = self.file.try_clone()?;
        Ok(thread::spawn(move || {
            set_namespace(file.as_raw_fd()).expect("a namespace that this process made can be entered");
            work()
        }))
    }

    /// A command that runs inside the namespace (mounts stay the host's, unlike with `ip netns exec`), and that is killed
    /// when the thread that started it ends.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let namespace = self.file.as_raw_fd();
        let mut command = Command::new(program);
        // SAFETY: between fork and exec only system calls are made, and the descriptor is open as long as `self`, which
        // a caller that spawns the command still holds.
        unsafe {
            command.pre_exec(move || {
                set_namespace(namespace)?;
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            });
        }
        command
    }

    /// Runs lines of `ip` (iproute2) commands inside the namespace.
    pub fn ip(&self, lines: &str) -> Result<()> {
        self.run_ip(lines, &["-batch", "-"])
    }

    /// The same where the lines don't say by themselves that they are about IPv6.
    pub fn ip6(&self, lines: &str) -> Result<()> {
        self.run_ip(lines, &["-6", "-batch", "-"])
    }

    fn run_ip(&self, lines: &str, options: &[&str]) -> Result<()> {
        let mut child = self
            .command("ip")
            .args(options)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot run `ip`: the end to end tests need iproute2")?;
        child.stdin.take().context("stdin is piped")?.write_all(lines.as_bytes())?;
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "ip failed: {}\nin:\n{lines}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(())
    }

    /// Sets a sysctl of the namespace, named by its path below /proc/sys.
    pub fn set_sysctl(&self, name: &str, value: &str) -> Result<()> {
        self.enter(|| fs::write(PathBuf::from("/proc/sys").join(name), value))
            .with_context(|| format!("cannot set {name} to {value}"))
    }

    /// What `ip -json -details link show dev NAME` says.
    pub fn link(&self, interface: &str) -> Result<serde_json::Value> {
        let output = self.command("ip").args(["-json", "-details", "link", "show", "dev", interface]).output()?;
        ensure!(output.status.success(), "ip: {}", String::from_utf8_lossy(&output.stderr).trim());
        let links: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        match links.get(0) {
            Some(link) => Ok(link.clone()),
            None => bail!("ip knows no link {interface}"),
        }
    }

    /// Waits until an interface that was set up carries packets: until then the kernel drops what is sent, and TCP tries
    /// again a second later.
    pub fn wait_link_up(&self, interface: &str) -> Result<()> {
        eventually(SOON, &format!("{interface} is up"), || {
            let link = self.link(interface)?;
            Ok(link["operstate"] == "UP" && link["qdisc"] != "noop")
        })
    }

    /// Waits until no XDP program is on an interface: a link whose pin was removed ends a moment later.
    pub fn wait_xdp_free(&self, interface: &str) -> Result<()> {
        eventually(SOON, &format!("no XDP program is on {interface}"), || {
            Ok(self.link(interface)?.get("xdp").is_none())
        })
    }

    /// Has an interface compute checksums of what it sends, or, off, leaves that to the stack.
    pub fn set_checksum_offload(&self, interface: &str, on: bool) -> Result<()> {
        self.enter(|| set_checksum_offload(interface, on)).context("cannot set the offload of checksums")
    }

    /// Index of an interface.
    pub fn interface_index(&self, interface: &str) -> Result<u32> {
        let index = self.link(interface)?.get("ifindex").and_then(serde_json::Value::as_u64);
        u32::try_from(index.context("a link has an index")?).context("an index fits 32 bits")
    }

    /// How many packets an interface has received, those that XDP dropped among them.
    pub fn received_packets(&self, interface: &str) -> Result<u64> {
        let table = self.enter(|| fs::read_to_string("/proc/thread-self/net/dev"))?;
        // name: bytes packets errs drop …
        table
            .lines()
            .find_map(|line| line.trim().strip_prefix(interface)?.strip_prefix(':'))
            .and_then(|counts| counts.split_whitespace().nth(1)?.parse().ok())
            .with_context(|| format!("/proc/net/dev has no {interface}"))
    }

    /// A path that names the namespace as long as `self` lives; for `ip link … netns PATH`.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd()))
    }
}

/// Size of a namespace's own table of TCP sockets. Who lists the sockets of a namespace walks the whole table, and the
/// host's has hundreds of thousands of slots. It is the namespace's parent that says how large it is to be.
const TCP_TABLE_SIZE: &str = "1024";

fn set_checksum_offload(interface: &str, on: bool) -> io::Result<()> {
    /// `struct ethtool_value` of linux/ethtool.h.
    #[repr(C)]
    struct Value {
        command: u32,
        data: u32,
    }
    const SIOCETHTOOL: libc::c_ulong = 0x8946;
    const ETHTOOL_STXCSUM: u32 = 0x17;
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let mut value = Value { command: ETHTOOL_STXCSUM, data: on.into() };
    // SAFETY: an all-zero ifreq is a valid one.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(interface.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    // SAFETY: the request holds a name that ends with a zero, and points to a value that outlives the call.
    if unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Moves the calling thread to a new namespace.
fn unshare_network() -> io::Result<()> {
    // SAFETY: unshare takes a constant, and changes only the calling thread.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Moves the calling thread.
fn set_namespace(namespace: RawFd) -> io::Result<()> {
    // SAFETY: setns takes a descriptor and a constant, and changes only the calling thread.
    if unsafe { libc::setns(namespace, libc::CLONE_NEWNET) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
