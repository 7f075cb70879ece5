//! The kernels that the tests are run on beside this machine's own: a distribution's packages, got once, unpacked into
//! .tools/kernels.
//!
//! Ubuntu's are those that its releases came out with: they stay in its archive and never change, so they are pinned by their
//! hashes. Debian replaces its kernels, so apt says which is the newest and checks its signature, by lists of its own that the
//! machine's packages know nothing of.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    process::{output_of, run, say},
    workspace,
};

/// The series, oldest first.
const KERNELS: [(&str, Source); 6] = [
    ("5.10", Source::Debian { suite: "bullseye" }),
    (
        "5.15",
        Source::Ubuntu([
            (
                "linux-signed/linux-image-5.15.0-25-generic_5.15.0-25.25_amd64.deb",
                "ad56f8c442a54d4f5ff2dff010d00321d53e32b543f3a92f3ba4e042d20a71da",
            ),
            (
                "linux/linux-modules-5.15.0-25-generic_5.15.0-25.25_amd64.deb",
                "d0ba4087d9e1d497925b3481d3531fba6c2a852855f8019d73b0b1385aa4da1f",
            ),
        ]),
    ),
    ("6.1", Source::Debian { suite: "bookworm" }),
    (
        "6.8",
        Source::Ubuntu([
            (
                "linux-signed/linux-image-6.8.0-31-generic_6.8.0-31.31_amd64.deb",
                "fd2ed023c84163e62c73d3b7b613a9b004bd31e335641c23d42bd249e489fbe6",
            ),
            (
                "linux/linux-modules-6.8.0-31-generic_6.8.0-31.31_amd64.deb",
                "3f17f2c279257eb50e40da44390bdf8272c440ca078831c348773d1314b5c2fe",
            ),
        ]),
    ),
    ("6.12", Source::Debian { suite: "trixie" }),
    ("newest", Source::Debian { suite: "sid" }),
];

