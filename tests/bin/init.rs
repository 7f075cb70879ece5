//! The first process of the virtual machine in which `cargo xtask test --kernel` runs the tests: mounts what they expect of a
//! host, runs two at a time, says how they ended, and ends the machine.
//!
//! The file `/plan` says what to run, a word and its value to a line: `set NAME=VALUE`, `argument VALUE`, `test PATH`.

use std::{
    collections::HashMap,
    fs,
    io::{self, BufRead as _, BufReader},
    os::unix::process::ExitStatusExt as _,
    process::{Command, ExitStatus, Stdio, exit},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

/// Where the outcome goes: a line that the kernel and the tests don't write to.
const OUTCOME: &str = "/dev/ttyS1";

/// Type, where, and options.
const MOUNTS: [(&str, &str, &str); 7] = [
    ("proc", "/proc", ""),
    ("sysfs", "/sys", ""),
    ("devtmpfs", "/dev", ""),
    ("bpf", "/sys/fs/bpf", ""),
    ("cgroup2", "/sys/fs/cgroup", ""),
    ("securityfs", "/sys/kernel/security", ""),
    ("devpts", "/dev/pts", ""),
];

/// For files of the tests. Nothing is mounted there: the root is in memory anyway, and the tests themselves may be below one of them.
const FOLDERS: [&str; 2] = ["/tmp", "/run"];

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

/// How many programs run at once: one for each processor.
const AT_ONCE: usize = 2;

/// A program that runs.
struct Running {
    name: String,
    began: Instant,
    /// Passes its output on.
    output: JoinHandle<()>,
}

/// Runs what the plan says; how many of the programs failed.
fn run() -> Result<usize> {
    FOLDERS.into_iter().try_for_each(fs::create_dir_all).context("can't make a folder")?;
    mount_all()?;
    let plan = fs::read_to_string("/plan").context("can't read the plan")?;
    let values = |wanted: &str| {
        let lines = plan.lines().filter_map(|line| line.split_once(' '));
        lines.filter(|(word, _)| *word == wanted).map(|(_, value)| value.to_owned()).collect::<Vec<_>>()
    };
    let (arguments, settings) = (values("argument"), values("set"));
    let mut waiting = values("test").into_iter();
    let mut running = HashMap::from([
        start(Command::new("ip").args(["link", "set", "lo", "up"]), "ip")?,
        // What udev would do: its device is there only once it is.
        start(Command::new("modprobe").arg("tun"), "modprobe")?,
    ]);
    let mut failed = Vec::new();
    while !running.is_empty() {
        let (id, status) = next_that_ends()?;
        // What has lost its parent is this process's to wait for, too.
        let Some(ended) = running.remove(&id) else { continue };
        // What it has left behind may hold its output open.
        let enough = Instant::now() + Duration::from_secs(2);
        while !ended.output.is_finished() && Instant::now() < enough {
            thread::sleep(Duration::from_millis(10));
        }
        println!("init: {}: {status}, {:.1} s", ended.name, ended.began.elapsed().as_secs_f32());
        if !status.success() {
            failed.push(ended.name);
        }
        for test in waiting.by_ref().take(AT_ONCE - running.len()) {
            // Cargo has put a hash behind the name.
            let name = test.rsplit('/').next().unwrap_or(&test).split('-').next().unwrap_or(&test);
            let mut command = Command::new(&test);
            command.args(&arguments).envs(settings.iter().filter_map(|setting| setting.split_once('=')));
            running.extend([start(&mut command, name)?]);
        }
    }
    for test in &failed {
        println!("init: failed: {test}");
    }
    Ok(failed.len())
}

/// Starts a program whose output is shown behind its name.
fn start(command: &mut Command, name: &str) -> Result<(i32, Running)> {
    let (reader, writer) = io::pipe()?;
    command.stdout(writer.try_clone()?).stderr(writer);
    let child = command.spawn().with_context(|| format!("can't start {command:?}"))?;
    // The pipe ends with the last process that holds it, and so must not be held here.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let shown = name.to_owned();
    let output = thread::spawn(move || {
        for line in BufReader::new(reader).split(b'\n').map_while(Result::ok) {
            println!("{shown}: {}", String::from_utf8_lossy(&line));
        }
    });
    Ok((i32::try_from(child.id())?, Running { name: name.to_owned(), began: Instant::now(), output }))
}

/// Waits until a process ends, of those that were started here and those that have become this one's.
fn next_that_ends() -> Result<(i32, ExitStatus)> {
    loop {
        let mut status = 0;
        // SAFETY: the pointer is to an integer of ours. Nobody else waits for processes.
        let id = unsafe { libc::waitpid(-1, &raw mut status, 0) };
        if id > 0 {
            return Ok((id, ExitStatus::from_raw(status)));
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error).context("can't wait for a process");
        }
    }
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
