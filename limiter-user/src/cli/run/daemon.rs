//! The life of the daemon, from ready to drained.

use std::time::Duration;

use anyhow::Context as _;
use sd_notify::NotifyState;
use tokio::{
    sync::watch,
    task::{JoinError, JoinSet, spawn_blocking},
};

use super::{
    hand_over::{Attempt, Succession},
    kernel_side::KernelSide,
    reload::Reloader,
    signals::{Signal, Signals},
};
use crate::{
    admin::{Admin, Readiness, State},
    gateway::{DrainReport, Ending, Gateway},
    kernel::{Attached, KeeperPause},
};

/// Everything bound, and ready to be set going.
pub(super) struct Daemon {
    pub(super) gateways: Vec<Gateway>,
    pub(super) admin: Option<Admin>,
    pub(super) readiness: Readiness,
    pub(super) kernel: Option<KernelSide>,
    pub(super) reloader: Reloader,
    pub(super) succession: Succession,
}

/// What the end may take besides the drain.
const STOPPING_GRACE: Duration = Duration::from_secs(5);

/// Why the daemon ends.
enum End {
    /// A signal says so.
    Told,
    /// Another process is ready to take its place.
    Relieved {
        by: Box<Attempt>,
        /// Somebody wants the configuration read again, which it may have been before it changed.
        reload: bool,
    },
    /// A gateway ended by itself, which happens only when something in it is broken.
    Crashed(Result<DrainReport, JoinError>),
}

impl Daemon {
    /// Serves until a signal says to end, or another process takes over; then waits for the clients, or for another signal.
    /// `attached` is held as long as no other daemon may come.
    pub(super) async fn run(self, mut signals: Signals, attached: Option<Attached>) -> anyhow::Result<()> {
        let Self { gateways, admin, readiness, kernel, reloader, mut succession } = self;
        succession.begin(attached.as_ref()).await;
        let (gateways_end, helpers_end) = (watch::Sender::new(None), watch::Sender::new(None));
        let mut serving = JoinSet::new();
        for gateway in gateways {
            serving.spawn(gateway.run_until(said(gateways_end.subscribe())));
        }
        // Before anybody can ask: where there was another process, it was ready all the while.
        readiness.set(State::Ready);
        let mut helpers = JoinSet::new();
        if let Some(admin) = admin {
            tracing::info!(address = %admin.local_addr(), "metrics, health and control are at this address");
            helpers.spawn(admin.run_until(said(helpers_end.subscribe())));
        }
        let mut background = JoinSet::new();
        let keeper = kernel.map(|kernel| kernel.work(&mut background));

        notify(&[NotifyState::Ready]);
        let service = Service { reloader, succession, attached, keeper };
        let (Service { reloader, succession, attached, .. }, end) =
            service.until_end(&mut signals, &mut serving).await?;
        let (crashed, held, second) = match end {
            End::Relieved { by: next, reload } => {
                succession.leave();
                gateways_end.send_replace(Some(Ending::HandOver));
                helpers_end.send_replace(Some(Ending::HandOver));
                background.shutdown().await;
                // It holds the same lock.
                drop(attached);
                notify(&[NotifyState::MainPid(next.id())]);
                tracing::info!(pid = next.id(), "handed over to the new process; this one waits for its clients");
                next.begin(reload).await;
                (None, None, "told to end")
            }
            end => {
                readiness.set(State::Draining);
                // A unit's TimeoutStopSec= may be shorter than the drain.
                let time = (reloader.drain_timeout() + STOPPING_GRACE).as_micros();
                let time = u32::try_from(time).unwrap_or(u32::MAX);
                notify(&[NotifyState::Stopping, NotifyState::ExtendTimeoutUsec(time)]);
                // It keeps the sockets open.
                drop(succession);
                gateways_end.send_replace(Some(Ending::Drain));
                let crashed = if let End::Crashed(ended) = end { Some(ended) } else { None };
                (crashed, attached, "a second signal")
            }
        };
        tokio::select! {
            () = join_all(&mut serving) => {}
            () = signals.end() => {
                tracing::warn!("{second}: not waiting for the clients any longer");
                serving.shutdown().await;
            }
        }
        helpers_end.send_if_modified(|end| end.replace(end.unwrap_or(Ending::Drain)).is_none());
        join_all(&mut helpers).await;
        if held.is_some() {
            tracing::info!("the limits in the kernel stay in force; `limiter detach` removes them");
        }
        match crashed {
            Some(ended) => Err(anyhow::anyhow!("a gateway ended by itself: {ended:?}")),
            None => Ok(()),
        }
    }
}

