//! TLS towards the clients: the certificates, and how they are replaced while clients connect.

use std::sync::{Arc, PoisonError, RwLock};

use rustls::{
    ServerConfig,
    crypto::ring,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use tokio_rustls::TlsAcceptor;

use super::{metrics::Metrics, watch::FileWatch};
use crate::config::{self, CertificateError};

/// What the gateway needs to speak TLS.
pub(super) struct Tls {
    files: config::Tls,
    acceptor: TlsAcceptor,
    certificates: Arc<Certificates>,
    watch: FileWatch,
}

impl Tls {
    /// Loads every certificate.
    pub(super) fn new(files: &config::Tls) -> Result<Self, CertificateError> {
        let paths = files.files().flat_map(|(pair, _)| [pair.certificate.clone(), pair.key.clone()]);
        let watch = FileWatch::new(paths);
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
        Ok(Self { files: files.clone(), acceptor: TlsAcceptor::from(Arc::new(config)), certificates, watch })
    }

    pub(super) fn acceptor(&self) -> &TlsAcceptor {
        &self.acceptor
    }

    /// Looks at the files for ever, and takes new ones into use. Those that are no good are told, and the old ones stay.
    pub(super) async fn watch(self: Arc<Self>, metrics: Arc<Metrics>) {
        let watch = self.watch.clone();
        let reload = move || self.reload();
        let tell = |reloaded| match reloaded {
            Ok(()) => {
                metrics.certificates_reloaded("ok");
                tracing::info!("the certificates have changed: the new ones are in use");
            }
            Err(error) => {
                let error: CertificateError = error;
                metrics.certificates_reloaded("failed");
                tracing::error!(%error, "the certificates have changed and can't be used: the old ones stay in use");
            }
        };
        watch.run(reload, tell).await;
    }

    fn reload(&self) -> Result<(), CertificateError> {
        Set::load(&self.files).map(|set| self.certificates.replace(set))
    }
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
