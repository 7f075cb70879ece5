//! What an upstream is spoken to through: TCP, TLS or a unix socket.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use rustls::{ClientConfig, RootCertStore, crypto::ring, pki_types::ServerName};
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::{TcpSocket, TcpStream, UnixStream, lookup_host},
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
        let stream = connect(host, port).await.map_err(|error| format!("cannot connect: {error}"))?;
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

/// Connects to the first address of a host that takes the connection.
pub(in crate::gateway) async fn connect(host: &str, port: u16) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in lookup_host((host, port)).await? {
        match connect_to(address).await {
            Ok(stream) => return Ok(stream),
            // Also where the kernel has no sockets of this family.
            Err(error) => last = error,
        }
    }
    Err(last)
}

async fn connect_to(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // Both only make things faster: what we say first goes out at once when the server has answered the SYN, and is the
    // acknowledgement of that answer, which needs no packet of its own.
    _ = socket.set_nodelay(true);
    _ = SockRef::from(&socket).set_tcp_quickack(false);
    socket.connect(address).await
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

#[cfg(test)]
mod tests {
    use std::{mem, os::fd::AsRawFd};

    use tokio::{io::AsyncReadExt, net::TcpListener};

    use super::*;

    /// How many segments have come to a socket.
    fn segments_in(stream: &TcpStream) -> u32 {
        // SAFETY: an all-zero tcp_info is a valid one.
        let mut info: libc::tcp_info = unsafe { mem::zeroed() };
        let mut length = libc::socklen_t::try_from(mem::size_of_val(&info)).unwrap();
        // SAFETY: the descriptor is open; the pointers are to a tcp_info and its length.
        let outcome = unsafe {
            let info = (&raw mut info).cast();
            libc::getsockopt(stream.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, info, &raw mut length)
        };
        assert_eq!(outcome, 0, "{}", io::Error::last_os_error());
        info.tcpi_segs_in
    }

    #[tokio::test]
    async fn what_is_said_first_completes_the_handshake() {
        for host in ["127.0.0.1", "::1"] {
            let listener = TcpListener::bind((host, 0)).await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let target = Target { at: Place::Host(host.to_owned(), port), tls: false, path: None };
            let mut stream = Stream::connect(&target, None).await.unwrap();
            stream.write_all(b"GET").await.unwrap();
            let (mut accepted, _) = listener.accept().await.unwrap();
            accepted.read_exact(&mut [0; 3]).await.unwrap();
            assert_eq!(segments_in(&accepted), 2, "{host}: a SYN, and data that acknowledges the answer");
        }
    }

    #[tokio::test]
    async fn each_address_of_a_name_is_tried() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        // "localhost" is ::1, too, where nobody listens; it may come first.
        connect("localhost", port).await.unwrap();
        drop(listener);
        let error = connect("localhost", port).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        assert_eq!(connect("127.0.0.1", port).await.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }
}
