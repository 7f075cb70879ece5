//! What a request gets, byte for byte.

use std::time::Duration;

use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, timeout},
};

use super::support::*;
use crate::{
    config,
    gateway::{BindError, Gateway, Metrics},
    policy::Fixed,
};

/// An answer's head, and its body as a problem document whose status is that of the head.
fn problem(answer: &str, status: u16) -> (String, Value) {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {answer:?}"));
    let head = head.to_ascii_lowercase();
    assert!(head.starts_with("http/1.") && head[8..].starts_with(&format!(" {status} ")), "{answer}");
    assert!(head.contains("\r\ncontent-type: application/problem+json"), "{answer}");
    assert!(head.contains(&format!("\r\ncontent-length: {}", body.len())), "{answer}");
    let body: Value = serde_json::from_str(body).unwrap();
    assert_eq!(body["status"], status);
    assert!(body["detail"].is_string() && body["title"].is_string(), "{body}");
    (head, body)
}

#[tokio::test]
async fn a_good_handshake_gets_101_and_nothing_that_it_did_not_ask_for() {
    let gateway = start(&quiet());
    let mut stream = TcpStream::connect(gateway.addr).await.unwrap();
    let mut request = good_request("/chat?token=secret").into_bytes();
    request.truncate(request.len() - 2);
    request.extend_from_slice(b"Sec-WebSocket-Extensions: permessage-deflate\r\nSec-WebSocket-Protocol: a, b\r\n\r\n");
    stream.write_all(&request).await.unwrap();
    let head = read_head(&mut stream).await.to_ascii_lowercase();
    assert!(head.starts_with("http/1.1 101 "), "{head}");
    assert!(head.contains("\r\nsec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo=\r\n"), "{head}");
    assert!(head.contains("\r\nconnection: upgrade\r\n"), "{head}");
    assert!(head.contains("\r\nupgrade: websocket\r\n"), "{head}");
    assert!(!head.contains("sec-websocket-extensions") && !head.contains("sec-websocket-protocol"), "{head}");
}

#[tokio::test]
async fn frames_that_come_with_the_request_are_not_lost() {
    let gateway = start(&quiet());
    let mut stream = TcpStream::connect(gateway.addr).await.unwrap();
    let mut bytes = good_request("/").into_bytes();
    bytes.extend_from_slice(&frame(0x81, b"early"));
    stream.write_all(&bytes).await.unwrap();
    assert!(read_head(&mut stream).await.starts_with("HTTP/1.1 101 "));
    let mut echoed = [0; 7];
    timeout(PATIENCE, stream.read_exact(&mut echoed)).await.unwrap().unwrap();
    assert_eq!(&echoed, b"\x81\x05early");
}

#[tokio::test]
async fn a_plain_request_gets_426_and_is_closed() {
    let gateway = start(&quiet());
    for request in ["GET / HTTP/1.1\r\nHost: x\r\n\r\n", "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi"] {
        let (head, _) = problem(&gateway.raw(request.as_bytes()).await, 426);
        assert!(head.contains("\r\nupgrade: websocket"), "{head}");
        assert!(head.contains("\r\nsec-websocket-version: 13"), "{head}");
    }
    gateway.policy.wait_closed(2).await;
    assert_eq!(gateway.metric("limiter_handshakes_total{result=\"not_websocket\"}"), 2);
}

#[tokio::test]
async fn bad_handshakes_get_their_status_and_a_body() {
    let gateway = start(&quiet());
    let good = good_request("/");
    let cases = [
        (426, good.replace("Version: 13", "Version: 8")),
        (400, good.replace("GET", "PUT")),
        (400, good.replace("HTTP/1.1", "HTTP/1.0")),
        (400, good.replace("Host: localhost\r\n", "")),
        (400, good.replace("Host: localhost\r\n", "Host: localhost\r\nHost: elsewhere\r\n")),
        (400, good.replace("Connection: Upgrade\r\n", "")),
        (400, good.replace("Sec-WebSocket-Version: 13\r\n", "")),
        (400, good.replace("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n", "")),
        (400, good.replace("dGhlIHNhbXBsZSBub25jZQ==", "c2hvcnQ=")),
        (400, good.replace("\r\n\r\n", "\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n")),
        (400, good.replace("\r\n\r\n", "\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")),
        (400, good.replace("\r\n\r\n", "\r\nContent-Length: 3\r\n\r\nabc")),
    ];
    for (status, request) in &cases {
        let (head, _) = problem(&gateway.raw(request.as_bytes()).await, *status);
        assert!(*status != 426 || head.contains("\r\nsec-websocket-version: 13"), "{head}");
    }
    gateway.policy.wait_closed(cases.len()).await;
    assert_eq!(gateway.metric("limiter_handshakes_total{result=\"accepted\"}"), 0);
}

