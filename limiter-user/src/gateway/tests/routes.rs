//! Routes: what holds for some paths and hosts.

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use tokio::net::TcpListener;
use tokio_tungstenite::tungstenite::{Error, Message};

use super::support::*;
use crate::{
    config::{self, Auth, Forward, Messages, Route},
    policy::Limits,
};

fn route(path: &str) -> Route {
    Route {
        path: path.into(),
        exact: false,
        host: None,
        upstream: None,
        auth: true,
        exempt: false,
        connections: 0,
        messages: Messages { rate: 0, ..Messages::default() },
    }
}

async fn connect(gateway: &Running, path: &str) -> Result<Client, u16> {
    match tokio_tungstenite::connect_async(format!("ws://{}{path}", gateway.addr)).await {
        Ok((client, _)) => Ok(client),
        Err(Error::Http(response)) => Err(response.status().as_u16()),
        Err(e) => panic!("neither admitted nor refused: {e}"),
    }
}

#[tokio::test]
async fn a_route_has_its_own_upstream_and_limits() {
    let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("ws://{}", upstream.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((stream, _)) = upstream.accept().await {
            tokio::spawn(async move {
                let mut server = tokio_tungstenite::accept_async(stream).await.unwrap();
                server.send(Message::text("from the upstream")).await.unwrap();
                while server.next().await.is_some() {}
            });
        }
    });
    let small = Messages { max_size: 10, ..route("/").messages };
    let routes = vec![
        Route { upstream: Some(url.parse().unwrap()), ..route("/app") },
        Route { connections: 1, messages: small, ..route("/small") },
    ];
    let gateway = start(&config::Gateway { routes, ..quiet() });
    let mut app = connect(&gateway, "/app/1").await.unwrap();
    assert_eq!(next(&mut app).await, Message::text("from the upstream"));
    let mut other = connect(&gateway, "/other").await.unwrap();
    echoes(&mut other, "longer than ten").await;

    let mut small = connect(&gateway, "/small").await.unwrap();
    assert_eq!(connect(&gateway, "/small/x").await.err(), Some(503), "it has one session");
    echoes(&mut small, "short").await;
    small.send(Message::text("longer than ten")).await.unwrap();
    assert_eq!(next_close(&mut small).await.0, 1009);
    drop(small);
    let again = async {
        while connect(&gateway, "/small").await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, again).await.expect("its place is free again");
    let answer = gateway.raw(good_request("/small/../app").as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
}

#[tokio::test]
async fn a_route_may_do_without_authentication_and_limits_and_others_do_not() {
    // A service that nobody answers for: whoever is asked about gets 503.
    let url = "http://127.0.0.1:1/".parse().unwrap();
    let forward = Forward { url, timeout: Duration::from_secs(5), user_header: "X-User".into() };
    let auth = Some(Auth { forward: Some(forward), ..Auth::default() });
    let routes =
        vec![Route { auth: false, ..route("/public") }, Route { auth: false, exempt: true, ..route("/federation") }];
    let limits = Limits { connections_per_source: 1, connections_total: 1, ..unlimited() };
    let gateway = start_with(&config::Gateway { auth, routes, ..quiet() }, limits);
    let _public = connect(&gateway, "/public").await.unwrap();
    assert_eq!(connect(&gateway, "/public").await.err(), Some(429));
    let mut exempt = Vec::new();
    for _ in 0..3 {
        exempt.push(connect(&gateway, "/federation").await.unwrap());
    }
    gateway.policy.set(unlimited());
    for path in ["/", "/publicity", "/private"] {
        assert_eq!(connect(&gateway, path).await.err(), Some(503), "{path}");
    }
    for path in ["/public/..;/private", "/public/%2e%2e/private", "/public//x"] {
        let answer = gateway.raw(good_request(path).as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{path}: {answer}");
    }
}
