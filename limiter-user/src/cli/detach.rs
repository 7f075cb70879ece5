//! `limiter detach`.

use super::{Global, exit, output::print};
use crate::kernel;

#[derive(Debug, clap::Args)]
pub(super) struct Args {}

pub(super) fn run(global: &Global, _: &Args) -> anyhow::Result<()> {
    let pin_path = global.pin_path()?;
    let detached = kernel::detach(&pin_path)?;
    if let Some(before) = detached.syncookies_left {
        exit::complain(&format!(
            "net.ipv4.tcp_syncookies stays 2 in the network namespace that limiter was attached in, which is not this one; \
             before, it was {before}"
        ));
    }
    print(&format!("detached: {} pins removed from {}\n", detached.removed, pin_path.display()))
}