/// Where a kernel comes from.
enum Source {
    /// Files of Ubuntu's archive below its pool/main/l, and their SHA-256.
    Ubuntu([(&'static str, &'static str); 2]),
    /// What this package depends on in a suite of Debian's.
    Debian { suite: &'static str },
}

const UBUNTU_POOL: &str = "http://archive.ubuntu.com/ubuntu/pool/main/l";

/// Debian's small kernel for virtual machines: half as large as the other, with all that the tests need.
const DEBIAN_PACKAGE: &str = "linux-image-cloud-amd64";

/// What downloads a file for apt, by the proxies that apt has been told of.
const APT_HELPER: &str = "/usr/lib/apt/apt-helper";

/// A kernel that can be booted.
#[derive(Debug)]
pub struct Kernel {
    /// Its full version, as in the name of the folder of its modules.
    pub version: String,
    /// What is booted.
    pub image: PathBuf,
    folder: PathBuf,
}

impl Kernel {
    /// The folder of its modules, with what depmod says of them.
    pub fn modules(&self) -> PathBuf {
        self.folder.join("lib/modules").join(&self.version)
    }
}

/// The kernel of a series, got first if it is not there yet.
///
/// # Errors
/// When nobody has such a kernel, or its archive can't be reached.
pub fn ensure(series: &str) -> Result<Kernel> {
    let Some((_, source)) = KERNELS.iter().find(|(name, _)| *name == series) else {
        let known: Vec<_> = KERNELS.iter().map(|(name, _)| *name).collect();
        bail!("there is no kernel {series} to test on; there are {}", known.join(", "));
    };
    let folder = workspace::tools().join("kernels").join(series);
    if !folder.exists() {
        // Nobody takes half a kernel for a whole one.
        let unfinished = folder.with_file_name(format!("{series}-unfinished"));
        make_empty(&unfinished)?;
        let packages = match source {
            Source::Ubuntu(files) => from_ubuntu(files, &unfinished)?,
            Source::Debian { suite } => from_debian(suite, &unfinished)?,
        };
        for package in packages {
            run(Command::new("dpkg-deb").arg("--extract").arg(&package).arg(&unfinished))?;
            fs::remove_file(&package)?;
        }
        // Newer packages have them where /lib leads to.
        if !unfinished.join("lib").exists() {
            std::os::unix::fs::symlink("usr/lib", unfinished.join("lib"))?;
        }
        let version = version_in(&unfinished)?;
        run(Command::new(super::find("depmod").context("there is no depmod")?)
            .arg("--basedir")
            .arg(&unfinished)
            .arg(&version))?;
        fs::rename(&unfinished, &folder).with_context(|| format!("can't rename to {}", folder.display()))?;
    }
    let version = version_in(&folder)?;
    Ok(Kernel { image: folder.join(format!("boot/vmlinuz-{version}")), version, folder })
}

fn from_ubuntu(files: &[(&str, &str)], to: &Path) -> Result<Vec<PathBuf>> {
    let mut packages = Vec::new();
    for (file, hash) in files {
        let name = file.rsplit('/').next().unwrap_or(file);
        let package = to.join(name);
        run(Command::new(APT_HELPER)
            .args(["download-file", &format!("{UBUNTU_POOL}/{file}")])
            .arg(&package)
            .arg(format!("SHA256:{hash}")))?;
        packages.push(package);
    }
    Ok(packages)
}

fn from_debian(suite: &str, to: &Path) -> Result<Vec<PathBuf>> {
    let apt = Apt::of(suite)?;
    run(apt.command("apt-get").args(["update", "--quiet"]))?;
    let depends = output_of(apt.command("apt-cache").args(["depends", DEBIAN_PACKAGE]))?;
    let package = depends
        .lines()
        .find_map(|line| line.trim().strip_prefix("Depends: ").filter(|name| name.starts_with("linux-image-")))
        .with_context(|| format!("{DEBIAN_PACKAGE} of {suite} depends on no kernel:\n{depends}"))?;
    say(format_args!("the kernel of Debian's {suite} is {package}"));
    run(apt.command("apt-get").args(["download", "--quiet", package]).current_dir(to))?;
    let packages = fs::read_dir(to)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    Ok(packages.into_iter().filter(|path| path.extension().is_some_and(|extension| extension == "deb")).collect())
}

/// apt with lists of its own, of one suite.
struct Apt {
    folder: PathBuf,
}

impl Apt {
    fn of(suite: &str) -> Result<Self> {
        let folder = workspace::tools().join("kernels").join(format!("apt-{suite}"));
        for name in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(folder.join(name)).with_context(|| format!("can't create {name}"))?;
        }
        let targets = output_of(Command::new("apt-get").args(["indextargets", "--format", "$(LABEL) $(SITE)"]))?;
        let site = targets.lines().find_map(|line| line.strip_prefix("Debian ")).context(
            "this kernel is Debian's, and apt has no source of Debian's here (on Ubuntu: those of Ubuntu, 5.15 and 6.8)",
        )?;
        fs::write(
            folder.join("sources.list"),
            format!("deb [arch=amd64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {site} {suite} main\n"),
        )?;
        fs::write(folder.join("status"), "")?;
        Ok(Self { folder })
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let folder = self.folder.display();
        for option in [
            format!("Dir::Etc::SourceList={folder}/sources.list"),
            "Dir::Etc::SourceParts=/dev/null".into(),
            format!("Dir::State::Lists={folder}/lists"),
            format!("Dir::State::Status={folder}/status"),
            format!("Dir::Cache={folder}/cache"),
            // Its folders are this user's.
            "APT::Sandbox::User=".into(),
            // What people read.
            "Acquire::Languages=none".into(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".into(),
        ] {
            command.arg("-o").arg(option);
        }
        command
    }
}

/// The version of the one kernel below a folder.
fn version_in(folder: &Path) -> Result<String> {
    let modules = folder.join("lib/modules");
    let mut names = fs::read_dir(&modules).with_context(|| format!("no modules in {}", folder.display()))?;
    let name = names.next().context("a kernel has modules")??.file_name();
    ensure!(names.next().is_none(), "several kernels in {}", folder.display());
    name.into_string().ok().context("a version is plain text")
}

fn make_empty(folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("can't remove {}", folder.display()))?;
    }
    fs::create_dir_all(folder).with_context(|| format!("can't create {}", folder.display()))
}
