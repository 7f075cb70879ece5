//! TLS, with clients of rustls and openssl.

use std::{fs, process::Stdio, sync::Arc, time::Duration};

use futures_util::StreamExt;
use rustls::{
    ClientConfig, ProtocolVersion, RootCertStore, SupportedProtocolVersion,
    crypto::ring,
    pki_types::{CertificateDer, ServerName},
    version::{TLS12, TLS13},
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    process::Command,
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_tungstenite::tungstenite::Message;

use super::{relays, support::*};
use crate::config::{self, CertificateFiles, Tls, TlsHost};

/// A certificate in a folder of its own, and the settings of a gateway that has it.
pub struct Setup {
    folder: TempDir,
    files: CertificateFiles,
    der: CertificateDer<'static>,
}

impl Setup {
    pub fn new(name: &str) -> Self {
        let folder = TempDir::new().unwrap();
        let files =
            CertificateFiles { certificate: folder.path().join("cert.pem"), key: folder.path().join("key.pem") };
        let mut setup = Self { folder, files, der: CertificateDer::from(Vec::new()) };
        setup.renew(name);
        setup
    }

    /// Writes another certificate in place of the one there is.
    fn renew(&mut self, name: &str) {
        let made = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
        for (path, pem) in
            [(&self.files.certificate, made.cert.pem()), (&self.files.key, made.signing_key.serialize_pem())]
        {
            let new = self.folder.path().join("new");
            fs::write(&new, pem).unwrap();
            fs::rename(new, path).unwrap();
        }
        self.der = made.cert.der().clone();
    }

    pub fn config(&self) -> config::Gateway {
        let tls = Tls { default: self.files.clone(), hosts: Vec::new() };
        config::Gateway { tls: Some(tls), ..quiet() }
    }

    /// A client that trusts this certificate.
    pub(super) fn client(&self, version: &'static SupportedProtocolVersion) -> ClientConfig {
        let mut roots = RootCertStore::empty();
        roots.add(self.der.clone()).unwrap();
        client_config(roots, version)
    }
}

fn client_config(roots: RootCertStore, version: &'static SupportedProtocolVersion) -> ClientConfig {
    ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[version])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth()
}

async fn secure(stream: TcpStream, config: ClientConfig, name: &str) -> std::io::Result<TlsStream<TcpStream>> {
    let name = ServerName::try_from(name.to_owned()).unwrap();
    timeout(PATIENCE, TlsConnector::from(Arc::new(config)).connect(name, stream)).await.expect("an end")
}

pub(super) async fn connect(
    gateway: &Running,
    config: ClientConfig,
    name: &str,
) -> std::io::Result<TlsStream<TcpStream>> {
    secure(TcpStream::connect(gateway.addr).await.unwrap(), config, name).await
}

#[tokio::test]
async fn both_versions_carry_a_session_to_its_close() {
    let setup = Setup::new("localhost");
    for (version, expected) in [(&TLS12, ProtocolVersion::TLSv1_2), (&TLS13, ProtocolVersion::TLSv1_3)] {
        let gateway = start(&setup.config());
        let mut config = setup.client(version);
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let stream = connect(&gateway, config, "localhost").await.unwrap();
        assert_eq!(stream.get_ref().1.protocol_version(), Some(expected));
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
        let address = stream.get_ref().0.local_addr().unwrap();

        let (mut client, _) = tokio_tungstenite::client_async("ws://localhost/", stream).await.unwrap();
        echoes(&mut client, "short").await;
        echoes(&mut client, &"long ".repeat(12_000)).await;
        let policy = Arc::clone(&gateway.policy);
        let stopping = gateway.begin_stop();
        assert_eq!(next_close(&mut client).await.0, 1001);
        // The end is one of TLS, too: nothing was cut off.
        while let Some(message) = timeout(PATIENCE, client.next()).await.expect("the end") {
            assert!(message.is_ok(), "{message:?}");
        }
        assert_eq!(stopping.await.unwrap().closed, 1);
        policy.wait_closed(1).await;
        assert_eq!(policy.closed(address), 1);
    }
}

#[tokio::test]
async fn openssl_gets_in() {
    let setup = Setup::new("localhost");
    let gateway = start(&setup.config());
    // A Close frame right after the request, so that the connection ends.
    let request = [good_request("/").as_bytes(), &frame(0x88, &[])].concat();
    for version in ["-tls1_2", "-tls1_3"] {
        let mut openssl = Command::new("openssl")
            .args(["s_client", "-quiet", "-verify_return_error", "-verify_hostname", "localhost", version])
            .args(["-servername", "localhost", "-alpn", "http/1.1", "-connect", &gateway.addr.to_string(), "-CAfile"])
            .arg(&setup.files.certificate)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("this test takes the program openssl");
        let mut stdin = openssl.stdin.take().unwrap();
        stdin.write_all(&request).await.unwrap();
        let output = timeout(PATIENCE, openssl.wait_with_output()).await.expect("the end").unwrap();
        drop(stdin);
        let answer = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(answer.starts_with("HTTP/1.1 101 "), "{version}: {answer}\n{errors}");
        assert!(output.stdout.ends_with(&[0x88, 0]), "{version}: {:?}", output.stdout);
    }
    gateway.policy.wait_closed(2).await;
}

#[tokio::test]
async fn the_name_decides_which_certificate_it_is() {
    let default = Setup::new("localhost");
    let chat = Setup::new("chat.example.com");
    let mut config = default.config();
    let host = TlsHost { name: "chat.example.com".into(), files: chat.files.clone() };
    config.tls.as_mut().unwrap().hosts.push(host);
    let gateway = start(&config);
    for (setup, name) in [(&default, "localhost"), (&chat, "chat.example.com")] {
        let stream = connect(&gateway, setup.client(&TLS13), name).await.unwrap();
        assert_eq!(stream.get_ref().1.peer_certificates().unwrap()[0], setup.der);
    }
}