/// The daemon while it serves.
struct Service {
    reloader: Reloader,
    succession: Succession,
    /// Held until the end: it keeps other daemons off.
    attached: Option<Attached>,
    keeper: Option<KeeperPause>,
}

impl Service {
    /// Does what signals say, until one of them, or something else, ends the service.
    async fn until_end(
        mut self,
        signals: &mut Signals,
        serving: &mut JoinSet<DrainReport>,
    ) -> anyhow::Result<(Self, End)> {
        let mut attempt: Option<Attempt> = None;
        let mut reload_after = false;
        let mut mark = None;
        loop {
            let failed = tokio::select! {
                signal = signals.next() => match (signal, &attempt) {
                    (Signal::End, _) => return Ok((self, End::Told)),
                    (Signal::Reload, None) => {
                        self.reloader = reload(self.reloader).await?;
                        continue;
                    }
                    (Signal::Reload, Some(_)) => {
                        tracing::info!("the configuration is read again when the new process has started, or has failed to");
                        reload_after = true;
                        continue;
                    }
                    (Signal::HandOver, Some(attempt)) => {
                        tracing::warn!(pid = attempt.id(), "an upgrade is under way already: the signal is ignored");
                        continue;
                    }
                    (Signal::HandOver, None) => {
                        self.pause_keeper().await?;
                        mark = self.reloader.policy_mark();
                        match self.succession.start_next(self.attached.as_ref()) {
                            Ok(started) => {
                                tracing::info!(pid = started.id(), "an upgrade: started the new process");
                                attempt = Some(started);
                                continue;
                            }
                            Err(error) => error,
                        }
                    }
                },
                ready = ready(&mut attempt) => match (ready, attempt.take()) {
                    (Ok(()), Some(by)) => {
                        return Ok((self, End::Relieved { by: Box::new(by), reload: reload_after }));
                    }
                    (Ok(()), None) => continue,
                    (Err(error), _) => error,
                },
                Some(ended) = serving.join_next() => return Ok((self, End::Crashed(ended))),
            };
            tracing::error!(
                "no upgrade: {failed:#}; this process goes on as before. What the new one wrote before this line says why, if it got \
                 so far: mend that, and send SIGUSR2 again"
            );
            self.reloader.restore_policy(mark.take());
            self.keeper.iter().for_each(KeeperPause::resume);
            if std::mem::take(&mut reload_after) {
                self.reloader = reload(self.reloader).await?;
            }
        }
    }

    /// What the next process takes off an interface must stay off.
    async fn pause_keeper(&self) -> anyhow::Result<()> {
        let Some(keeper) = self.keeper.clone() else { return Ok(()) };
        spawn_blocking(move || keeper.pause()).await.context("waiting for the interfaces ended badly")
    }
}

/// Completes when the new process is ready, or never will be; never, as long as there is none.
async fn ready(attempt: &mut Option<Attempt>) -> anyhow::Result<()> {
    match attempt {
        Some(attempt) => attempt.ready().await,
        None => std::future::pending().await,
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

async fn join_all<T: 'static>(tasks: &mut JoinSet<T>) {
    while let Some(ended) = tasks.join_next().await {
        if let Err(error) = ended {
            tracing::error!(%error, "a task ended badly");
        }
    }
}

/// Completes when it is said how to end, or when there is nobody left who could say it.
async fn said(mut ending: watch::Receiver<Option<Ending>>) -> Ending {
    let said = ending.wait_for(Option::is_some).await;
    said.ok().and_then(|said| *said).unwrap_or(Ending::Drain)
}

/// Tells systemd, if it is there.
fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "can't tell systemd");
    }
}
