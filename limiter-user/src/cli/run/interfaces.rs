//! What is said of interfaces that come and go.

use crate::kernel::{Change, Keeper};

/// Keeps interfaces attached, and logs what happens to them. Does not end but by an error.
pub(super) async fn keep(keeper: Keeper) {
    let error = keeper.run(log).await;
    tracing::error!(%error, "interfaces that come back are not attached again any longer: restart for that");
}

fn log(change: Change) {
    match change {
        Change::Gone { index } => {
            tracing::warn!(index, "an interface is gone; it is attached again when it comes back");
        }
        Change::Attached(report) => {
            tracing::info!(
                interface = report.name,
                mode = report.mode.name(),
                hook = report.mode.hook(),
                why = report.why.map(tracing::field::display),
                "attached an interface that has come"
            );
        }
        Change::Failed { name, error } => {
            tracing::error!(
                interface = name,
                error = format!("{:#}", anyhow::Error::from(error)),
                "an interface has come, and can't be attached; trying again when one changes"
            );
        }
    }
}
