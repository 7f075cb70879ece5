//! The relay, to an upstream that is a tungstenite server.

use std::{future::pending, net::SocketAddr, time::Duration};

use futures_util::{SinkExt, StreamExt};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::oneshot,
    time::timeout,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Error, Message,
        client::IntoClientRequest,
        handshake::server::{ErrorResponse, Request, Response},
    },
};

use super::support::*;
use crate::config;

pub type Server = WebSocketStream<TcpStream>;

/// A gateway to an upstream that takes one connection and does `act` with it; with the request that the upstream saw.
pub async fn relay_to<F>(
    path: &str,
    act: impl FnOnce(Server) -> F + Send + 'static,
) -> (Running, oneshot::Receiver<Request>)
where
    F: Future<Output = ()> + Send,
{
    relay_with(quiet(), path, act).await
}

/// The same, with other settings.
pub async fn relay_with<F>(
    config: config::Gateway,
    path: &str,
    act: impl FnOnce(Server) -> F + Send + 'static,
) -> (Running, oneshot::Receiver<Request>)
where
    F: Future<Output = ()> + Send,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let (seen, request) = oneshot::channel();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        #[expect(clippy::result_large_err, reason = "the library's own type")]
        let look = |request: &Request, mut response: Response| -> Result<Response, ErrorResponse> {
            _ = seen.send(request.clone());
            if request.headers().contains_key("sec-websocket-protocol") {
                response.headers_mut().insert("sec-websocket-protocol", "second".parse().unwrap());
            }
            Ok(response)
        };
        act(tokio_tungstenite::accept_hdr_async(stream, look).await.unwrap()).await;
    });
    (start(&config::Gateway { upstream: format!("ws://{addr}{path}").parse().unwrap(), ..config }), request)
}

fn gateway_to(addr: SocketAddr, path: &str) -> Running {
    start(&config::Gateway { upstream: format!("ws://{addr}{path}").parse().unwrap(), ..quiet() })
}

pub async fn echo(mut server: Server) {
    while let Some(Ok(message)) = server.next().await {
        if message.is_text() || message.is_binary() {
            server.send(message).await.unwrap();
        }
    }
}

/// The status that a connect through the gateway is refused with.
async fn refused(gateway: &Running) -> u16 {
    match tokio_tungstenite::connect_async(gateway.url()).await {
        Err(Error::Http(response)) => response.status().as_u16(),
        other => panic!("expected a refusal, got {other:?}"),
    }
}

#[tokio::test]
async fn messages_keep_order_and_boundaries_both_ways() {
    let (gateway, _) = relay_to("", echo).await;
    let mut client = gateway.connect().await;
    for n in 0..100 {
        let message = if n % 2 == 0 { Message::text(format!("{n}")) } else { Message::binary(vec![n; usize::from(n)]) };
        client.send(message).await.unwrap();
    }
    for n in 0..100 {
        let expected =
            if n % 2 == 0 { Message::text(format!("{n}")) } else { Message::binary(vec![n; usize::from(n)]) };
        assert_eq!(next(&mut client).await, expected);
    }
}

/// Of the longer one, more than is kept while there is no answer.
#[tokio::test]
async fn what_a_client_sends_along_with_its_request_reaches_the_upstream_as_it_is() {
    let short = frame(0x81, b"early");
    let long = [&[0x82, 0xfe][..], &40_000_u16.to_be_bytes(), &[0; 4], &*vec![7; 40_000]].concat();
    let echoed = [b"\x81\x05early\x82\x7e".as_slice(), &40_000_u16.to_be_bytes(), &*vec![7; 40_000]].concat();
    let early = [short, long].concat();
    for at in [1, 7, 15, 30_000, early.len()] {
        let (gateway, _) = relay_to("", echo).await;
        let mut stream = TcpStream::connect(gateway.addr).await.unwrap();
        let (along, later) = early.split_at(at);
        stream.write_all(&[good_request("/").as_bytes(), along].concat()).await.unwrap();
        assert!(read_head(&mut stream).await.starts_with("HTTP/1.1 101 "));
        stream.write_all(later).await.unwrap();
        let mut came = vec![0; echoed.len()];
        timeout(PATIENCE, stream.read_exact(&mut came)).await.expect("all of it comes back").unwrap();
        assert!(came == echoed, "{at}");
    }
}

