//! What the host says of itself: memory, pressure (PSI) and file descriptors, of this process's cgroup where it has one.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::level::{Readings, Signal};
use crate::config;

/// Where readings come from.
pub(in crate::gateway) trait Sense: Send {
    /// Reads those that have a threshold. Blocks.
    fn read(&mut self, config: &config::Overload) -> Readings;
}

/// The kernel's files.
pub(super) struct Host {
    /// Where `/proc` is.
    proc: PathBuf,
    /// The cgroup of this process, and those that it is in, up to the root; looked for when it is first needed.
    cgroups: Option<Vec<PathBuf>>,
    /// Which of the signals it was said of that they are not to be had.
    missed: [bool; Signal::ALL.len()],
}

impl Default for Host {
    fn default() -> Self {
        Self::at("/proc")
    }
}

impl Sense for Host {
    fn read(&mut self, config: &config::Overload) -> Readings {
        let mut readings = Readings::default();
        for signal in Signal::ALL {
            if signal == Signal::Lag || signal.threshold(config).is_none() {
                continue;
            }
            let reading = match signal {
                Signal::Memory => self.memory(),
                Signal::MemoryPressure => self.pressure("memory"),
                Signal::CpuPressure => self.pressure("cpu"),
                Signal::Descriptors => self.descriptors(),
                Signal::Lag => None,
            };
            if reading.is_none() && !std::mem::replace(&mut self.missed[signal as usize], true) {
                tracing::info!(
                    "gateway.overload.{} is not looked at: {}",
                    signal.name(),
                    match signal {
                        Signal::MemoryPressure | Signal::CpuPressure =>
                            "this kernel does not measure pressure (CONFIG_PSI, and psi=1 on its command line)",
                        _ => "/proc does not say",
                    }
                );
            }
            readings.set(signal, reading);
        }
        readings
    }
}

impl Host {
    fn at(proc: impl Into<PathBuf>) -> Self {
        Self { proc: proc.into(), cgroups: None, missed: Default::default() }
    }

    /// Percent of the memory that there is: in the cgroup that is nearest to its limit, or where there is no limit, on the host.
    fn memory(&mut self) -> Option<f64> {
        let limited = self.cgroups().iter().filter_map(|cgroup| memory_of(cgroup)).reduce(f64::max);
        limited.or_else(|| host_memory(&self.read_proc("meminfo").ok()?))
    }

    /// Percent of the last ten seconds in which somebody in the cgroup, or else on the host, waited for that.
    fn pressure(&mut self, what: &str) -> Option<f64> {
        let own = self.cgroups().first().and_then(|own| fs::read_to_string(own.join(format!("{what}.pressure"))).ok());
        // A cgroup may have it switched off.
        own.as_deref().and_then(some_avg10).or_else(|| some_avg10(&self.read_proc(&format!("pressure/{what}")).ok()?))
    }

    /// Percent of the descriptors that this process may have.
    fn descriptors(&self) -> Option<f64> {
        let most = most_descriptors(&self.read_proc("self/limits").ok()?)?;
        let folder = self.proc.join("self/fd");
        // From 6.2 on the kernel says how many there are as the size of the folder; before, they have to be counted.
        let open = match fs::metadata(&folder).ok()?.len() {
            0 => fs::read_dir(&folder).ok()?.count().saturating_sub(1) as u64,
            open => open,
        };
        percent(open, most)
    }

    fn cgroups(&mut self) -> &[PathBuf] {
        if self.cgroups.as_ref().is_none_or(|known| known.first().is_some_and(|own| !own.exists())) {
            let found =
                self.read_proc("self/cgroup").and_then(|cgroup| Ok((cgroup, self.read_proc("self/mountinfo")?)));
            self.cgroups = Some(found.map(|(cgroup, mounts)| cgroups(&cgroup, &mounts)).unwrap_or_default());
        }
        self.cgroups.as_deref().unwrap_or_default()
    }

    fn read_proc(&self, name: &str) -> io::Result<String> {
        fs::read_to_string(self.proc.join(name))
    }
}

