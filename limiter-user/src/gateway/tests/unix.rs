//! Clients of a unix socket.

use std::path::{Path, PathBuf};

use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::timeout,
};

use super::support::*;
use crate::{
    config::{self, Listen},
    policy::Limits,
};

/// A gateway that listens on a unix socket, and on TCP for the sake of [`Running`].
fn start_on_unix(config: config::Gateway, limits: Limits) -> (TempDir, PathBuf, Running) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ws.sock");
    let listen = vec!["127.0.0.1:0".parse().unwrap(), Listen::Unix(path.clone())];
    let gateway = start_with(&config::Gateway { listen, ..config }, limits);
    (folder, path, gateway)
}

/// A connection that sends `header`, then a good handshake with `more` lines; with the head of the answer.
async fn shake(path: &Path, header: &str, more: &str) -> (UnixStream, String) {
    let mut stream = UnixStream::connect(path).await.unwrap();
    let request = good_request("/").replace("Host: localhost\r\n", &format!("Host: localhost\r\n{more}"));
    stream.write_all(format!("{header}{request}").as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(timeout(PATIENCE, stream.read_u8()).await.expect("a byte").unwrap());
    }
    (stream, String::from_utf8(head).unwrap())
}

fn from(client: &str) -> String {
    format!("X-Forwarded-For: {client}\r\n")
}

#[tokio::test]
async fn messages_come_back_and_the_end_is_told() {
    let (_folder, path, gateway) = start_on_unix(quiet(), unlimited());
    let (mut stream, head) = shake(&path, "", "").await;
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    stream.write_all(&frame(0x81, b"hi")).await.unwrap();
    let mut echo = [0; 4];
    stream.read_exact(&mut echo).await.unwrap();
    assert_eq!(&echo, b"\x81\x02hi");
    drop(stream);
    gateway.policy.wait_closed(1).await;
    gateway.stop().await;
    assert!(!path.exists(), "the socket goes with its gateway");
}

#[tokio::test]
async fn its_clients_are_one_source_whatever_they_say() {
    let (_folder, path, _gateway) = start_on_unix(quiet(), Limits { connections_per_source: 1, ..unlimited() });
    let (_first, head) = shake(&path, "", &from("192.0.2.1")).await;
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    let (_, head) = shake(&path, "", &from("192.0.2.2")).await;
    assert!(head.starts_with("HTTP/1.1 429 "), "{head}");
}

#[tokio::test]
async fn a_trusted_proxy_says_who_its_clients_are() {
    let config = config::Gateway { trusts_unix: true, ..quiet() };
    let (_folder, path, gateway) = start_on_unix(config, Limits { connections_per_source: 1, ..unlimited() });
    let mut open = Vec::new();
    for client in ["192.0.2.1", "192.0.2.2"] {
        let (stream, head) = shake(&path, "", &from(client)).await;
        assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
        open.push(stream);
        let (_, head) = shake(&path, "", &from(client)).await;
        assert!(head.starts_with("HTTP/1.1 429 "), "{head}");
    }
    gateway.policy.denied.lock().unwrap().push("192.0.2.3".parse().unwrap());
    let (_, head) = shake(&path, "", &from("192.0.2.3")).await;
    assert!(head.starts_with("HTTP/1.1 403 "), "the kernel could not refuse it: {head}");
}

#[tokio::test]
async fn a_proxy_header_says_who_the_client_is() {
    let config = config::Gateway { trusts_unix: true, proxy_protocol: true, ..quiet() };
    let (_folder, path, _gateway) = start_on_unix(config, Limits { connections_per_source: 1, ..unlimited() });
    let header = |client: &str| format!("PROXY TCP4 {client} 198.51.100.1 51234 443\r\n");
    let (_one, head) = shake(&path, &header("192.0.2.1"), &from("192.0.2.9")).await;
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    let (_, head) = shake(&path, &header("192.0.2.1"), &from("192.0.2.8")).await;
    assert!(head.starts_with("HTTP/1.1 429 "), "who is behind the proxy is no proxy: {head}");
}

#[tokio::test]
async fn a_rule_for_this_hosts_own_address_holds_for_it() {
    let (_folder, path, gateway) = start_on_unix(quiet(), unlimited());
    gateway.policy.denied.lock().unwrap().push("127.0.0.1".parse().unwrap());
    let (_, head) = shake(&path, "", "").await;
    assert!(head.starts_with("HTTP/1.1 403 "), "{head}");
    assert!(tokio_tungstenite::connect_async(gateway.url()).await.is_ok(), "TCP is the kernel's to refuse");
}
