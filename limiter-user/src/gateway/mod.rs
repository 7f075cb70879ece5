//! The WebSocket server in front of the application.
//!
//! The way of a connection through it: `listen` accepts the socket, `connection` reads the HTTP head, `handshake`
//! says whether it asks for a WebSocket, `admission` whether there is room, `application` opens what stands behind,
//! and `session` sees to the messages until the close. Whatever happens on that way, dropping the `socket` tells
//! the policy, once, that the connection is over.

mod admission;
mod answer;
mod application;
mod close;
mod connection;
mod drain;
mod handshake;
mod listen;
mod liveness;
mod messages;
mod metrics;
mod peer;
mod relay;
mod sampler;
mod session;
mod socket;

#[cfg(test)]
mod tests;

pub use drain::DrainReport;
pub use listen::BindError;
pub use metrics::Metrics;

use std::{net::SocketAddr, sync::Arc};

use crate::{config, policy::Policy};
use admission::Admission;
use application::Application;
use drain::Drain;
use listen::Listeners;
use sampler::Sampler;

/// A gateway whose addresses are bound and that [`run`](Self::run) sets going.
pub struct Gateway {
    listeners: Listeners,
    shared: Arc<Shared>,
}

/// What every connection of one gateway needs.
struct Shared {
    config: config::Gateway,
    policy: Arc<dyn Policy>,
    metrics: Arc<Metrics>,
    admission: Arc<Admission>,
    application: Application,
    log: Sampler,
    drain: Drain,
}

impl Gateway {
    /// Binds every address of `config.listen` and checks what stands behind the gateway. Nothing is accepted yet, but the
    /// kernel queues the clients that connect from now on.
    ///
    /// # Errors
    /// [`BindError`] names the address or key at fault and says what to do; nothing stays bound then.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn bind(config: &config::Gateway, policy: Arc<dyn Policy>, metrics: Arc<Metrics>) -> Result<Self, BindError> {
        let application = Application::new(&config.upstream)?;
        let listeners = Listeners::bind(&config.listen)?;
        let shared = Shared {
            config: config.clone(),
            policy,
            metrics,
            admission: Arc::default(),
            application,
            log: Sampler::default(),
            drain: Drain::default(),
        };
        Ok(Self { listeners, shared: Arc::new(shared) })
    }

    /// The addresses that it listens on, in the order of the configuration; where that says port 0, the port that the
    /// kernel chose.
    pub fn local_addrs(&self) -> &[SocketAddr] {
        self.listeners.local_addrs()
    }

    /// Serves until `shutdown` completes, then stops accepting, closes every session with 1001 and waits up to
    /// `drain_timeout` for the clients to do likewise. Dropping the future instead ends everything at once.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> DrainReport {
        let Self { listeners, shared } = self;
        let mut connections = listen::serve(listeners, &shared, shutdown).await;
        drain::finish(&mut connections, &shared).await
    }
}
