//! `limiter man`.

use std::{fs, path::PathBuf};

use anyhow::Context as _;
use clap::CommandFactory as _;

use super::{Cli, Usage, output::print};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The command whose page is printed, such as `limit set`; without, that of limiter itself
    #[arg(value_name = "COMMAND", conflicts_with = "dir")]
    command: Vec<String>,
    /// Write the pages of all commands into this folder
    #[arg(long, value_name = "FOLDER")]
    dir: Option<PathBuf>,
}

pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    // With `--help` and the like in each command.
    let mut limiter = Cli::command();
    limiter.build();
    if let Some(dir) = &args.dir {
        fs::create_dir_all(dir).with_context(|| format!("can't make the folder {}", dir.display()))?;
        return clap_mangen::generate_to(limiter, dir)
            .with_context(|| format!("can't write the pages into {}", dir.display()));
    }
    let mut command = &limiter;
    for name in &args.command {
        command = command.find_subcommand(name).ok_or_else(|| {
            let names: Vec<_> = command.get_subcommands().map(clap::Command::get_name).collect();
            Usage(format!("{} has no command {name:?}; it has: {}", command.get_name(), names.join(", ")))
        })?;
    }
    let mut page = Vec::new();
    clap_mangen::Man::new(command.clone()).render(&mut page)?;
    print(&String::from_utf8_lossy(&page))
}
