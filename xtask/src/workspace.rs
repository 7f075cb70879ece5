//! Where things lie: the top of the repository, its tools, the cargo that runs this.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::process::output_of;

/// Arguments of cargo that name the packages which are compiled for the host.
pub const HOST_PACKAGES: [&str; 3] = ["--workspace", "--exclude", "limiter-ebpf"];

/// The top of the repository.
pub fn root() -> &'static Path {
    // This crate lies one folder below the top.
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// The folder of what `setup` installs; never on the user's PATH, never in git.
pub fn tools() -> PathBuf {
    root().join(".tools")
}

/// The cargo that started this (`cargo xtask` sets it), at the top of the repository.
pub fn cargo() -> Command {
    let mut command = Command::new(cargo_path());
    command.current_dir(root());
    command
}

/// See [`cargo`].
pub fn cargo_path() -> PathBuf {
    env::var_os("CARGO").map_or_else(|| PathBuf::from("cargo"), PathBuf::from)
}

/// Where cargo leaves what it builds: beside this program, which it has built too (in the dev profile).
///
/// # Errors
/// When this program's own path can't be found out.
pub fn artifacts(release: bool) -> Result<PathBuf> {
    let own = env::current_exe().context("can't find this program's own path")?;
    let dev = own.parent().context("this program lies nowhere")?;
    Ok(if release { dev.with_file_name("release") } else { dev.to_owned() })
}

/// The host's target triple as cargo writes it in the names of variables.
///
/// # Errors
/// When rustc can't be asked.
pub fn host_triple() -> Result<String> {
    let triple = output_of(Command::new("rustc").args(["--print", "host-tuple"]))?;
    Ok(triple.to_uppercase().replace('-', "_"))
}
