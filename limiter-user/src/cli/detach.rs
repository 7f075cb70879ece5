//! `limiter detach`.

use super::{Global, output::print};
use crate::kernel;

#[derive(Debug, clap::Args)]
pub(super) struct Args {}

pub(super) fn run(global: &Global, _: &Args) -> anyhow::Result<()> {
    let pin_path = global.pin_path()?;
    let removed = kernel::detach(&pin_path)?;
    print(&format!("detached: {removed} pins removed from {}\n", pin_path.display()))
}
