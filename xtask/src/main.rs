//! Sets up, builds, runs, tests, checks and measures limiter: `cargo xtask --help`.

mod bench;
mod build;
mod fuzz;
mod lint;
mod process;
mod recipe;
mod run;
mod setup;
mod test;
mod vm;
mod workspace;

use std::process::ExitCode;

use clap::Parser;

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about, disable_help_subcommand = true)]
enum Xtask {
    /// Find or install what compiles the BPF programs; seconds when there is nothing to do
    Setup(setup::Args),
    /// Build the binary `limiter`, setting up first what is missing
    Build(build::Args),
    /// Run limiter on `lo` with the built-in echo application on port 8080, 20 connections per source
    Run(run::Args),
    /// Run every test: the unit tests, then the end to end tests as root
    Test(test::Args),
    /// Check format, lints, documentation, licences and spelling
    Lint(lint::Args),
    /// Look for input that breaks a property, for a bounded time
    Fuzz(fuzz::Args),
    /// Measure what each verdict costs
    Bench(bench::Args),
}

fn main() -> ExitCode {
    let done = match Xtask::parse() {
        Xtask::Setup(args) => args.run(),
        Xtask::Build(args) => args.run(),
        Xtask::Run(args) => args.run(),
        Xtask::Test(args) => args.run(),
        Xtask::Lint(args) => args.run(),
        Xtask::Fuzz(args) => args.run(),
        Xtask::Bench(args) => args.run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
