//! `process_*`, as every Prometheus client library has them: from `/proc/self`.

use std::{fmt, fs};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
};

#[derive(Debug)]
pub(super) struct ProcessCollector;

impl Collector for ProcessCollector {
    /// What can't be read is left out: a scrape doesn't fail for it.
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        if let Ok(descriptors) = fs::read_dir("/proc/self/fd") {
            // The one that reads the folder is among them.
            let open = i64::try_from(descriptors.count().saturating_sub(1)).unwrap_or(i64::MAX);
            gauge(&mut encoder, "process_open_fds", "Open file descriptors", &ConstGauge::new(open))?;
        }
        if let Some(most) = max_descriptors() {
            let most = i64::try_from(most).unwrap_or(i64::MAX);
            gauge(&mut encoder, "process_max_fds", "Most file descriptors that may be open", &ConstGauge::new(most))?;
        }
        let ticks = constant(libc::_SC_CLK_TCK);
        let page = constant(libc::_SC_PAGESIZE);
        let stat = fs::read_to_string("/proc/self/stat").ok().as_deref().and_then(Stat::parse);
        let (Some(stat), Some(ticks), Some(page)) = (stat, ticks, page) else { return Ok(()) };
        let resident = i64::try_from(stat.resident_pages.saturating_mul(page)).unwrap_or(i64::MAX);
        let help = "Memory that is resident, in bytes";
        gauge(&mut encoder, "process_resident_memory_bytes", help, &ConstGauge::new(resident))?;
        let seconds = ConstCounter::new(seconds(stat.cpu_ticks, ticks));
        let metric = encoder.encode_descriptor(
            "process_cpu_seconds",
            "CPU time spent, in seconds",
            None,
            seconds.metric_type(),
        )?;
        seconds.encode(metric)?;
        if let Some(booted) = fs::read_to_string("/proc/stat").ok().as_deref().and_then(boot_time) {
            let started = ConstGauge::new(booted + self::seconds(stat.start_ticks, ticks));
            gauge(&mut encoder, "process_start_time_seconds", "Start, in seconds since 1970", &started)?;
        }
        Ok(())
    }
}

fn gauge(encoder: &mut DescriptorEncoder, name: &str, help: &str, value: &impl EncodeMetric) -> fmt::Result {
    value.encode(encoder.encode_descriptor(name, help, None, value.metric_type())?)
}

fn constant(name: libc::c_int) -> Option<u64> {
    // SAFETY: sysconf takes any number, and answers -1 for one that it doesn't know.
    u64::try_from(unsafe { libc::sysconf(name) }).ok().filter(|value| *value > 0)
}

fn max_descriptors() -> Option<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel fills in the structure that the pointer leads to.
    let result = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    (result == 0).then_some(limit.rlim_cur)
}

#[expect(clippy::cast_precision_loss, reason = "exact for millions of years of CPU time")]
fn seconds(ticks: u64, ticks_per_second: u64) -> f64 {
    ticks as f64 / ticks_per_second as f64
}

/// When the host was booted, in seconds since 1970, from `/proc/stat`.
fn boot_time(stat: &str) -> Option<f64> {
    stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

/// What is taken from `/proc/self/stat`; `proc_pid_stat(5)`.
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    cpu_ticks: u64,
    start_ticks: u64,
    resident_pages: u64,
}

impl Stat {
    fn parse(text: &str) -> Option<Self> {
        // The program's name may hold spaces and brackets; the last bracket ends it.
        let (_, rest) = text.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        // The first of these is field 3 of the manual.
        let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        Some(Self { cpu_ticks: field(14)? + field(15)?, start_ticks: field(22)?, resident_pages: field(24)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_is_read_whatever_the_program_is_called() {
        let rest = "S 1 2 3 4 5 6 7 8 9 10 70 30 13 14 15 16 17 18 4242 20 99 22";
        let expected = Stat { cpu_ticks: 100, start_ticks: 4242, resident_pages: 99 };
        assert_eq!(Stat::parse(&format!("17 (a) b (c)) {rest}")), Some(expected));
        assert_eq!(Stat::parse("17 (a) S 1 2"), None);
        assert_eq!(Stat::parse(""), None);
    }

    #[test]
    fn boot_time_is_found() {
        assert_eq!(boot_time("cpu 1 2\nbtime 1700000000\nprocesses 3\n"), Some(1_700_000_000.0));
        assert_eq!(boot_time("cpu 1 2\n"), None);
    }
}
