//! Requests that break HTTP or the WebSocket handshake, or that two servers could read in two ways: each has one answer and is
//! over, reaches no upstream, and holds nobody up.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
};

use super::support::*;
use crate::config::{self, Upstream};

/// What it is called, the status that it gets, and the bytes.
type Case = (&'static str, u16, Vec<u8>);

/// The good request with lines added to its head.
fn and(lines: &str) -> Vec<u8> {
    good_request("/").replace("\r\n\r\n", &format!("\r\n{lines}\r\n\r\n")).into_bytes()
}

/// The good request with a part of it replaced.
fn but(part: &str, other: &str) -> Vec<u8> {
    let good = good_request("/");
    assert_eq!(good.matches(part).count(), 1, "{part}");
    good.replace(part, other).into_bytes()
}

/// What is no HTTP/1.1 request.
fn no_requests() -> Vec<Case> {
    vec![
        ("no text at all", 400, vec![0xff; 64]),
        ("a TLS handshake", 400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".repeat(4)),
        ("zeros", 400, vec![0; 64]),
        ("HTTP/2", 505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec()),
        ("HTTP/0.9", 400, b"GET /\r\n\r\n".to_vec()),
        ("HTTP/1.2", 505, but("HTTP/1.1", "HTTP/1.2")),
        ("HTTP/3.0", 505, but("HTTP/1.1", "HTTP/3.0")),
        ("a version that is none", 400, but("HTTP/1.1", "HTTP/x.y")),
        ("a version in small letters", 400, but("HTTP/1.1", "http/1.1")),
        ("a version with more digits", 400, but("HTTP/1.1", "HTTP/1.10")),
        ("another version behind a target with a space", 400, but("GET / HTTP/1.1", "GET / a HTTP/2.0")),
        ("a method with a NUL", 400, but("GET", "GE\0T")),
        ("a method that is no token", 400, but("GET", "G(T")),
        ("a target with a space", 400, but("GET / ", "GET / a ")),
        ("a target with a control character", 400, but("GET / ", "GET /\x01 ")),
        ("a target that is none", 400, but("GET / ", "GET a ")),
        ("a target with a NUL", 400, but("GET / ", "GET /\0 ")),
        ("a target with a DEL", 400, but("GET / ", "GET /\x7f ")),
        ("a target with a fragment", 400, but("GET / ", "GET /#a ")),
        ("a target with a tab", 400, but("GET / ", "GET /\ta ")),
        ("a line before the request line", 400, [b" \r\n", good_request("/").as_bytes()].concat()),
        ("a line without a colon", 400, and("nothing")),
        ("a header without a name", 400, and(": x")),
        ("a space before the colon", 400, and("X : y")),
        ("a tab in a name", 400, and("X\ty: z")),
        ("a NUL in a name", 400, and("X\0: y")),
        ("a NUL in a value", 400, and("X: y\0z")),
        ("a bare CR in a value", 400, and("X: y\rZ: z")),
        ("a bare CR at the end of a value", 400, and("X: y\r\r")),
        ("a bare CR before the request", 400, [b"\r", good_request("/").as_bytes()].concat()),
        ("a bare CR in the first line", 400, but("HTTP/1.1\r\n", "HTTP/1.1\r\r\n")),
        ("a VT before a colon", 400, and("X\x0b: y")),
        ("a DEL in a value", 400, and("X: y\x7f")),
        ("a line that is folded", 400, and("X: y\r\n z")),
        ("a line that is folded by a tab", 400, and("X: y\r\n\tz")),
        ("a line that is folded by LF alone", 400, and("X: y\n z")),
        ("a first line that is folded", 400, but("\r\nHost", "\r\n Host")),
        ("a line that is too long", 431, and(&format!("X: {}", "y".repeat(64 * 1024)))),
        ("a name that is too long", 431, and(&format!("X{}: y", "x".repeat(64 * 1024)))),
        ("a target that is too long", 414, but("GET / ", &format!("GET /{} ", "x".repeat(20_000)))),
        ("a target without end", 414, [b"GET /", &*vec![b'x'; 64 * 1024]].concat()),
        ("a method without end", 400, vec![b'X'; 64 * 1024]),
        ("empty lines without end", 431, b"\r\n".repeat(40_000)),
        ("too many lines", 431, and(&"X: y\r\n".repeat(64))),
        ("lines without end", 431, and(&"X: y\r\n".repeat(40_000))),
    ]
}

/// Where a body begins and ends is what servers are made to disagree about.
fn smuggled() -> Vec<Case> {
    let second = "GET /admin HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let body = |lines: &str, body: &str| [and(lines), body.as_bytes().to_vec()].concat();
    vec![
        ("a length", 400, body(&format!("Content-Length: {}", second.len()), second)),
        ("a length that is not there", 400, and("Content-Length: 4")),
        ("two lengths", 400, body("Content-Length: 0\r\nContent-Length: 43", second)),
        ("two lengths the other way round", 400, body("Content-Length: 43\r\nContent-Length: 0", second)),
        ("two lengths in one line", 400, and("Content-Length: 0, 0")),
        ("a negative length", 400, and("Content-Length: -1")),
        ("a length with a sign", 400, and("Content-Length: +0")),
        ("a length with two digits for one", 400, and("Content-Length: 00")),
        ("a length in hexadecimal", 400, and("Content-Length: 0x0")),
        ("a length beyond 2^64", 400, and("Content-Length: 18446744073709551616")),
        ("an empty length", 400, and("Content-Length: ")),
        ("chunks", 400, body("Transfer-Encoding: chunked", &format!("0\r\n\r\n{second}"))),
        ("chunks and a length", 400, body("Transfer-Encoding: chunked\r\nContent-Length: 4", "0\r\n\r\n")),
        ("a length and chunks", 400, body("Content-Length: 0\r\nTransfer-Encoding: chunked", "0\r\n\r\n")),
        ("an encoding that is none", 400, and("Transfer-Encoding: identity")),
        ("chunks that are not last", 400, and("Transfer-Encoding: chunked, identity")),
        ("chunks twice", 400, and("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked")),
        ("chunks with a space before the colon", 400, and("Transfer-Encoding : chunked")),
        ("chunks in a value that hides it", 400, and("Transfer-Encoding: \x0bchunked")),
        ("chunks in a folded line", 400, and("Transfer-Encoding:\r\n chunked")),
        ("two hosts", 400, and("Host: elsewhere")),
        ("the same host twice", 400, and("Host: localhost")),
        ("a host in the target and another in the header", 400, but("GET / ", "GET http://elsewhere/ ")),
        ("another host in a URL without a path", 400, but("GET / ", "GET ws://elsewhere ")),
        ("a user in the target", 400, but("GET / ", "GET http://user@localhost/ ")),
        ("chunks with a NUL before the colon", 400, and("Transfer-Encoding\0: chunked")),
        ("a length with a tab before the colon", 400, and("Content-Length\t: 43")),
        ("a plain request, and a second behind it", 426, second.repeat(2).into_bytes()),
    ]
}

/// Requests that are HTTP, and no handshake of RFC 6455.
fn no_handshakes() -> Vec<Case> {
    const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";
    vec![
        ("HTTP/1.0", 400, but("HTTP/1.1", "HTTP/1.0")),
        ("POST", 400, but("GET", "POST")),
        ("a method in small letters", 400, but("GET", "get")),
        ("CONNECT", 400, but("GET / ", "CONNECT localhost:80 ")),
        ("no host", 400, but("Host: localhost\r\n", "")),
        ("an empty host", 400, but("Host: localhost", "Host: ")),
        ("a host with a space", 400, but("Host: localhost", "Host: local host")),
        ("two hosts in one line", 400, but("Host: localhost", "Host: localhost, elsewhere")),
        ("a host with a path", 400, but("Host: localhost", "Host: localhost/admin")),
        ("a host with a user", 400, but("Host: localhost", "Host: user@localhost")),
        (
            "a user in host and target",
            400,
            good_request("http://a@localhost/").replace("Host: ", "Host: a@").into_bytes(),
        ),
        ("a host whose port is none", 400, but("Host: localhost", "Host: localhost:http")),
        ("a port without a host", 400, but("Host: localhost", "Host: :80")),
        ("a host that is not ASCII", 400, but("Host: localhost", "Host: l\u{f6}calhost")),
        ("a target for CONNECT alone", 400, but("GET / ", "GET localhost ")),
        ("a target for OPTIONS alone", 400, but("GET / ", "GET * ")),
        ("a URL of something else", 400, but("GET / ", "GET ftp://localhost/ ")),
        ("no upgrade", 426, but("Upgrade: websocket\r\n", "")),
        ("another upgrade", 426, but("Upgrade: websocket", "Upgrade: h2c")),
        ("no connection", 400, but("Connection: Upgrade\r\n", "")),
        ("a connection that closes", 400, but("Connection: Upgrade", "Connection: close")),
        ("an older version", 426, but("Version: 13", "Version: 8")),
        ("a version in words", 426, but("Version: 13", "Version: thirteen")),
        ("a version with a zero", 426, but("Version: 13", "Version: 013")),
        ("two versions", 400, and("Sec-WebSocket-Version: 13")),
        ("no version", 400, but("Sec-WebSocket-Version: 13\r\n", "")),
        ("no key", 400, but(&format!("Sec-WebSocket-Key: {KEY}\r\n"), "")),
        ("two keys", 400, and(&format!("Sec-WebSocket-Key: {KEY}"))),
        ("an empty key", 400, but(KEY, "")),
        ("a key of 15 bytes", 400, but(KEY, "AAAAAAAAAAAAAAAAAAAA")),
        ("a key of 17 bytes", 400, but(KEY, "AAAAAAAAAAAAAAAAAAAAAAA=")),
        ("a key in another alphabet", 400, but(KEY, "_-_-_-_-_-_-_-_-_-_-_w==")),
        ("a key without its padding", 400, but(KEY, "dGhlIHNhbXBsZSBub25jZQ")),
        ("a subprotocol that is no token", 400, and("Sec-WebSocket-Protocol: a b")),
        ("an empty subprotocol", 400, and("Sec-WebSocket-Protocol: a,,b")),
    ]
}

/// An upstream that counts who connects to it, and answers nobody.
async fn counting() -> (Upstream, Arc<AtomicU32>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let upstream = format!("ws://{}", listener.local_addr().unwrap()).parse().unwrap();
    let count: Arc<AtomicU32> = Arc::default();
    let counted = Arc::clone(&count);
    tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok(accepted) = listener.accept().await {
            counted.fetch_add(1, Ordering::Relaxed);
            held.push(accepted);
        }
    });
    (upstream, count)
}

