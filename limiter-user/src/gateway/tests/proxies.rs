//! Clients behind proxies, which are trusted to say who they are or not.

use std::{
    io,
    net::IpAddr,
    sync::{Arc, Mutex},
};

use futures_util::SinkExt;
use tokio_tungstenite::tungstenite::{Error, Message, client::IntoClientRequest};

use super::support::*;
use crate::{config, policy::Limits};

fn trusting(networks: &[&str]) -> config::Gateway {
    let trusted_proxies = networks.iter().map(|network| network.parse().unwrap()).collect();
    config::Gateway { trusted_proxies, ..quiet() }
}

fn one_each() -> Limits {
    Limits { connections_per_source: 1, ..unlimited() }
}

/// A connect with a header, or the status that it is refused with.
async fn connect(gateway: &Running, name: &'static str, value: &str) -> Result<Client, u16> {
    let mut request = gateway.url().into_client_request().unwrap();
    request.headers_mut().insert(name, value.parse().unwrap());
    match tokio_tungstenite::connect_async(request).await {
        Ok((client, _)) => Ok(client),
        Err(Error::Http(response)) => Err(response.status().as_u16()),
        Err(e) => panic!("neither admitted nor refused: {e}"),
    }
}

#[tokio::test]
async fn behind_a_trusted_proxy_each_client_has_its_own_limit() {
    let gateway = start_with(&trusting(&["127.0.0.0/8"]), one_each());
    let mut first = connect(&gateway, "x-forwarded-for", "192.0.2.1").await.unwrap();
    let mut second = connect(&gateway, "forwarded", "for=192.0.2.2").await.unwrap();
    assert_eq!(connect(&gateway, "x-forwarded-for", "192.0.2.1").await.err(), Some(429));
    assert_eq!(connect(&gateway, "forwarded", "for=\"192.0.2.2:80\"").await.err(), Some(429));
    // What stands to the left was made up by the client.
    assert_eq!(connect(&gateway, "x-forwarded-for", "192.0.2.3, 192.0.2.1").await.err(), Some(429));
    echoes(&mut first, "a").await;
    echoes(&mut second, "b").await;

    // The kernel knows the proxy's connections, so these are what ends.
    let addresses = [address(&first), address(&second)];
    drop((first, second));
    gateway.policy.wait_closed(5).await;
    for address in addresses {
        assert_eq!(gateway.policy.closed(address), 1);
    }
    let _again = connect(&gateway, "x-forwarded-for", "192.0.2.1").await.unwrap();
}

#[tokio::test]
async fn from_anybody_else_the_headers_are_ignored() {
    for config in [quiet(), trusting(&["10.0.0.0/8"])] {
        let gateway = start_with(&config, one_each());
        let _first = connect(&gateway, "x-forwarded-for", "192.0.2.1").await.unwrap();
        assert_eq!(connect(&gateway, "x-forwarded-for", "192.0.2.2").await.err(), Some(429));
        assert_eq!(connect(&gateway, "forwarded", "for=\"broken").await.err(), Some(429));
    }
}

#[tokio::test]
async fn a_header_that_cannot_be_read_is_refused_and_takes_no_slot() {
    let gateway = start_with(&trusting(&["127.0.0.1/32"]), one_each());
    assert_eq!(connect(&gateway, "forwarded", "for=\"192.0.2.9, for=192.0.2.1").await.err(), Some(400));
    gateway.policy.wait_closed(1).await;
    gateway.wait_released().await;
    assert_eq!(gateway.metric("limiter_handshakes_total{result=\"bad_request\"}"), 1);
}

