//! What the daemon does for the kernel's side while it serves.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::MissedTickBehavior,
};

use super::{audits, interfaces, refusals};
use crate::kernel::{Auditor, Challenges, Control, DebugLog, Events, Keeper, KeeperPause};

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
        let Self { refusals, control, debug_log, auditor, keeper, challenges, audit_interval } = self;
        background.spawn(expire_reservations(control));
        background.spawn(keep_up(challenges));
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

/// How often the programs are told anew what they can't see for themselves.
const KEEP_UP_INTERVAL: Duration = Duration::from_secs(1);

/// Tells the programs what somebody changes on the host, and they need to know for a challenge.
async fn keep_up(mut challenges: Challenges) {
    let mut ticks = tokio::time::interval(KEEP_UP_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut failed = false;
    loop {
        ticks.tick().await;
        match challenges.keep_up() {
            Ok(()) => failed = false,
            // Said once, not every second.
            Err(error) => {
                if !failed {
                    tracing::warn!(%error, "can't tell the kernel programs of net.core.rmem_max; trying again");
                }
                failed = true;
            }
        }
    }
}

/// How often reservations are looked through on behalf of nobody in particular.
const EXPIRE_INTERVAL: Duration = Duration::from_secs(1);

/// Gives back the slots that the stack never confirmed, also when no packet comes that would be the occasion.
async fn expire_reservations(control: Arc<Control>) {
    let mut ticks = tokio::time::interval(EXPIRE_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut failed = false;
    loop {
        ticks.tick().await;
        match control.expire() {
            Ok(()) => failed = false,
            // Said once, not every second.
            Err(error) => {
                if !failed {
                    tracing::warn!(%error, "can't look for slots that the stack never confirmed; trying again");
                }
                failed = true;
            }
        }
    }
}
