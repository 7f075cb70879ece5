//! Sets up, builds, runs, tests, checks and measures limiter: `cargo xtask --help`.

mod process;
mod recipe;
mod setup;
mod workspace;

use std::process::ExitCode;

use clap::Parser;

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about, disable_help_subcommand = true)]
enum Xtask {
    /// Find or install what compiles the BPF programs; seconds when there is nothing to do
    Setup(setup::Args),
}

fn main() -> ExitCode {
    let done = match Xtask::parse() {
        Xtask::Setup(args) => args.run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
