//! Clients that fall silent.

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use tokio::{
    io::AsyncReadExt,
    io::AsyncWriteExt,
    time::{Instant, timeout},
};
use tokio_tungstenite::tungstenite::Message;

use super::support::*;
use crate::config;

const SHORT: Duration = Duration::from_millis(50);

#[tokio::test]
async fn a_quiet_client_that_answers_pings_stays() {
    let gateway = start(&config::Gateway { ping_interval: SHORT, pong_timeout: PATIENCE, ..quiet() });
    let mut client = gateway.connect().await;
    for _ in 0..5 {
        // Reading it is what makes the client answer.
        let ping = timeout(PATIENCE, client.next()).await.unwrap().unwrap().unwrap();
        assert!(ping.is_ping(), "{ping:?}");
    }
    echoes(&mut client, "still here").await;
}

#[tokio::test]
async fn a_client_that_does_not_answer_is_given_up() {
    let gateway = start(&config::Gateway { ping_interval: SHORT, pong_timeout: SHORT, ..quiet() });
    let mut stream = shaken(&gateway).await;
    let remote = stream.local_addr().unwrap();
    eventually("it is given up", || gateway.policy.closed(remote) == 1).await;
    eventually("it is counted", || gateway.metric("limiter_sessions_closed_total{reason=\"no_pong\"}") == 1).await;

    let mut received = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut received)).await.unwrap().unwrap();
    assert_eq!(&received[..13], b"\x89\x07limiter\x88\x13\x03\xe9", "a ping, and a Close with 1001");
}

#[tokio::test]
async fn a_client_that_does_not_read_is_given_up_and_its_memory_with_it() {
    let config = config::Gateway { pong_timeout: Duration::from_millis(200), ..quiet() };
    let gateway = start(&config);
    let mut stream = shaken(&gateway).await;
    let remote = stream.local_addr().unwrap();
    // Each of these comes back, until nothing fits any more.
    let message = [&[0x82, 0xfe][..], &8_192_u16.to_be_bytes(), &[0; 4], &[0; 8_192]].concat();
    let began = Instant::now();
    let mut written = 0;
    while gateway.policy.closed(remote) == 0 {
        assert!(began.elapsed() < PATIENCE, "it is never given up");
        // Neither a full buffer nor the end of the connection is of interest here.
        if let Ok(Ok(n)) = timeout(Duration::from_millis(10), stream.write(&message[written..])).await {
            written = (written + n) % message.len();
        }
    }
    let slow = "limiter_sessions_closed_total{reason=\"slow_consumer\"}";
    eventually("it is counted", || gateway.metric(slow) == 1).await;
}

#[tokio::test]
async fn a_client_that_pings_without_end_is_answered_for_a_while_and_closed() {
    let gateway = start(&quiet());
    let mut stream = shaken(&gateway).await;
    let ping = frame(0x89, b"x");
    stream.write_all(&ping.repeat(300)).await.unwrap();
    let mut answer = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
    let (pongs, close) = answer.split_at(3 * 200);
    assert_eq!(pongs, b"\x8a\x01x".repeat(200));
    assert_eq!(&close[2..4], 1008_u16.to_be_bytes());
    gateway.policy.wait_closed(1).await;
    assert_eq!(gateway.metric("limiter_sessions_closed_total{reason=\"control_flood\"}"), 1);
}

#[tokio::test]
async fn an_idle_client_gets_1001_however_well_it_answers_pings() {
    let config = config::Gateway { ping_interval: SHORT, idle_timeout: Duration::from_millis(300), ..quiet() };
    let gateway = start(&config);
    let mut client = gateway.connect().await;
    let began = Instant::now();
    assert_eq!(next_close(&mut client).await, (1001, "idle".to_owned()));
    assert!(began.elapsed() >= Duration::from_millis(250), "{:?}", began.elapsed());
    gateway.policy.wait_closed(1).await;
}

#[tokio::test]
async fn messages_keep_a_client_from_being_idle() {
    let gateway = start(&config::Gateway { idle_timeout: Duration::from_millis(400), ..quiet() });
    let mut client = gateway.connect().await;
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(800) {
        client.send(Message::text("x")).await.unwrap();
        assert_eq!(next(&mut client).await, Message::text("x"));
        tokio::time::sleep(SHORT).await;
    }
}
