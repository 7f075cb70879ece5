//! `limiter kick`.

use std::net::SocketAddr;

use ipnet::IpNet;
use serde::Serialize;

use super::{Global, connections::parse_cidr, output::Format};
use crate::kernel;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The client's address, or a prefix of addresses
    #[arg(value_name = "IP", value_parser = parse_cidr)]
    client: IpNet,
    #[command(flatten)]
    format: Format,
}

#[derive(Serialize)]
struct Document {
    kicked: Vec<SocketAddr>,
}

pub(super) fn run(global: &Global, args: &Args) -> anyhow::Result<()> {
    let document = Document { kicked: kernel::kick(&global.pin_path()?, &args.client)? };
    args.format.print(&document, || text(&document.kicked, &args.client))
}

fn text(kicked: &[SocketAddr], client: &IpNet) -> String {
    match kicked.len() {
        0 => format!("nothing is open from {client}\n"),
        1 => format!("closed 1 connection from {client}\n"),
        count => format!("closed {count} connections from {client}\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_closed_is_counted() {
        let client = "192.0.2.7/32".parse().unwrap();
        let one = "192.0.2.7:50000".parse().unwrap();
        assert_eq!(text(&[], &client), "nothing is open from 192.0.2.7/32\n");
        assert_eq!(text(&[one], &client), "closed 1 connection from 192.0.2.7/32\n");
        assert_eq!(text(&[one, one], &client), "closed 2 connections from 192.0.2.7/32\n");
    }
}
