//! Which Rust compiler compiles the BPF programs.
//!
//! It must come with LLVM of the major version that the linker speaks, and with `core` for the BPF target: ready made, or as
//! source. Tried in this order: the one that `LIMITER_BPF_RUSTC` names, rustup's nightlies, and Debian's own compiler.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use super::linker::LLVM_MAJOR;
use crate::{
    process::{find_on_path, output_of, say},
    recipe::bpf_target,
    workspace,
};

/// Names the compiler to use, whatever else there is.
const OVERRIDE: &str = "LIMITER_BPF_RUSTC";

/// Debian's compiler (package rustc-web or rustc); never rustup's, which lies in the home directory.
const SYSTEM_RUSTC: &str = "/usr/bin/rustc";

/// A compiler that can compile BPF programs.
pub struct Compiler {
    pub rustc: PathBuf,
    /// The cargo that goes with it.
    pub cargo: PathBuf,
    pub core: CoreLibrary,
    /// Why this one, for the user.
    pub why: String,
}

/// In which form the compiler has `core` for the BPF target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CoreLibrary {
    Prebuilt,
    /// To be built with `-Z build-std=core`.
    Source,
}

/// The compiler that the environment asks for.
pub fn overriding() -> Option<PathBuf> {
    env::var_os(OVERRIDE).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// The first compiler that will do.
///
/// # Errors
/// When the one that the environment asks for won't do.
pub fn find() -> Result<Option<Compiler>> {
    if let Some(rustc) = overriding() {
        return match examine(&rustc, format!("{OVERRIDE} names it")) {
            Ok(compiler) => Ok(Some(compiler)),
            Err(reason) => bail!("{OVERRIDE} names {}, which won't do: {reason:#}", rustc.display()),
        };
    }
    for (rustc, why) in rustup_nightlies().into_iter().chain(system()) {
        match examine(&rustc, why) {
            Ok(compiler) => return Ok(Some(compiler)),
            Err(reason) => say(format_args!("{} won't do: {reason:#}", rustc.display())),
        }
    }
    Ok(None)
}

/// What `rustc --version` says.
pub fn version_line(rustc: &Path) -> Result<String> {
    output_of(Command::new(rustc).arg("--version"))
}

/// Where the compiler's own files lie.
pub fn sysroot(rustc: &Path) -> Result<PathBuf> {
    Ok(output_of(Command::new(rustc).args(["--print", "sysroot"]))?.into())
}

fn rustup_nightlies() -> Vec<(PathBuf, String)> {
    let Ok(list) = output_of(Command::new("rustup").args(["toolchain", "list"])) else { return Vec::new() };
    list.lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|toolchain| toolchain.starts_with("nightly"))
        .filter_map(|toolchain| {
            let rustc = output_of(Command::new("rustup").args(["which", "--toolchain", toolchain, "rustc"])).ok()?;
            Some((PathBuf::from(rustc), format!("rustup's {toolchain} has what it takes")))
        })
        .collect()
}

fn system() -> Option<(PathBuf, String)> {
    let rustc = PathBuf::from(SYSTEM_RUSTC);
    rustc.is_file().then(|| (rustc, "the distribution's compiler has what it takes".to_owned()))
}

fn examine(rustc: &Path, why: String) -> Result<Compiler> {
    let version = output_of(Command::new(rustc).arg("-vV"))?;
    let llvm = version
        .lines()
        .find_map(|line| line.strip_prefix("LLVM version: "))
        .and_then(|version| version.split('.').next())
        .and_then(|major| major.parse::<u32>().ok())
        .context("it doesn't say which LLVM it has")?;
    if llvm != LLVM_MAJOR {
        bail!("it has LLVM {llvm}, and bpf-linker speaks LLVM {LLVM_MAJOR}");
    }
    let core = core_library(rustc)?;
    // A cargo that lies beside the compiler knows its -Z options; any cargo can drive a compiler with a ready-made core.
    let beside = rustc.with_file_name("cargo");
    let cargo = match core {
        CoreLibrary::Source if beside.is_file() => beside,
        _ => absolute_cargo()?,
    };
    Ok(Compiler { rustc: rustc.to_owned(), cargo, core, why })
}

fn core_library(rustc: &Path) -> Result<CoreLibrary> {
    let libraries = output_of(Command::new(rustc).args(["--print", "target-libdir", "--target", bpf_target()]))?;
    let is_core = |entry: std::io::Result<std::fs::DirEntry>| {
        entry.is_ok_and(|entry| entry.file_name().to_string_lossy().starts_with("libcore-"))
    };
    if std::fs::read_dir(libraries).is_ok_and(|mut entries| entries.any(is_core)) {
        return Ok(CoreLibrary::Prebuilt);
    }
    if sysroot(rustc)?.join("lib/rustlib/src/rust/library/core/Cargo.toml").is_file() {
        return Ok(CoreLibrary::Source);
    }
    bail!("it has `core` for {} neither ready made nor as source (rust-src)", bpf_target())
}

/// The recipe is used by builds that other cargos start, so it must not depend on their PATH.
fn absolute_cargo() -> Result<PathBuf> {
    let cargo = workspace::cargo_path();
    if cargo.is_absolute() {
        return Ok(cargo);
    }
    find_on_path("cargo").context("there is no cargo on PATH")
}
