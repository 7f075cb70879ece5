//! The end of the gateway.

use std::time::Duration;

use futures_util::StreamExt;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use super::support::*;
use crate::config;

#[tokio::test]
async fn sessions_get_1001_and_are_waited_for() {
    let gateway = start(&quiet());
    let (mut first, mut second) = (gateway.connect().await, gateway.connect().await);
    let (addr, policy) = (gateway.addr, std::sync::Arc::clone(&gateway.policy));
    let ended = gateway.begin_stop();
    for client in [&mut first, &mut second] {
        assert_eq!(without_hint(next_close(client).await), (1001, "server is shutting down".to_owned()));
        // The next read writes the answer, and finds the end.
        assert!(timeout(PATIENCE, client.next()).await.unwrap().is_none());
    }
    let report = timeout(PATIENCE, ended).await.unwrap().unwrap();
    assert_eq!((report.closed, report.cut), (2, 0));
    policy.wait_closed(2).await;
    TcpStream::connect(addr).await.expect_err("nobody listens any more");
}

#[tokio::test]
async fn who_does_not_close_is_cut_at_the_timeout() {
    let gateway = start(&config::Gateway { drain_timeout: Duration::from_millis(100), ..quiet() });
    let silent = shaken(&gateway).await;
    let (policy, metrics) = (std::sync::Arc::clone(&gateway.policy), gateway.sampler());
    let report = gateway.stop().await;
    assert_eq!((report.closed, report.cut), (0, 1));
    assert!(report.took >= Duration::from_millis(100), "{:?}", report.took);
    policy.wait_closed(1).await;
    assert_eq!(policy.closed(silent.local_addr().unwrap()), 1);
    assert_eq!(metrics("limiter_sessions_closed_total{reason=\"draining\"}"), 1);
    assert_eq!(metrics("limiter_sessions"), 0);
}

#[tokio::test]
async fn a_handshake_during_the_drain_gets_503() {
    let gateway = start(&quiet());
    let mut client = gateway.connect().await;
    let mut late = TcpStream::connect(gateway.addr).await.unwrap();
    let mut never = TcpStream::connect(gateway.addr).await.unwrap();
    // Accepted in order: once a later one is served, the two are in.
    echoes(&mut gateway.connect().await, "in").await;
    let ended = gateway.begin_stop();
    assert_eq!(next_close(&mut client).await.0, 1001);

    late.write_all(good_request("/").as_bytes()).await.unwrap();
    for stream in [&mut late, &mut never] {
        let mut answer = String::new();
        timeout(PATIENCE, stream.read_to_string(&mut answer)).await.expect("an answer").unwrap();
        assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
        assert!(answer.to_ascii_lowercase().contains("\r\nretry-after: "), "{answer}");
    }
    drop(client);
    timeout(PATIENCE, ended).await.unwrap().unwrap();
}

#[tokio::test]
async fn dropping_the_gateway_ends_everything() {
    let gateway = start(&quiet());
    let client = gateway.connect().await;
    let _pending = TcpStream::connect(gateway.addr).await.unwrap();
    echoes(&mut gateway.connect().await, "both are in").await;
    let policy = std::sync::Arc::clone(&gateway.policy);
    gateway.begin_abort();
    policy.wait_closed(3).await;
    assert_eq!(policy.closed(address(&client)), 1);
}
