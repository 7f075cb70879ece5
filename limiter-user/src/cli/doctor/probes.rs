//! The probes, one function each.

use std::{io::ErrorKind, path::Path};

use super::{Row, State, host::Host, mounts};

/// Oldest kernel that has everything the programs call.
const OLDEST_KERNEL: (u32, u32) = (5, 15);

/// `BPF_FS_MAGIC` of `<linux/magic.h>`.
const BPF_FS: i64 = 0xcafe_4a11;

/// Fewer open files than this are soon used up: each relayed connection takes two.
const ENOUGH_OPEN_FILES: u64 = 65_536;

/// The kernel's default since 5.4; less drops connections in any burst.
const ENOUGH_BACKLOG: u64 = 4096;

/// Drivers that can run XDP programs themselves. For the others the network stack does, more slowly.
const XDP_DRIVERS: [&str; 32] = [
    "atlantic",
    "bnxt_en",
    "bonding",
    "cpsw",
    "dpaa2-eth",
    "ena",
    "enetc",
    "fec",
    "fsl_dpaa",
    "gve",
    "hv_netvsc",
    "i40e",
    "ice",
    "igb",
    "igc",
    "ixgbe",
    "ixgbevf",
    "lan966x",
    "mana",
    "mlx4_en",
    "mlx5_core",
    "mvneta",
    "mvpp2",
    "nfp",
    "qede",
    "sfc",
    "stmmac",
    "thunder-nicvf",
    "tun",
    "veth",
    "virtio_net",
    "vmxnet3",
];

/// Everything there is to look at.
pub(super) fn all(host: &impl Host, pin_path: &Path, interfaces: &[String]) -> Vec<Row> {
    let mut rows = vec![
        kernel(host),
        privilege(host),
        bpffs(host, pin_path),
        cgroup(host),
        btf(host),
        tc(host),
        open_before(host),
        elsewhere(host),
        sock_destroy(host),
        syncookies(host),
        timestamps(host),
        open_files(host),
        memlock(host),
        backlog(host),
    ];
    rows.extend(interfaces.iter().map(|name| interface(host, name)));
    rows
}

fn row(check: &str, state: State, found: impl Into<String>, advice: impl Into<String>) -> Row {
    Row { check: check.to_owned(), state, found: found.into(), advice: advice.into() }
}

fn unreadable(check: &str, path: &str, error: &std::io::Error) -> Row {
    row(check, State::Warn, format!("{path}: {error}"), "mount /proc and /sys, and look again")
}

/// `major.minor` of a kernel's release.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn kernel(host: &impl Host) -> Row {
    const PATH: &str = "/proc/sys/kernel/osrelease";
    let release = match host.read(PATH) {
        Ok(release) => release,
        Err(error) => return unreadable("kernel", PATH, &error),
    };
    let (major, minor) = OLDEST_KERNEL;
    match version(&release) {
        Some(found) if found >= OLDEST_KERNEL => row("kernel", State::Ok, release, ""),
        Some(_) => row("kernel", State::Fail, release, format!("upgrade to Linux {major}.{minor} or later")),
        None => row("kernel", State::Warn, release, format!("make sure that this is Linux {major}.{minor} or later")),
    }
}

/// Since when the kernel has links to TC.
const TCX: (u32, u32) = (6, 6);

/// Since when a `bpf_iter` may set what has the stack tell of a socket's end.
const WATCH: (u32, u32) = (6, 12);

/// What the running kernel is too old for costs nothing but what is said here.
fn since(host: &impl Host, check: &str, least: (u32, u32), with: &str, without: &str, costs: bool) -> Row {
    const PATH: &str = "/proc/sys/kernel/osrelease";
    let release = match host.read(PATH) {
        Ok(release) => release,
        Err(error) => return unreadable(check, PATH, &error),
    };
    let (major, minor) = least;
    match version(&release) {
        Some(found) if found < least && costs => {
            row(check, State::Warn, without, format!("Linux {major}.{minor} or later"))
        }
        Some(found) if found < least => row(check, State::Ok, without, ""),
        Some(_) => row(check, State::Ok, with, ""),
        // The kernel's own row says what to do.
        None => row(check, State::Ok, "unknown", ""),
    }
}

fn tc(host: &impl Host) -> Row {
    since(host, "tc", TCX, "links (TCX)", "filters of a clsact qdisc; links (TCX) from Linux 6.6 on", false)
}

fn open_before(host: &impl Host) -> Row {
    let without = "`limiter attach` does not count connections that were open before, only `limiter run` does";
    since(host, "open_before", WATCH, "connections that were open before are counted", without, true)
}

/// Since when what is delivered to a socket can be told by its namespace (`bpf_get_netns_cookie` for `cgroup_skb`).
const DELIVERY: (u32, u32) = (6, 17);

