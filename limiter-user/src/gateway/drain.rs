//! The end of a gateway: everybody is told, and waited for, but not for ever.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, timeout},
};

use super::{Shared, listen::report_panic};

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

/// Tells every connection that the gateway ends, and counts how they take it.
#[derive(Default)]
pub(super) struct Drain {
    begun: watch::Sender<bool>,
    closed: AtomicUsize,
    cut: AtomicUsize,
}

impl Drain {
    pub(super) fn begun(&self) -> bool {
        *self.begun.borrow()
    }

    fn begin(&self) {
        self.begun.send_replace(true);
    }

    /// A session is over: its client closed too, or was cut off.
    pub(super) fn session_ended(&self, clean: bool) {
        if self.begun() {
            let counter = if clean { &self.closed } else { &self.cut };
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Completes when the drain begins.
    pub(super) async fn wait(&self) {
        // The sender is this very object, so it outlives the call and the wait can't fail.
        _ = self.begun.subscribe().wait_for(|begun| *begun).await;
    }
}

/// Ends `connections`, in good order as far as their clients take part.
pub(super) async fn finish(connections: &mut JoinSet<()>, shared: &Arc<Shared>) -> DrainReport {
    let started = Instant::now();
    shared.drain.begin();
    tracing::info!(sessions = shared.admission.total(), timeout = ?shared.config.drain_timeout, "draining");

    let all = async {
        while let Some(ended) = connections.join_next().await {
            report_panic(&ended);
        }
    };
    let in_time = timeout(shared.config.drain_timeout, all).await.is_ok();
    // A session holds its permit until its client's socket is closed.
    let left = shared.admission.total() as usize;
    if !in_time {
        connections.shutdown().await;
    }
    let report = DrainReport {
        closed: shared.drain.closed.load(Ordering::Relaxed),
        cut: shared.drain.cut.load(Ordering::Relaxed) + left,
        took: started.elapsed(),
    };
    tracing::info!(closed = report.closed, cut = report.cut, took = ?report.took, "drained");
    report
}