#[tokio::test]
async fn handshakes_that_fail_are_counted_by_reason_and_end_once() {
    let setup = Setup::new("localhost");
    let gateway = start(&config::Gateway { handshake_timeout: Duration::from_millis(300), ..setup.config() });

    let plain = gateway.raw(good_request("/").as_bytes()).await;
    assert!(plain.starts_with("HTTP/1.1 400 ") && plain.contains("wss://"), "{plain}");
    let alert = gateway.raw(b"\x16\x09\x09\x00\x04none").await;
    assert!(alert.starts_with('\u{15}'), "{alert:?}");
    let mut http2 = setup.client(&TLS13);
    http2.alpn_protocols = vec![b"h2".to_vec()];
    connect(&gateway, http2, "localhost").await.unwrap_err();
    let trusts_nobody = client_config(RootCertStore::empty(), &TLS13);
    connect(&gateway, trusts_nobody, "localhost").await.unwrap_err();
    // A client that never speaks, one that stops half-way, and one that leaves.
    assert_eq!(gateway.raw(b"").await, "");
    assert_eq!(gateway.raw(b"\x16\x03\x01\x02\x00\x01").await, "");
    drop(TcpStream::connect(gateway.addr).await.unwrap());

    gateway.policy.wait_closed(7).await;
    for (reason, expected) in [("plain_http", 1), ("malformed", 1), ("incompatible", 1), ("alert", 1), ("timeout", 2)] {
        let sample = format!("limiter_tls_failures_total{{reason=\"{reason}\"}}");
        assert_eq!(gateway.metric(&sample), expected, "{reason}");
    }
    for (result, expected) in [("not_tls", 1), ("tls", 3), ("timeout", 2), ("left", 1), ("accepted", 0)] {
        let sample = format!("limiter_handshakes_total{{result=\"{result}\"}}");
        assert_eq!(gateway.metric(&sample), expected, "{result}");
    }
}

#[tokio::test]
async fn refusals_and_close_frames_arrive_through_tls_too() {
    let setup = Setup::new("localhost");
    let gateway = start(&setup.config());
    let mut stream = connect(&gateway, setup.client(&TLS13), "localhost").await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    timeout(PATIENCE, stream.read_to_string(&mut answer)).await.expect("the end").expect("a clean end");
    assert!(answer.starts_with("HTTP/1.1 426 "), "{answer}");

    let stream = connect(&gateway, setup.client(&TLS13), "localhost").await.unwrap();
    let (mut client, _) = tokio_tungstenite::client_async("ws://localhost/", stream).await.unwrap();
    futures_util::SinkExt::send(&mut client, Message::text("x".repeat(100_000))).await.unwrap();
    assert_eq!(next_close(&mut client).await.0, 1009);
}

#[tokio::test]
async fn the_upstream_is_told_that_the_client_speaks_tls_also_behind_a_proxy_header() {
    let setup = Setup::new("localhost");
    let trusted_proxies = vec!["127.0.0.0/8".parse().unwrap()];
    let config = config::Gateway { proxy_protocol: true, trusted_proxies, ..setup.config() };
    let (gateway, request) = relays::relay_with(config, "", relays::echo).await;
    let mut stream = TcpStream::connect(gateway.addr).await.unwrap();
    stream.write_all(b"PROXY TCP4 192.0.2.7 198.51.100.1 51234 443\r\n").await.unwrap();
    let stream = secure(stream, setup.client(&TLS13), "localhost").await.unwrap();
    let (mut client, _) = tokio_tungstenite::client_async("ws://localhost/", stream).await.unwrap();
    echoes(&mut client, "hello").await;
    let request = request.await.unwrap();
    assert_eq!(request.headers()["x-forwarded-proto"], "https");
    assert_eq!(request.headers()["x-forwarded-for"], "192.0.2.7");
}

#[tokio::test]
async fn a_renewed_certificate_is_in_use_without_a_restart() {
    let mut setup = Setup::new("localhost");
    let gateway = start(&setup.config());
    let before = connect(&gateway, setup.client(&TLS13), "localhost").await.unwrap();
    let (mut session, _) = tokio_tungstenite::client_async("ws://localhost/", before).await.unwrap();

    fs::write(&setup.files.key, "no key").unwrap();
    let reloads = |result| gateway.metric(&format!("limiter_certificate_reloads_total{{result=\"{result}\"}}"));
    eventually("the bad key is seen", || reloads("failed") == 1).await;
    connect(&gateway, setup.client(&TLS13), "localhost").await.expect("the old one is in use");

    setup.renew("localhost");
    eventually("the new one is seen", || reloads("ok") == 1).await;
    connect(&gateway, setup.client(&TLS13), "localhost").await.expect("the new one is in use");
    echoes(&mut session, "nobody was cut").await;
}

#[tokio::test]
async fn a_certificate_that_cannot_be_used_is_said_at_the_start() {
    let setup = Setup::new("localhost");
    let other = Setup::new("localhost");
    fs::copy(&other.files.key, &setup.files.key).unwrap();
    let bound = crate::gateway::Gateway::reserve(&setup.config());
    let Err(error) = bound else { panic!("it was taken") };
    let text = error.to_string();
    assert!(text.starts_with("gateway.tls: the private key in ") && text.contains("does not belong"), "{text}");
    fs::remove_file(&setup.files.certificate).unwrap();
    let Err(error) = crate::gateway::Gateway::reserve(&setup.config()) else { panic!("it was taken") };
    assert!(error.to_string().contains("cert.pem: No such file"), "{error}");
}
