//! Several upstreams, TLS and unix sockets towards them, and their health.

use std::{
    fs,
    io::Write as _,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::{SinkExt, StreamExt};
use rustls::{
    RootCertStore, ServerConfig,
    crypto::ring,
    pki_types::{PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, UnixListener},
};
use tokio_rustls::TlsAcceptor;
use tokio_tungstenite::tungstenite::Error;

use super::support::*;
use crate::config::{self, CertificateFiles, Health, Upstream, UpstreamTls};

/// An application that sends every message back; GET /healthz is answered by 204, or by 503 while it is ill.
struct Application {
    addr: SocketAddr,
    is_ill: Arc<AtomicBool>,
}

impl Application {
    async fn start() -> Self {
        Self::start_on(TcpListener::bind("127.0.0.1:0").await.unwrap())
    }

    fn start_on(listener: TcpListener) -> Self {
        let addr = listener.local_addr().unwrap();
        let is_ill = Arc::new(AtomicBool::new(false));
        let ill = Arc::clone(&is_ill);
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                tokio::spawn(serve(stream, Arc::clone(&ill)));
            }
        });
        Self { addr, is_ill }
    }

    fn url(&self) -> String {
        format!("ws://{}", self.addr)
    }

    fn fall_ill(&self, is_ill: bool) {
        self.is_ill.store(is_ill, Ordering::Relaxed);
    }
}

async fn serve(mut stream: impl AsyncRead + AsyncWrite + Unpin, is_ill: Arc<AtomicBool>) {
    // Only a health check asks for this path.
    let mut begin = [0; 12];
    if stream.read_exact(&mut begin).await.is_err() {
        return;
    }
    if begin == *b"GET /healthz" {
        let status = if is_ill.load(Ordering::Relaxed) { "503 Service Unavailable" } else { "204 No Content" };
        _ = stream.write_all(format!("HTTP/1.1 {status}\r\nConnection: close\r\n\r\n").as_bytes()).await;
        return;
    }
    let stream = Begun { begin: begin.to_vec(), stream };
    let Ok(mut server) = tokio_tungstenite::accept_async(stream).await else { return };
    while let Some(Ok(message)) = server.next().await {
        if (message.is_text() || message.is_binary()) && server.send(message).await.is_err() {
            return;
        }
    }
}

/// A stream whose first bytes have been read.
struct Begun<S> {
    begin: Vec<u8>,
    stream: S,
}

