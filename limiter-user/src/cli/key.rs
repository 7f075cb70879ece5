//! `limiter key`.

use std::{
    fs::{self, OpenOptions},
    io::{self, Read as _, Seek as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use serde::Serialize;

use super::output::Format;
use crate::config::{ApiKeys, new_api_key, user_name};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Make an API key. It is shown once: only its hash is kept
    New(NewArgs),
}

#[derive(Debug, clap::Args)]
pub(super) struct NewArgs {
    /// Whom it is for
    #[arg(long, value_name = "NAME", value_parser = parse_user)]
    user: String,
    /// Connections that may be open with it at a time; 0: any number [default: as gateway.auth.users has it]
    #[arg(long, value_name = "COUNT")]
    connections: Option<u32>,
    /// Connection attempts per minute with it; 0: any number [default: as gateway.auth.users has it]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(..=1000))]
    attempts_per_minute: Option<u32>,
    /// Messages per `gateway.messages.window` over all connections with it; 0: any number [default: `rate_per_user`]
    #[arg(long, value_name = "COUNT")]
    rate: Option<u32>,
    /// The file of `gateway.auth.api_keys`, to add its entry to; made if it is not there
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    #[command(flatten)]
    format: Format,
}

#[derive(Serialize)]
struct Document {
    key: String,
    user: String,
    /// What belongs into the file, if it is not there yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    entry: Option<String>,
}

pub(super) fn run(command: &Command) -> anyhow::Result<()> {
    let Command::New(args) = command;
    let (key, entry) = new_api_key(&args.user, args.connections, args.attempts_per_minute, args.rate)
        .context("can't make a key: the system gives no random numbers")?;
    let entry = match &args.file {
        Some(file) => {
            append(file, &entry).with_context(|| format!("can't add the key to {}", file.display()))?;
            None
        }
        None => Some(entry),
    };
    let document = Document { key, user: args.user.clone(), entry };
    args.format.print(&document, || text(&document))
}

fn text(document: &Document) -> String {
    match &document.entry {
        None => format!("{}\n", document.key),
        Some(entry) => format!("{}\n\n# for the file of gateway.auth.api_keys:\n{entry}", document.key),
    }
}

fn parse_user(text: &str) -> Result<String, String> {
    let why = "a name has 1 to 128 bytes, without control characters or spaces at its ends";
    user_name(text).map(|name| name.to_string()).ok_or_else(|| why.to_owned())
}

/// Adds an entry to a file of keys, which nobody else may read if it is made here.
fn append(path: &Path, entry: &str) -> anyhow::Result<()> {
    let mut file = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)?;
    // Two at once would else write into each other's entries.
    file.lock()?;
    if fs::metadata(path)?.len() != 0 {
        ApiKeys::load(path).context("it is not a file of keys")?;
    }
    let separator = separator(&mut file)?;
    file.write_all(format!("{separator}{entry}").as_bytes())?;
    Ok(file.sync_all()?)
}

/// What goes between the last line of a file and a new entry.
fn separator(file: &mut fs::File) -> io::Result<&'static str> {
    let length = file.seek(io::SeekFrom::End(0))?;
    if length == 0 {
        return Ok("");
    }
    let mut last = [0];
    file.seek(io::SeekFrom::End(-1))?;
    file.read_exact(&mut last)?;
    Ok(if last == *b"\n" { "\n" } else { "\n\n" })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn entries_are_added_to_a_file_that_only_its_owner_reads() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys.toml");
        let (first, entry) = new_api_key("alice", None, None, Some(7)).unwrap();
        append(&path, &entry).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        // As an editor may leave it.
        fs::write(&path, fs::read_to_string(&path).unwrap().trim_end()).unwrap();
        let (second, entry) = new_api_key("bob", Some(2), None, None).unwrap();
        append(&path, &entry).unwrap();
        let keys = ApiKeys::load(&path).unwrap();
        assert_eq!(&*keys.find(&first).unwrap().user, "alice");
        assert_eq!(&*keys.find(&second).unwrap().user, "bob");

        fs::write(&path, "nonsense").unwrap();
        append(&path, &entry).unwrap_err();
        assert_eq!(fs::read_to_string(&path).unwrap(), "nonsense", "what is no file of keys is left alone");
    }
}
