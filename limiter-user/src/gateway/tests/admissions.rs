//! Limits on connections, at the handshake.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use futures_util::{SinkExt, future::join_all};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Error;

use super::support::*;
use crate::{
    gateway::{AllServices, DrainReport, Gateway, Metrics},
    policy::{Action, Connection, Fixed, Limits, OwnLimits, Policy, Rule},
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

/// A gateway without a kernel, by itself or among others.
fn without_a_kernel(limits: Limits, rules: &[Rule], all: &AllServices) -> Served {
    serve(Fixed::new(limits, rules), all)
}

fn serve(policy: Fixed, all: &AllServices) -> Served {
    let policy = Arc::new(policy);
    let metrics = Arc::new(Metrics::default());
    let gateway = Gateway::reserve(&quiet()).unwrap().open_among(policy, Arc::clone(&metrics), all.clone()).unwrap();
    let url = format!("ws://{}/", gateway.local_addrs()[0]);
    Served { url, metrics, running: AbortOnDrop(tokio::spawn(gateway.run(std::future::pending()))) }
}

struct Served {
    url: String,
    metrics: Arc<Metrics>,
    #[expect(dead_code, reason = "it is served as long as this is held")]
    running: AbortOnDrop,
}

struct AbortOnDrop(tokio::task::JoinHandle<DrainReport>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Served {
    /// A client, or the status of its refusal.
    async fn connect(&self) -> Result<Client, u16> {
        match tokio_tungstenite::connect_async(&self.url).await {
            Ok((client, _)) => Ok(client),
            Err(Error::Http(response)) => Err(response.status().as_u16()),
            Err(e) => panic!("neither admitted nor refused: {e}"),
        }
    }

    /// As many as get in, and the status of the first refusal.
    async fn fill(&self) -> (Vec<Client>, u16) {
        let mut clients = Vec::new();
        loop {
            match self.connect().await {
                Ok(client) => clients.push(client),
                Err(status) => return (clients, status),
            }
            assert!(clients.len() < 1000, "no limit is kept");
        }
    }

    /// A client, as soon as there is room for one.
    async fn connect_in_time(&self) -> Client {
        let connected = async {
            loop {
                match self.connect().await {
                    Ok(client) => return client,
                    Err(_) => tokio::time::sleep(Duration::from_millis(2)).await,
                }
            }
        };
        timeout(PATIENCE, connected).await.expect("there is room again")
    }

    fn observed(&self, reason: &str) -> u64 {
        sampler(&self.metrics)(&format!("limiter_handshakes_observed_total{{reason=\"{reason}\"}}"))
    }

    fn refused(&self, reason: &str) -> u64 {
        sampler(&self.metrics)(&format!("limiter_handshakes_total{{result=\"{reason}\"}}"))
    }
}

/// Nothing is limited but what a test says.
fn none() -> Limits {
    Limits { connections_per_source: 0, connections_total: 0, connection_rate: 0, ..Limits::default() }
}

fn everybody(action: Action) -> Rule {
    Rule::new("127.0.0.0/8".parse().unwrap(), action)
}

#[tokio::test]
async fn without_a_kernel_the_gateway_keeps_connections_per_source_and_per_wide_source() {
    let alone = AllServices::default();
    let served = without_a_kernel(Limits { connections_per_source: 2, ..none() }, &[], &alone);
    let (held, status) = served.fill().await;
    assert_eq!((held.len(), status, served.refused("source_full")), (2, 429, 1));

    let wide = Limits { wide_ipv4_prefix: 24, connections_per_wide_source: 3, ..none() };
    let served = without_a_kernel(wide, &[], &alone);
    let (held, status) = served.fill().await;
    assert_eq!((held.len(), status, served.refused("source_full")), (3, 429, 1));
}

#[tokio::test]
async fn without_a_kernel_the_gateway_keeps_the_total_of_a_service() {
    let served = without_a_kernel(Limits { connections_total: 3, ..none() }, &[], &AllServices::default());
    let (mut held, status) = served.fill().await;
    assert_eq!((held.len(), status, served.refused("service_full")), (3, 503, 1));
    held.pop().unwrap().close(None).await.unwrap();
    served.connect_in_time().await;
}

#[tokio::test]
async fn without_a_kernel_gateways_keep_the_total_of_all_services_together() {
    let all = AllServices::default();
    let limits = Limits { connections_total_all: 3, ..none() };
    let (chat, game) = (without_a_kernel(limits, &[], &all), without_a_kernel(limits, &[], &all));
    let first = chat.connect().await.unwrap();
    let (held, status) = game.fill().await;
    assert_eq!((held.len(), status, game.refused("total_full")), (2, 503, 1));
    assert_eq!(chat.connect().await.unwrap_err(), 503);
    drop(first);
    game.connect_in_time().await;
}

#[tokio::test]
async fn without_a_kernel_the_gateway_keeps_the_rate_of_a_source_and_of_a_service() {
    // A token comes back in a second: some may during the test.
    let alone = AllServices::default();
    let slow = Limits { connection_rate: 1, connection_burst: 2, ..none() };
    let served = without_a_kernel(slow, &[], &alone);
    let (held, status) = served.fill().await;
    assert!(held.len() >= 2, "{}", held.len());
    assert_eq!((status, served.refused("source_rate")), (429, 1));

    let slow = Limits { service_connection_rate: 1, service_connection_burst: 2, ..none() };
    let served = without_a_kernel(slow, &[], &alone);
    let (held, status) = served.fill().await;
    assert!(held.len() >= 2, "{}", held.len());
    assert_eq!((status, served.refused("service_rate")), (503, 1));
}

#[tokio::test]
async fn without_a_kernel_the_gateway_keeps_the_rules() {
    // Whom a rule allows, none of these holds back.
    let narrow = Limits {
        connections_per_source: 1,
        connections_total: 1,
        connections_total_all: 1,
        connection_rate: 1,
        connection_burst: 1,
        service_connection_rate: 1,
        service_connection_burst: 1,
        wide_ipv4_prefix: 24,
        connections_per_wide_source: 1,
        ..Limits::default()
    };
    let all = AllServices::default();
    let served = without_a_kernel(narrow, &[everybody(Action::Allow)], &all);
    let mut held = Vec::new();
    for _ in 0..5 {
        held.push(served.connect().await.unwrap());
    }

    let served = without_a_kernel(none(), &[everybody(Action::Deny)], &all);
    assert_eq!((served.connect().await.unwrap_err(), served.refused("rule")), (403, 1));

    let ended = Rule { expires: Some(std::time::UNIX_EPOCH), ..everybody(Action::Deny) };
    let served = without_a_kernel(none(), &[ended], &all);
    served.connect().await.unwrap();

    let own = OwnLimits { connections_per_source: Some(4), ..OwnLimits::default() };
    let served =
        without_a_kernel(Limits { connections_per_source: 1, ..none() }, &[everybody(Action::Limit(own))], &all);
    let (held, status) = served.fill().await;
    assert_eq!((held.len(), status), (4, 429));

    let own = OwnLimits { rate: Some((1, 3)), ..OwnLimits::default() };
    let served = without_a_kernel(none(), &[everybody(Action::Limit(own))], &all);
    let (held, status) = served.fill().await;
    assert!(held.len() >= 3, "{}", held.len());
    assert_eq!((status, served.refused("source_rate")), (429, 1));
}

#[tokio::test]
async fn where_a_service_only_observes_everybody_gets_in_and_each_refusal_is_counted_once() {
    let wide = Limits { wide_ipv4_prefix: 24, connections_per_wide_source: 2, ..none() };
    let full = Limits { connections_per_source: 2, connections_total: 1, ..none() };
    let slow = Limits { connection_rate: 1, connection_burst: 2, ..none() };
    for (limits, rules, reason, expected) in [
        (Limits { connections_per_source: 2, ..none() }, vec![], "source_full", 3),
        (wide, vec![], "source_full", 3),
        (Limits { connections_total: 2, ..none() }, vec![], "service_full", 3),
        (Limits { connections_total_all: 2, ..none() }, vec![], "total_full", 3),
        (none(), vec![everybody(Action::Deny)], "rule", 5),
        // By the first of several reasons.
        (Limits { connection_rate: 1, connection_burst: 1, ..full }, vec![everybody(Action::Deny)], "rule", 5),
        (full, vec![], "source_full", 3),
        (none(), vec![everybody(Action::Allow)], "source_full", 0),
    ] {
        let served = serve(Fixed::new(limits, &rules).observing(true), &AllServices::default());
        let mut held = Vec::new();
        for _ in 0..5 {
            held.push(served.connect().await.unwrap_or_else(|status| panic!("{reason}: {status}")));
        }
        echoes(&mut held[4], "in").await;
        assert_eq!((served.observed(reason), served.refused("accepted")), (expected, 5), "{reason}");
    }
    // At most a few tokens come back meanwhile.
    for (limits, reason) in [
        (slow, "source_rate"),
        (Limits { service_connection_rate: 1, service_connection_burst: 2, ..none() }, "service_rate"),
    ] {
        let served = serve(Fixed::new(limits, &[]).observing(true), &AllServices::default());
        let mut connects = 0;
        while served.observed(reason) < 3 {
            served.connect().await.unwrap();
            connects += 1;
            assert!(connects < 1000, "{reason}: no rate is kept");
        }
        assert!(connects >= 5, "{connects}");
    }
}

#[tokio::test]
async fn who_was_only_observed_counts_and_gives_its_slot_back_once() {
    let gateway = start_with(&quiet(), Limits { connections_per_source: 1, ..unlimited() });
    gateway.policy.observes.store(true, Ordering::Relaxed);
    let (first, second, third) = (gateway.connect().await, gateway.connect().await, gateway.connect().await);
    let observed = || gateway.metric("limiter_handshakes_observed_total{reason=\"source_full\"}");
    assert_eq!((gateway.admission().total(), observed()), (3, 2));
    // From now on it counts.
    gateway.policy.observes.store(false, Ordering::Relaxed);
    assert_eq!(refusal(&gateway).await.0, 429);
    let admission = gateway.admission();
    drop((first, second));
    eventually("two are free", || admission.total() == 1).await;
    assert_eq!(refusal(&gateway).await.0, 429);
    drop(third);
    gateway.wait_released().await;
    let _fourth = gateway.connect().await;
    assert_eq!(refusal(&gateway).await.0, 429);
    assert_eq!((gateway.admission().total(), observed()), (1, 2));
}