#[tokio::test]
async fn rules_hold_for_the_true_address_and_a_proxy_past_the_limits_hides_nobody() {
    let gateway = start_with(&trusting(&["127.0.0.0/8"]), one_each());
    gateway.policy.denied.lock().unwrap().push("192.0.2.66".parse().unwrap());
    gateway.policy.allowed.lock().unwrap().extend(["127.0.0.1", "192.0.2.9"].map(|ip| ip.parse::<IpAddr>().unwrap()));
    assert_eq!(connect(&gateway, "x-forwarded-for", "192.0.2.66").await.err(), Some(403));
    assert_eq!(gateway.metric("limiter_handshakes_total{result=\"rule\"}"), 1);
    let _any_number = [
        connect(&gateway, "x-forwarded-for", "192.0.2.9").await.unwrap(),
        connect(&gateway, "x-forwarded-for", "192.0.2.9").await.unwrap(),
    ];
    // The kernel lets the proxy past its limit; a client that it does not name has no share in that.
    let _unnamed = connect(&gateway, "x-forwarded-for", "unknown").await.unwrap();
    assert_eq!(connect(&gateway, "x-forwarded-for", "unknown").await.err(), Some(429));
}

/// The log, as text.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn warnings(&self) -> Vec<String> {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        text.lines().filter(|line| line.contains("trusted_proxies")).map(str::to_owned).collect()
    }
}

impl io::Write for Log {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(text)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn capture() -> (Log, tracing::subscriber::DefaultGuard) {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
    (log, tracing::subscriber::set_default(subscriber))
}

#[tokio::test]
async fn a_proxy_that_is_not_trusted_is_warned_of_once_with_what_to_do() {
    let (log, _guard) = capture();
    let gateway = start(&quiet());
    let mut clients = Vec::new();
    for n in 0..9 {
        clients.push(connect(&gateway, "x-forwarded-for", &format!("192.0.2.{n}")).await.unwrap());
    }
    assert_eq!(log.warnings(), [""; 0], "nine are not many");
    for n in 0..9 {
        clients.push(connect(&gateway, "via", &format!("1.1 proxy{n}")).await.unwrap());
    }
    let warnings = log.warnings();
    assert_eq!(warnings.len(), 1, "{warnings:#?}");
    for part in ["source=127.0.0.1/32", "header=\"Via\"", "trusted_proxies = [\"127.0.0.1\"]"] {
        assert!(warnings[0].contains(part), "{}", warnings[0]);
    }
}

#[tokio::test]
async fn a_proxy_at_the_limit_is_warned_of_and_a_trusted_one_or_a_plain_client_is_not() {
    let (log, _guard) = capture();
    let trusted = start_with(&trusting(&["127.0.0.1/32"]), one_each());
    let _one = connect(&trusted, "x-forwarded-for", "127.0.0.1").await.unwrap();
    assert_eq!(connect(&trusted, "x-forwarded-for", "127.0.0.1").await.err(), Some(429));
    let plain = start_with(&quiet(), one_each());
    let _two = connect(&plain, "user-agent", "test").await.unwrap();
    assert_eq!(connect(&plain, "user-agent", "test").await.err(), Some(429));
    assert_eq!(log.warnings(), [""; 0]);

    assert_eq!(connect(&plain, "x-forwarded-for", "192.0.2.1").await.err(), Some(429));
    assert_eq!(log.warnings().len(), 1);
}

#[tokio::test]
async fn behind_a_trusted_proxy_messages_count_by_the_true_address_and_prefix() {
    let messages = config::Messages { rate: 0, rate_per_source: 1, ..config::Messages::default() };
    let limits = Limits { ipv4_prefix: 24, ..unlimited() };
    let gateway = start_with(&config::Gateway { messages, ..trusting(&["127.0.0.0/8"]) }, limits);
    let mut one = connect(&gateway, "x-forwarded-for", "192.0.2.1").await.unwrap();
    let mut neighbour = connect(&gateway, "x-forwarded-for", "192.0.2.9").await.unwrap();
    let mut other = connect(&gateway, "x-forwarded-for", "198.51.100.1").await.unwrap();
    echoes(&mut one, "a").await;
    echoes(&mut other, "b").await;
    neighbour.send(Message::text("c")).await.unwrap();
    assert_eq!(next_close(&mut neighbour).await, (1008, "too many messages over all connections".to_owned()));
}
