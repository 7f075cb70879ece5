//! `cargo xtask lint`: everything that a machine can say about the code without running it.
//!
//! All checks are run, and those that failed are named at the end: one run shows all there is to mend.

mod bpf_clippy;
mod tools;

use std::process::Command;

use anyhow::{Result, bail};

use crate::{
    process::{output_of, run, say},
    setup,
    workspace::{self, HOST_PACKAGES},
};

#[derive(clap::Args)]
pub struct Args {}

/// What became of a check that raised no error.
enum Outcome {
    Passed,
    /// It could not be made here, for this reason; that is no failure, and it is said.
    NotMade(String),
}

impl Args {
    /// Makes every check.
    ///
    /// # Errors
    /// When any check failed.
    pub fn run(&self) -> Result<()> {
        let Self {} = self;
        let recipe = setup::ensure()?;
        let checks: [(&str, &dyn Fn() -> Result<Outcome>); 8] = [
            ("format", &|| passed(run(workspace::cargo().args(["fmt", "--all", "--check"])))),
            ("spelling", &spelling),
            ("clippy", &clippy),
            ("clippy of the BPF programs", &|| passed(bpf_clippy::run(&recipe))),
            ("documentation", &documentation),
            ("licences, bans, sources", &|| passed(run(cargo_deny()?.args(["check", "bans", "licenses", "sources"])))),
            ("advisories", &advisories),
            ("shell scripts", &shell_scripts),
        ];

        let outcomes = checks.map(|(name, check)| {
            say(format_args!("checking {name}"));
            (name, check())
        });

        let mut failed = Vec::new();
        eprintln!();
        for (name, outcome) in &outcomes {
            match outcome {
                Ok(Outcome::Passed) => say(format_args!("passed    {name}")),
                Ok(Outcome::NotMade(why)) => say(format_args!("NOT MADE  {name}: {why}")),
                Err(error) => {
                    say(format_args!("FAILED    {name}: {error:#}"));
                    failed.push(*name);
                }
            }
        }
        if !failed.is_empty() {
            bail!("{} of {} checks failed: {}", failed.len(), outcomes.len(), failed.join("; "));
        }
        Ok(())
    }
}

fn passed(result: Result<()>) -> Result<Outcome> {
    result.map(|()| Outcome::Passed)
}

fn clippy() -> Result<Outcome> {
    passed(run(workspace::cargo().arg("clippy").args(HOST_PACKAGES).args([
        "--all-targets",
        "--",
        "--deny",
        "warnings",
    ])))
}

fn documentation() -> Result<Outcome> {
    passed(run(workspace::cargo()
        .arg("doc")
        .args(HOST_PACKAGES)
        .args(["--no-deps", "--document-private-items"])
        // The documentation is read by those who work on limiter too, and may lead them to what is private.
        .env("RUSTDOCFLAGS", "--deny warnings --allow rustdoc::private_intra_doc_links")))
}

fn spelling() -> Result<Outcome> {
    passed(run(Command::new(tools::typos()?).current_dir(workspace::root())))
}

/// Known vulnerabilities of the dependencies. The database is a git repository that not every machine reaches.
fn advisories() -> Result<Outcome> {
    if let Err(error) = output_of(cargo_deny()?.args(["fetch", "db"])) {
        let said = format!("{error:#}");
        let why = said.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default().trim();
        return Ok(Outcome::NotMade(format!("the advisory database can't be reached ({why})")));
    }
    passed(run(cargo_deny()?.args(["check", "advisories"])))
}

fn cargo_deny() -> Result<Command> {
    let mut command = Command::new(tools::cargo_deny()?);
    command.current_dir(workspace::root());
    Ok(command)
}

/// Only whether they parse: bash is all that is sure to be there.
fn shell_scripts() -> Result<Outcome> {
    passed(
        [("bash", ".ci/run"), ("sh", "xtask/as-root"), ("sh", "xtask/instrument")].into_iter().try_for_each(
            |(shell, script)| run(Command::new(shell).args(["-n", script]).current_dir(workspace::root())),
        ),
    )
}
