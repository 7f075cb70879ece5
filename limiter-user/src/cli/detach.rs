//! `limiter detach`.

use super::{Global, exit, output::print};
use crate::kernel;

#[derive(Debug, clap::Args)]
pub(super) struct Args {}

pub(super) fn run(global: &Global, _: &Args) -> anyhow::Result<()> {
    let pin_path = global.pin_path()?;
    let detached = kernel::detach(&pin_path)?;
    for left in detached.left_changed {
        exit::complain(&format!(
            "{} stays 2 in the network namespace that limiter was attached in, which is not this one; before, it was {}",
            left.name, left.before
        ));
    }
    print(&format!("detached: {} pins removed from {}\n", detached.removed, pin_path.display()))
}