impl<S: AsyncRead + Unpin> AsyncRead for Begun<S> {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        if !self.begin.is_empty() {
            buf.put_slice(&std::mem::take(&mut self.begin));
            return std::task::Poll::Ready(Ok(()));
        }
        std::pin::Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Begun<S> {
    fn poll_write(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &[u8],
    ) -> std::task::Poll<std::io::Result<usize>> {
        std::pin::Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

fn several(urls: &[String]) -> Upstream {
    Upstream::Relay(urls.iter().map(|url| url.parse().unwrap()).collect())
}

fn connections(url: &str) -> String {
    format!("limiter_upstream_connections{{upstream=\"{url}\"}}")
}

fn is_up(url: &str) -> String {
    format!("limiter_upstream_up{{upstream=\"{url}\"}}")
}

/// The status that a connect through the gateway is refused with.
async fn refused(gateway: &Running) -> u16 {
    match tokio_tungstenite::connect_async(gateway.url()).await {
        Err(Error::Http(response)) => response.status().as_u16(),
        other => panic!("expected a refusal, got {other:?}"),
    }
}

#[tokio::test]
async fn each_session_goes_to_the_upstream_with_the_fewest() {
    let (a, b) = (Application::start().await, Application::start().await);
    let gateway = start(&config::Gateway { upstream: several(&[a.url(), b.url()]), ..quiet() });
    let mut clients = Vec::new();
    for n in 1..=6 {
        let mut client = gateway.connect().await;
        echoes(&mut client, "hello").await;
        clients.push(client);
        let held = [&a, &b].map(|one| gateway.metric(&connections(&one.url())));
        assert_eq!(held.iter().sum::<u64>(), n);
        assert!(held[0].abs_diff(held[1]) <= 1, "{held:?}");
    }
    // A reload neither forgets nor doubles what is open.
    let one = config::Gateway { upstream: several(&[b.url(), a.url()]), ..quiet() };
    gateway.settings.prepare(&one, None).unwrap().commit();
    assert_eq!([&a, &b].map(|one| gateway.metric(&connections(&one.url()))), [3, 3]);
    drop(clients);
    gateway.wait_released().await;
    eventually("no upstream has a session", || {
        [&a, &b].iter().all(|one| gateway.metric(&connections(&one.url())) == 0)
    })
    .await;
    gateway.stop().await;
}

#[tokio::test]
async fn one_that_cannot_be_reached_costs_no_client_its_session() {
    let well = Application::start().await;
    let gone = {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        format!("ws://{}", listener.local_addr().unwrap())
    };
    let gateway = start(&config::Gateway { upstream: several(&[gone.clone(), well.url()]), ..quiet() });
    let mut clients = Vec::new();
    for _ in 0..12 {
        clients.push(gateway.connect().await);
    }
    assert_eq!(gateway.metric(&connections(&well.url())), 12);
    assert_eq!(gateway.metric(&connections(&gone)), 0);
    // It has the fewest sessions, and would be asked first every time, were it not left alone after three failures in a row.
    let failures =
        gateway.metric(&format!("limiter_upstream_failures_total{{upstream=\"{gone}\",reason=\"connect\"}}"));
    assert!((3..12).contains(&failures), "{failures}");
    for client in &mut clients {
        echoes(client, "hello").await;
    }
    drop(clients);
    gateway.stop().await;
}

#[tokio::test]
async fn one_that_is_alone_is_asked_again_and_again() {
    let addr = {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap()
    };
    let gateway = start(&config::Gateway { upstream: several(&[format!("ws://{addr}")]), ..quiet() });
    for _ in 0..5 {
        assert_eq!(refused(&gateway).await, 502);
    }
    let back = Application::start_on(TcpListener::bind(addr).await.unwrap());
    let mut client = gateway.connect().await;
    echoes(&mut client, "hello").await;
    assert_eq!(gateway.metric(&is_up(&back.url())), 1);
    drop(client);
    gateway.stop().await;
}

#[tokio::test]
async fn one_that_fails_its_health_checks_gets_nobody_until_it_passes_them() {
    let (a, b) = (Application::start().await, Application::start().await);
    a.fall_ill(true);
    let health = Health {
        path: Some("/healthz".parse().unwrap()),
        interval: Duration::from_millis(20),
        timeout: PATIENCE,
        ..Health::default()
    };
    let gateway = start(&config::Gateway { upstream: several(&[a.url(), b.url()]), health, ..quiet() });
    eventually("the one that is ill is out of use", || gateway.metric(&is_up(&a.url())) == 0).await;
    let mut clients = Vec::new();
    for _ in 0..4 {
        clients.push(gateway.connect().await);
    }
    assert_eq!([&a, &b].map(|one| gateway.metric(&connections(&one.url()))), [0, 4]);

    // With none left, clients are told at once; sessions that are open go on.
    b.fall_ill(true);
    eventually("both are out of use", || gateway.metric(&is_up(&b.url())) == 0).await;
    assert_eq!(refused(&gateway).await, 502);
    echoes(&mut clients[0], "hello").await;

    a.fall_ill(false);
    eventually("the one that is well again is in use", || gateway.metric(&is_up(&a.url())) == 1).await;
    clients.push(gateway.connect().await);
    assert_eq!([&a, &b].map(|one| gateway.metric(&connections(&one.url()))), [1, 4]);
    drop(clients);
    gateway.stop().await;
}

#[tokio::test]
async fn an_upstream_may_listen_on_a_unix_socket() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("app.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let (seen, mut request) = tokio::sync::mpsc::channel(1);
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut begin = vec![0; 10];
        stream.read_exact(&mut begin).await.unwrap();
        seen.send(begin.clone()).await.unwrap();
        let mut server = tokio_tungstenite::accept_async(Begun { begin, stream }).await.unwrap();
        while let Some(Ok(message)) = server.next().await {
            if message.is_text() {
                server.send(message).await.unwrap();
            }
        }
    });
    let upstream = format!("unix:{}:/ws", path.display()).parse().unwrap();
    let gateway = start(&config::Gateway { upstream, ..quiet() });
    let mut client = gateway.connect().await;
    echoes(&mut client, "hello").await;
    assert_eq!(request.recv().await.unwrap(), b"GET /ws HT");
    drop(client);
    gateway.stop().await;
}

/// It can't be had that each is closed before the request is written, but of so many some are.
#[tokio::test]
async fn an_upstream_that_answers_and_closes_without_reading_is_passed_on() {
    const TIMES: u64 = 100;
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("app.sock");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let serving = std::thread::spawn(move || {
        for _ in 0..TIMES {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 7\r\n\r\nlater").unwrap();
        }
    });
    let url = format!("unix:{}", path.display());
    let gateway = start(&config::Gateway { upstream: url.parse().unwrap(), ..quiet() });
    for _ in 0..TIMES {
        let answer = gateway.raw(good_request("/").as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 429 ") && answer.contains("retry-after: 7\r\n"), "{answer}");
    }
    serving.join().unwrap();
    assert_eq!(gateway.metric("limiter_handshakes_total{result=\"upstream_refused\"}"), TIMES);
    assert_eq!(gateway.metric(&format!("limiter_upstream_failures_total{{upstream=\"{url}\",reason=\"answer\"}}")), 0);
    gateway.stop().await;
}

/// A certificate of its own making, in files.
fn certificate(folder: &TempDir, name: &str) -> CertificateFiles {
    let made = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
    let files = CertificateFiles {
        certificate: folder.path().join(format!("{name}.pem")),
        key: folder.path().join(format!("{name}.key")),
    };
    fs::write(&files.certificate, made.cert.pem()).unwrap();
    fs::write(&files.key, made.signing_key.serialize_pem()).unwrap();
    files
}

/// An application that speaks TLS and, if `asks_for` is given, wants that certificate of its clients.
async fn start_tls(own: &CertificateFiles, asks_for: Option<&CertificateFiles>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let load = |files: &CertificateFiles| {
        let chain: Vec<_> = rustls::pki_types::CertificateDer::pem_file_iter(&files.certificate)
            .unwrap()
            .collect::<Result<_, _>>()
            .unwrap();
        chain
    };
    let provider = Arc::new(ring::default_provider());
    let builder =
        ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions().unwrap();
    let builder = match asks_for {
        None => builder.with_no_client_auth(),
        Some(files) => {
            let mut roots = RootCertStore::empty();
            roots.add(load(files).remove(0)).unwrap();
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap();
            builder.with_client_cert_verifier(verifier)
        }
    };
    let key = PrivateKeyDer::from_pem_file(&own.key).unwrap();
    let config = builder.with_single_cert(load(own), key).unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                if let Ok(stream) = acceptor.accept(stream).await {
                    serve(stream, Arc::default()).await;
                }
            });
        }
    });
    addr
}

