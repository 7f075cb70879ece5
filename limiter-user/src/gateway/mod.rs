//! The WebSocket server in front of the application.
//!
//! The way of a connection through it: `listen` accepts the socket, `arrival` takes what
//! comes ahead of the request, `connection` reads the HTTP head, `handshake`
//! says whether it asks for a WebSocket, `admission` whether there is room, `auth` who the client is, `application` opens what stands behind,
//! and `session` sees to the messages until the close. Whatever happens on that way, dropping the `socket` tells
//! the policy, once, that the connection is over.

pub(crate) mod admission;
pub(crate) mod answer;
mod application;
mod arrival;
mod auth;
mod close;
mod connection;
mod drain;
mod forwarded;
mod handshake;
pub(crate) mod listen;
mod liveness;
mod messages;
mod metrics;
mod offenders;
mod origin;
mod peer;
mod proxy_hint;
mod proxy_protocol;
mod rate;
mod relay;
mod sampler;
mod session;
mod socket;
mod tls;
mod upstream;
mod watch;

#[cfg(test)]
mod tests;

pub use drain::DrainReport;
pub use listen::BindError;
pub use metrics::Metrics;

use std::{net::SocketAddr, sync::Arc};

use crate::{
    config,
    policy::{Policy, Rates},
};
use admission::Admission;
use application::Application;
use auth::Auth;
use drain::Drain;
use listen::{Addresses, Listeners};
use offenders::Offenders;
use sampler::Sampler;
use tls::Tls;
use tokio::task::JoinSet;

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
    tls: Option<Arc<Tls>>,
    auth: Option<Arc<Auth>>,
    /// Of clients that the kernel does not see.
    rates: Rates,
    log: Sampler,
    drain: Drain,
    offenders: Offenders,
}

/// A gateway that has its addresses, and that nobody can connect to yet.
///
/// Whether the addresses are to be had is known before anything else is done to the host, and no client gets in before the
/// kernel's limits are in force.
pub struct Reserved {
    config: config::Gateway,
    addresses: Addresses,
    application: Application,
    tls: Option<Arc<Tls>>,
    auth: Option<Arc<Auth>>,
}

impl Reserved {
    /// Lets clients connect: the kernel queues them until [`Gateway::run`].
    ///
    /// # Errors
    /// [`BindError`] if somebody else has begun to listen on one of the addresses meanwhile.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn open(self, policy: Arc<dyn Policy>, metrics: Arc<Metrics>) -> Result<Gateway, BindError> {
        let Self { config, addresses, application, tls, auth } = self;
        let listeners = addresses.listen()?;
        let shared = Shared {
            config,
            policy,
            metrics,
            admission: Arc::default(),
            application,
            tls,
            auth,
            rates: Rates::default(),
            log: Sampler::default(),
            drain: Drain::default(),
            offenders: Offenders::default(),
        };
        Ok(Gateway { listeners, shared: Arc::new(shared) })
    }
}

impl Gateway {
    /// Checks what stands behind the gateway and takes every address of `config.listen`.
    ///
    /// # Errors
    /// [`BindError`] names the address or key at fault and says what to do; nothing stays bound then.
    pub fn reserve(config: &config::Gateway) -> Result<Reserved, BindError> {
        let application = Application::new(&config.upstream)?;
        let tls = config.tls.as_ref().map(Tls::new).transpose()?.map(Arc::new);
        let auth = config.auth.as_ref().map(Auth::new).transpose()?.map(Arc::new);
        let addresses = Addresses::bind(&config.listen)?;
        Ok(Reserved { config: config.clone(), addresses, application, tls, auth })
    }

    /// [`Self::reserve`] and [`Reserved::open`] in one.
    ///
    /// # Errors
    /// [`BindError`] names the address or key at fault and says what to do; nothing stays bound then.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn bind(config: &config::Gateway, policy: Arc<dyn Policy>, metrics: Arc<Metrics>) -> Result<Self, BindError> {
        Self::reserve(config)?.open(policy, metrics)
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
        // Ends when it is dropped.
        let mut watching = JoinSet::new();
        if let Some(tls) = &shared.tls {
            watching.spawn(Arc::clone(tls).watch(Arc::clone(&shared.metrics)));
        }
        if let Some(auth) = &shared.auth {
            watching.spawn(Arc::clone(auth).watch(Arc::clone(&shared.metrics)));
        }
        let mut connections = listen::serve(listeners, &shared, shutdown).await;
        drain::finish(&mut connections, &shared).await
    }
}