#[tokio::test]
async fn the_upstream_sees_the_clients_request_and_who_it_is() {
    let (gateway, request) = relay_to("", echo).await;
    let mut asked = format!("ws://{}/chat?token=t", gateway.addr).into_client_request().unwrap();
    for (name, value) in [
        ("sec-websocket-protocol", "first, second"),
        ("cookie", "a=1"),
        ("x-forwarded-for", "203.0.113.9"),
        ("x-request-id", "spoofed"),
    ] {
        asked.headers_mut().insert(name, value.parse().unwrap());
    }
    let (mut client, response) = tokio_tungstenite::connect_async(asked).await.unwrap();
    assert_eq!(response.headers()["sec-websocket-protocol"], "second");
    echoes(&mut client, "hello").await;

    let request = request.await.unwrap();
    assert_eq!(request.uri(), "/chat?token=t");
    let header = |name: &str| request.headers()[name].to_str().unwrap();
    assert_eq!(header("host"), gateway.addr.to_string());
    assert_eq!(header("cookie"), "a=1");
    assert_eq!(header("sec-websocket-protocol"), "first, second");
    assert_eq!(header("x-forwarded-for"), "127.0.0.1");
    assert_eq!(header("x-forwarded-proto"), "http");
    assert_eq!(header("x-request-id").len(), 32);
}

#[tokio::test]
async fn the_upstream_is_told_the_address_that_a_trusted_proxy_tells() {
    let trusted_proxies = vec!["127.0.0.0/8".parse().unwrap()];
    let (gateway, request) = relay_with(config::Gateway { trusted_proxies, ..quiet() }, "", echo).await;
    let mut asked = gateway.url().into_client_request().unwrap();
    let headers = [
        ("x-forwarded-for", "203.0.113.9, 192.0.2.7:4711, 127.0.0.9"),
        ("x-forwarded-proto", "https"),
        ("x-real-ip", "1"),
    ];
    for (name, value) in headers {
        asked.headers_mut().insert(name, value.parse().unwrap());
    }
    let (mut client, _) = tokio_tungstenite::connect_async(asked).await.unwrap();
    echoes(&mut client, "hello").await;
    let request = request.await.unwrap();
    assert_eq!(request.headers()["x-forwarded-for"], "192.0.2.7");
    assert_eq!(request.headers()["x-forwarded-proto"], "https");
    assert!(!request.headers().contains_key("x-real-ip"));
}

#[tokio::test]
async fn the_upstream_is_told_both_addresses_of_a_proxy_header() {
    let trusted_proxies = vec!["127.0.0.0/8".parse().unwrap()];
    let config = config::Gateway { proxy_protocol: true, trusted_proxies, ..quiet() };
    let (gateway, request) = relay_with(config, "", echo).await;
    let mut stream = TcpStream::connect(gateway.addr).await.unwrap();
    let header = "PROXY TCP6 2001:db8::7 2001:db8::1 51234 443\r\n";
    stream.write_all(format!("{header}{}", good_request("/")).as_bytes()).await.unwrap();
    assert!(read_head(&mut stream).await.starts_with("HTTP/1.1 101 "));
    let request = request.await.unwrap();
    assert_eq!(request.headers()["x-forwarded-for"], "2001:db8::7");
    assert_eq!(request.headers()["x-forwarded-port"], "443");
}

#[tokio::test]
async fn a_path_in_the_url_is_the_upstreams_own() {
    let (gateway, request) = relay_to("/fixed", echo).await;
    echoes(&mut gateway.connect().await, "hello").await;
    assert_eq!(request.await.unwrap().uri(), "/fixed");
}

#[tokio::test]
async fn the_clients_close_reaches_the_upstream_after_its_messages() {
    let (told, heard) = oneshot::channel();
    let (gateway, _) = relay_to("", |mut server| async move {
        let mut received = Vec::new();
        while let Some(Ok(message)) = server.next().await {
            received.push(message);
        }
        told.send(received).unwrap();
    })
    .await;
    let mut client = gateway.connect().await;
    client.send(Message::text("last words")).await.unwrap();
    client.send(close(4321, "done")).await.unwrap();
    assert_eq!(next_close(&mut client).await, (4321, "done".to_owned()));
    let received = timeout(PATIENCE, heard).await.unwrap().unwrap();
    assert_eq!(received, [Message::text("last words"), close(4321, "done")]);
    gateway.policy.wait_closed(1).await;
}