#[tokio::test]
async fn tls_is_spoken_to_an_upstream_whose_certificate_is_good() {
    let folder = TempDir::new().unwrap();
    let own = certificate(&folder, "app.internal");
    let addr = start_tls(&own, None).await;
    let upstream: Upstream = format!("wss://{addr}").parse().unwrap();
    let with = |upstream_tls| start(&config::Gateway { upstream: upstream.clone(), upstream_tls, ..quiet() });
    let good = UpstreamTls {
        ca: Some(own.certificate.clone()),
        server_name: Some("app.internal".try_into().unwrap()),
        certificate: None,
    };

    let gateway = with(good.clone());
    let mut client = gateway.connect().await;
    echoes(&mut client, "hello").await;
    echoes(&mut client, &"x".repeat(60_000)).await;
    client.close(None).await.unwrap();
    gateway.wait_released().await;
    gateway.stop().await;

    for bad in [
        // For somebody else; of an authority that nobody knows.
        UpstreamTls { server_name: None, ..good.clone() },
        UpstreamTls { ca: Some(certificate(&folder, "other.internal").certificate), ..good.clone() },
        UpstreamTls { ca: None, ..good.clone() },
    ] {
        let gateway = with(bad);
        assert_eq!(refused(&gateway).await, 502);
        gateway.stop().await;
    }
}

#[tokio::test]
async fn an_upstream_that_asks_who_we_are_is_shown_a_certificate() {
    let folder = TempDir::new().unwrap();
    let (own, ours) = (certificate(&folder, "app.internal"), certificate(&folder, "gateway.internal"));
    let addr = start_tls(&own, Some(&ours)).await;
    let upstream: Upstream = format!("wss://{addr}").parse().unwrap();
    let tls = |certificate| UpstreamTls {
        ca: Some(own.certificate.clone()),
        server_name: Some("app.internal".try_into().unwrap()),
        certificate,
    };
    let gateway = start(&config::Gateway { upstream: upstream.clone(), upstream_tls: tls(Some(ours)), ..quiet() });
    let mut client = gateway.connect().await;
    echoes(&mut client, "hello").await;
    drop(client);
    gateway.stop().await;

    let gateway = start(&config::Gateway { upstream, upstream_tls: tls(None), ..quiet() });
    assert_eq!(refused(&gateway).await, 502);
    gateway.stop().await;
}
