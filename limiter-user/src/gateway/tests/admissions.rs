//! Limits on connections, at the handshake.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use futures_util::{SinkExt, future::join_all};
use tokio_tungstenite::tungstenite::Error;

use super::support::*;
use crate::{
    gateway::{Gateway, Metrics},
    policy::{Action, Connection, Fixed, Limits, Policy, Rule},
};

/// The status and Retry-After that a refused connect gets.
async fn refusal(gateway: &Running) -> (u16, u32) {
    match tokio_tungstenite::connect_async(gateway.url()).await {
        Err(Error::Http(response)) => {
            let retry = response.headers()["retry-after"].to_str().unwrap().parse().unwrap();
            assert_eq!(response.headers()["content-type"], "application/problem+json");
            (response.status().as_u16(), retry)
        }
        other => panic!("expected a refusal, got {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_200_at_once_exactly_the_limit_get_in() {
    let gateway = start_with(&quiet(), Limits { connections_per_source: 5, ..unlimited() });
    let url = gateway.url();
    let attempts = join_all((0..200).map(|_| tokio::spawn(tokio_tungstenite::connect_async(url.clone())))).await;
    let mut admitted = Vec::new();
    for attempt in attempts {
        match attempt.unwrap() {
            Ok((client, _)) => admitted.push(client),
            Err(Error::Http(response)) => assert_eq!(response.status().as_u16(), 429),
            Err(e) => panic!("neither admitted nor refused: {e}"),
        }
    }
    assert_eq!(admitted.len(), 5);
    eventually("all five are served", || gateway.metric("limiter_sessions") == 5).await;
    assert_eq!(gateway.metric("limiter_handshakes_total{result=\"source_full\"}"), 195);
    for client in &mut admitted {
        echoes(client, "still here").await;
    }

    // One leaves, one more gets in.
    admitted.pop().unwrap().close(None).await.unwrap();
    gateway.policy.wait_closed(196).await;
    let _sixth = gateway.connect().await;
    assert_eq!(refusal(&gateway).await.0, 429);
}

#[tokio::test]
async fn a_full_source_gets_429_and_a_full_service_503() {
    let gateway = start_with(&quiet(), Limits { connections_per_source: 1, ..unlimited() });
    let _first = gateway.connect().await;
    let (status, retry) = refusal(&gateway).await;
    assert_eq!(status, 429);
    assert!((5..=10).contains(&retry), "{retry}");

    gateway.policy.set(Limits { connections_total: 1, ..unlimited() });
    let (status, retry) = refusal(&gateway).await;
    assert_eq!(status, 503);
    assert!((5..=15).contains(&retry), "{retry}");
}

#[tokio::test]
async fn limits_change_under_running_clients_and_cut_nobody() {
    let gateway = start_with(&quiet(), Limits { connections_per_source: 1, ..unlimited() });
    let mut first = gateway.connect().await;
    assert_eq!(refusal(&gateway).await.0, 429);
    gateway.policy.set(Limits { connections_per_source: 2, ..unlimited() });
    let mut second = gateway.connect().await;
    gateway.policy.set(Limits { connections_per_source: 1, ..unlimited() });
    assert_eq!(refusal(&gateway).await.0, 429);
    echoes(&mut first, "a").await;
    echoes(&mut second, "b").await;
}

#[tokio::test]
async fn every_way_out_gives_the_slot_back() {
    let gateway = start_with(&quiet(), Limits { connections_per_source: 1, ..unlimited() });
    let mut ended = 0;
    for way in 0..4 {
        let mut client = gateway.connect().await;
        match way {
            0 => client.close(None).await.unwrap(),
            1 => drop(client),
            2 => client.send(tokio_tungstenite::tungstenite::Message::text("x".repeat(100_000))).await.unwrap(),
            _ => {
                // A reset, not a FIN.
                let tokio_tungstenite::MaybeTlsStream::Plain(stream) = client.get_ref() else { unreachable!() };
                socket2::SockRef::from(stream).set_linger(Some(std::time::Duration::ZERO)).unwrap();
                drop(client);
            }
        }
        ended += 1;
        gateway.policy.wait_closed(ended).await;
        gateway.wait_released().await;
    }
}

/// A policy with a bug.
#[derive(Default)]
struct Panicking {
    panics: AtomicU32,
    closed: AtomicU32,
}

impl Policy for Panicking {
    fn limits(&self) -> Limits {
        assert!(self.panics.fetch_add(1, Ordering::Relaxed) > 0, "a bug, for the first client only");
        unlimited()
    }

    fn closed(&self, _: &Connection) {
        self.closed.fetch_add(1, Ordering::Relaxed);
    }
}

#[tokio::test]
async fn a_panic_ends_its_own_connection_only_and_releases_it() {
    let policy = Arc::new(Panicking::default());
    let gateway =
        Gateway::bind(&quiet(), Arc::clone(&policy) as Arc<dyn Policy>, Arc::new(Metrics::default())).unwrap();
    let url = format!("ws://{}/", gateway.local_addrs()[0]);
    let running = tokio::spawn(gateway.run(std::future::pending()));
    tokio_tungstenite::connect_async(&url).await.expect_err("its task panicked");
    eventually("its end is told", || policy.closed.load(Ordering::Relaxed) == 1).await;
    let (mut client, _) = tokio_tungstenite::connect_async(&url).await.unwrap();
    echoes(&mut client, "all is well").await;
    running.abort();
}

#[tokio::test]
async fn without_a_kernel_the_gateway_keeps_rules_and_rates() {
    let serve = |limits, rules: &[Rule]| {
        let policy = Arc::new(Fixed::new(limits, rules));
        let gateway = Gateway::bind(&quiet(), policy, Arc::new(Metrics::default())).unwrap();
        let url = format!("ws://{}/", gateway.local_addrs()[0]);
        (url, tokio::spawn(gateway.run(std::future::pending())))
    };
    let status = async |url: &str| match tokio_tungstenite::connect_async(url).await {
        Ok(_) => 101,
        Err(Error::Http(response)) => response.status().as_u16(),
        Err(e) => panic!("neither admitted nor refused: {e}"),
    };
    let rule = |action| Rule::new("127.0.0.0/8".parse().unwrap(), action);
    // So slow that no token comes back during the test.
    let slow = Limits { connection_rate: 1, connection_burst: 2, connections_per_source: 0, ..Limits::default() };
    let (url, running) = serve(slow, &[]);
    let mut answers = Vec::new();
    while answers.last() != Some(&429) {
        answers.push(status(&url).await);
        assert!(answers.len() < 1000, "the rate is not kept");
    }
    assert!(answers.len() > 2 && answers[..2] == [101, 101], "{answers:?}");
    running.abort();

    let (url, running) = serve(slow, &[rule(Action::Deny)]);
    assert_eq!(status(&url).await, 403);
    running.abort();
    let (url, running) = serve(slow, &[rule(Action::Allow)]);
    for _ in 0..5 {
        assert_eq!(status(&url).await, 101);
    }
    running.abort();
}
