//! The kernels that the tests are run on beside this machine's own: Debian's packages, got once, unpacked into .tools/kernels; or
//! whichever somebody has unpacked himself.
//!
//! Debian replaces its kernels, so apt says which is the newest and checks its signature, by lists of its own that the machine's
//! packages know nothing of.

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

/// The series, oldest first, and the suite of Debian's that has it.
const KERNELS: [(&str, &str); 4] = [("5.10", "bullseye"), ("6.1", "bookworm"), ("6.12", "trixie"), ("newest", "sid")];

/// Debian's small kernel for virtual machines: half as large as the other, with all that the tests need.
const DEBIAN_PACKAGE: &str = "linux-image-cloud-amd64";

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

/// The kernel of a series, got first if it is not there yet; or that in a folder, if it has a slash.
///
/// # Errors
/// When nobody has such a kernel, or Debian's archive can't be reached.
pub fn ensure(series: &str) -> Result<Kernel> {
    if series.contains('/') {
        let folder = PathBuf::from(series);
        let version = version_in(&folder)?;
        index_modules(&folder, &version)?;
        return at(folder, version);
    }
    let Some((_, suite)) = KERNELS.iter().find(|(name, _)| *name == series) else {
        let known: Vec<_> = KERNELS.iter().map(|(name, _)| *name).collect();
        bail!(
            "there is no kernel {series} to test on; there are {}, and any in a folder (with a slash in its name) that has \
             boot/vmlinuz-VERSION and lib/modules/VERSION",
            known.join(", ")
        );
    };
    let folder = workspace::tools().join("kernels").join(series);
    if !folder.exists() {
        // Nobody takes half a kernel for a whole one.
        let unfinished = folder.with_file_name(format!("{series}-unfinished"));
        make_empty(&unfinished)?;
        for package in from_debian(suite, &unfinished)? {
            run(Command::new("dpkg-deb").arg("--extract").arg(&package).arg(&unfinished))?;
            fs::remove_file(&package)?;
        }
        // Newer packages have them where /lib leads to.
        if !unfinished.join("lib").exists() {
            std::os::unix::fs::symlink("usr/lib", unfinished.join("lib"))?;
        }
        index_modules(&unfinished, &version_in(&unfinished)?)?;
        fs::rename(&unfinished, &folder).with_context(|| format!("can't rename to {}", folder.display()))?;
    }
    let version = version_in(&folder)?;
    at(folder, version)
}

fn at(folder: PathBuf, version: String) -> Result<Kernel> {
    let image = folder.join(format!("boot/vmlinuz-{version}"));
    ensure!(image.exists(), "there is no {}", image.display());
    Ok(Kernel { version, image, folder })
}

/// Notes which modules need which others.
fn index_modules(folder: &Path, version: &str) -> Result<()> {
    run(Command::new(super::find("depmod").context("there is no depmod")?).arg("--basedir").arg(folder).arg(version))
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
            "this kernel is Debian's, and apt has no source of Debian's here; unpack another into a folder, and name that",
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
