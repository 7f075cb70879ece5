//! TLS towards the clients: the certificates, and how they are replaced while clients connect.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, SystemTime},
};

use rustls::{
    ServerConfig,
    crypto::ring,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use tokio::{task::spawn_blocking, time::interval};
use tokio_rustls::TlsAcceptor;

use super::metrics::Metrics;
use crate::config::{self, CertificateError};

/// How often the files are looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);

/// What the gateway needs to speak TLS.
pub(super) struct Tls {
    files: config::Tls,
    acceptor: TlsAcceptor,
    certificates: Arc<Certificates>,
    /// The files as they were before they were read.
    loaded: Fingerprint,
}

impl Tls {
    /// Loads every certificate.
    pub(super) fn new(files: &config::Tls) -> Result<Self, CertificateError> {
        let loaded = fingerprint(files);
        let certificates = Arc::new(Certificates(RwLock::new(Arc::new(Set::load(files)?))));
        let resolver = Arc::clone(&certificates);
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("ring has cipher suites for TLS 1.2 and 1.3")
            .with_no_client_auth()
            .with_cert_resolver(resolver);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        // A returning client then costs no signature. Without random numbers there are none, and no TLS either.
        if let Ok(ticketer) = ring::Ticketer::new() {
            config.ticketer = ticketer;
        }
        Ok(Self { files: files.clone(), acceptor: TlsAcceptor::from(Arc::new(config)), certificates, loaded })
    }

    pub(super) fn acceptor(&self) -> &TlsAcceptor {
        &self.acceptor
    }

    /// Looks at the files for ever, and takes new ones into use. Those that are no good are told, and the old ones stay.
    pub(super) async fn watch(self: Arc<Self>, metrics: Arc<Metrics>) {
        let mut ticks = interval(LOOK_INTERVAL);
        let mut watch = Watch { loaded: self.loaded.clone(), changing: None };
        loop {
            ticks.tick().await;
            let tls = Arc::clone(&self);
            let looked = spawn_blocking(move || {
                let reloaded = watch.look(&tls);
                (watch, reloaded)
            });
            // It does not panic; if it did, the certificates in hand would stay.
            let Ok((next, reloaded)) = looked.await else { return };
            watch = next;
            match reloaded {
                None => {}
                Some(Ok(())) => {
                    metrics.certificates_reloaded("ok");
                    tracing::info!("the certificates have changed: the new ones are in use");
                }
                Some(Err(error)) => {
                    metrics.certificates_reloaded("failed");
                    tracing::error!(%error, "the certificates have changed and can't be used: the old ones stay in use");
                }
            }
        }
    }
}

/// What was last seen of the files.
struct Watch {
    loaded: Fingerprint,
    /// Another state, seen once: somebody may be in the middle of writing two files.
    changing: Option<Fingerprint>,
}

impl Watch {
    /// Loads the files if they have changed since, and not since the last look.
    fn look(&mut self, tls: &Tls) -> Option<Result<(), CertificateError>> {
        let seen = fingerprint(&tls.files);
        if seen == self.loaded {
            self.changing = None;
            return None;
        }
        if self.changing.as_ref() != Some(&seen) {
            self.changing = Some(seen);
            return None;
        }
        self.changing = None;
        // Also if they are no good: once is enough to say so.
        self.loaded = seen;
        Some(Set::load(&tls.files).map(|set| tls.certificates.replace(set)))
    }
}

/// What changes when a file is written or replaced; `None` for one that can't be looked at.
type Fingerprint = Vec<Option<(SystemTime, u64, u64)>>;

fn fingerprint(files: &config::Tls) -> Fingerprint {
    let paths = files.files().flat_map(|(pair, _)| [&pair.certificate, &pair.key]);
    let look = |path| {
        let file = fs::metadata(path).ok()?;
        Some((file.modified().ok()?, file.ino(), file.len()))
    };
    paths.map(look).collect()
}

/// The certificates in use.
#[derive(Debug)]
struct Certificates(RwLock<Arc<Set>>);

impl Certificates {
    fn replace(&self, set: Set) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(set);
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let set = Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner));
        Some(Arc::clone(set.choose(hello.server_name())))
    }
}

/// A certificate for everybody, and those for certain names.
#[derive(Debug)]
struct Set {
    default: Arc<CertifiedKey>,
    hosts: Vec<(String, Arc<CertifiedKey>)>,
}

impl Set {
    fn load(files: &config::Tls) -> Result<Self, CertificateError> {
        let hosts = files.hosts.iter().map(|host| {
            let certified = host.files.load(Some(&host.name))?;
            Ok((host.name.clone(), Arc::new(certified)))
        });
        Ok(Self { default: Arc::new(files.default.load(None)?), hosts: hosts.collect::<Result<_, _>>()? })
    }

    /// The one of that name, else the one whose star stands for its first label, else the default.
    fn choose(&self, name: Option<&str>) -> &Arc<CertifiedKey> {
        let Some(name) = name.map(str::to_ascii_lowercase) else { return &self.default };
        let star = name.split_once('.').map(|(_, rest)| format!("*.{rest}"));
        let find = |wanted: &str| self.hosts.iter().find(|(host, _)| host == wanted).map(|(_, certified)| certified);
        find(&name).or_else(|| find(star.as_deref()?)).unwrap_or(&self.default)
    }
}

#[cfg(test)]
#[path = "tls_tests.rs"]
mod tests;