#[tokio::test]
async fn what_is_no_http_1_is_answered_too() {
    let gateway = start(&quiet());
    let huge = format!("GET / HTTP/1.1\r\nHost: x\r\nX-Huge: {}\r\n\r\n", "x".repeat(64 * 1024));
    let many = format!("GET / HTTP/1.1\r\nHost: x\r\n{}\r\n", "A: b\r\n".repeat(200));
    let cases = [
        ("400", "\x16\x03\x01\x02\x00 no HTTP at all\r\n\r\n"),
        ("400", "GET / HTTP/1.1\r\nno colon\r\n\r\n"),
        ("431", huge.as_str()),
        ("431", many.as_str()),
    ];
    for (status, request) in cases {
        let answer = gateway.raw(request.as_bytes()).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
    }
    problem(&gateway.raw(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await, 505);
    gateway.policy.wait_closed(5).await;
    assert_eq!(gateway.metric("limiter_handshakes_total{result=\"malformed\"}"), 5);
}

#[tokio::test]
async fn half_a_request_gets_408_at_the_deadline() {
    let gateway = start(&config::Gateway { handshake_timeout: Duration::from_millis(100), ..quiet() });
    let began = Instant::now();
    problem(&gateway.raw(b"GET / HTTP/1.1\r\nHost: x\r\n").await, 408);
    assert!(began.elapsed() >= Duration::from_millis(100), "{:?}", began.elapsed());
    problem(&gateway.raw(b"").await, 408);
    gateway.policy.wait_closed(2).await;
    assert_eq!(gateway.metric("limiter_handshakes_total{result=\"timeout\"}"), 2);
}

#[tokio::test]
async fn a_client_that_feeds_one_byte_at_a_time_has_no_more_time() {
    let gateway = start(&config::Gateway { handshake_timeout: Duration::from_millis(200), ..quiet() });
    let (mut read, mut write) = TcpStream::connect(gateway.addr).await.unwrap().into_split();
    let slow = tokio::spawn(async move {
        for byte in std::iter::once("GET /").chain(std::iter::repeat("x")) {
            if write.write_all(byte.as_bytes()).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    let mut answer = String::new();
    timeout(PATIENCE, read.read_to_string(&mut answer)).await.expect("the end").unwrap();
    problem(&answer, 408);
    gateway.policy.wait_closed(1).await;
    slow.abort();
}

#[tokio::test]
async fn a_client_that_leaves_is_over_at_once() {
    let gateway = start(&quiet());
    drop(TcpStream::connect(gateway.addr).await.unwrap());
    let mut half = TcpStream::connect(gateway.addr).await.unwrap();
    half.write_all(b"GET / HT").await.unwrap();
    drop(half);
    gateway.policy.wait_closed(2).await;
}

#[tokio::test]
async fn a_client_that_leaves_need_not_be_answered_by_its_upstream() {
    let upstream = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let config = config::Gateway {
        upstream: format!("ws://{}", upstream.local_addr().unwrap()).parse().unwrap(),
        handshake_timeout: Duration::from_hours(1),
        ..quiet()
    };
    let gateway = start(&config);
    let mut client = TcpStream::connect(gateway.addr).await.unwrap();
    client.write_all(good_request("/").as_bytes()).await.unwrap();
    let (mut asked, _) = upstream.accept().await.unwrap();
    read_head(&mut asked).await;
    // What it sends early is no reason to stay.
    client.write_all(&frame(0x81, b"early")).await.unwrap();
    drop(client);
    gateway.policy.wait_closed(1).await;
    assert_eq!(timeout(PATIENCE, asked.read(&mut [0])).await.unwrap().unwrap(), 0, "the upstream is told");
    assert_eq!(gateway.metric("limiter_handshakes_total{result=\"left\"}"), 1);
}

#[tokio::test]
async fn an_answer_to_head_has_no_body() {
    let gateway = start(&quiet());
    let answer = gateway.raw(b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n").await;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 426 ") && head.contains("\r\ncontent-length: "), "{head}");
    assert!(head.contains("\r\ndate: ") && head.contains(" GMT\r\n"), "{head}");
    assert_eq!(body, "");
}

#[tokio::test]
async fn both_wildcards_can_have_one_port_and_a_taken_port_is_said_clearly() {
    let bind = |addrs: &[String]| {
        let listen = addrs.iter().map(|a| a.parse().unwrap()).collect();
        let config = config::Gateway { listen, ..quiet() };
        Gateway::bind(
            &config,
            std::sync::Arc::new(Fixed::new(unlimited(), &[])),
            std::sync::Arc::new(Metrics::default()),
        )
    };
    let v4 = bind(&["0.0.0.0:0".to_owned()]).unwrap();
    let port = v4.local_addrs()[0].port();
    let v6 = bind(&[format!("[::]:{port}")]).unwrap();
    assert_eq!(v6.local_addrs()[0].port(), port);

    let Err(error) = bind(&[format!("127.0.0.1:{port}")]) else { panic!("the port was free") };
    let text = error.to_string();
    assert!(text.contains(&format!("cannot listen on 127.0.0.1:{port}")), "{text}");
    assert!(text.contains("in use") && text.contains(&format!("ss -ltnp 'sport = :{port}'")), "{text}");
    assert!(matches!(bind(&[]), Err(BindError::NoAddress)));
}

#[tokio::test]
async fn an_upstream_that_cannot_be_is_said_at_the_start() {
    let upstream_tls = config::UpstreamTls { ca: Some("/no/such.pem".into()), ..config::UpstreamTls::default() };
    let config = config::Gateway { upstream: "wss://x".parse().unwrap(), upstream_tls, ..quiet() };
    let bound = Gateway::bind(&config, std::sync::Arc::new(Fixed::new(unlimited(), &[])), std::sync::Arc::default());
    let Err(error) = bound else { panic!("it was taken") };
    assert!(error.to_string().contains("gateway.upstream_tls: cannot read /no/such.pem"), "{error}");
}
