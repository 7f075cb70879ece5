//! The PROXY protocol.

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use super::support::*;
use crate::{config, policy::Limits};

fn behind(network: &str) -> config::Gateway {
    config::Gateway { proxy_protocol: true, trusted_proxies: vec![network.parse().unwrap()], ..quiet() }
}

/// A header of version 1 for a client at that address.
fn v1(client: &str) -> String {
    format!("PROXY TCP4 {client} 198.51.100.1 51234 443\r\n")
}

/// A connection that sends `header`, then a good handshake; with the head of the answer.
async fn shake(gateway: &Running, header: &[u8]) -> (TcpStream, String) {
    let mut stream = TcpStream::connect(gateway.addr).await.unwrap();
    stream.write_all(&[header, good_request("/").as_bytes()].concat()).await.unwrap();
    let head = read_head(&mut stream).await;
    (stream, head)
}

#[tokio::test]
async fn the_limit_holds_for_the_client_that_the_proxy_names() {
    let gateway = start_with(&behind("127.0.0.0/8"), Limits { connections_per_source: 1, ..unlimited() });
    let (mut first, head) = shake(&gateway, v1("192.0.2.1").as_bytes()).await;
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    let v2 = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0f\xc0\0\x02\x02\xc6\x33\x64\x01\xc8\x22\x01\xbb\x04\0\0";
    let (second, head) = shake(&gateway, v2).await;
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    for full in [v1("192.0.2.1"), v1("192.0.2.2")] {
        let (_, head) = shake(&gateway, full.as_bytes()).await;
        assert!(head.starts_with("HTTP/1.1 429 "), "{head}");
    }
    first.write_all(&frame(0x81, b"hi")).await.unwrap();
    let mut echo = [0; 4];
    first.read_exact(&mut echo).await.unwrap();
    assert_eq!(&echo, b"\x81\x02hi");

    // What ends are the proxy's connections.
    let addresses = [first.local_addr().unwrap(), second.local_addr().unwrap()];
    drop((first, second));
    gateway.policy.wait_closed(4).await;
    for address in addresses {
        assert_eq!(gateway.policy.closed(address), 1);
    }
}

#[tokio::test]
async fn what_a_proxy_opens_for_itself_counts_as_its_own() {
    let gateway = start_with(&behind("127.0.0.0/8"), Limits { connections_per_source: 1, ..unlimited() });
    let (_one, head) = shake(&gateway, b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0").await;
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    let (_, head) = shake(&gateway, b"PROXY UNKNOWN\r\n").await;
    assert!(head.starts_with("HTTP/1.1 429 "), "{head}");
}

#[tokio::test]
async fn without_its_header_a_proxy_is_not_served() {
    let gateway = start(&behind("127.0.0.0/8"));
    for bytes in [good_request("/"), "PROXY TCP4 nonsense\r\n".into(), "\u{16}\u{3}\u{1}".into()] {
        let mut stream = TcpStream::connect(gateway.addr).await.unwrap();
        stream.write_all(bytes.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        // A reset is an end, too: what was sent has not been read.
        _ = timeout(PATIENCE, stream.read_to_end(&mut answer)).await.expect("the end");
        assert_eq!(answer, b"", "{bytes}");
    }
    gateway.policy.wait_closed(3).await;
    assert_eq!(gateway.metric("limiter_handshakes_total{result=\"proxy_header\"}"), 3);
}

#[tokio::test]
async fn a_header_that_does_not_come_is_waited_for_until_the_deadline() {
    let gateway = start(&config::Gateway { handshake_timeout: Duration::from_millis(100), ..behind("127.0.0.0/8") });
    for beginning in ["", "PROXY TC"] {
        assert_eq!(gateway.raw(beginning.as_bytes()).await, "");
    }
    gateway.policy.wait_closed(2).await;
    assert_eq!(gateway.metric("limiter_handshakes_total{result=\"timeout\"}"), 2);
    drop(TcpStream::connect(gateway.addr).await.unwrap());
    gateway.policy.wait_closed(3).await;
    assert_eq!(gateway.metric("limiter_handshakes_total{result=\"left\"}"), 1);
}

#[tokio::test]
async fn from_others_a_header_is_refused_and_a_plain_request_served() {
    for config in
        [behind("10.0.0.0/8"), config::Gateway { trusted_proxies: behind("127.0.0.0/8").trusted_proxies, ..quiet() }]
    {
        let gateway = start(&config);
        let spoofed = gateway.raw(&[v1("192.0.2.1").as_bytes(), good_request("/").as_bytes()].concat()).await;
        assert!(spoofed.starts_with("HTTP/1.1 400 "), "{spoofed}");
        let (_open, head) = shake(&gateway, b"").await;
        assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    }
}
