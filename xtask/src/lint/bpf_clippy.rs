//! clippy on the BPF programs, which only the clippy of the compiler that compiles them can read.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};

use crate::{
    process::{self, find_on_path, say},
    recipe::Recipe,
    setup::{apt_install, has_apt_package},
    workspace,
};

/// Debian's clippy of the compiler in rustc-web.
const DEBIAN_PACKAGE: &str = "rust-web-clippy";

/// Checks limiter-ebpf.
pub fn run(recipe: &Recipe) -> Result<()> {
    let target_dir = workspace::artifacts(false)?.with_file_name("bpf-clippy");
    let mut command = recipe.command(&cargo_clippy(recipe)?, "clippy", &target_dir);
    command.args(["--package", "limiter-ebpf", "--", "--deny", "warnings"]).current_dir(workspace::root());
    process::run(&mut command)
}

/// cargo-clippy beside the compiler; it uses the clippy-driver beside itself.
fn cargo_clippy(recipe: &Recipe) -> Result<PathBuf> {
    let path = recipe.rustc.with_file_name("cargo-clippy");
    if path.is_file() {
        return Ok(path);
    }
    let rustc = recipe.rustc.display();
    if recipe.rustc.starts_with("/usr") && find_on_path("apt-get").is_some() && has_apt_package(DEBIAN_PACKAGE) {
        say(format_args!("installing {DEBIAN_PACKAGE} with apt-get: the clippy that goes with {rustc}"));
        apt_install(&[DEBIAN_PACKAGE])?;
    } else {
        bail!("there is no clippy beside {rustc}: add it (with rustup: rustup component add clippy --toolchain NAME)");
    }
    path.is_file()
        .then_some(path)
        .with_context(|| format!("{DEBIAN_PACKAGE} was installed, and there is no clippy beside {rustc}"))
}
