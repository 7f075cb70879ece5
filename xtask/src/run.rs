//! `cargo xtask run`: the release binary, on the loopback interface, with the built-in echo application behind it.

use std::{env, ffi::OsString, os::unix::process::CommandExt as _};

use anyhow::{Context as _, Result};

use crate::{
    build,
    process::{as_root_keeping, say},
};

/// What `limiter run` is told when the user doesn't say otherwise: the flag and its value.
const DEFAULTS: [(&str, &str); 4] =
    [("--interface", "lo"), ("--listen", "127.0.0.1:8080"), ("--upstream", "echo"), ("--connections-per-source", "20")];

#[derive(clap::Args)]
pub struct Args {
    /// Arguments of `limiter run`; a flag among them takes the place of its default, a --config that of all defaults
    #[arg(last = true, value_name = "ARGS")]
    forwarded: Vec<OsString>,
}

impl Args {
    /// Builds, then becomes `limiter run`: signals of the terminal go to limiter and its exit status to the caller.
    pub fn run(&self) -> Result<()> {
        let binary = build::limiter(true)?;
        // sudo drops the environment; limiter's configuration may be in it.
        let settings = env::vars()
            .map(|(name, _)| name)
            .filter(|name| name.starts_with("LIMITER_") || name == "RUST_LOG" || name == "RUST_BACKTRACE");
        let mut limiter = as_root_keeping(&binary, "to load the programs into the kernel", settings)?;
        limiter.arg("run").args(defaults_for(&self.forwarded)).args(&self.forwarded);
        say(format_args!("starting {}", crate::process::command_line(&limiter)));
        Err(limiter.exec()).with_context(|| format!("can't start {}", binary.display()))
    }
}

fn defaults_for(args: &[OsString]) -> Vec<&'static str> {
    let says = |flag: &str| {
        args.iter().filter_map(|arg| arg.to_str()).any(|arg| arg.split_once('=').map_or(arg, |(name, _)| name) == flag)
    };
    if says("--config") {
        return Vec::new();
    }
    DEFAULTS.iter().filter(|(flag, _)| !says(flag)).flat_map(|&(flag, value)| [flag, value]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn defaults(args: &[&str]) -> String {
        defaults_for(&args.iter().map(OsString::from).collect::<Vec<_>>()).join(" ")
    }

    #[test]
    fn defaults_are_echo_on_loopback() {
        assert_eq!(defaults(&[]), "--interface lo --listen 127.0.0.1:8080 --upstream echo --connections-per-source 20");
    }

    #[test]
    fn a_flag_takes_the_place_of_its_default() {
        assert_eq!(
            defaults(&["--interface=eth0", "--connections-per-source", "5"]),
            "--listen 127.0.0.1:8080 --upstream echo"
        );
    }

    #[test]
    fn a_config_file_takes_the_place_of_all_defaults() {
        assert_eq!(defaults(&["--config", "limiter.toml"]), "");
    }
}
