//! What the daemon does for the kernel's side while it serves.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::MissedTickBehavior,
};

use super::{audits, interfaces, refusals};
use crate::kernel::{Auditor, Challenges, Control, DebugLog, Events, Keeper, KeeperPause, KernelError};

/// All that it takes.
pub(super) struct KernelSide {
    pub(super) refusals: Option<Refusals>,
    pub(super) control: Arc<Control>,
    pub(super) debug_log: Option<DebugLog>,
    pub(super) auditor: Auditor,
    pub(super) keeper: Keeper,
    pub(super) challenges: Challenges,
    /// Zero: no audits.
    pub(super) audit_interval: watch::Receiver<Duration>,
}

/// Where refusals are read from, and the names of the services by their index.
pub(super) struct Refusals {
    pub(super) events: Events,
    pub(super) services: watch::Receiver<HashMap<u32, String>>,
}

impl KernelSide {
    /// Sets it going: it ends with `background`, and has nothing to finish.
    pub(super) fn work(self, background: &mut JoinSet<()>) -> KeeperPause {
        let Self { refusals, control, debug_log, auditor, keeper, mut challenges, audit_interval } = self;
        // They end when no packet comes that would be the occasion, too.
        background.spawn(every_second("can't look for slots that the stack never confirmed", move || control.expire()));
        // Of what somebody changes on the host, and they need to know for a challenge.
        background
            .spawn(every_second("can't tell the kernel programs of net.core.rmem_max", move || challenges.keep_up()));
        if let Some(debug_log) = debug_log {
            background.spawn(async {
                let error = debug_log.forward().await;
                tracing::error!(%error, "can't read the kernel programs' debug messages any longer");
            });
        }
        let pause = keeper.pauser();
        background.spawn(interfaces::keep(keeper));
        let (past_limit, to_cut) = mpsc::channel(audits::QUEUE);
        background.spawn(audits::run(auditor, audit_interval, to_cut));
        if let Some(Refusals { events, services }) = refusals {
            background.spawn(refusals::log_all(events, services, past_limit));
        }
        pause
    }
}

/// How often what nothing gives the occasion for is done.
const INTERVAL: Duration = Duration::from_secs(1);

/// Does the work again and again. What goes wrong is said once, and not every second.
async fn every_second(can_not: &'static str, mut work: impl FnMut() -> Result<(), KernelError>) {
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut failed = false;
    loop {
        ticks.tick().await;
        match work() {
            Ok(()) => failed = false,
            Err(error) => {
                if !failed {
                    tracing::warn!(%error, "{can_not}; trying again");
                }
                failed = true;
            }
        }
    }
}
