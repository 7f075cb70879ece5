//! Log lines, on stderr.

use std::io;

use tracing_subscriber::{EnvFilter, filter::ParseError};

use crate::config::{Log, LogFormat};

/// The WebSocket library writes whole messages at `trace` and the reasons of Close frames at `debug`; what clients say to
/// each other has no place in a log, whatever level is asked for.
const NEVER_BELOW_WARN: &str = "tungstenite=warn";

/// Starts logging for the rest of the process; a second call does nothing.
pub(super) fn start(log: &Log) -> Result<(), ParseError> {
    let filter = filter(&log.level)?;
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    // It fails only where logging was started before.
    let _ = match log.format {
        LogFormat::Text => {
            let colours = io::IsTerminal::is_terminal(&io::stderr()) && std::env::var_os("NO_COLOR").is_none();
            lines.with_ansi(colours).try_init()
        }
        LogFormat::Json => lines.json().flatten_event(true).try_init(),
    };
    Ok(())
}

fn filter(level: &str) -> Result<EnvFilter, ParseError> {
    Ok(level.parse::<EnvFilter>()?.add_directive(NEVER_BELOW_WARN.parse()?))
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn the_bodies_of_messages_are_not_logged_at_any_level() {
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_env_filter(filter("trace").unwrap())
            .with_writer(move || writer.clone())
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            tracing::trace!(target: "limiter", "ours");
            tracing::trace!(target: "tungstenite::protocol", "Received message secret");
        });
        let written = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        assert!(written.contains("ours") && !written.contains("secret"), "{written}");
    }
}
