//! Many clients at once that come and go in every way, and upstreams that do likewise.

use std::time::Duration;

use futures_util::{SinkExt, StreamExt, future::join_all};
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tokio_tungstenite::{MaybeTlsStream, tungstenite::Message};

use super::support::*;
use crate::{
    config::{self, Upstream},
    policy::Limits,
};

const LIVES: usize = 400;
const LIMIT: u32 = 20;

/// One client, from connect to end.
async fn live(url: String, addr: std::net::SocketAddr, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    tokio::time::sleep(Duration::from_micros(random.u64(0..200_000))).await;
    if random.u8(..) < 64 {
        // Never gets to be a session.
        let mut stream = TcpStream::connect(addr).await.unwrap();
        let request = good_request("/");
        let sent = &request.as_bytes()[..random.usize(0..request.len())];
        _ = stream.write_all(sent).await;
        return;
    }
    let Ok((mut client, _)) = tokio_tungstenite::connect_async(url).await else { return };
    for _ in 0..random.u8(0..4) {
        if client.send(Message::text("hello")).await.is_err() {
            return;
        }
    }
    let MaybeTlsStream::Plain(stream) = client.get_mut() else { unreachable!("no test uses TLS") };
    match random.u8(0..6) {
        0 => drop(client),
        1 => socket2::SockRef::from(&*stream).set_linger(Some(Duration::ZERO)).unwrap(),
        2 => _ = client.close(None).await,
        3 => _ = stream.write_all(&frame(0x83, b"malformed")).await,
        4 => _ = stream.write_all(&frame(0x81, b"half a frame")[..9]).await,
        // Gone silent, until the gateway gives it up.
        _ => tokio::time::sleep(Duration::from_millis(random.u64(0..400))).await,
    }
}

/// One connection of an upstream that can't be relied on.
async fn behave(stream: TcpStream, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    if random.u8(..) < 24 {
        // Not even a handshake.
        return;
    }
    let Ok(mut server) = tokio_tungstenite::accept_async(stream).await else { return };
    let mut left = random.u8(0..6);
    while left > 0
        && let Some(Ok(message)) = server.next().await
    {
        left -= 1;
        if (message.is_text() || message.is_binary()) && server.send(message).await.is_err() {
            return;
        }
    }
    match random.u8(0..6) {
        0 => drop(server),
        1 => socket2::SockRef::from(server.get_ref()).set_linger(Some(Duration::ZERO)).unwrap(),
        2 => _ = server.close(None).await,
        3 => _ = server.get_mut().write_all(&[0xff, 0x00]).await,
        4 => _ = server.get_mut().write_all(&[0x82, 100, 1, 2, 3]).await,
        _ => tokio::time::sleep(Duration::from_millis(random.u64(0..400))).await,
    }
}

/// An upstream whose every connection behaves in its own way, for as long as the test runs.
async fn unreliable_upstream(seed: u64) -> Upstream {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        for n in 0.. {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(behave(stream, seed << 32 | n));
        }
    });
    format!("ws://{addr}").parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_is_given_back_once_whatever_the_clients_do() {
    for (seed, upstream) in [(1, Upstream::Echo), (2, Upstream::Echo), (5, Upstream::Broadcast)] {
        storm(seed, upstream).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_is_given_back_once_whatever_clients_and_upstream_do() {
    for seed in [3, 4] {
        storm(seed, unreliable_upstream(seed).await).await;
    }
}

async fn storm(seed: u64, upstream: Upstream) {
    let is_built_in = !matches!(upstream, Upstream::Relay(_));
    let config = config::Gateway {
        upstream,
        ping_interval: Duration::from_millis(50),
        pong_timeout: Duration::from_millis(50),
        handshake_timeout: Duration::from_secs(5),
        ..quiet()
    };
    let gateway = start_with(&config, Limits { connections_per_source: LIMIT, ..unlimited() });
    let lives = (0..LIVES as u64).map(|n| tokio::spawn(live(gateway.url(), gateway.addr, seed << 32 | n)));
    let mut lives = std::pin::pin!(join_all(lives));
    let ended = loop {
        match timeout(Duration::from_millis(1), &mut lives).await {
            Ok(ended) => break ended,
            Err(_) => assert!(gateway.metric("limiter_sessions") <= u64::from(LIMIT)),
        }
    };
    for life in ended {
        life.unwrap();
    }
    gateway.policy.wait_closed(LIVES).await;
    gateway.wait_released().await;
    assert_eq!(gateway.metric("limiter_sessions"), 0);

    if is_built_in {
        // Every slot is there again.
        let full = join_all((0..LIMIT).map(|_| gateway.connect())).await;
        tokio_tungstenite::connect_async(gateway.url()).await.expect_err("no slot too many");
        drop(full);
    }
}
