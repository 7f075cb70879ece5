//! `limiter attach`.

use super::{
    Global, logging,
    settings::{self, KernelSettings},
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    kernel: KernelSettings,
}

pub(super) fn run(global: &Global, args: Args) -> anyhow::Result<()> {
    let config = settings::for_attach(global, args.kernel)?;
    logging::start(&config.log)?;
    anyhow::bail!("attaching is not part of this build")
}
