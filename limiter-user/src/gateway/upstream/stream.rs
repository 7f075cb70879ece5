//! What an upstream is spoken to through: TCP, TLS or a unix socket.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use rustls::{ClientConfig, RootCertStore, crypto::ring, pki_types::ServerName};
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::{TcpStream, UnixStream},
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::config::{self, CertificateError, Place, Target};

/// After how much silence the kernel asks whether an upstream's host is still there, where clients are never asked.
const ASK_AFTER: Duration = Duration::from_secs(30);

/// How often it asks before it gives up.
const QUESTIONS: u32 = 3;

/// The shortest time that the kernel takes for these.
const SECOND: Duration = Duration::from_secs(1);

/// A connection to an upstream. TLS is boxed: most of its room is elsewhere anyway, and the others should not have it.
pub(in crate::gateway) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// How TLS is spoken to upstreams.
pub(super) struct ClientTls {
    connector: TlsConnector,
    /// In the place of the host that the URL names.
    server_name: Option<ServerName<'static>>,
}

impl ClientTls {
    /// Reads the certificates that `config` names, or else the system's.
    pub(super) fn new(config: &config::UpstreamTls) -> Result<Self, CertificateError> {
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("ring has cipher suites for TLS 1.2 and 1.3")
            .with_root_certificates(roots(config)?);
        let mut client = match &config.certificate {
            None => builder.with_no_client_auth(),
            Some(files) => {
                let certified = Arc::new(files.load(None)?);
                builder.with_client_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(certified)))
            }
        };
        client.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self { connector: TlsConnector::from(Arc::new(client)), server_name: config.server_name.clone() })
    }

    async fn connect(&self, host: &str, stream: TcpStream) -> Result<TlsStream<TcpStream>, String> {
        let name = match &self.server_name {
            Some(name) => name.clone(),
            None => ServerName::try_from(host.to_owned())
                .map_err(|_| format!("{host:?} is no name that a certificate could be for"))?,
        };
        self.connector.connect(name, stream).await.map_err(|error| {
            let advice = match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
                Some(rustls::Error::InvalidCertificate(_)) => {
                    "; gateway.upstream_tls.ca names who may have signed its certificate, server_name whom it is for"
                }
                Some(rustls::Error::AlertReceived(_)) => {
                    "; it may want a certificate of ours: gateway.upstream_tls.certificate"
                }
                _ => "",
            };
            format!("the TLS handshake failed: {error}{advice}")
        })
    }
}

/// Whose certificates are taken.
fn roots(config: &config::UpstreamTls) -> Result<RootCertStore, CertificateError> {
    if let Some(roots) = config.load_authorities()? {
        return Ok(roots);
    }
    // Those that can't be read or used are of no use to anybody; without any, each handshake says why it fails.
    let native = rustls_native_certs::load_native_certs();
    for error in &native.errors {
        tracing::warn!(%error, "a certificate of the system cannot be read");
    }
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(native.certs);
    Ok(roots)
}

impl Stream {
    /// Connects; an error says why not, for the log. A name is looked up each time, and each of its addresses is tried.
    pub(super) async fn connect(target: &Target, tls: Option<&ClientTls>) -> Result<Self, String> {
        let (host, port) = match &target.at {
            Place::Unix(path) => {
                let connected = UnixStream::connect(path).await;
                return connected.map(Self::Unix).map_err(|error| format!("cannot connect: {error}"));
            }
            Place::Host(host, port) => (host.as_str(), *port),
        };
        let stream = TcpStream::connect((host, port)).await.map_err(|error| format!("cannot connect: {error}"))?;
        // It only makes things faster.
        _ = stream.set_nodelay(true);
        match (target.tls, tls) {
            (false, _) => Ok(Self::Tcp(stream)),
            (true, Some(tls)) => tls.connect(host, stream).await.map(|stream| Self::Tls(Box::new(stream))),
            (true, None) => Err("TLS is not set up".to_owned()),
        }
    }

    /// Has the connection break when the upstream's host has vanished without a word: `patience` after it should have acknowledged
    /// data, or the first question after `ask_after` of silence; both count from when it was last heard of. (An application that
    /// hangs on a host that is there is a matter of health checks.)
    ///
    /// The kernel sees to it: nothing is kept for it in a session, nothing of it is in the stream, and data that waits for an
    /// acknowledgement, which questions don't look after, has the same deadline.
    pub(in crate::gateway) fn give_up_after(&self, ask_after: Duration, patience: Duration) {
        let stream = match self {
            Self::Tcp(stream) => stream,
            Self::Tls(stream) => stream.get_ref().0,
            Self::Unix(_) => return,
        };
        let socket = SockRef::from(stream);
        // It has been told. A session that kept that in mind would be larger.
        if socket.keepalive().unwrap_or(false) {
            return;
        }
        let ask_after = if ask_after.is_zero() { ASK_AFTER } else { ask_after.max(SECOND) };
        let pause = (patience / QUESTIONS).max(SECOND);
        // Without them the session works just as well, as long as nothing vanishes.
        _ = socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(ask_after).with_interval(pause));
        _ = socket.set_tcp_user_timeout(Some(ask_after + patience));
    }

    /// Says in TLS, if that is spoken, that nothing more comes; the upstream could else take the end for an attack.
    pub(in crate::gateway) async fn end_tls(&mut self) -> io::Result<()> {
        match self {
            Self::Tls(stream) => stream.shutdown().await,
            Self::Tcp(_) | Self::Unix(_) => Ok(()),
        }
    }
}

/// Does the same with whichever it is.
macro_rules! each {
    ($stream:expr, $pinned:ident => $call:expr) => {
        match $stream.get_mut() {
            Stream::Tcp(stream) => {
                let $pinned = Pin::new(stream);
                $call
            }
            Stream::Unix(stream) => {
                let $pinned = Pin::new(stream);
                $call
            }
            Stream::Tls(stream) => {
                let $pinned = Pin::new(stream.as_mut());
                $call
            }
        }
    };
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        each!(self, stream => stream.poll_read(cx, buf))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        each!(self, stream => stream.poll_write(cx, buf))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, stream => stream.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, stream => stream.poll_shutdown(cx))
    }
}
