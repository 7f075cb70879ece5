//! Settings that change while clients are connected.

use futures_util::{SinkExt, StreamExt};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Message;

use super::support::*;
use crate::{
    config::{self, CertificateFiles, Messages, Tls, UpstreamTls},
    gateway::Settings,
};

fn change(settings: &Settings, config: &config::Gateway) {
    match settings.prepare(config, None) {
        Ok(prepared) => prepared.commit(),
        Err(error) => panic!("{error}"),
    }
}

/// Messages of two hundred bytes at most, and pages of one origin.
fn narrow() -> config::Gateway {
    config::Gateway {
        allowed_origins: vec!["https://example.com".parse().unwrap()],
        messages: Messages { max_size: 200, ..quiet().messages },
        ..quiet()
    }
}

/// The next read writes the answer to the Close frame, and finds the end.
async fn ends(client: &mut Client) {
    assert!(timeout(PATIENCE, client.next()).await.unwrap().is_none());
}

async fn answer(gateway: &Running, origin: &str) -> String {
    let mut request = good_request("/").replace("\r\n\r\n", &format!("\r\nOrigin: {origin}\r\n\r\n")).into_bytes();
    request.extend(frame(0x88, &[]));
    gateway.raw(&request).await
}

#[tokio::test]
async fn new_settings_hold_for_new_connections_and_the_old_ones_keep_theirs() {
    let gateway = start(&quiet());
    let mut before = gateway.connect().await;
    let long = "x".repeat(1000);
    echoes(&mut before, &long).await;
    assert!(answer(&gateway, "https://example.org").await.starts_with("HTTP/1.1 101 "));

    change(&gateway.settings, &narrow());
    assert!(answer(&gateway, "https://example.org").await.starts_with("HTTP/1.1 403 "));
    let mut after = gateway.connect().await;
    echoes(&mut after, "short").await;
    after.send(Message::text(long.as_str())).await.unwrap();
    assert_eq!(next_close(&mut after).await.0, 1009);
    drop(after);
    echoes(&mut before, &long).await;

    // Whoever is open is told of the end, whatever settings it has.
    let mut after = gateway.connect().await;
    echoes(&mut after, "short").await;
    gateway.policy.wait_closed(3).await;
    let ended = gateway.begin_stop();
    for client in [&mut before, &mut after] {
        assert_eq!(next_close(client).await.0, 1001);
        ends(client).await;
    }
    let report = timeout(PATIENCE, ended).await.unwrap().unwrap();
    assert_eq!((report.closed, report.cut), (2, 0));
}

#[tokio::test]
async fn what_is_no_good_changes_nothing() {
    let gateway = start(&narrow());
    let missing = CertificateFiles { certificate: "/no/such.pem".into(), key: "/no/such.key".into() };
    let upstream_tls = UpstreamTls { ca: Some("/no/such.pem".into()), ..UpstreamTls::default() };
    let bad = [
        config::Gateway { upstream: "wss://x".parse().unwrap(), upstream_tls, ..quiet() },
        config::Gateway { tls: Some(Tls { default: missing, hosts: Vec::new() }), ..quiet() },
    ];
    for bad in bad {
        assert!(gateway.settings.prepare(&bad, None).is_err());
        assert!(answer(&gateway, "https://example.org").await.starts_with("HTTP/1.1 403 "));
    }
    // Good ones that nobody puts in force change nothing either.
    drop(gateway.settings.prepare(&quiet(), None));
    assert!(answer(&gateway, "https://example.org").await.starts_with("HTTP/1.1 403 "));
    gateway.stop().await;
}

#[tokio::test]
async fn how_far_a_client_may_be_behind_changes_for_everybody() {
    let gateway = start(&quiet());
    let limit = || gateway.settings.0.borrow().hub.limit();
    assert_eq!(limit(), 256 * 1024);
    change(&gateway.settings, &config::Gateway { push: config::Push { queue: 5000 }, ..quiet() });
    assert_eq!(limit(), 5000);
}
