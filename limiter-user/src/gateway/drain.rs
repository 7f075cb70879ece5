//! The end of a gateway: everybody is told, and waited for, but not for ever.

use std::{pin::pin, sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep},
};

use super::{Shared, listen::report_panic};

/// What a connection's task was when it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Its handshake was refused, or never came.
    NoSession,
    /// A session; whether its client took part in the close.
    Session {
        /// It did: a Close frame went each way, or the client left by itself.
        clean: bool,
    },
}

/// What became of the sessions that were open at the shutdown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DrainReport {
    /// Sessions that ended in good order.
    pub closed: usize,
    /// Sessions whose client did not answer the Close frame and that were cut.
    pub cut: usize,
    /// How long it took.
    pub took: Duration,
}

/// Tells every connection that the gateway ends.
pub(super) struct Drain(watch::Sender<bool>);

impl Default for Drain {
    fn default() -> Self {
        Self(watch::Sender::new(false))
    }
}

impl Drain {
    pub(super) fn begun(&self) -> bool {
        *self.0.borrow()
    }

    fn begin(&self) {
        self.0.send_replace(true);
    }

    /// Completes when the drain begins.
    pub(super) async fn wait(&self) {
        // The sender is this very object, so it outlives the call and the wait can't fail.
        _ = self.0.subscribe().wait_for(|begun| *begun).await;
    }
}

/// Ends `connections`, in good order as far as their clients take part.
pub(super) async fn finish(connections: &mut JoinSet<Outcome>, shared: &Arc<Shared>) -> DrainReport {
    let started = Instant::now();
    shared.drain.begin();
    tracing::info!(sessions = shared.admission.total(), timeout = ?shared.config.drain_timeout, "draining");

    let mut report = DrainReport::default();
    let mut patience = pin!(sleep(shared.config.drain_timeout));
    loop {
        tokio::select! {
            biased;
            ended = connections.join_next() => {
                let Some(ended) = ended else { break };
                report_panic(&ended);
                match ended {
                    Ok(Outcome::Session { clean: true }) => report.closed += 1,
                    Ok(Outcome::Session { clean: false }) | Err(_) => report.cut += 1,
                    Ok(Outcome::NoSession) => {}
                }
            }
            () = &mut patience => {
                // A session holds its permit to its last moment, a handshake that was not admitted has none.
                report.cut += shared.admission.total() as usize;
                connections.shutdown().await;
                break;
            }
        }
    }
    report.took = started.elapsed();
    tracing::info!(closed = report.closed, cut = report.cut, took = ?report.took, "drained");
    report
}
