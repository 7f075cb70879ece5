//! `cargo xtask build`: the binary `limiter`, with the BPF object inside.

use std::path::PathBuf;

use anyhow::{Result, ensure};

use crate::{
    process::{run, say},
    setup, workspace,
};

#[derive(clap::Args)]
pub struct Args {
    /// Optimise, as for a release
    #[arg(long)]
    release: bool,
}

impl Args {
    /// Builds and says where the binary is.
    pub fn run(&self) -> Result<()> {
        let binary = limiter(self.release)?;
        say(format_args!("built {}", binary.display()));
        Ok(())
    }
}

/// Sets up what is missing, builds the binary and returns where it is.
pub fn limiter(release: bool) -> Result<PathBuf> {
    setup::ensure()?;
    let mut cargo = workspace::cargo();
    cargo.args(["build", "--package", "limiter-user"]);
    if release {
        cargo.arg("--release");
    }
    run(&mut cargo)?;

    let binary = workspace::artifacts(release)?.join("limiter");
    ensure!(binary.is_file(), "cargo built the binary, and it is not at {}", binary.display());
    Ok(binary)
}