#[expect(clippy::cast_precision_loss, reason = "a percentage need not be exact to the byte")]
fn percent(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 * 100.0 / whole as f64)
}

/// The folder of the process's cgroup v2, and those around it, from the texts of `/proc/self/cgroup` and `/proc/self/mountinfo`.
fn cgroups(cgroup: &str, mounts: &str) -> Vec<PathBuf> {
    // 0::/system.slice/limiter.service
    let own = cgroup.lines().find_map(|line| line.strip_prefix("0::"));
    // 31 23 0:27 /docker/x /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw
    let mounted = mounts.lines().find_map(|line| {
        let (fields, kind) = line.split_once(" - ")?;
        kind.starts_with("cgroup2 ").then_some(())?;
        let mut fields = fields.split(' ').skip(3);
        Some((fields.next()?, fields.next()?))
    });
    let (Some(own), Some((root, place))) = (own, mounted) else { return Vec::new() };
    // What the mount does not show can't be read; whoever is outside of it goes by its root.
    let below = Path::new(own).strip_prefix(root).unwrap_or(Path::new(""));
    let place = Path::new(place);
    place.join(below).ancestors().take_while(|folder| folder.starts_with(place)).map(Path::to_owned).collect()
}

/// Percent of its limit that a cgroup uses; what the kernel would give up first does not count. `None`: it has no limit.
fn memory_of(cgroup: &Path) -> Option<f64> {
    let read = |name: &str| fs::read_to_string(cgroup.join(name)).ok();
    let limit = |name| read(name)?.trim().parse::<u64>().ok();
    let most = limit("memory.max").into_iter().chain(limit("memory.high")).min()?;
    let used: u64 = read("memory.current")?.trim().parse().ok()?;
    let stat = read("memory.stat").unwrap_or_default();
    let idle = stat.lines().find_map(|line| line.strip_prefix("inactive_file ")?.parse().ok()).unwrap_or(0);
    percent(used.saturating_sub(idle), most)
}

/// Percent of the host's memory that is not available, from the text of `/proc/meminfo`.
fn host_memory(meminfo: &str) -> Option<f64> {
    let kibibytes = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix(" kB")?.parse::<u64>().ok()
    };
    let all = kibibytes("MemTotal:")?;
    percent(all.saturating_sub(kibibytes("MemAvailable:")?), all)
}

/// The percentage in `some avg10=1.29 avg60=…`.
fn some_avg10(pressure: &str) -> Option<f64> {
    let some = pressure.lines().find_map(|line| line.strip_prefix("some avg10="))?;
    some.split(' ').next()?.parse().ok().filter(|percent| (0.0..=100.0).contains(percent))
}

