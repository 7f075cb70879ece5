//! `limiter connections`.

use std::{net::IpAddr, time::Duration};

use ipnet::IpNet;
use serde::Serialize;

use super::{
    Global,
    output::{Format, printable, table},
};
use crate::kernel::{ConnectionRow, Pinned};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only connections from this address or prefix
    #[arg(long, value_name = "CIDR", value_parser = parse_cidr)]
    source: Option<IpNet>,
    #[command(flatten)]
    format: Format,
}

#[derive(Serialize)]
struct Document {
    connections: Vec<ConnectionRow>,
}

pub(super) fn run(global: &Global, args: &Args) -> anyhow::Result<()> {
    let mut connections = Pinned::open(&global.pin_path()?)?.connections()?;
    if let Some(source) = &args.source {
        connections.retain(|row| source.contains(&row.remote.ip().to_canonical()));
    }
    let document = Document { connections };
    args.format.print(&document, || text(&document.connections))
}

/// An address prefix, or an address by itself.
pub(super) fn parse_cidr(text: &str) -> Result<IpNet, String> {
    let address = text.parse::<IpAddr>().map(IpNet::from);
    address
        .or_else(|_| text.parse::<IpNet>())
        .map_err(|_| "expected an address or a prefix, such as 192.0.2.7 or 2001:db8::/32".to_owned())
}

fn text(connections: &[ConnectionRow]) -> String {
    let rows = connections.iter().map(|row| {
        [
            row.service.clone(),
            row.source.clone(),
            row.remote.to_string(),
            match &row.namespace {
                Some(namespace) => format!("{} in {}", row.local, printable(namespace)),
                None => row.local.to_string(),
            },
            row.state.to_owned(),
            humantime::format_duration(Duration::from_secs(row.age.as_secs())).to_string(),
        ]
    });
    table(["SERVICE", "SOURCE", "REMOTE", "LOCAL", "STATE", "AGE"], &[], rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_or_an_address_is_taken() {
        assert_eq!(parse_cidr("192.0.2.7").unwrap().to_string(), "192.0.2.7/32");
        assert_eq!(parse_cidr("2001:db8::/32").unwrap().to_string(), "2001:db8::/32");
        assert!(parse_cidr("192.0.2.0/24").unwrap().contains(&"192.0.2.9".parse::<IpAddr>().unwrap()));
        for text in ["", "chat", "192.0.2.0/33", "192.0.2", "::/129"] {
            assert!(parse_cidr(text).is_err(), "{text}");
        }
    }

    #[test]
    fn connections_are_a_table() {
        let row = ConnectionRow {
            service: "chat".into(),
            source: "2001:db8::/64".into(),
            user: None,
            remote: "[2001:db8::7]:50000".parse().unwrap(),
            local: "[2001:db8::1]:8080".parse().unwrap(),
            namespace: None,
            state: "open",
            age: Duration::from_millis(61_700),
        };
        let contained = ConnectionRow { namespace: Some("web".into()), ..row.clone() };
        assert!(text(&[contained]).contains("  [2001:db8::1]:8080 in web  open"));
        assert_eq!(
            text(&[row]),
            "SERVICE  SOURCE         REMOTE               LOCAL               STATE  AGE\n\
             chat     2001:db8::/64  [2001:db8::7]:50000  [2001:db8::1]:8080  open   1m 1s\n"
        );
    }
}