#[tokio::test]
async fn the_upstreams_close_reaches_the_client_after_its_messages() {
    let (told, heard) = oneshot::channel();
    let (gateway, _) = relay_to("", |mut server| async move {
        for n in 0..20 {
            server.send(Message::text(format!("{n}"))).await.unwrap();
        }
        server.send(close(4001, "log in again")).await.unwrap();
        told.send(server.next().await.unwrap().unwrap()).unwrap();
    })
    .await;
    let mut client = gateway.connect().await;
    for n in 0..20 {
        assert_eq!(next(&mut client).await, Message::text(format!("{n}")));
    }
    assert_eq!(next_close(&mut client).await, (4001, "log in again".to_owned()));
    assert_eq!(timeout(PATIENCE, heard).await.unwrap().unwrap(), close(4001, "log in again"), "the answer");
    assert!(timeout(PATIENCE, client.next()).await.unwrap().is_none());
    gateway.policy.wait_closed(1).await;
}

#[tokio::test]
async fn an_upstream_that_dies_is_1012_and_one_that_babbles_1011() {
    let (gateway, _) = relay_to("", |server| async move { drop(server) }).await;
    let mut client = gateway.connect().await;
    assert_eq!(without_hint(next_close(&mut client).await), (1012, "application went away".to_owned()));

    let (gateway, _) = relay_to("", |mut server| async move {
        server.get_mut().write_all(&[0xff, 0x00]).await.unwrap();
        pending::<()>().await;
    })
    .await;
    let mut client = gateway.connect().await;
    assert_eq!(next_close(&mut client).await.0, 1011);
}

#[tokio::test]
async fn the_upstream_is_told_when_its_client_is_lost_or_misbehaves() {
    for misbehaves in [false, true] {
        let (told, heard) = oneshot::channel();
        let (gateway, _) = relay_to("", |mut server| async move {
            told.send(server.next().await.unwrap().unwrap()).unwrap();
        })
        .await;
        let mut client = gateway.connect().await;
        if misbehaves {
            client.send(Message::text("x".repeat(70_000))).await.unwrap();
            assert_eq!(next_close(&mut client).await.0, 1009);
        }
        drop(client);
        let received = timeout(PATIENCE, heard).await.unwrap().unwrap();
        assert_eq!(received, close(1001, "client went away"));
    }
}

#[tokio::test]
async fn no_upstream_is_502_and_a_mute_one_504_before_any_101() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let config = config::Gateway {
        upstream: format!("ws://{addr}").parse().unwrap(),
        handshake_timeout: Duration::from_millis(300),
        ..quiet()
    };
    let gateway = start(&config);
    assert_eq!(refused(&gateway).await, 504);
    drop(listener);
    assert_eq!(refused(&gateway).await, 502);
    gateway.policy.wait_closed(2).await;
    assert_eq!(gateway.metric("limiter_sessions"), 0);
}

#[tokio::test]
async fn what_the_upstream_answers_instead_of_101_decides_the_status() {
    let answers = [
        (401, "HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n"),
        (503, "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n"),
        (502, "HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n"),
        (502, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"),
        (502, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"),
        (502, "SSH-2.0-OpenSSH_9.2\r\n"),
    ];
    for (status, answer) in answers {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let gateway = gateway_to(listener.local_addr().unwrap(), "");
        let upstream = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let head = read_head(&mut stream).await;
            stream.write_all(answer.as_bytes()).await.unwrap();
            // Until the gateway has had enough of it.
            _ = stream.read(&mut [0]).await;
            head
        };
        let (refused, _) = tokio::join!(refused(&gateway), upstream);
        assert_eq!(refused, status, "{answer}");
    }
}

#[tokio::test]
async fn a_client_that_does_not_read_may_still_write() {
    let (told, heard) = oneshot::channel();
    let (gateway, _) = relay_to("", |server| async move {
        let (mut write, mut read) = server.split();
        let flood = async { while write.send(Message::binary(vec![0; 60_000])).await.is_ok() {} };
        let listen = async {
            let first = read.next().await.unwrap().unwrap();
            told.send(first).unwrap();
            while let Some(Ok(_)) = read.next().await {}
        };
        tokio::join!(flood, listen);
    })
    .await;
    let mut client = gateway.connect().await;
    let passed = || gateway.metric("limiter_messages_total{direction=\"out\",verdict=\"passed\"}");
    eventually("the flood is on its way", || passed() > 0).await;
    // Stalled: nothing more has passed for a while.
    let mut before = 0;
    while passed() > before {
        before = passed();
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    client.send(Message::text("stop")).await.unwrap();
    assert_eq!(timeout(PATIENCE, heard).await.unwrap().unwrap(), Message::text("stop"));
}
