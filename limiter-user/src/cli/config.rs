//! `limiter config`.

use std::path::PathBuf;

use super::{exit, output::print};
use crate::config::{Config, EXAMPLE};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Check a file and the certificates that it names; everything that is wrong with them is told
    Check {
        /// The file
        file: PathBuf,
    },
    /// Print a commented example of every key with its default
    Example,
}

pub(super) fn run(command: &Command) -> anyhow::Result<()> {
    match command {
        Command::Check { file } => {
            for warning in Config::check_file(file)?.warnings() {
                exit::complain(&format!("warning: {}: {warning}", file.display()));
            }
            print(&format!("{}: ok\n", file.display()))
        }
        Command::Example => print(EXAMPLE),
    }
}
