//! `cargo xtask bench`: what each verdict costs, measured on this machine.

use std::ffi::OsString;

use anyhow::{Context as _, Result};

use crate::{
    build,
    process::{as_root, run},
    workspace,
};

#[derive(clap::Args)]
pub struct Args {
    /// Arguments of the bench binary
    #[arg(last = true, value_name = "ARGS")]
    forwarded: Vec<OsString>,
}

impl Args {
    /// Builds everything optimised and runs the bench binary of limiter-tests as root.
    pub fn run(&self) -> Result<()> {
        let limiter = build::limiter(true)?;
        run(workspace::cargo().args(["build", "--release", "--package", "limiter-tests", "--bin", "bench"]))?;
        let bench = workspace::artifacts(true)?.join("bench");
        // `env` hands the variable over, since sudo drops the environment.
        run(as_root("env", "to load BPF programs and make namespaces")?
            .arg(format!("LIMITER_BIN={}", limiter.to_str().context("the path of the repository is not UTF-8")?))
            .arg(bench)
            .args(&self.forwarded))
    }
}
