//! The WebSocket server in front of the application.
//!
//! The way of a connection through it: `listen` accepts the socket, `arrival` takes what
//! comes ahead of the request, `connection` reads the HTTP head, `handshake`
//! says whether it asks for a WebSocket, `admission` whether there is room, `auth` who the client is, `route` what holds for what it asks for, `application` opens what stands behind,
//! and `session` sees to the messages until the close: by `relay` to an upstream, by `builtin` without one, and by `push` for those that
//! others have for it. Under `overload` some are turned away at the beginning of it. Whatever happens on that way, dropping the `socket` tells
//! the policy, once, that the connection is over.

mod address;
pub(crate) mod admission;
pub(crate) mod answer;
mod application;
mod arrival;
mod auth;
mod builtin;
mod close;
mod connection;
mod drain;
mod exchange;
mod forwarded;
#[cfg(any(test, limiter_fuzz))]
pub(crate) mod fuzz;
mod handed;
mod handshake;
mod inherited;
mod json;
mod limits;
pub(crate) mod listen;
mod liveness;
mod messages;
mod metrics;
mod offenders;
mod origin;
mod overload;
mod proxy_hint;
mod proxy_protocol;
mod push;
mod rate;
mod relay;
mod request;
pub(crate) mod retry;
mod route;
pub(crate) mod sampler;
mod session;
mod settings;
mod socket;
mod tls;
mod together;
mod turns;
mod upstream;
pub(crate) mod watch;
mod wire;

#[cfg(test)]
mod tests;

pub use address::{Place, Sockets};
pub use admission::AllServices;
pub use application::room_name;
pub use drain::{DrainReport, Ending};
pub use handed::{Handed, Label, Spare};
pub use listen::BindError;
pub use metrics::Metrics;
pub use overload::{Overload, Strain};
pub use push::{Content, LONGEST_ROOM, Listed, Push, Recipients};
pub use settings::{PreparedSettings, Settings};

use std::{net::SocketAddr, sync::Arc};

use crate::{
    config,
    policy::{Policy, Rates},
};
use admission::Admission;
use auth::Auth;
use drain::Drain;
use listen::Listeners;
use offenders::Offenders;
use push::Hub;
use route::Routes;
use sampler::Sampler;
use settings::Parts;
use tls::Tls;
use together::Counters;
use tokio::{sync::watch::Sender, task::JoinSet};

/// A gateway whose addresses are bound and that [`run`](Self::run) sets going.
pub struct Gateway {
    listeners: Listeners,
    current: Arc<Sender<Arc<Shared>>>,
}

/// What every connection of one gateway needs.
struct Shared {
    config: config::Gateway,
    policy: Arc<dyn Policy>,
    metrics: Arc<Metrics>,
    admission: Arc<Admission>,
    routes: Routes,
    tls: Option<Arc<Tls>>,
    auth: Option<Arc<Auth>>,
    /// Of clients that the kernel does not see.
    rates: Arc<Rates>,
    log: Arc<Sampler>,
    drain: Arc<Drain>,
    offenders: Arc<Offenders>,
    /// Of what sessions send together.
    counters: Arc<Counters>,
    hub: Arc<Hub>,
}

/// A gateway that has its addresses, and that nobody can connect to yet.
///
/// Whether the addresses are to be had is known before anything else is done to the host, and no client gets in before the
/// kernel's limits are in force.
pub struct Reserved {
    sockets: Sockets,
    parts: Parts,
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
        self.open_among(policy, metrics, AllServices::default())
    }

    /// The same for one of several gateways whose sessions count together against `connections_total_all`.
    ///
    /// # Errors
    /// As [`Self::open`].
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn open_among(
        self,
        policy: Arc<dyn Policy>,
        metrics: Arc<Metrics>,
        all: AllServices,
    ) -> Result<Gateway, BindError> {
        let Self { sockets, parts: Parts { config, routes, tls, auth } } = self;
        let listeners = Listeners::open(sockets)?;
        metrics.upstreams.observe(routes.reach().servers());
        let hub = Hub::new(config.push.queue, Arc::clone(&metrics));
        let shared = Shared {
            config,
            policy,
            metrics,
            admission: Arc::new(Admission::among(all)),
            routes,
            tls,
            auth,
            rates: Arc::default(),
            log: Arc::default(),
            drain: Arc::default(),
            offenders: Arc::default(),
            counters: Arc::default(),
            hub,
        };
        Ok(Gateway { listeners, current: Arc::new(Sender::new(Arc::new(shared))) })
    }
}

impl Gateway {
    /// Checks what stands behind the gateway and takes every address of `config.listen`.
    ///
    /// # Errors
    /// [`BindError`] names the address or key at fault and says what to do; nothing stays bound then.
    pub fn reserve(config: &config::Gateway) -> Result<Reserved, BindError> {
        // The parts first: what is wrong with them is found before anything is bound.
        let parts = Parts::new(config, None)?;
        Ok(Reserved { sockets: Sockets::take(config)?, parts })
    }

    /// The same on sockets that are there already.
    ///
    /// # Errors
    /// [`BindError`] names the key at fault and says what to do.
    pub fn reserve_on(config: &config::Gateway, sockets: Sockets) -> Result<Reserved, BindError> {
        if sockets.is_empty() {
            return Err(BindError::NoAddress);
        }
        Ok(Reserved { sockets, parts: Parts::new(config, None)? })
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

    /// The TCP addresses that it listens on, in the order of the configuration; where that says port 0, the port that the
    /// kernel chose.
    pub fn local_addrs(&self) -> &[SocketAddr] {
        self.listeners.local_addrs()
    }

    /// Where it listens, unix sockets too.
    pub fn places(&self) -> &[Place] {
        self.listeners.places()
    }

    /// A hand on its settings, to change them while it runs.
    pub fn settings(&self) -> Settings {
        Settings(Arc::clone(&self.current))
    }

    /// A hand on its clients, to publish messages to them. Sessions that begin before the first is asked for can't be reached by their
    /// users or all together.
    pub fn push(&self) -> Push {
        self.current.borrow().hub.push()
    }

    /// Serves until `shutdown` completes, then stops accepting, closes every session with 1001 and waits up to
    /// `drain_timeout` for the clients to do likewise. Dropping the future instead ends everything at once.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> DrainReport {
        self.run_until(async {
            shutdown.await;
            Ending::Drain
        })
        .await
    }

    /// The same, where `ending` also says whether another process accepts on the same sockets from then on.
    pub async fn run_until(self, ending: impl Future<Output = Ending>) -> DrainReport {
        let Self { listeners, current } = self;
        // Ends when it is dropped.
        let mut watching = JoinSet::new();
        watching.spawn(settings::watch_files(current.subscribe()));
        watching.spawn(upstream::probe(current.subscribe()));
        watching.spawn(overload::watch(current.subscribe()));
        let (mut connections, ending) = listen::serve(listeners, &current.subscribe(), ending).await;
        let shared = Arc::clone(&current.borrow());
        drain::finish(&mut connections, &shared, ending).await
    }
}
