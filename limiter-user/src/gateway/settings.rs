//! The settings of a gateway, and how they change while it runs.
//!
//! A connection keeps the settings that it was accepted with until it ends. So a change is one step: whoever is accepted
//! before it has all of the old settings, whoever is accepted after it all of the new ones.

use std::{
    convert::Infallible,
    sync::{Arc, Weak},
    time::Duration,
};

use tokio::{sync::watch, task::JoinSet, time::interval};

use super::{Shared, auth::Auth, listen::BindError, route::Routes, tls::Tls};
use crate::{config, policy::Policy};

/// How often it is looked whether anybody still goes by settings that are not the newest.
const UNUSED_INTERVAL: Duration = Duration::from_secs(10);

/// What a gateway makes of its configuration.
pub(super) struct Parts {
    pub(super) config: config::Gateway,
    pub(super) routes: Routes,
    pub(super) tls: Option<Arc<Tls>>,
    pub(super) auth: Option<Arc<Auth>>,
}

impl Parts {
    /// Reads certificates and keys. `before`: what held until now, if anything did.
    pub(super) fn new(config: &config::Gateway, before: Option<&Shared>) -> Result<Self, BindError> {
        let mut auth = config.auth.as_ref().map(Auth::new).transpose()?;
        if let Some(before) = before.and_then(|before| before.auth.as_ref()) {
            auth = auth.map(|auth| auth.counting_with(before));
        }
        Ok(Self {
            config: config.clone(),
            routes: Routes::new(config, before.map(|before| &before.routes))?,
            tls: config.tls.as_ref().map(Tls::new).transpose()?.map(Arc::new),
            auth: auth.map(Arc::new),
        })
    }
}

/// A hand on the settings of a gateway that runs.
#[derive(Clone)]
pub struct Settings(pub(super) Arc<watch::Sender<Arc<Shared>>>);

/// Settings that are good, and not in force yet.
pub struct PreparedSettings {
    settings: Settings,
    parts: Parts,
    policy: Option<Arc<dyn Policy>>,
}

impl Settings {
    /// Checks everything that `config` asks for and makes it ready. The addresses stay as they are; `policy` stays if it is
    /// `None`.
    ///
    /// # Errors
    /// [`BindError`] names the key at fault and says what to do.
    pub fn prepare(
        &self,
        config: &config::Gateway,
        policy: Option<Arc<dyn Policy>>,
    ) -> Result<PreparedSettings, BindError> {
        let before = Arc::clone(&self.0.borrow());
        Ok(PreparedSettings { settings: self.clone(), parts: Parts::new(config, Some(&before))?, policy })
    }
}

impl PreparedSettings {
    /// From now on they hold for whoever is accepted.
    pub fn commit(self) {
        let Self { settings: Settings(sender), parts, policy } = self;
        sender.send_modify(|current| {
            let policy = policy.unwrap_or_else(|| Arc::clone(&current.policy));
            *current = Arc::new(current.with(parts, policy));
            current.hub.set_limit(current.config.push.queue);
        });
    }
}

impl Shared {
    /// Other settings for the same gateway.
    fn with(&self, Parts { config, routes, tls, auth }: Parts, policy: Arc<dyn Policy>) -> Self {
        Self {
            config,
            policy,
            metrics: Arc::clone(&self.metrics),
            admission: Arc::clone(&self.admission),
            routes,
            tls,
            auth,
            rates: Arc::clone(&self.rates),
            log: Arc::clone(&self.log),
            drain: Arc::clone(&self.drain),
            offenders: Arc::clone(&self.offenders),
            counters: Arc::clone(&self.counters),
            hub: Arc::clone(&self.hub),
        }
    }
}

/// Watches over the files that settings name, for as long as they are the newest or a connection goes by them.
pub(super) async fn watch_files(mut current: watch::Receiver<Arc<Shared>>) -> Infallible {
    let mut watching = JoinSet::new();
    current.mark_changed();
    loop {
        tokio::select! {
            changed = current.changed() => {
                if changed.is_err() {
                    // Nobody can change them any more.
                    while watching.join_next().await.is_some() {}
                    std::future::pending::<()>().await;
                }
                let shared = Arc::downgrade(&current.borrow_and_update());
                watching.spawn(watch_files_of(shared));
            }
            Some(_) = watching.join_next() => {}
        }
    }
}

async fn watch_files_of(shared: Weak<Shared>) {
    let mut watching = JoinSet::new();
    if let Some(shared) = shared.upgrade() {
        if let Some(tls) = &shared.tls {
            watching.spawn(Arc::clone(tls).watch(Arc::clone(&shared.metrics)));
        }
        if let Some(auth) = &shared.auth {
            watching.spawn(Arc::clone(auth).watch(Arc::clone(&shared.metrics)));
        }
        for schema in shared.routes.schemas().files() {
            watching.spawn(Arc::clone(schema).watch(Arc::clone(&shared.metrics)));
        }
    }
    if watching.is_empty() {
        return;
    }
    let mut ticks = interval(UNUSED_INTERVAL);
    while shared.strong_count() > 0 {
        ticks.tick().await;
    }
}
