//! Installs a compiler for BPF where there is none: Debian's packages where Debian has them, else a nightly through rustup.

use std::process::Command;

use anyhow::{Context as _, Result, bail};

use super::compiler::{self, Compiler};
use crate::process::{as_root, find_on_path, output_of, run, say};

/// Debian's compiler with a ready-made `core` for BPF: no nightly and no build-std.
const DEBIAN_PACKAGES: [&str; 2] = ["rustc-web", "libstd-rust-web-dev-bpf"];

/// The nightly that is installed where Debian's packages aren't to be had. Pinned: a later one may come with an LLVM that the
/// pinned bpf-linker doesn't speak.
const NIGHTLY: &str = "nightly-2026-05-20";

/// Installs a compiler and returns it.
///
/// # Errors
/// When neither way is open; the message says what to install by hand.
pub fn compiler() -> Result<Compiler> {
    if find_on_path("apt-get").is_some() && debian_has_compiler()? {
        say(format_args!(
            "installing {} with apt-get: no compiler here knows the BPF target, and these do",
            DEBIAN_PACKAGES.join(" and ")
        ));
        apt_install(&DEBIAN_PACKAGES)?;
    } else if find_on_path("rustup").is_some() {
        say(format_args!("installing {NIGHTLY} with rustup: no compiler here knows the BPF target, and it does"));
        run(Command::new("rustup").args([
            "toolchain",
            "install",
            NIGHTLY,
            "--profile",
            "minimal",
            "--component",
            "rust-src,clippy",
        ]))?;
    } else {
        bail!(
            "no compiler here can compile BPF programs, and there is neither apt-get with the package rustc-web nor rustup \
             to install one with.\nInstall rustup (https://rustup.rs) and run `cargo xtask setup` again, or name a rustc that \
             has the source of `core` (rust-src) in LIMITER_BPF_RUSTC."
        );
    }
    compiler::find()?.context("a compiler was installed, and still none will do (see above)")
}

/// Installs Debian packages.
pub fn apt_install(packages: &[&str]) -> Result<()> {
    run(as_root("apt-get", "to install packages")?
        .args(["install", "--yes", "--quiet", "--no-install-recommends"])
        .args(packages))
}

/// Whether apt offers a package.
pub fn has_apt_package(name: &str) -> bool {
    output_of(Command::new("apt-cache").args(["show", "--quiet", "--no-all-versions", name]))
        .is_ok_and(|description| !description.is_empty())
}

fn debian_has_compiler() -> Result<bool> {
    let offered = || DEBIAN_PACKAGES.iter().all(|package| has_apt_package(package));
    if offered() {
        return Ok(true);
    }
    say("asking apt-get for the current list of packages, to see whether it has a compiler for BPF");
    run(as_root("apt-get", "to update the list of packages")?.args(["update", "--quiet"]))?;
    Ok(offered())
}