/// Matters to nobody but those who have `socket_port` or `namespaces` in a `[[service]]`, which works without, if less exactly.
fn elsewhere(host: &impl Host) -> Row {
    const CHECK: &str = "elsewhere";
    const WITHOUT: &str = "sockets in containers and behind redirects are counted once they are open, and `limiter run` cuts what \
                           is past a limit; before they are open, they are with BTF and from Linux 6.17 on";
    let with = "sockets in containers and behind redirects are counted before they are open";
    let row_of_version = since(host, CHECK, DELIVERY, with, WITHOUT, false);
    if row_of_version.found == with && btf(host).state != State::Ok {
        return row(CHECK, State::Ok, WITHOUT, "");
    }
    row_of_version
}

fn sock_destroy(host: &impl Host) -> Row {
    const CHECK: &str = "sock_destroy";
    match host.can_destroy() {
        Ok(true) => row(CHECK, State::Ok, "connections can be closed from outside", ""),
        Ok(false) => row(
            CHECK,
            State::Warn,
            "the kernel was built without CONFIG_INET_DIAG_DESTROY",
            "use one that was: without, `limiter kick` fails, and what gets past the programs stays open",
        ),
        Err(error) => row(CHECK, State::Warn, error.to_string(), "run as root (sudo), and look again"),
    }
}

fn privilege(host: &impl Host) -> Row {
    const PATH: &str = "/proc/self/status";
    // The bits of capabilities(7).
    const NET_ADMIN: u32 = 12;
    const SYS_ADMIN: u32 = 21;
    const PERFMON: u32 = 38;
    const BPF: u32 = 39;
    let status = match host.read(PATH) {
        Ok(status) => status,
        Err(error) => return unreadable("privilege", PATH, &error),
    };
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
    let Some(effective) = effective else {
        return row("privilege", State::Warn, format!("{PATH} has no CapEff"), "run as root");
    };
    let missing: Vec<&str> =
        [("CAP_NET_ADMIN", NET_ADMIN), ("CAP_SYS_ADMIN", SYS_ADMIN), ("CAP_PERFMON", PERFMON), ("CAP_BPF", BPF)]
            .into_iter()
            .filter_map(|(name, bit)| (effective >> bit & 1 == 0).then_some(name))
            .collect();
    if missing.is_empty() {
        row("privilege", State::Ok, "CAP_NET_ADMIN, CAP_SYS_ADMIN, CAP_PERFMON, CAP_BPF", "")
    } else {
        let found = format!("no {}", missing.join(", "));
        row("privilege", State::Fail, found, "run as root (sudo), or give the process these capabilities")
    }
}

fn bpffs(host: &impl Host, pin_path: &Path) -> Row {
    let path = pin_path.display();
    match host.filesystem(pin_path) {
        Ok(BPF_FS) => row("bpffs", State::Ok, format!("{path} is on a bpffs"), ""),
        Ok(_) => {
            let mounted = mounts_of(host, "bpf");
            let advice = match mounted.first() {
                Some(point) => format!("pin below {point}: --pin-path {point}/limiter"),
                // `ip netns exec` mounts /sys anew, without what was mounted below it.
                None => "mount -t bpf bpf /sys/fs/bpf; in a network namespace, enter by `nsenter --net=…`, \
                         since `ip netns exec` hides it"
                    .to_owned(),
            };
            row("bpffs", State::Fail, format!("{path} is not on a bpffs"), advice)
        }
        Err(error) => row("bpffs", State::Fail, format!("{path}: {error}"), "run as root (sudo)"),
    }
}

/// Mount points of that filesystem. Without `/proc` there are none to be seen.
fn mounts_of(host: &impl Host, filesystem: &str) -> Vec<String> {
    let mountinfo = host.read("/proc/self/mountinfo").unwrap_or_default();
    let mounts = mounts::parse(&mountinfo).into_iter();
    mounts.filter(|mount| mount.filesystem == filesystem).map(|mount| mount.point).collect()
}

fn cgroup(host: &impl Host) -> Row {
    match mounts_of(host, "cgroup2").first() {
        Some(point) => row("cgroup2", State::Ok, point.clone(), ""),
        None => row(
            "cgroup2",
            State::Fail,
            "not mounted",
            "mount -t cgroup2 cgroup2 /sys/fs/cgroup, or another folder; `ip netns exec` hides it: use nsenter",
        ),
    }
}

fn btf(host: &impl Host) -> Row {
    const PATH: &str = "/sys/kernel/btf/vmlinux";
    match host.readable(PATH) {
        Ok(()) => row("btf", State::Ok, PATH, ""),
        Err(error) if error.kind() == ErrorKind::NotFound => row(
            "btf",
            State::Warn,
            "the kernel has no BTF",
            "use a kernel with CONFIG_DEBUG_INFO_BTF=y: without, a burst of handshakes can pass a limit by a few",
        ),
        Err(error) => row("btf", State::Fail, format!("{PATH}: {error}"), "run as root (sudo)"),
    }
}