#[tokio::test]
async fn each_has_one_answer_and_reaches_no_upstream_and_holds_nobody_up() {
    let (upstream, reached) = counting().await;
    let open = config::Route { exact: true, upstream: Some(Upstream::Echo), ..route("/bystander") };
    let relay = config::Gateway { upstream, routes: vec![open], ..quiet() };
    for gateway in [start(&quiet()), start(&relay)] {
        let (mut bystander, _) = tokio_tungstenite::connect_async(format!("{}bystander", gateway.url())).await.unwrap();
        let cases = [no_requests(), smuggled(), no_handshakes()].concat();
        for (case, status, bytes) in &cases {
            let answer = gateway.raw_of(case, bytes).await;
            let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{case}: {answer:?}"));
            // To an older client in its own version.
            assert!(head.starts_with("HTTP/1.") && head[8..].starts_with(&format!(" {status} ")), "{case}: {answer}");
            assert!(head.to_ascii_lowercase().contains("\r\nconnection: close"), "{case}: {answer}");
            // One document and nothing behind it: a second request, if that is what it is, is nobody's.
            let body: serde_json::Value =
                serde_json::from_str(body).unwrap_or_else(|e| panic!("{case}: {e}: {answer}"));
            assert_eq!(body["status"], *status, "{case}");
            echoes(&mut bystander, case).await;
        }
        gateway.policy.wait_closed(cases.len()).await;
        assert_eq!(gateway.metric("limiter_handshakes_total{result=\"accepted\"}"), 1);
        drop(bystander);
        gateway.wait_released().await;
        assert_eq!(gateway.metric("limiter_sessions"), 0);
    }
    assert_eq!(reached.load(Ordering::Relaxed), 0, "an upstream was asked");
}

