use std::{collections::BTreeMap, fs, io, path::PathBuf};

use tempfile::TempDir;

use super::{super::link::Link, *};

/// A host whose `/proc` and `/sys` lie in a folder.
struct Fake {
    root: TempDir,
    filesystem: i64,
    links: BTreeMap<&'static str, Link>,
    /// `None`: it can't be asked.
    can_destroy: Option<bool>,
}

impl Fake {
    /// A host where all is well.
    fn fit() -> Self {
        let host = Self {
            root: tempfile::tempdir().unwrap(),
            filesystem: BPF_FS,
            links: BTreeMap::new(),
            can_destroy: Some(true),
        };
        host.write("/proc/sys/kernel/osrelease", "6.12.0-31-amd64\n");
        host.write("/proc/self/status", "Name:\tlimiter\nCapEff:\t000001ffffffffff\n");
        host.write(
            "/proc/self/mountinfo",
            "30 1 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n\
             31 1 0:27 / /sys/fs/bpf rw - bpf bpf rw\n",
        );
        host.write("/sys/kernel/btf/vmlinux", "");
        host.write("/proc/sys/net/ipv4/tcp_syncookies", "1\n");
        host.write("/proc/sys/net/ipv4/tcp_timestamps", "1\n");
        host.write(
            "/proc/self/limits",
            "Limit                     Soft Limit           Hard Limit           Units     \n\
             Max locked memory         8388608              8388608              bytes     \n\
             Max open files            1048576              unlimited            files     \n",
        );
        host.write("/proc/sys/net/core/somaxconn", "4096\n");
        host
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.path().join(path.trim_start_matches('/'))
    }

    fn write(&self, path: &str, text: &str) {
        fs::create_dir_all(self.path(path).parent().unwrap()).unwrap();
        fs::write(self.path(path), text).unwrap();
    }

    fn remove(&self, path: &str) {
        fs::remove_file(self.path(path)).unwrap();
    }
}

impl Host for Fake {
    fn read(&self, path: &str) -> io::Result<String> {
        fs::read_to_string(self.path(path)).map(|text| text.trim_end().to_owned())
    }

    fn readable(&self, path: &str) -> io::Result<()> {
        fs::File::open(self.path(path)).map(drop)
    }

    fn filesystem(&self, _: &Path) -> io::Result<i64> {
        Ok(self.filesystem)
    }

    fn link(&self, name: &str) -> io::Result<Option<Link>> {
        Ok(self.links.get(name).cloned())
    }

    fn can_destroy(&self) -> io::Result<bool> {
        self.can_destroy.ok_or_else(|| io::Error::from_raw_os_error(libc::EPERM))
    }
}

fn looked_at(host: &Fake, interfaces: &[&str]) -> Vec<Row> {
    let interfaces: Vec<String> = interfaces.iter().map(ToString::to_string).collect();
    all(host, Path::new("/sys/fs/bpf/limiter"), &interfaces)
}

/// The row of that name, which must be the only one that is not well.
fn only_fault(host: &Fake, check: &str) -> Row {
    let mut rows: Vec<Row> = looked_at(host, &[]).into_iter().filter(|row| row.state != State::Ok).collect();
    assert_eq!(rows.len(), 1, "{rows:#?}");
    assert_eq!(rows[0].check, check);
    assert!(!rows[0].advice.is_empty());
    rows.remove(0)
}

#[test]
fn on_a_fit_host_all_is_well() {
    let rows = looked_at(&Fake::fit(), &[]);
    let checks: Vec<&str> = rows.iter().map(|row| row.check.as_str()).collect();
    assert_eq!(
        checks,
        [
            "kernel",
            "privilege",
            "bpffs",
            "cgroup2",
            "btf",
            "tc",
            "open_before",
            "elsewhere",
            "sock_destroy",
            "syncookies",
            "timestamps",
            "open_files",
            "memlock",
            "somaxconn"
        ]
    );
    assert!(rows.iter().all(|row| row.state == State::Ok && row.advice.is_empty()), "{rows:#?}");
}

#[test]
fn an_old_kernel_fails_and_an_odd_one_warns() {
    let host = Fake::fit();
    for (release, state) in [
        ("5.14.0-70.el9", State::Fail),
        ("4.19.0", State::Fail),
        ("5.15.0", State::Ok),
        ("10.0.1", State::Ok),
        ("linux", State::Warn),
        ("", State::Warn),
    ] {
        host.write("/proc/sys/kernel/osrelease", release);
        let row = kernel(&host);
        assert_eq!((row.state, row.advice.is_empty()), (state, state == State::Ok), "{release}");
    }
}

#[test]
fn what_a_kernel_is_too_old_for_is_said_with_what_it_falls_back_to() {
    let host = Fake::fit();
    host.write("/proc/sys/kernel/osrelease", "6.1.0-31-amd64");
    assert_eq!(only_fault(&host, "open_before").advice, "Linux 6.12 or later");
    assert!(tc(&host).found.contains("clsact"));
    host.write("/proc/sys/kernel/osrelease", "6.6.0");
    assert_eq!(tc(&host).found, "links (TCX)");
    assert_eq!(open_before(&host).state, State::Warn);
    assert!(elsewhere(&host).found.contains("`limiter run` cuts what is past a limit"));
    host.write("/proc/sys/kernel/osrelease", "6.17.0");
    let with = "sockets in containers and behind redirects are counted before they are open";
    assert_eq!((elsewhere(&host).state, elsewhere(&host).found.as_str()), (State::Ok, with));
    host.remove("/sys/kernel/btf/vmlinux");
    assert!(elsewhere(&host).found.contains("with BTF and from Linux 6.17 on"));
}

