//! `cargo xtask test`: the unit tests as the user, the end to end tests (tests/) as root.

use std::{ffi::OsString, fs, process::Command};

use anyhow::{Context as _, Result, bail};

use crate::{
    build,
    process::{as_root, find_on_path, is_root, run, say},
    workspace,
};

const BPFFS: &str = "/sys/fs/bpf";

/// The crate of the end to end tests.
const END_TO_END: &str = "limiter-tests";

#[derive(clap::Args)]
pub struct Args {
    /// Only the unit tests, which need no root
    #[arg(long, conflicts_with = "e2e")]
    unit: bool,

    /// Only the end to end tests
    #[arg(long)]
    e2e: bool,

    /// Arguments of the test binaries: parts of test names, --nocapture …
    #[arg(last = true, value_name = "ARGS")]
    forwarded: Vec<OsString>,
}

impl Args {
    /// Builds the binary and runs the tests that were asked for.
    pub fn run(&self) -> Result<()> {
        let binary = build::limiter(false)?;
        if !self.e2e {
            say("unit tests");
            run(workspace::cargo()
                .args(["test", "--exclude", END_TO_END, "--exclude", "limiter-ebpf", "--workspace", "--"])
                .args(&self.forwarded))?;
        }
        if !self.unit {
            say("end to end tests: network namespaces, real sockets, the binary in the kernel");
            mount_bpffs()?;
            let mut cargo = workspace::cargo();
            cargo.args(["test", "--package", END_TO_END, "--"]).args(&self.forwarded).env("LIMITER_BIN", binary);
            as_root_runner(&mut cargo)?;
            run(&mut cargo)?;
        }
        Ok(())
    }
}

/// Makes cargo start what it has built as root; cargo itself stays the user's.
fn as_root_runner(cargo: &mut Command) -> Result<()> {
    if is_root() {
        return Ok(());
    }
    if find_on_path("sudo").is_none() {
        bail!("the end to end tests need root, this is not root, and there is no sudo (--unit runs the others)");
    }
    say("the end to end tests need root to make namespaces and load BPF programs: through sudo");
    cargo.env(format!("CARGO_TARGET_{}_RUNNER", workspace::host_triple()?), "sudo --preserve-env --");
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
