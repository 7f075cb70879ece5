//! From what went wrong to the exit status, in one place.

use std::{
    io::{self, ErrorKind, Write as _},
    process::ExitCode,
};

use super::{Usage, control::ControlError, output::print};
use crate::{config::ConfigError, kernel::KernelError};

const FAILED: u8 = 1;
const BAD_USAGE: u8 = 2;
const NOT_ATTACHED: u8 = 3;
const NO_PRIVILEGE: u8 = 4;

/// Says what went wrong on stderr, and gives the status to exit with.
pub(super) fn report(result: anyhow::Result<()>) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    let status = status(&error);
    if status != 0 {
        for line in messages(&error) {
            complain(&line);
        }
    }
    ExitCode::from(status)
}

/// What clap has to say: help and version go to stdout, the rest is bad usage.
pub(super) fn usage(error: &clap::Error) -> ExitCode {
    let text = error.render().to_string();
    let text = text.trim_end();
    if !error.use_stderr() {
        return report(print(&format!("{text}\n")));
    }
    match text.strip_prefix("error: ") {
        Some(text) => complain(text),
        // Without a command there is the help instead.
        None => say(text),
    }
    ExitCode::from(BAD_USAGE)
}

/// One message on stderr.
pub(super) fn complain(message: &str) {
    say(&format!("limiter: {message}"));
}

fn say(text: &str) {
    // Where stderr is closed nobody can be told.
    let _ = writeln!(io::stderr(), "{text}");
}

/// The error with its causes on one line; each problem of a configuration on a line of its own.
pub(super) fn messages(error: &anyhow::Error) -> Vec<String> {
    match error.downcast_ref() {
        Some(ConfigError::Invalid(problems)) => problems.iter().map(ToString::to_string).collect(),
        _ => vec![format!("{error:#}")],
    }
}

fn status(error: &anyhow::Error) -> u8 {
    error.chain().find_map(status_of).unwrap_or(FAILED)
}

fn status_of(error: &(dyn std::error::Error + 'static)) -> Option<u8> {
    if let Some(error) = error.downcast_ref::<KernelError>() {
        // Every other one, whatever is added there, is a failure.
        return Some(if matches!(error, KernelError::NoPrivilege { .. }) {
            NO_PRIVILEGE
        } else if matches!(error, KernelError::NotAttached { .. }) {
            NOT_ATTACHED
        } else {
            FAILED
        });
    }
    if let Some(error) = error.downcast_ref::<ConfigError>() {
        return match error {
            ConfigError::Unwritable { .. } => Some(FAILED),
            ConfigError::Unreadable { .. } | ConfigError::Invalid(_) => Some(BAD_USAGE),
        };
    }
    if let Some(error) = error.downcast_ref::<ControlError>() {
        return Some(if error.is_lack_of_privilege() {
            NO_PRIVILEGE
        } else if matches!(error, ControlError::NotRunning { .. }) {
            NOT_ATTACHED
        } else {
            FAILED
        });
    }
    if error.is::<Usage>() {
        return Some(BAD_USAGE);
    }
    // Only what writes to stdout lets a broken pipe through: whoever reads it has seen enough.
    error.downcast_ref::<io::Error>().filter(|error| error.kind() == ErrorKind::BrokenPipe).map(|_| 0)
}

#[cfg(test)]
mod tests {
    use anyhow::{Context, anyhow};

    use super::*;

    fn failed() -> KernelError {
        KernelError::Failed { what: "can't load".into(), source: io::Error::from(ErrorKind::BrokenPipe).into() }
    }

    #[test]
    fn each_error_has_its_status_however_deep_it_lies() {
        let unreadable = || ConfigError::Unreadable { path: "f".into(), source: ErrorKind::NotFound.into() };
        let unwritable = ConfigError::Unwritable { path: "f".into(), source: ErrorKind::PermissionDenied.into() };
        let cases: [(anyhow::Error, u8); 8] = [
            (anyhow!("anything"), 1),
            (failed().into(), 1),
            (unreadable().into(), 2),
            (unwritable.into(), 1),
            (Usage("no".into()).into(), 2),
            (KernelError::NotAttached { pin_path: "/p".into() }.into(), 3),
            (KernelError::NoPrivilege { action: "load" }.into(), 4),
            (io::Error::from(ErrorKind::BrokenPipe).into(), 0),
        ];
        for (error, expected) in cases {
            let text = error.to_string();
            assert_eq!(status(&error), expected, "{text}");
            assert_eq!(status(&error.context("while starting")), expected, "{text} in a context");
        }
        let nested = Err::<(), _>(unreadable()).context("first").context("second").unwrap_err();
        assert_eq!(status(&nested), 2);
    }

    #[test]
    fn causes_stand_on_one_line() {
        let error = anyhow::Error::from(failed()).context("can't attach to eth0");
        assert_eq!(messages(&error), ["can't attach to eth0: can't load: broken pipe"]);
    }
}
