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

    /// Watches over one session, which counts if it ends in the drain: as cut, unless it is said to be closed before.
    pub(super) fn session(&self) -> Witness<'_> {
        Witness { drain: self, counter: &self.cut }
    }

    /// Completes when the drain begins.
    pub(super) async fn wait(&self) {
        // The sender is this very object, so it outlives the call and the wait can't fail.
        _ = self.begun.subscribe().wait_for(|begun| *begun).await;
    }
}

/// Counts a session when it is dropped, which is what happens to those that are cut.
pub(super) struct Witness<'a> {
    drain: &'a Drain,
    counter: &'a AtomicUsize,
}

impl Witness<'_> {
    /// The client closed too.
    pub(super) fn closed(&mut self) {
        self.counter = &self.drain.closed;
    }
}

impl Drop for Witness<'_> {
    fn drop(&mut self) {
        if self.drain.begun() {
            self.counter.fetch_add(1, Ordering::Relaxed);
        }
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
    if timeout(shared.config.drain_timeout, all).await.is_err() {
        connections.shutdown().await;
    }
    let report = DrainReport {
        closed: shared.drain.closed.load(Ordering::Relaxed),
        cut: shared.drain.cut.load(Ordering::Relaxed),
        took: started.elapsed(),
    };
    tracing::info!(closed = report.closed, cut = report.cut, took = ?report.took, "drained");
    report
}
