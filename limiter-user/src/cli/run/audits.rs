//! The audit of the ledger, every so often, and the end of connections that got past XDP, at once.

use std::time::Duration;

use limiter_common::Endpoints;
use tokio::{
    sync::{mpsc, watch},
    task::spawn_blocking,
    time::{Interval, MissedTickBehavior},
};

use crate::kernel::{Audit, Auditor, KernelError};

/// How many connections may wait to be cut. What finds no room is left to the next audit.
pub(super) const QUEUE: usize = 4096;

enum Work {
    Audit,
    Cut(Vec<Endpoints>),
}

/// Audits every so often (zero: never), and cuts what comes through `past_limit`. Does not end.
pub(super) async fn run(
    mut auditor: Auditor,
    mut intervals: watch::Receiver<Duration>,
    mut past_limit: mpsc::Receiver<Endpoints>,
) {
    let mut interval = *intervals.borrow_and_update();
    let mut ticks = every(interval);
    let mut failed = false;
    loop {
        let mut connections = Vec::new();
        let work = tokio::select! {
            _ = ticks.tick(), if !interval.is_zero() => Work::Audit,
            Ok(()) = intervals.changed() => {
                let new = *intervals.borrow_and_update();
                if new != interval {
                    interval = new;
                    ticks = every(interval);
                }
                continue;
            }
            received = past_limit.recv_many(&mut connections, QUEUE), if !past_limit.is_closed() => {
                if received == 0 {
                    continue;
                }
                Work::Cut(connections)
            }
            else => return,
        };
        let done = spawn_blocking(move || {
            let result = match work {
                Work::Audit => auditor.audit(),
                Work::Cut(connections) => auditor.cut(&connections).map(|cut| Audit { cut, ..Audit::default() }),
            };
            (auditor, result)
        });
        let result: Result<Audit, KernelError>;
        match done.await {
            Ok(done) => (auditor, result) = done,
            Err(error) => {
                tracing::error!(%error, "the audit of the ledger ended badly; it is not audited any longer");
                return;
            }
        }
        match result {
            Ok(audit) => {
                failed = false;
                log(&audit);
            }
            // Said once, not every few seconds.
            Err(error) => {
                if !failed {
                    tracing::warn!(%error, "can't audit the ledger; trying again");
                }
                failed = true;
            }
        }
    }
}

fn every(interval: Duration) -> Interval {
    // An interval of zero is refused; this one is never waited for then.
    let mut ticks = tokio::time::interval(if interval.is_zero() { Duration::from_hours(1) } else { interval });
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

fn log(audit: &Audit) {
    let &Audit { adopted, removed, cut, drift } = audit;
    if adopted + removed + drift > 0 {
        tracing::warn!(adopted, removed, drift, "the ledger differed from the kernel's sockets");
    }
    if cut > 0 {
        tracing::info!(cut, "closed connections that had got past XDP and past their limits");
    }
}
