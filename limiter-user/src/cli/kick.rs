//! `limiter kick`.

use std::net::SocketAddr;

use serde::Serialize;

use anyhow::Context as _;
use serde_json::json;

use super::{Global, connections::parse_cidr, control::Control, output::Format};
use crate::{
    config::user_name,
    kernel,
    kernel::{KernelError, Kicked},
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The client's address, a prefix of addresses, or the name of a user (user:NAME if it looks like an address)
    #[arg(value_name = "IP|USER", value_parser = parse_kicked)]
    client: Kicked,
    #[command(flatten)]
    format: Format,
}

#[derive(Serialize)]
struct Document {
    kicked: Vec<SocketAddr>,
}

/// Where the gateway closes them itself.
#[derive(Serialize)]
struct Disconnected {
    sessions: u64,
}

pub(super) fn run(global: &Global, args: &Args) -> anyhow::Result<()> {
    let error = match kernel::kick(&global.pin_path()?, &args.client) {
        Ok(kicked) => {
            let document = Document { kicked };
            return args.format.print(&document, || text(document.kicked.len() as u64, &args.client));
        }
        Err(error) => error,
    };
    let Kicked::User(user) = &args.client else { return Err(error.into()) };
    if !matches!(error, KernelError::NotAttached { .. } | KernelError::NoPrivilege { .. }) {
        return Err(error.into());
    }
    let Some(control) = Control::of(global, None)? else {
        return Err(error).context(
            "neither the kernel nor the gateway can close them (the gateway's way takes admin.token_file, and --config to find it)",
        );
    };
    let answer = control.call("/v1/disconnect", &json!({ "user": user }))?;
    let sessions = answer["sessions"].as_u64().context("the answer does not say how many were closed")?;
    args.format.print(&Disconnected { sessions }, || text(sessions, &args.client))
}

fn parse_kicked(text: &str) -> Result<Kicked, String> {
    if let Ok(clients) = parse_cidr(text) {
        return Ok(Kicked::Clients(clients));
    }
    let name = user_name(text.strip_prefix("user:").unwrap_or(text));
    name.map(|name| Kicked::User(name.to_string())).ok_or_else(|| "expected an address, a prefix or a user".to_owned())
}

fn text(kicked: u64, client: &Kicked) -> String {
    let client = match client {
        Kicked::Clients(clients) => clients.to_string(),
        Kicked::User(name) => format!("user {name}"),
    };
    match kicked {
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
        let client = parse_kicked("192.0.2.7").unwrap();
        assert_eq!(text(0, &client), "nothing is open from 192.0.2.7/32\n");
        assert_eq!(text(1, &client), "closed 1 connection from 192.0.2.7/32\n");
        assert_eq!(text(2, &client), "closed 2 connections from 192.0.2.7/32\n");
    }

    #[test]
    fn what_is_no_address_is_a_user() {
        assert_eq!(parse_kicked("192.0.2.0/24"), Ok(Kicked::Clients("192.0.2.0/24".parse().unwrap())));
        assert_eq!(parse_kicked("alice@example.com"), Ok(Kicked::User("alice@example.com".into())));
        assert_eq!(parse_kicked("user:192.0.2.7"), Ok(Kicked::User("192.0.2.7".into())));
        assert_eq!(text(0, &parse_kicked("alice").unwrap()), "nothing is open from user alice\n");
        for wrong in ["", " ", "user:", "a\nb"] {
            assert!(parse_kicked(wrong).is_err(), "{wrong:?}");
        }
    }
}
