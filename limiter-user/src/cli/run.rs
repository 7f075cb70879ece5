//! `limiter run`.

use super::{
    Global, logging,
    settings::{self, GatewaySettings, KernelSettings},
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    pub(super) kernel: KernelSettings,
    #[command(flatten)]
    pub(super) gateway: GatewaySettings,
}

pub(super) fn run(global: &Global, args: Args) -> anyhow::Result<()> {
    let config = settings::for_run(global, args.kernel, args.gateway)?;
    logging::start(&config.log)?;
    anyhow::bail!("the gateway is not part of this build")
}
