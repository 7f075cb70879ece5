//! `limiter completions`.

use clap::CommandFactory as _;
use clap_complete::Shell;

use super::{Cli, output::print};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "limiter", &mut script);
    print(&String::from_utf8_lossy(&script))
}