fn syncookies(host: &impl Host) -> Row {
    const PATH: &str = "/proc/sys/net/ipv4/tcp_syncookies";
    let found = |value: &str| format!("net.ipv4.tcp_syncookies = {value}");
    match host.read(PATH) {
        Ok(value) if value == "0" => row(
            "syncookies",
            State::Warn,
            found(&value),
            "sysctl net.ipv4.tcp_syncookies=1, or a flood of spoofed SYNs fills the backlog",
        ),
        // Set by whoever wants cookies at any time; so does kernel.challenge.
        Ok(value) if value == "2" => row("syncookies", State::Ok, found(&value) + ", for every connection", ""),
        Ok(value) => row("syncookies", State::Ok, found(&value), ""),
        Err(error) if error.kind() == ErrorKind::NotFound && host.readable("/proc/sys/net/ipv4").is_ok() => row(
            "syncookies",
            State::Warn,
            "the kernel was built without CONFIG_SYN_COOKIES",
            "use one that was, or a flood of spoofed SYNs fills the backlog",
        ),
        Err(error) => unreadable("syncookies", PATH, &error),
    }
}

/// Matters to nobody but [`crate::config::Kernel::challenge`].
fn timestamps(host: &impl Host) -> Row {
    const PATH: &str = "/proc/sys/net/ipv4/tcp_timestamps";
    match host.read(PATH) {
        Ok(value) => {
            let means = if value == "2" {
                "kernel.challenge's cookies keep window scaling, SACK and ECN"
            } else {
                "kernel.challenge's cookies keep the MSS alone, unless kernel.challenge_timestamps sets it to 2"
            };
            row("timestamps", State::Ok, format!("net.ipv4.tcp_timestamps = {value}: {means}"), "")
        }
        Err(error) => unreadable("timestamps", PATH, &error),
    }
}

/// One line of `/proc/self/limits`: soft and hard; `None` is unlimited.
fn resource_limit(host: &impl Host, name: &str) -> Option<(Option<u64>, Option<u64>)> {
    let limits = host.read("/proc/self/limits").ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix(name))?;
    let mut values = line.split_whitespace().map(|value| match value {
        "unlimited" => Some(None),
        number => number.parse().ok().map(Some),
    });
    Some((values.next()??, values.next()??))
}

fn amount(limit: Option<u64>) -> String {
    limit.map_or_else(|| "unlimited".to_owned(), |limit| limit.to_string())
}

fn open_files(host: &impl Host) -> Row {
    let Some((soft, hard)) = resource_limit(host, "Max open files") else {
        return row("open_files", State::Warn, "unknown", "mount /proc and look again");
    };
    let found = format!("{} (hard limit {})", amount(soft), amount(hard));
    if soft.is_none_or(|soft| soft >= ENOUGH_OPEN_FILES) {
        return row("open_files", State::Ok, found, "");
    }
    let advice = "a relayed connection takes two: raise it (ulimit -n; LimitNOFILE= under systemd)";
    row("open_files", State::Warn, found, advice)
}

fn memlock(host: &impl Host) -> Row {
    let Some((soft, _)) = resource_limit(host, "Max locked memory") else {
        return row("memlock", State::Warn, "unknown", "mount /proc and look again");
    };
    // Since 5.11 the memory of maps is accounted to the cgroup, so every kernel that will do ignores this limit.
    row("memlock", State::Ok, format!("{}; not used for BPF since Linux 5.11", amount(soft)), "")
}

fn backlog(host: &impl Host) -> Row {
    const PATH: &str = "/proc/sys/net/core/somaxconn";
    match host.read(PATH) {
        Ok(value) => match value.parse::<u64>() {
            Ok(number) if number >= ENOUGH_BACKLOG => row("somaxconn", State::Ok, value, ""),
            _ => {
                let advice =
                    format!("sysctl net.core.somaxconn={ENOUGH_BACKLOG}, or bursts of connections are dropped");
                row("somaxconn", State::Warn, value, advice)
            }
        },
        Err(error) => unreadable("somaxconn", PATH, &error),
    }
}

fn interface(host: &impl Host, name: &str) -> Row {
    let check = format!("interface {name}");
    let link = match host.link(name) {
        Ok(Some(link)) => link,
        Ok(None) => {
            let advice = "`ip link` lists those of this network namespace";
            return row(&check, State::Fail, "there is none of that name", advice);
        }
        Err(error) => return row(&check, State::Warn, error.to_string(), "look at it with `ip link`"),
    };
    let Some(ethernet) = link.ethernet else {
        let advice = "leave it out: limiter can't read its packets";
        return row(&check, State::Fail, "neither Ethernet nor IP is what its packets begin with", advice);
    };
    let (kind, native) = match &link.driver {
        _ if link.loopback => ("loopback".to_owned(), false),
        Some(driver) => (format!("driver {driver}"), XDP_DRIVERS.contains(&driver.as_str())),
        None => ("no driver".to_owned(), false),
    };
    let mode = match (ethernet, native) {
        (true, true) => "native XDP",
        (true, false) => "generic XDP only (slower)",
        (false, _) => "TC only (slower): no Ethernet header",
    };
    let found = format!("index {}, {kind}, {mode}", link.index);
    if link.up {
        row(&check, State::Ok, found, "")
    } else {
        row(&check, State::Warn, format!("{found}, down"), format!("ip link set {name} up"))
    }
}

#[cfg(test)]
#[path = "probes_tests.rs"]
mod tests;
