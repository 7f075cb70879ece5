//! WebSocket clients that are not ours, for the end to end tests: a browser, Python's websockets and Node's ws.
//!
//! The libraries are pinned, with hashes, by the lists in tests/clients, and go to .tools/clients.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use super::apt_install;
use crate::{
    process::{as_root, find_on_path, run, say},
    workspace,
};

/// What the tests start, by each name that will do, and the Debian package that has it.
const PROGRAMS: [(&[&str], &str); 7] = [
    (&["chromium", "chromium-browser", "google-chrome"], "chromium"),
    // Publishes the port of a container.
    (&["nft"], "nftables"),
    (&["node"], "nodejs"),
    (&["npm"], "npm"),
    (&["openssl"], "openssl"),
    (&["python3"], "python3"),
    (&["pip3"], "python3-pip"),
];

/// Names the list that a folder's content was installed from.
const INSTALLED: &str = "installed-from";

/// Installs what is missing. Silent when nothing is.
///
/// # Errors
/// When a program is missing and there is no apt-get, or a registry can't be reached.
pub fn ensure() -> Result<()> {
    programs()?;
    let lists = workspace::root().join("tests/clients");
    library(&lists.join("python"), "requirements.txt", |folder| {
        // The wheel that is for every platform, whose hash the list has.
        run(Command::new("pip3")
            .args(["install", "--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes"])
            .args(["--only-binary=:all:", "--platform", "any", "--upgrade", "--target"])
            .arg(folder)
            .arg("--requirement")
            .arg(folder.join("requirements.txt")))
    })?;
    library(&lists.join("node"), "package-lock.json", |folder| {
        run(Command::new("npm")
            .args(["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"])
            .current_dir(folder))
    })
}

fn programs() -> Result<()> {
    let is_there = |names: &[&str]| names.iter().any(|name| find_on_path(name).is_some());
    let missing: Vec<_> = PROGRAMS.into_iter().filter(|(names, _)| !is_there(names)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let programs = missing.iter().map(|(names, _)| names[0]).collect::<Vec<_>>().join(", ");
    if find_on_path("apt-get").is_none() {
        bail!(
            "the end to end tests start {programs}, which PATH does not have, and there is no apt-get to install it with: \
             install it as your distribution does (`cargo xtask test --unit` does without)"
        );
    }
    let packages: Vec<&str> = missing.iter().map(|(_, package)| *package).collect();
    say(format_args!("installing {} with apt-get: the end to end tests start {programs}", packages.join(", ")));
    run(as_root("apt-get", "to update the list of packages")?.args(["update", "--quiet"]))?;
    apt_install(&packages)
}

/// Puts the lists of `source` into a folder of .tools and has them installed there, if they aren't already.
fn library(source: &Path, list: &str, install: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let name = source.file_name().unwrap_or_default();
    let folder: PathBuf = workspace::tools().join("clients").join(name);
    let wanted = fs::read(source.join(list)).with_context(|| format!("can't read {}", source.join(list).display()))?;
    let mark = folder.join(INSTALLED);
    if fs::read(&mark).is_ok_and(|installed| installed == wanted) {
        return Ok(());
    }
    say(format_args!("installing the WebSocket library of {} for the tests into .tools", name.display()));
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("can't remove {}", folder.display()))?;
    }
    fs::create_dir_all(&folder).with_context(|| format!("can't create {}", folder.display()))?;
    for file in ["requirements.txt", "package.json", "package-lock.json"] {
        if source.join(file).is_file() {
            fs::copy(source.join(file), folder.join(file)).with_context(|| format!("can't copy {file}"))?;
        }
    }
    install(&folder)?;
    fs::write(&mark, wanted).with_context(|| format!("can't write {}", mark.display()))
}
