//! `cargo xtask test`: the unit tests as the user, the tests that load programs and make namespaces (tests/) as root.

use std::{ffi::OsString, fs, process::Command, time::Duration};

use anyhow::{Context as _, Result, bail};

use crate::{
    process::{as_root, find_on_path, is_root, run, say},
    setup, vm,
    workspace::{self, HOST_PACKAGES},
};

const BPFFS: &str = "/sys/fs/bpf";

/// The crate of the end to end tests.
const END_TO_END: &str = "limiter-tests";

/// What limiter-tests looks for, to run its attacks in full number.
const FULL: &str = "LIMITER_TEST_FULL";

#[derive(clap::Args)]
pub struct Args {
    /// Only the unit tests, which need no root
    #[arg(long, conflicts_with = "e2e")]
    unit: bool,

    /// Only the end to end tests
    #[arg(long)]
    e2e: bool,

    /// The attacks and the generated packets in full number: takes tens of minutes
    #[arg(long, conflicts_with = "unit")]
    full: bool,

    /// Only the end to end tests of this file (tests/e2e/NAME.rs, tests/program/NAME.rs). Several may be named
    #[arg(long, value_name = "NAME", conflicts_with = "unit")]
    test: Vec<String>,

    /// The end to end tests in a virtual machine with Debian's kernel of this series instead: 5.10, 6.1, 6.12, newest; or with the
    /// one in a folder (./linux-5.15). Several may be named
    #[arg(long, value_name = "SERIES", conflicts_with_all = ["unit", "full"])]
    kernel: Vec<String>,

    /// How long each virtual machine may take
    #[arg(long, value_name = "MINUTES", default_value_t = 60, requires = "kernel")]
    minutes: u64,

    /// Arguments of the test binaries: parts of test names, --nocapture …
    #[arg(last = true, value_name = "ARGS")]
    forwarded: Vec<OsString>,
}

impl Args {
    /// Builds the binary and runs the tests that were asked for.
    ///
    /// Both steps name the same packages: cargo chooses the features of dependencies by the packages that it is told, and
    /// would compile many of them anew for others.
    pub fn run(&self) -> Result<()> {
        setup::ensure()?;
        if !self.kernel.is_empty() {
            let limit = Duration::from_mins(self.minutes);
            return self.kernel.iter().try_for_each(|series| vm::test(series, &self.test, &self.forwarded, limit));
        }
        let mut cargo = workspace::cargo();
        // A failed test must not hide those after it.
        cargo.args(["test", "--no-fail-fast"]);
        if self.e2e || !self.test.is_empty() {
            cargo.args(["--package", END_TO_END]);
            cargo.args(self.test.iter().flat_map(|name| ["--test", name]));
        } else {
            cargo.args(HOST_PACKAGES);
        }
        if self.unit {
            cargo.args(["--exclude", END_TO_END]);
        } else {
            setup::clients::ensure()?;
            say("building the binary and the tests");
            run(workspace::cargo().arg("build").args(HOST_PACKAGES).arg("--all-targets"))?;
            mount_bpffs()?;
            start_as_root(&mut cargo)?;
        }
        if self.full {
            cargo.env(FULL, "1");
        }
        say("running the tests");
        run(cargo.arg("--").args(&self.forwarded))
    }
}

/// Makes cargo start the end to end tests as root; cargo itself stays the user's.
fn start_as_root(cargo: &mut Command) -> Result<()> {
    if is_root() {
        return Ok(());
    }
    if find_on_path("sudo").is_none() {
        bail!("the end to end tests need root, this is not root, and there is no sudo (--unit runs the others)");
    }
    say("the end to end tests need root to make namespaces and load BPF programs: through sudo");
    let runner = workspace::root().join("xtask/as-root");
    cargo.env(format!("CARGO_TARGET_{}_RUNNER", workspace::host_triple()?), runner);
    Ok(())
}

/// limiter pins what it loads on the bpffs; systemd mounts it at boot, a container or a bare CI machine may not.
fn mount_bpffs() -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("can't read /proc/self/mountinfo")?;
    if is_bpffs_mounted(&mounts) {
        return Ok(());
    }
    say(format_args!("mounting a bpffs at {BPFFS}: limiter pins its programs and maps there"));
    run(as_root("mount", "to mount the bpffs")?.args(["-t", "bpf", "bpf", BPFFS]))
}

/// A line: `36 35 0:32 / /sys/fs/bpf rw,relatime shared:9 - bpf bpf rw` (the type comes after the lone dash).
fn is_bpffs_mounted(mountinfo: &str) -> bool {
    mountinfo.lines().any(|line| {
        let Some((mount, filesystem)) = line.split_once(" - ") else { return false };
        mount.split(' ').nth(4) == Some(BPFFS) && filesystem.starts_with("bpf ")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bpffs_is_found_among_the_mounts() {
        assert!(is_bpffs_mounted("36 35 0:32 / /sys/fs/bpf rw,relatime shared:9 - bpf bpf rw,mode=700\n"));
        assert!(!is_bpffs_mounted("36 35 0:32 / /sys/fs/bpf rw - tmpfs bpf rw\n36 35 0:32 / /mnt rw - bpf bpf rw\n"));
    }
}
