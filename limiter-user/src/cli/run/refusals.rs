//! Refusals in the log. The kernel reports one per source and second; of very many sources, only some are logged.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use limiter_common::{Endpoints, event::Stage};
use tokio::sync::{mpsc, watch};

use crate::kernel::{Event, Events};

/// Most lines per [`WINDOW`].
const MOST_LINES: u32 = 20;
const WINDOW: Duration = Duration::from_secs(1);

/// Logs refusals as long as they can be read. `services`: names by index. Connections that are open already go to
/// `past_limit`, to be cut.
pub(super) async fn log_all(
    events: Events,
    services: watch::Receiver<HashMap<u32, String>>,
    past_limit: mpsc::Sender<Endpoints>,
) {
    let mut budget = Budget::default();
    let error = events
        .read(|event| {
            if event.stage == Stage::Open {
                // Those that find no room are found by the next audit.
                let _ =
                    past_limit.try_send(Endpoints { netns: event.netns, ..Endpoints::new(event.remote, event.local) });
            }
            if let Some(left_out) = budget.take(Instant::now()) {
                let services = services.borrow();
                let name = services.get(&event.service).map_or("?", String::as_str);
                log(&event, name, left_out);
            }
        })
        .await;
    tracing::error!(%error, "can't read refusals any longer: they are counted, but not logged");
}

fn log(event: &Event, service: &str, left_out: u64) {
    tracing::info!(
        service,
        reason = event.reason.name(),
        stage = event.stage.name(),
        remote = %event.remote,
        local = %event.local,
        // Left out where it is limiter's own.
        netns_cookie = (!event.netns.is_own()).then(|| event.netns.cookie()),
        unreported = event.unreported,
        left_out,
        "{}", if event.observed { "would refuse" } else { "refused" },
    );
}

/// How many lines may still be written in this window.
#[derive(Debug, Default)]
struct Budget {
    window_start: Option<Instant>,
    written: u32,
    left_out: u64,
}

impl Budget {
    /// Whether a line may be written at that time; if so, how many were left out since the last one.
    fn take(&mut self, now: Instant) -> Option<u64> {
        if self.window_start.is_none_or(|start| now.duration_since(start) >= WINDOW) {
            self.window_start = Some(now);
            self.written = 0;
        }
        if self.written == MOST_LINES {
            self.left_out += 1;
            return None;
        }
        self.written += 1;
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_very_many_some_are_written_and_the_rest_is_counted() {
        let mut budget = Budget::default();
        let start = Instant::now();
        let written = (0..100).filter(|_| budget.take(start).is_some()).count();
        assert_eq!(written, MOST_LINES as usize);
        assert_eq!(budget.take(start + WINDOW), Some(80));
        assert_eq!(budget.take(start + WINDOW), Some(0));
    }
}