#[tokio::test]
async fn what_is_odd_and_good_gets_in() {
    let gateway = start(&quiet());
    let good = good_request("/");
    let cases: [(&str, Vec<u8>); 13] = [
        // RFC 9112, 2.2: a recipient may take it for the end of a line. What is passed on has both.
        ("lines that end in LF alone", good.replace("\r\n", "\n").into_bytes()),
        ("empty lines before the request", [b"\r\n\r\n", good.as_bytes()].concat()),
        ("the host in the target too", but("GET / ", "GET http://LOCALHOST/ ")),
        ("a URL of WebSocket", but("GET / ", "GET ws://localhost ")),
        ("a length of nothing", and("Content-Length: 0")),
        ("a host with a port", but("Host: localhost", "Host: my_app.example:8080")),
        ("a host with an empty port", but("Host: localhost", "Host: localhost:")),
        ("a host that is an address", but("Host: localhost", "Host: [::1]:80")),
        ("a value that is not ASCII", and("X: \u{fc}")),
        ("names in any letters", good.replace("Upgrade: websocket", "uPGRADE: WebSocket").into_bytes()),
        ("lists", good.replace("Connection: Upgrade", "Connection: keep-alive,, Upgrade ,x").into_bytes()),
        ("spaces around values", but("Host: localhost", "Host:\t localhost \t")),
        ("an extension that is not taken", and("Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits")),
    ];
    for (case, mut bytes) in cases {
        bytes.extend(frame(0x88, &[]));
        let answer = gateway.raw_of(case, &bytes).await;
        assert!(answer.starts_with("HTTP/1.1 101 "), "{case}: {answer}");
        assert!(!answer.to_ascii_lowercase().contains("sec-websocket-extensions"), "{case}: {answer}");
    }
}

#[tokio::test]
async fn half_requests_hold_nobody_up_and_are_forgotten_with_their_clients() {
    let gateway = start(&quiet());
    let good = good_request("/");
    let mut halves = Vec::new();
    for end in (0..good.len()).step_by(3) {
        let mut stream = TcpStream::connect(gateway.addr).await.unwrap();
        stream.write_all(&good.as_bytes()[..end]).await.unwrap();
        halves.push(stream);
    }
    let mut bystander = gateway.connect().await;
    echoes(&mut bystander, "not held up").await;
    let ended = halves.len();
    drop(halves);
    gateway.policy.wait_closed(ended).await;
    // They left: that is no refusal, and nothing for the log.
    assert_eq!(gateway.metric("limiter_handshakes_total{result=\"left\"}"), ended as u64);
    assert_eq!(gateway.metric("limiter_handshakes_total{result=\"malformed\"}"), 0);
    drop(bystander);
    gateway.wait_released().await;
}