#[test]
fn what_a_kernel_was_built_without_is_named() {
    let mut host = Fake::fit();
    host.can_destroy = Some(false);
    assert!(only_fault(&host, "sock_destroy").found.contains("CONFIG_INET_DIAG_DESTROY"));
    host.can_destroy = None;
    assert!(only_fault(&host, "sock_destroy").advice.contains("root"));

    let host = Fake::fit();
    host.remove("/proc/sys/net/ipv4/tcp_syncookies");
    assert!(only_fault(&host, "syncookies").found.contains("CONFIG_SYN_COOKIES"));
}

#[test]
fn missing_capabilities_are_named() {
    let host = Fake::fit();
    host.write("/proc/self/status", "CapEff:\t0000000000000000\n");
    let row = only_fault(&host, "privilege");
    assert_eq!(row.state, State::Fail);
    assert_eq!(row.found, "no CAP_NET_ADMIN, CAP_SYS_ADMIN, CAP_PERFMON, CAP_BPF");

    let needed = 1_u64 << 12 | 1 << 21 | 1 << 38 | 1 << 39;
    host.write("/proc/self/status", &format!("CapEff:\t{needed:016x}\n"));
    assert_eq!(privilege(&host).state, State::Ok);
    host.write("/proc/self/status", &format!("CapEff:\t{:016x}\n", needed & !(1 << 39)));
    assert_eq!(only_fault(&host, "privilege").found, "no CAP_BPF");
}

#[test]
fn a_pin_path_off_the_bpffs_fails_and_names_one_that_is_on_it() {
    let mut host = Fake::fit();
    host.filesystem = 0x6265_6572;
    assert!(only_fault(&host, "bpffs").advice.contains("--pin-path /sys/fs/bpf/limiter"));
    host.write("/proc/self/mountinfo", "30 1 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n");
    let row = only_fault(&host, "bpffs");
    assert_eq!(row.state, State::Fail);
    assert!(row.advice.contains("mount -t bpf"), "{row:?}");
}

#[test]
fn cgroup2_is_found_wherever_it_is_mounted() {
    let host = Fake::fit();
    host.write("/proc/self/mountinfo", "30 1 0:26 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n");
    assert_eq!(cgroup(&host).found, "/sys/fs/cgroup/unified");
    host.write("/proc/self/mountinfo", "30 1 0:26 / /sys/fs/cgroup rw - cgroup cgroup rw\n");
    assert_eq!(only_fault(&host, "cgroup2").state, State::Fail);
}

#[test]
fn a_kernel_without_btf_is_warned_of() {
    let host = Fake::fit();
    host.remove("/sys/kernel/btf/vmlinux");
    assert_eq!(only_fault(&host, "btf").state, State::Warn);
}

#[test]
fn settings_that_weaken_the_host_are_warned_of() {
    let host = Fake::fit();
    host.write("/proc/sys/net/ipv4/tcp_syncookies", "0\n");
    assert_eq!(only_fault(&host, "syncookies").state, State::Warn);
    host.write("/proc/sys/net/ipv4/tcp_syncookies", "2\n");
    let row = syncookies(&host);
    assert_eq!((row.state, row.found.contains("for every connection")), (State::Ok, true));

    assert!(timestamps(&host).found.contains("the MSS alone"));
    host.write("/proc/sys/net/ipv4/tcp_timestamps", "2\n");
    assert!(timestamps(&host).found.contains("keep window scaling"));

    let host = Fake::fit();
    host.write("/proc/sys/net/core/somaxconn", "128\n");
    assert_eq!(only_fault(&host, "somaxconn").state, State::Warn);

    let host = Fake::fit();
    host.write("/proc/self/limits", "Max locked memory unlimited unlimited bytes\nMax open files 1024 1048576 files\n");
    assert_eq!(only_fault(&host, "open_files").found, "1024 (hard limit 1048576)");
}

#[test]
fn without_proc_nothing_panics_and_everything_is_said() {
    let host = Fake { root: tempfile::tempdir().unwrap(), filesystem: 0, links: BTreeMap::new(), can_destroy: None };
    let rows = looked_at(&host, &["eth0"]);
    assert!(rows.iter().all(|row| row.state != State::Ok && !row.advice.is_empty()), "{rows:#?}");
}

#[test]
fn interfaces_are_named_with_driver_and_mode() {
    let mut host = Fake::fit();
    let link = Link { index: 2, up: true, loopback: false, ethernet: Some(true), driver: Some("virtio_net".into()) };
    host.links.insert("eth0", link.clone());
    host.links.insert("eth1", Link { up: false, driver: Some("e1000e".into()), ..link.clone() });
    host.links.insert("lo", Link { index: 1, loopback: true, driver: None, ..link.clone() });
    host.links.insert("tun0", Link { ethernet: Some(false), driver: Some("tun".into()), ..link.clone() });
    host.links.insert("ib0", Link { ethernet: None, ..link });
    let rows = looked_at(&host, &["eth0", "eth1", "lo", "eth9", "tun0", "ib0"]);
    let found: Vec<_> = rows[14..].iter().map(|row| (row.state, row.found.as_str())).collect();
    assert_eq!(
        found,
        [
            (State::Ok, "index 2, driver virtio_net, native XDP"),
            (State::Warn, "index 2, driver e1000e, generic XDP only (slower), down"),
            (State::Ok, "index 1, loopback, generic XDP only (slower)"),
            (State::Fail, "there is none of that name"),
            (State::Ok, "index 2, driver tun, TC only (slower): no Ethernet header"),
            (State::Fail, "neither Ethernet nor IP is what its packets begin with"),
        ]
    );
}
