//! `limiter detach`.

use super::Global;

#[derive(Debug, clap::Args)]
pub(super) struct Args {}

pub(super) fn run(global: &Global, _: &Args) -> anyhow::Result<()> {
    let pin_path = global.pin_path()?;
    anyhow::bail!("detaching {} is not part of this build", pin_path.display())
}