/// The soft limit of open files, from the text of `/proc/self/limits`.
fn most_descriptors(limits: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host in a folder.
    struct Made(tempfile::TempDir);

    impl Made {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn put(&self, name: &str, text: &str) -> &Self {
            let path = self.0.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
            self
        }

        /// This process's cgroup is /a/b, and the hierarchy is mounted at `cg`.
        fn with_cgroup(&self) -> &Self {
            let place = self.0.path().join("cg");
            self.put("self/cgroup", "1:name=systemd:/x\n0::/a/b\n");
            let mounts = format!("30 1 0:2 / /x rw - tmpfs t rw\n31 23 0:27 / {} rw - cgroup2 c rw\n", place.display());
            self.put("self/mountinfo", &mounts).put("cg/a/b/cgroup.procs", "")
        }

        fn host(&self) -> Host {
            Host::at(self.0.path())
        }
    }

    const MEMINFO: &str = "MemTotal:       1000 kB\nMemFree:         10 kB\nMemAvailable:    250 kB\n";
    const PRESSURE: &str =
        "some avg10=12.50 avg60=1.00 avg300=0.00 total=1\nfull avg10=3.00 avg60=0.00 avg300=0.00 total=1\n";

    #[test]
    fn the_hosts_memory_counts_where_no_cgroup_has_a_limit() {
        let made = Made::new();
        made.put("meminfo", MEMINFO);
        assert_eq!(made.host().memory(), Some(75.0));
        made.with_cgroup().put("cg/a/b/memory.max", "max\n").put("cg/a/b/memory.current", "999\n");
        assert_eq!(made.host().memory(), Some(75.0));
    }

    #[test]
    fn the_cgroup_that_is_nearest_to_its_limit_counts() {
        let made = Made::new();
        made.put("meminfo", MEMINFO).with_cgroup();
        made.put("cg/a/b/memory.max", "max\n").put("cg/a/b/memory.high", "200\n");
        made.put("cg/a/b/memory.current", "150\n").put("cg/a/b/memory.stat", "anon 5\ninactive_file 50\n");
        assert_eq!(made.host().memory(), Some(50.0));
        made.put("cg/a/memory.max", "1000\n").put("cg/a/memory.current", "900\n");
        assert_eq!(made.host().memory(), Some(90.0));
    }

    #[test]
    fn the_cgroups_pressure_goes_before_the_hosts() {
        let made = Made::new();
        assert_eq!(made.host().pressure("cpu"), None);
        made.put("pressure/cpu", PRESSURE);
        assert_eq!(made.host().pressure("cpu"), Some(12.5));
        made.with_cgroup().put("cg/a/b/cpu.pressure", "some avg10=99.00 avg60=0.00 avg300=0.00 total=1\n");
        assert_eq!(made.host().pressure("cpu"), Some(99.0));
        assert_eq!(made.host().pressure("memory"), None);
    }

    #[test]
    fn a_hierarchy_that_is_mounted_in_part_is_read_in_that_part() {
        let mounts = "31 23 0:27 /docker/x /sys/fs/cgroup ro - cgroup2 c rw";
        let of = |cgroup: &str| cgroups(cgroup, mounts);
        assert_eq!(of("0::/docker/x/y\n"), [Path::new("/sys/fs/cgroup/y"), Path::new("/sys/fs/cgroup")]);
        assert_eq!(of("0::/docker/x\n"), [Path::new("/sys/fs/cgroup/")]);
        assert_eq!(of("0::/elsewhere\n"), [Path::new("/sys/fs/cgroup/")]);
        assert_eq!(of("4:memory:/docker/x\n"), [] as [&Path; 0]);
        assert_eq!(cgroups("0::/", ""), [] as [&Path; 0]);
    }

    #[test]
    fn descriptors_are_held_against_the_soft_limit() {
        let limits = "Limit   Soft Limit  Hard Limit  Units\nMax open files            400                  524288               files\n";
        assert_eq!(most_descriptors(limits), Some(400));
        // A folder of the usual kind has a size of its own, so the real one.
        let open = Host::default().descriptors().unwrap();
        assert!(open > 0.0 && open <= 100.0, "{open}");
    }

    #[test]
    fn what_is_not_to_be_had_is_said_once_and_does_without() {
        let made = Made::new();
        made.put("meminfo", MEMINFO);
        let mut host = made.host();
        let readings = host.read(&config::Overload::default());
        assert_eq!(readings.of(Signal::Memory), Some(75.0));
        assert_eq!(readings.of(Signal::MemoryPressure), None);
        assert_eq!(host.missed, [false, true, false, true, false]);
        assert_eq!(readings.of(Signal::Lag), None);
    }

    #[test]
    fn what_has_no_threshold_is_not_looked_at() {
        let made = Made::new();
        let mut host = made.host();
        assert_eq!(host.read(&config::Overload::OFF), Readings::default());
        assert_eq!(host.missed, [false; 5]);
    }

    #[test]
    fn nonsense_is_no_reading() {
        for text in ["", "some", "some avg10=", "some avg10=x avg60=1", "some avg10=nan ", "some avg10=-1 "] {
            assert_eq!(some_avg10(text), None, "{text:?}");
        }
        assert_eq!(host_memory("MemTotal: 0 kB\nMemAvailable: 0 kB\n"), None);
        assert_eq!(host_memory("MemTotal: 10 kB\n"), None);
        assert_eq!(most_descriptors("Max open files   unlimited   unlimited\n"), None);
    }
}
