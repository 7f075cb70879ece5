//! Certificates and their keys, as `[gateway.tls]` names them.

use std::{
    io,
    path::{Path, PathBuf},
};

use rustls::{
    RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    server::ParsedCertificate,
    sign::CertifiedKey,
};

use super::{UpstreamTls, bounded};

/// Longest file that is read; a chain has a few KiB.
const LONGEST_FILE_BYTES: u64 = 1 << 20;

/// `[gateway.tls]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    /// What clients get that name no host, or none of `hosts`.
    pub default: CertificateFiles,
    /// Certificates for certain names.
    pub hosts: Vec<TlsHost>,
}

/// A certificate for clients that ask for a certain name (SNI).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsHost {
    /// The name, in lower case: `chat.example.com`, or `*.example.com` for one label before the rest.
    pub name: String,
    /// The files.
    pub files: CertificateFiles,
}

/// A certificate and its key, both in PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateFiles {
    /// The certificate, followed by those of the authorities between it and the root.
    pub certificate: PathBuf,
    /// Its private key, without a pass phrase.
    pub key: PathBuf,
}

/// Why a certificate can't be used. Says which file, and never what is in it.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// A file can't be read.
    #[error("cannot read {}: {error}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the kernel said; part of the text.
        error: io::Error,
    },
    /// The file has no certificate.
    #[error("{} has no certificate in PEM form (-----BEGIN CERTIFICATE-----)", .0.display())]
    NoCertificate(PathBuf),
    /// The file has no key.
    #[error("{} has no private key in PEM form (-----BEGIN PRIVATE KEY-----)", .0.display())]
    NoKey(PathBuf),
    /// The key has a pass phrase.
    #[error("the private key in {} is encrypted; store it without a pass phrase (`openssl pkey` does that)", .0.display())]
    EncryptedKey(PathBuf),
    /// The key is of a kind that is not supported, or damaged.
    #[error("the private key in {} cannot be used: {reason}", path.display())]
    BadKey {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: rustls::Error,
    },
    /// The certificate is damaged.
    #[error("the certificate in {} cannot be used: {reason}", path.display())]
    BadCertificate {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: rustls::Error,
    },
    /// The files do not belong together.
    #[error("the private key in {} does not belong to the certificate in {}", key.display(), certificate.display())]
    Mismatch {
        /// The file with the certificate.
        certificate: PathBuf,
        /// The file with the key.
        key: PathBuf,
    },
    /// The certificate is for other names.
    #[error("the certificate in {} is not for {name}", certificate.display())]
    OtherName {
        /// The file with the certificate.
        certificate: PathBuf,
        /// The name that it was configured for.
        name: String,
    },
}

impl Tls {
    /// Every pair of files, with the name that it is for.
    pub fn files(&self) -> impl Iterator<Item = (&CertificateFiles, Option<&str>)> {
        let hosts = self.hosts.iter().map(|host| (&host.files, Some(host.name.as_str())));
        std::iter::once((&self.default, None)).chain(hosts)
    }
}

impl UpstreamTls {
    /// The certificates in the file of authorities, if one is named.
    ///
    /// # Errors
    /// When it can't be read, or has none that can be used.
    pub(crate) fn load_authorities(&self) -> Result<Option<RootCertStore>, CertificateError> {
        let Some(path) = &self.ca else { return Ok(None) };
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(&read(path)?) {
            let certificate = certificate.map_err(|_| CertificateError::NoCertificate(path.clone()))?;
            roots.add(certificate).map_err(|reason| CertificateError::BadCertificate { path: path.clone(), reason })?;
        }
        if roots.is_empty() { Err(CertificateError::NoCertificate(path.clone())) } else { Ok(Some(roots)) }
    }

    /// Whether every file can be used.
    pub(super) fn check_files(&self) -> Result<(), CertificateError> {
        self.load_authorities()?;
        self.certificate.iter().try_for_each(|files| files.load(None).map(drop))
    }
}

impl CertificateFiles {
    /// Reads both files and checks that they belong together, and that the certificate is for `name`.
    ///
    /// # Errors
    /// [`CertificateError`] names the file at fault.
    pub fn load(&self, name: Option<&str>) -> Result<CertifiedKey, CertificateError> {
        let Self { certificate, key } = self;
        let chain = read(certificate)?;
        let chain = CertificateDer::pem_slice_iter(&chain).collect::<Result<Vec<_>, _>>().unwrap_or_default();
        let Some(first) = chain.first() else { return Err(CertificateError::NoCertificate(certificate.clone())) };
        let bad_certificate = |reason| CertificateError::BadCertificate { path: certificate.clone(), reason };
        let parsed = ParsedCertificate::try_from(first).map_err(bad_certificate)?;
        if let Some(name) = name {
            check_name(&parsed, name).ok_or_else(|| CertificateError::OtherName {
                certificate: certificate.clone(),
                name: name.to_owned(),
            })?;
        }
        let pem = read(key)?;
        let signing = match PrivateKeyDer::from_pem_slice(&pem) {
            Ok(der) => ring::sign::any_supported_type(&der)
                .map_err(|reason| CertificateError::BadKey { path: key.clone(), reason })?,
            Err(_) if contains(&pem, b"ENCRYPTED") => return Err(CertificateError::EncryptedKey(key.clone())),
            Err(_) => return Err(CertificateError::NoKey(key.clone())),
        };
        let certified = CertifiedKey::new(chain, signing);
        match certified.keys_match() {
            Ok(()) => Ok(certified),
            Err(rustls::Error::InconsistentKeys(_)) => {
                Err(CertificateError::Mismatch { certificate: certificate.clone(), key: key.clone() })
            }
            Err(reason) => Err(bad_certificate(reason)),
        }
    }
}

/// `None`: it is for other names.
fn check_name(certificate: &ParsedCertificate, name: &str) -> Option<()> {
    // Any name will do for the star.
    let name = name.strip_prefix('*').map_or_else(|| name.to_owned(), |rest| format!("any{rest}"));
    let name = ServerName::try_from(name).ok()?;
    rustls::client::verify_server_name(certificate, &name).ok()
}

fn read(path: &Path) -> Result<Vec<u8>, CertificateError> {
    bounded::read(path, LONGEST_FILE_BYTES)
        .map_err(|error| CertificateError::Unreadable { path: path.to_owned(), error })
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

#[cfg(test)]
#[path = "certificate_tests.rs"]
mod tests;
