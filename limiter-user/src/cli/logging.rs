//! Log lines, on stderr.

use std::{io, sync::OnceLock};

use tracing_subscriber::{
    EnvFilter, Registry, filter::ParseError, fmt, layer::SubscriberExt as _, reload, util::SubscriberInitExt as _,
};

use crate::config::{Log, LogFormat};

/// The WebSocket library writes whole messages at `trace` and the reasons of Close frames at `debug`; what clients say to
/// each other has no place in a log, whatever level is asked for.
const NEVER_BELOW_WARN: &str = "tungstenite=warn";

/// Starts logging for the rest of the process; a second call does nothing.
pub(super) fn start(log: &Log) -> Result<(), ParseError> {
    let (filter, handle) = reload::Layer::new(filter(&log.level)?);
    let lines = tracing_subscriber::registry().with(filter);
    // It fails only where logging was started before.
    let started = match log.format {
        LogFormat::Text => {
            let colours = io::IsTerminal::is_terminal(&io::stderr()) && std::env::var_os("NO_COLOR").is_none();
            lines.with(fmt::layer().with_writer(io::stderr).with_ansi(colours)).try_init()
        }
        LogFormat::Json => lines.with(fmt::layer().with_writer(io::stderr).json().flatten_event(true)).try_init(),
    };
    if started.is_ok() {
        let _ = FILTER.set(handle);
    }
    Ok(())
}

/// What the process logs by, once it does.
static FILTER: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// From now on the process logs by that filter.
pub(super) fn change(filter: EnvFilter) {
    if let Some(handle) = FILTER.get() {
        // It fails only when the subscriber is gone, and that is there until the end.
        let _ = handle.reload(filter);
    }
}

/// The filter of a level, or of what else `log.level` may say.
pub(super) fn filter(level: &str) -> Result<EnvFilter, ParseError> {
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
