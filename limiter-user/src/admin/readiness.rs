//! Whether clients are served.

use std::sync::Arc;

use serde::Serialize;
use tokio::sync::watch;

/// What the process is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It isn't listening yet, or the kernel's part isn't attached yet where it should be.
    Starting,
    /// It serves clients.
    Ready,
    /// It was told to end, and waits for its clients.
    Draining,
}

/// The state of the process: set by whoever starts and stops it, read by `/readyz`. Clones share one state.
#[derive(Clone, Debug)]
pub struct Readiness(Arc<watch::Sender<State>>);

impl Default for Readiness {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(State::Starting)))
    }
}

impl Readiness {
    /// Says what the process is doing from now on.
    pub fn set(&self, state: State) {
        self.0.send_replace(state);
    }

    /// What it is doing.
    pub fn get(&self) -> State {
        *self.0.borrow()
    }
}
