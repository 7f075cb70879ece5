//! `limiter doctor`.

mod host;
mod link;
mod mounts;
mod probes;

use serde::Serialize;

use super::{
    Global,
    output::{Format, table},
};
use crate::config::{Config, ConfigError};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// An interface to look at (repeatable); without, those of the configuration
    #[arg(long = "interface", short, value_name = "NAME", env = "LIMITER_INTERFACE", value_delimiter = ',')]
    interfaces: Option<Vec<String>>,
    #[command(flatten)]
    format: Format,
}

/// What one probe found.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Row {
    /// What was looked at.
    check: String,
    state: State,
    /// What was found.
    found: String,
    /// What to do about it; empty if there is nothing to do.
    advice: String,
}

/// Whether what was found will do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    /// All is well.
    Ok,
    /// limiter works, but less well than it could.
    Warn,
    /// limiter can't work.
    Fail,
}

impl State {
    const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }
}

#[derive(Serialize)]
struct Document {
    ok: bool,
    checks: Vec<Row>,
}

/// Something on this host keeps limiter from working.
#[derive(Debug, thiserror::Error)]
#[error("{failed} of {all} checks failed; the ADVICE column says what to do")]
struct Unfit {
    failed: usize,
    all: usize,
}

pub(super) fn run(global: &Global, args: &Args) -> anyhow::Result<()> {
    let interfaces = interfaces(global, args)?;
    let checks = probes::all(&host::Real, &global.pin_path()?, &interfaces);
    let failed = checks.iter().filter(|row| row.state == State::Fail).count();
    let all = checks.len();
    let document = Document { ok: failed == 0, checks };
    args.format.print(&document, || text(&document.checks))?;
    if failed == 0 { Ok(()) } else { Err(Unfit { failed, all }.into()) }
}

fn interfaces(global: &Global, args: &Args) -> Result<Vec<String>, ConfigError> {
    match (&args.interfaces, global.config()) {
        (Some(interfaces), _) => Ok(interfaces.clone()),
        (None, Some(file)) => Config::from_file(file).map(|config| config.kernel.interfaces),
        (None, None) => Ok(Vec::new()),
    }
}

fn text(rows: &[Row]) -> String {
    let rows =
        rows.iter().map(|row| [row.check.clone(), row.state.name().into(), row.found.clone(), row.advice.clone()]);
    table(["CHECK", "STATE", "FOUND", "ADVICE"], &[], rows)
}
