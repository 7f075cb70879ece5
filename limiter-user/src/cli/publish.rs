//! `limiter publish`.

use std::{
    io::{self, Read as _},
    net::SocketAddr,
};

use anyhow::Context as _;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::Serialize;
use serde_json::{Value, json};

use super::{Global, Usage, control::Control, output::Format};
use crate::admin::LONGEST_BODY_BYTES;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    to: To,
    /// The message; - reads it from the standard input
    #[arg(value_name = "TEXT", allow_hyphen_values = true)]
    text: String,
    /// Send a binary message: what is read need not be text
    #[arg(long)]
    binary: bool,
    /// The admin address of the limiter that runs [default: admin.listen]
    #[arg(long, value_name = "ADDRESS", env = "LIMITER_ADMIN")]
    admin: Option<SocketAddr>,
    #[command(flatten)]
    format: Format,
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct To {
    /// To a room of the broadcast application: a path, or HOST/PATH where a route is for one host
    #[arg(long, value_name = "PATH")]
    room: Option<String>,
    /// To every session of a user
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    /// To every client
    #[arg(long)]
    all: bool,
}

#[derive(Debug, Serialize)]
struct Document {
    receivers: u64,
}

pub(super) fn run(global: &Global, args: &Args) -> anyhow::Result<()> {
    let control = Control::of(global, args.admin)?.ok_or_else(no_token)?;
    let message = message(args)?;
    let mut body = json!({ "to": to(&args.to) });
    if args.binary {
        body["binary"] = STANDARD.encode(message).into();
    } else {
        let advice = "the message is no text (UTF-8): send it with --binary";
        body["text"] = String::from_utf8(message).map_err(|_| Usage(advice.into()))?.into();
    }
    let answer = control.call("/v1/publish", &body)?;
    let receivers = answer["receivers"].as_u64().context("the answer does not say how many get it")?;
    args.format.print(&Document { receivers }, || match receivers {
        0 => "nobody is there\n".to_owned(),
        1 => "sent to 1 client\n".to_owned(),
        many => format!("sent to {many} clients\n"),
    })
}

/// What to say where the configuration names no secret.
fn no_token() -> Usage {
    Usage(
        "the configuration has no admin.token_file, whose secret it takes: name the file that `limiter run` uses with --config"
            .into(),
    )
}

fn to(to: &To) -> Value {
    match to {
        To { room: Some(room), .. } => json!({ "room": room }),
        To { user: Some(user), .. } => json!({ "user": user }),
        To { .. } => json!({ "all": true }),
    }
}

fn message(args: &Args) -> anyhow::Result<Vec<u8>> {
    let mut message = Vec::new();
    if args.text == "-" {
        // More does not fit into a request.
        let longest = LONGEST_BODY_BYTES as u64;
        io::stdin().take(longest + 1).read_to_end(&mut message).context("can't read the message")?;
    } else {
        message.extend_from_slice(args.text.as_bytes());
    }
    if message.len() > LONGEST_BODY_BYTES {
        return Err(Usage(format!("the message is longer than {LONGEST_BODY_BYTES} bytes")).into());
    }
    Ok(message)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::super::{Cli, Command};
    use super::*;

    fn parse(arguments: &[&str]) -> Result<Args, clap::Error> {
        match Cli::try_parse_from([&["limiter", "publish"], arguments].concat())?.command {
            Command::Publish(args) => Ok(args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_message_is_for_one_kind_of_recipients() {
        for (arguments, expected) in [
            (["--room", "/a", "x"].as_slice(), json!({ "room": "/a" })),
            (&["--user", "alice", "x"], json!({ "user": "alice" })),
            (&["--all", "x"], json!({ "all": true })),
        ] {
            assert_eq!(to(&parse(arguments).unwrap().to), expected);
        }
        for wrong in [["x"].as_slice(), &["--all"], &["--all", "--room", "/a", "x"]] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_message_may_begin_with_a_hyphen() {
        assert_eq!(message(&parse(&["--all", "-1"]).unwrap()).unwrap(), b"-1");
    }
}
