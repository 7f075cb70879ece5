//! The life of the daemon, from ready to drained.

use std::{collections::HashMap, sync::Arc, time::Duration};

use anyhow::Context as _;
use sd_notify::NotifyState;
use tokio::{
    sync::{mpsc, watch},
    task::{JoinSet, spawn_blocking},
    time::MissedTickBehavior,
};

use super::{
    audits, interfaces, refusals,
    reload::Reloader,
    signals::{Signal, Signals},
};
use crate::{
    admin::{Admin, Readiness, State},
    gateway::Gateway,
    kernel::{Auditor, Challenges, Control, DebugLog, Events, Keeper},
};

/// Everything bound, and ready to be set going.
pub(super) struct Daemon {
    pub(super) gateways: Vec<Gateway>,
    pub(super) admin: Option<Admin>,
    pub(super) readiness: Readiness,
    pub(super) kernel: Option<KernelSide>,
    pub(super) reloader: Reloader,
}

/// What the daemon does for the kernel's side.
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

/// What the end may take besides the drain.
const STOPPING_GRACE: Duration = Duration::from_secs(5);

impl Daemon {
    /// Serves until a signal says to end; then waits for the clients, or for a second signal.
    pub(super) async fn run(self, mut signals: Signals) -> anyhow::Result<()> {
        let Self { gateways, admin, readiness, kernel, mut reloader } = self;
        let drain = watch::Sender::new(false);
        let end = watch::Sender::new(false);
        let mut serving = JoinSet::new();
        for gateway in gateways {
            serving.spawn(gateway.run(set(drain.subscribe())));
        }
        let mut helpers = JoinSet::new();
        if let Some(admin) = admin {
            tracing::info!(address = %admin.local_addr(), "metrics, health and control are at this address");
            helpers.spawn(admin.run(set(end.subscribe())));
        }
        // Dropped at the end: it has nothing to finish.
        let mut background = JoinSet::new();
        if let Some(KernelSide { refusals, control, debug_log, auditor, keeper, challenges, audit_interval }) = kernel {
            background.spawn(expire_reservations(control));
            background.spawn(keep_up(challenges));
            if let Some(debug_log) = debug_log {
                background.spawn(async {
                    let error = debug_log.forward().await;
                    tracing::error!(%error, "can't read the kernel programs' debug messages any longer");
                });
            }
            background.spawn(interfaces::keep(keeper));
            let (past_limit, to_cut) = mpsc::channel(audits::QUEUE);
            background.spawn(audits::run(auditor, audit_interval, to_cut));
            if let Some(Refusals { events, services }) = refusals {
                background.spawn(refusals::log_all(events, services, past_limit));
            }
        }

        readiness.set(State::Ready);
        notify(&[NotifyState::Ready]);
        let crashed = loop {
            tokio::select! {
                signal = signals.next() => match signal {
                    Signal::End => break None,
                    Signal::Reload => reloader = reload(reloader).await?,
                },
                Some(ended) = serving.join_next() => break Some(ended),
            }
        };

        readiness.set(State::Draining);
        // A unit's TimeoutStopSec= may be shorter than the drain.
        let time = (reloader.drain_timeout() + STOPPING_GRACE).as_micros();
        notify(&[NotifyState::Stopping, NotifyState::ExtendTimeoutUsec(u32::try_from(time).unwrap_or(u32::MAX))]);
        drain.send_replace(true);
        tokio::select! {
            () = join_all(&mut serving) => {}
            () = signals.end() => {
                tracing::warn!("a second signal: not waiting for the clients any longer");
                serving.shutdown().await;
            }
        }
        end.send_replace(true);
        join_all(&mut helpers).await;
        match crashed {
            // A gateway ends by itself only when something in it is broken.
            Some(ended) => Err(anyhow::anyhow!("a gateway ended by itself: {ended:?}")),
            None => Ok(()),
        }
    }
}

/// Reads the configuration again, and tells systemd so. Fails only if that panics.
async fn reload(mut reloader: Reloader) -> anyhow::Result<Reloader> {
    // With the time, which `Type=notify-reload` asks for.
    match NotifyState::monotonic_usec_now() {
        Ok(now) => notify(&[NotifyState::Reloading, now]),
        Err(_) => notify(&[NotifyState::Reloading]),
    }
    let reloader = spawn_blocking(move || {
        reloader.reload();
        reloader
    })
    .await
    .context("reading the configuration again ended badly")?;
    notify(&[NotifyState::Ready]);
    Ok(reloader)
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

async fn join_all<T: 'static>(tasks: &mut JoinSet<T>) {
    while let Some(ended) = tasks.join_next().await {
        if let Err(error) = ended {
            tracing::error!(%error, "a task ended badly");
        }
    }
}

/// Completes when the value is set, or when there is nobody left who could set it.
async fn set(mut value: watch::Receiver<bool>) {
    let _ = value.wait_for(|set| *set).await;
}

/// Tells systemd, if it is there.
fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "can't tell systemd");
    }
}
