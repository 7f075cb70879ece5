//! `cargo xtask run`: the release binary, on the loopback interface, with the built-in echo application behind it.

use std::{env, ffi::OsString, os::unix::process::CommandExt as _};

use anyhow::{Context as _, Result};

use crate::{
    build,
    process::{as_root_keeping, say},
};

/// What `limiter run` is told when the user doesn't say otherwise: the flag, its short form, its variable, and the value.
const DEFAULTS: [(&str, Option<&str>, &str, &str); 4] = [
    ("--interface", Some("-i"), "LIMITER_INTERFACE", "lo"),
    ("--listen", None, "LIMITER_LISTEN", "127.0.0.1:8080"),
    ("--upstream", None, "LIMITER_UPSTREAM", "echo"),
    ("--connections-per-source", None, "LIMITER_CONNECTIONS_PER_SOURCE", "20"),
];

#[derive(clap::Args)]
pub struct Args {
    /// Arguments of `limiter run`; a flag or variable takes the place of its default, a --config that of all defaults
    #[arg(last = true, value_name = "ARGS")]
    forwarded: Vec<OsString>,
}

impl Args {
    /// Builds, then becomes `limiter run`: signals of the terminal go to limiter and its exit status to the caller.
    pub fn run(&self) -> Result<()> {
        let binary = build::limiter(true)?;
        // limiter's configuration may be in the environment, which sudo would drop.
        let settings: Vec<_> = env::vars()
            .map(|(name, _)| name)
            .filter(|name| name.starts_with("LIMITER_") || name == "RUST_LOG" || name == "RUST_BACKTRACE")
            .collect();
        let defaults = defaults_for(&self.forwarded, &settings);
        let mut limiter = as_root_keeping(&binary, "to load the programs into the kernel", settings)?;
        limiter.arg("run").args(defaults).args(&self.forwarded);
        say(format_args!("starting {}", crate::process::command_line(&limiter)));
        Err(limiter.exec()).with_context(|| format!("can't start {}", binary.display()))
    }
}

fn defaults_for(args: &[OsString], variables: &[String]) -> Vec<&'static str> {
    let is_flag = |flag: &str| {
        args.iter().filter_map(|arg| arg.to_str()).any(|arg| match arg.split_once('=') {
            Some((name, _)) => name == flag,
            // A short flag may have its value in the same word.
            None => arg == flag || (flag.len() == 2 && arg.starts_with(flag)),
        })
    };
    let is_said = |flag: &str, short: Option<&str>, variable: &str| {
        is_flag(flag) || short.is_some_and(is_flag) || variables.iter().any(|name| name == variable)
    };
    if is_said("--config", None, "LIMITER_CONFIG") {
        return Vec::new();
    }
    DEFAULTS
        .iter()
        .filter(|&&(flag, short, variable, _)| !is_said(flag, short, variable))
        .flat_map(|&(flag, _, _, value)| [flag, value])
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn defaults(args: &[&str], variables: &[&str]) -> String {
        let args: Vec<_> = args.iter().map(OsString::from).collect();
        let variables: Vec<_> = variables.iter().map(ToString::to_string).collect();
        defaults_for(&args, &variables).join(" ")
    }

    #[test]
    fn defaults_are_echo_on_loopback() {
        assert_eq!(
            defaults(&[], &["LIMITER_LOG"]),
            "--interface lo --listen 127.0.0.1:8080 --upstream echo --connections-per-source 20"
        );
    }

    #[test]
    fn a_flag_takes_the_place_of_its_default() {
        let rest = "--listen 127.0.0.1:8080 --upstream echo";
        assert_eq!(defaults(&["--interface=eth0", "--connections-per-source", "5"], &[]), rest);
        assert_eq!(defaults(&["-i", "eth0", "--connections-per-source", "5"], &[]), rest);
        assert_eq!(defaults(&["-ieth0", "--connections-per-source", "5"], &[]), rest);
    }

    #[test]
    fn a_variable_takes_the_place_of_its_default() {
        assert_eq!(
            defaults(&["--listen", "[::1]:80"], &["LIMITER_INTERFACE", "LIMITER_UPSTREAM"]),
            "--connections-per-source 20"
        );
    }

    #[test]
    fn a_config_file_takes_the_place_of_all_defaults() {
        assert_eq!(defaults(&["--config", "limiter.toml"], &[]), "");
        assert_eq!(defaults(&[], &["LIMITER_CONFIG"]), "");
    }
}
