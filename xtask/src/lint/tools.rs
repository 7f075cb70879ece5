//! The checkers that don't come with Rust: the one on PATH when it is recent enough, else a pinned one in `.tools`.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{
    process::{find_on_path, output_of, run, say},
    workspace,
};

const CARGO_DENY: &str = "0.20.2";
const TYPOS: &str = "1.52.0";

/// Licences, bans, sources and advisories of the dependencies.
pub fn cargo_deny() -> Result<PathBuf> {
    let own = workspace::tools().join("bin/cargo-deny");
    if let Some(path) = recent("cargo-deny", &own, CARGO_DENY) {
        return Ok(path);
    }
    say(format_args!("installing cargo-deny {CARGO_DENY} into .tools (two minutes, once)"));
    // Unoptimised and without debug information it is built in a third of the time, and takes the same second to run.
    run(workspace::cargo()
        .args(["install", "--quiet", "--locked", "--debug", "cargo-deny", "--version", CARGO_DENY, "--root"])
        .arg(workspace::tools())
        .env("CARGO_PROFILE_DEV_DEBUG", "0"))?;
    recent("cargo-deny", &own, CARGO_DENY).context("cargo-deny was installed, and can't be run")
}

/// The spelling checker.
pub fn typos() -> Result<PathBuf> {
    let own = workspace::tools().join("typos/bin/typos");
    if let Some(path) = recent("typos", &own, TYPOS) {
        return Ok(path);
    }
    // The package on PyPI holds the ready-made binary: seconds, where compiling it takes minutes.
    say(format_args!("installing typos {TYPOS} into .tools"));
    let folder = workspace::tools().join("typos");
    let by_pip = run(Command::new("python3")
        .args(["-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--upgrade"])
        .args(["--disable-pip-version-check", "--root-user-action=ignore", "--target"])
        .arg(&folder)
        .arg(format!("typos=={TYPOS}")));
    if let Err(error) = by_pip {
        say(format_args!("no typos by pip ({error:#}): compiling it (some minutes, once)"));
        run(workspace::cargo()
            .args(["install", "--quiet", "--locked", "typos-cli", "--version", TYPOS, "--root"])
            .arg(&folder))?;
    }
    recent("typos", &own, TYPOS).context("typos was installed, and can't be run")
}

/// The tool on PATH or our own, if it is of the pinned version or a later one.
fn recent(name: &str, own: &Path, pinned: &str) -> Option<PathBuf> {
    let is_recent = |path: &PathBuf| {
        output_of(Command::new(path).arg("--version")).is_ok_and(|said| version(&said) >= version(pinned))
    };
    find_on_path(name).filter(is_recent).or_else(|| Some(own.to_owned()).filter(is_recent))
}

/// The numbers of the version in `cargo-deny 0.20.2`, `typos-cli 1.52.0` or `1.52.0`.
fn version(said: &str) -> Vec<u32> {
    said.split_whitespace().last().unwrap_or_default().split('.').map_while(|number| number.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_by_number() {
        assert!(version("cargo-deny 0.20.2") > version("0.9.13"));
        assert!(version("typos-cli 1.52.0") == version("1.52.0"));
        assert!(version("nonsense") < version("0.0.1"));
    }
}
