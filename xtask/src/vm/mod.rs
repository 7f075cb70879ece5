//! `cargo xtask test --kernel`: the end to end tests on another kernel, in a virtual machine.
//!
//! Where the kernel comes from: [`kernels`]. The machine has a [`root`] file system in memory, with the tests that were built for
//! this machine and what they call, and no devices but two serial lines: the console, and one for the outcome. qemu
//! emulates its processor, so this works wherever qemu does, and takes some ten times as long as on the machine itself.

mod kernels;
mod root;

use std::{
    ffi::OsString,
    fs,
    io::{BufWriter, Write as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    process::{command_line, find_on_path, output_of, run, say},
    setup::apt_install,
    workspace::{self, HOST_PACKAGES},
};
use kernels::Kernel;
use root::Root;

/// What is called here, and the Debian package that has it.
const PROGRAMS: [(&str, &str); 8] = [
    ("ip", "iproute2"),
    ("nft", "nftables"),
    ("openssl", "openssl"),
    ("unshare", "util-linux"),
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("depmod", "kmod"),
    ("strip", "binutils"),
    ("ldd", "libc-bin"),
];

/// What the tests and the kernel call in the machine.
const CALLED: [&str; 10] = ["ip", "modprobe", "mount", "nft", "openssl", "sh", "sleep", "ss", "tc", "unshare"];

/// Where the modules are that the tests need: the network's, and those of the kernel's library that they stand on.
const MODULES: [&str; 6] =
    ["kernel/net", "kernel/drivers/net", "kernel/lib", "kernel/crypto", "kernel/arch/x86/crypto", "kernel/fs/nls"];

/// Tests that are about other programs than the kernel, and would take half a system with them: a browser, Python and Node.
const NOT_THERE: [&str; 1] = ["clients"];

/// How much longer a test may wait in the machine (`limiter_tests::wait`).
const SLOW: &str = "10";

/// The tests, as cargo built them.
struct Tests {
    /// The test binaries.
    tests: Vec<PathBuf>,
    /// What they start: limiter and programs of their own.
    programs: Vec<PathBuf>,
}

/// Runs the end to end tests on the kernel of a series or in a folder, within a time; those of some files, if any are named.
///
/// # Errors
/// When there is no such kernel, one of the tests fails, or the time is over.
pub fn test(series: &str, files: &[String], forwarded: &[OsString], limit: Duration) -> Result<()> {
    install_programs()?;
    let kernel = kernels::ensure(series)?;
    let tests = Tests::build(files)?;
    let folder = workspace::tools().join("kernels");
    fs::create_dir_all(&folder).with_context(|| format!("can't create {}", folder.display()))?;
    let archive = folder.join(format!("{}.cpio", kernel.version));
    let root = tests.root(&kernel, &folder.join("stripped"), forwarded)?;
    let mut file = BufWriter::new(fs::File::create(&archive)?);
    root.write(&mut file)?;
    file.flush()?;
    drop(file);
    say(format_args!("running the tests on Linux {} in a virtual machine", kernel.version));
    let outcome = boot(&kernel, &archive, &folder.join(format!("{}.outcome", kernel.version)), limit)?;
    ensure!(outcome == "passed", "the tests on Linux {}: {outcome}", kernel.version);
    Ok(())
}

fn install_programs() -> Result<()> {
    let is_there = |name: &str| find(name).is_some();
    let missing: Vec<_> = PROGRAMS.iter().filter(|(name, _)| !is_there(name)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    ensure!(find_on_path("apt-get").is_some(), "the tests on other kernels need {names}, and there is no apt-get");
    say(format_args!("installing {names} with apt-get, for the tests on other kernels"));
    apt_install(&missing.iter().map(|(_, package)| *package).collect::<Vec<_>>())
}

/// Where a program is. Debian leaves root's out of the PATH of users.
fn find(program: &str) -> Option<PathBuf> {
    find_on_path(program).or_else(|| {
        let path = Path::new("/usr/sbin").join(program);
        path.is_file().then_some(path)
    })
}

impl Tests {
    /// Has cargo build them and say where they are.
    fn build(files: &[String]) -> Result<Self> {
        say("building the binary and the tests");
        let files = if files.is_empty() { &["*".to_owned()] } else { files };
        let files = || files.iter().flat_map(|name| ["--test", name]);
        // Named together: the binary is that of the other tests then, and is not compiled anew for other features of dependencies.
        run(workspace::cargo().arg("build").args(HOST_PACKAGES).args(["--bin", "limiter"]).args(files()))?;
        let mut cargo = workspace::cargo();
        cargo.arg("test").args(HOST_PACKAGES).args(files());
        let messages = output_of(cargo.args(["--no-run", "--quiet", "--message-format=json"]))?;
        let mut built = Self { tests: Vec::new(), programs: vec![workspace::artifacts(false)?.join("limiter")] };
        for message in messages.lines() {
            let message: serde_json::Value = serde_json::from_str(message).context("cargo's messages are JSON")?;
            let Some(binary) = message["executable"].as_str().map(PathBuf::from) else { continue };
            let name = message["target"]["name"].as_str().unwrap_or_default();
            let kind = message["target"]["kind"][0].as_str().unwrap_or_default();
            let is_ours = message["manifest_path"].as_str().is_some_and(|path| path.ends_with("/tests/Cargo.toml"));
            match kind {
                "test" if is_ours && !NOT_THERE.contains(&name) => built.tests.push(binary),
                "bin" if is_ours && name != "bench" && message["profile"]["test"] == false => {
                    built.programs.push(binary);
                }
                _ => {}
            }
        }
        ensure!(!built.tests.is_empty(), "cargo built no tests");
        Ok(built)
    }

    /// The machine's file system, with the tests that have one which the arguments name.
    fn root(&self, kernel: &Kernel, stripped: &Path, forwarded: &[OsString]) -> Result<Root> {
        let mut root = Root::new();
        let mut plan = format!("set LIMITER_TEST_SLOW={SLOW}\nset RUST_BACKTRACE=0\nset RUST_TEST_THREADS=1\n");
        for argument in forwarded {
            plan.extend(["argument ", argument.to_str().context("an argument is not UTF-8")?, "\n"]);
        }
        fs::create_dir_all(stripped)?;
        for binary in &self.tests {
            let list = output_of(Command::new(binary).args(forwarded).arg("--list"))?;
            if !list.lines().any(|line| line.ends_with(": test")) {
                continue;
            }
            add_stripped(&mut root, binary, stripped)?;
            plan.extend(["test ", binary.to_str().context("a path is not UTF-8")?, "\n"]);
        }
        ensure!(plan.contains("\ntest "), "no test has such a name");
        for binary in &self.programs {
            add_stripped(&mut root, binary, stripped)?;
            if binary.ends_with("limiter-test-init") {
                root.link("init", binary);
            }
        }
        for program in CALLED {
            let path = find(program).with_context(|| format!("the tests call {program}, which is not installed"))?;
            root.program(&path)?;
        }
        let modules = Path::new("lib/modules").join(&kernel.version);
        let from = kernel.modules();
        for folder in MODULES {
            let from = from.join(folder);
            if from.is_dir() {
                // A driver's family of its own is no virtual device.
                let is_driver = |path: &Path| path.to_string_lossy().contains("/drivers/net/ethernet/");
                root.folder(&modules.join(folder), &from, &|path| !is_driver(path))?;
            }
        }
        root.folder(&modules, &from, &|path| path.parent() == Some(&from))?;
        root.text("plan", plan);
        Ok(root)
    }
}

/// Adds a binary that cargo built, where it is, without what only a debugger reads.
fn add_stripped(root: &mut Root, binary: &Path, folder: &Path) -> Result<()> {
    let to = folder.join(binary.file_name().context("a binary has a name")?);
    let modified = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified());
    let is_current = matches!((modified(&to), modified(binary)), (Ok(to), Ok(binary)) if to >= binary);
    if !is_current {
        output_of(Command::new("strip").args(["--strip-all", "-o"]).arg(&to).arg(binary))?;
    }
    root.file_from(binary, &to)?;
    root.libraries_of(binary)
}

/// Boots, waits for the end of the machine, and returns what its init said of the tests.
fn boot(kernel: &Kernel, initramfs: &Path, outcome: &Path, limit: Duration) -> Result<String> {
    let mebibytes = 1024 + 2 * fs::metadata(initramfs)?.len() / (1 << 20);
    fs::write(outcome, "")?;
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        // The emulated processor has everything but the fifth level of page tables, which would be one more to walk.
        .args(["-accel", "tcg,thread=multi", "-cpu", "max,la57=off", "-smp", "2", "-m", &mebibytes.to_string()])
        .args(["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"])
        .arg("-serial")
        .arg(format!("file:{}", outcome.display()))
        .arg("-kernel")
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(initramfs)
        // A panic, or an oops, ends the machine. Nothing attacks the processor through this one. What the kernel does not know
        // becomes the environment of init.
        .args([
            "-append",
            "console=ttyS0 quiet loglevel=4 oops=panic panic=-1 mitigations=off nowatchdog PATH=/usr/sbin:/usr/bin",
        ])
        .stdin(Stdio::null());
    let line = command_line(&qemu);
    eprintln!("  $ {line}");
    let mut machine = qemu.spawn().context("can't start qemu")?;
    let deadline = Instant::now() + limit;
    let status = loop {
        if let Some(status) = machine.try_wait()? {
            break status;
        }
        if Instant::now() >= deadline {
            machine.kill()?;
            machine.wait()?;
            bail!("the virtual machine was not done after {limit:?}");
        }
        thread::sleep(Duration::from_millis(100));
    };
    let outcome = fs::read_to_string(outcome)?.trim().to_owned();
    ensure!(status.success(), "qemu failed ({status})");
    ensure!(!outcome.is_empty(), "the virtual machine ended without an outcome; its last words are above");
    Ok(outcome)
}
