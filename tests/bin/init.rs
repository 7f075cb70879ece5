//! The first process of the virtual machine in which `cargo xtask test --kernel` runs the tests: mounts what they expect of a
//! host, runs them one after the other, says how they ended, and ends the machine.
//!
//! The file `/plan` says what to run, a word and its value to a line: `set NAME=VALUE`, `argument VALUE`, `test PATH`.

use std::{
    fs, io,
    os::unix::process::ExitStatusExt as _,
    process::{Child, Command, ExitStatus, exit},
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};

/// Where the outcome goes: a line that the kernel and the tests don't write to.
const OUTCOME: &str = "/dev/ttyS1";

/// Type, where, and options.
const MOUNTS: [(&str, &str, &str); 9] = [
    ("proc", "/proc", ""),
    ("sysfs", "/sys", ""),
    ("devtmpfs", "/dev", ""),
    ("tmpfs", "/tmp", ""),
    ("tmpfs", "/run", ""),
    ("bpf", "/sys/fs/bpf", ""),
    ("cgroup2", "/sys/fs/cgroup", ""),
    ("securityfs", "/sys/kernel/security", ""),
    ("devpts", "/dev/pts", ""),
];

fn main() {
    if std::process::id() != 1 {
        eprintln!("this is the init of a virtual machine: see `cargo xtask test --kernel`");
        exit(1);
    }
    let outcome = match run() {
        Ok(0) => "passed".to_owned(),
        Ok(failed) => format!("{failed} failed"),
        Err(error) => format!("{error:#}"),
    };
    println!("init: {outcome}");
    if let Err(error) = fs::write(OUTCOME, outcome) {
        println!("init: can't write to {OUTCOME}: {error}");
    }
    // SAFETY: no memory is passed. For a virtual machine that ends instead of starting anew, this is its end.
    unsafe {
        libc::sync();
        libc::reboot(libc::RB_AUTOBOOT);
    }
}

/// Runs what the plan says; how many of the programs failed.
fn run() -> Result<usize> {
    mount_all()?;
    ensure!(run_to_its_end(Command::new("ip").args(["link", "set", "lo", "up"]))?.success(), "lo can't be set up");
    let plan = fs::read_to_string("/plan").context("can't read the plan")?;
    let values = |wanted: &str| {
        let lines = plan.lines().filter_map(|line| line.split_once(' '));
        lines.filter(|(word, _)| *word == wanted).map(|(_, value)| value.to_owned()).collect::<Vec<_>>()
    };
    let arguments = values("argument");
    let settings = values("set");
    let mut failed = Vec::new();
    for test in values("test") {
        let began = Instant::now();
        println!("init: {test}");
        let mut command = Command::new(&test);
        command.args(&arguments).envs(settings.iter().filter_map(|setting| setting.split_once('=')));
        let status = run_to_its_end(&mut command)?;
        println!("init: {test}: {status}, {:.1} s", began.elapsed().as_secs_f32());
        if !status.success() {
            failed.push(test);
        }
    }
    for test in &failed {
        println!("init: failed: {test}");
    }
    Ok(failed.len())
}

fn mount_all() -> Result<()> {
    for (kind, path, options) in MOUNTS {
        if !fs::exists(path)? {
            // Those of /sys are the kernel's to make: what it has none for, it lacks.
            if path.starts_with("/sys/") {
                continue;
            }
            fs::create_dir_all(path)?;
        }
        let (name, path, options) = (c_string(kind)?, c_string(path)?, c_string(options)?);
        // SAFETY: all are C strings that outlive the call.
        let failed =
            unsafe { libc::mount(name.as_ptr(), path.as_ptr(), name.as_ptr(), 0, options.as_ptr().cast()) } != 0;
        let error = io::Error::last_os_error();
        // EBUSY: the kernel has mounted its devices itself.
        if failed && error.raw_os_error() != Some(libc::EBUSY) {
            return Err(error).with_context(|| format!("can't mount {kind}"));
        }
    }
    Ok(())
}

fn c_string(text: &str) -> Result<std::ffi::CString> {
    Ok(std::ffi::CString::new(text)?)
}

/// Starts a program and waits for its end. Processes that lose their parent meanwhile become this one's children, and are
/// reaped.
fn run_to_its_end(command: &mut Command) -> Result<ExitStatus> {
    let child: Child = command.spawn().with_context(|| format!("can't start {command:?}"))?;
    let id = i32::try_from(child.id())?;
    loop {
        let mut status = 0;
        // SAFETY: the pointer is to an integer of ours. The child is waited for by nobody else.
        let ended = unsafe { libc::waitpid(-1, &raw mut status, 0) };
        if ended < 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error).context("waitpid");
            }
        } else if ended == id {
            return Ok(ExitStatus::from_raw(status));
        }
    }
}
