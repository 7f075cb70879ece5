//! Signals to the daemon.

use anyhow::Context as _;
use tokio::signal::unix::{self, SignalKind};

/// What somebody wants of the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Signal {
    /// SIGTERM or SIGINT.
    End,
    /// SIGHUP.
    Reload,
    /// SIGUSR2.
    HandOver,
}

/// The signals that the daemon has taken over.
#[derive(Debug)]
pub(super) struct Signals {
    terminate: unix::Signal,
    interrupt: unix::Signal,
    hangup: unix::Signal,
    hand_over: unix::Signal,
}

impl Signals {
    /// From now on these signals don't end the process.
    pub(super) fn new() -> anyhow::Result<Self> {
        let take = |kind| unix::signal(kind).context("can't take over a signal");
        Ok(Self {
            terminate: take(SignalKind::terminate())?,
            interrupt: take(SignalKind::interrupt())?,
            hangup: take(SignalKind::hangup())?,
            hand_over: take(SignalKind::user_defined2())?,
        })
    }

    /// The next one.
    pub(super) async fn next(&mut self) -> Signal {
        tokio::select! {
            _ = self.terminate.recv() => Signal::End,
            _ = self.interrupt.recv() => Signal::End,
            _ = self.hangup.recv() => Signal::Reload,
            _ = self.hand_over.recv() => Signal::HandOver,
        }
    }

    /// Waits for one that says to end.
    pub(super) async fn end(&mut self) {
        while self.next().await != Signal::End {}
    }
}
