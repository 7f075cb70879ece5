//! How each refusal comes about.

use std::{ops::RangeInclusive, sync::atomic::Ordering, time::Duration};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use super::{
    super::super::{
        auth, forward_auth,
        overloads::{start_strained, watched},
        support::*,
        tls,
    },
    Row, Told,
};
use crate::{
    config::{self, OnExcess, new_api_key},
    gateway::auth::signing::{Signer, now},
    policy::Limits,
};

const UPGRADE: &[&str] = &["upgrade: websocket", "connection: close, upgrade", "sec-websocket-version: 13"];
const CHALLENGE: &[&str] = &["www-authenticate: bearer realm=\"limiter\""];
const INVALID_TOKEN: &[&str] = &["www-authenticate: bearer realm=\"limiter\", error=\"invalid_token\""];

/// Requests that say nothing wrong of themselves, or all of it.
pub(super) fn plain_rows() -> Vec<Row> {
    let good = good_request("/");
    let quietly = || start(&quiet());
    let impatient = || start(&config::Gateway { handshake_timeout: Duration::from_millis(50), ..quiet() });
    let allowed_origins = vec!["https://example.com".parse().unwrap()];
    let origins = start(&config::Gateway { allowed_origins, ..quiet() });
    let foreign = good.replace("\r\n\r\n", "\r\nOrigin: https://example.org\r\n\r\n");
    let (denying, hidden) = behind_a_proxy(unlimited());
    denying.policy.denied.lock().unwrap().push(HIDDEN.parse().unwrap());
    let long = good.replace("\r\n\r\n", &format!("\r\nX-Long: {}\r\n\r\n", "x".repeat(20_000)));
    vec![
        Row::new("not_websocket", 426, "WebSocket only", quietly(), "GET / HTTP/1.1\r\nHost: x\r\n\r\n").lines(UPGRADE),
        Row::new("version", 426, "version 13", quietly(), good.replace(": 13", ": 8")).lines(UPGRADE),
        Row::new("bad_request", 400, "GET request", quietly(), good.replace("GET", "PUT")),
        Row::new("malformed", 400, "no HTTP/1.1 request", quietly(), "GET / HTTP/1.1\r\nno colon\r\n\r\n"),
        Row::new(
            "malformed",
            414,
            "longer than",
            quietly(),
            good.replace("GET /", &format!("GET /{}", "x".repeat(20_000))),
        ),
        Row::new("malformed", 505, "HTTP/1.1 only", quietly(), "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        Row::new("malformed", 431, "longer than", quietly(), long),
        Row::new("timeout", 408, "not complete in time", impatient(), "GET / HTTP/1.1\r\nHost: x\r\n"),
        Row::new("timeout", 408, "not complete in time", impatient(), ""),
        Row::new("origin", 403, "https://example.org", origins, foreign),
        Row::new("rule", 403, "from your address", denying, hidden),
    ]
}

/// A client that the kernel does not see.
const HIDDEN: &str = "192.0.2.7";

/// A gateway that takes our word on who the client is, and what such a client asks.
fn behind_a_proxy(limits: Limits) -> (Running, String) {
    let trusted_proxies = vec!["127.0.0.0/8".parse().unwrap()];
    let gateway = start_with(&config::Gateway { trusted_proxies, ..quiet() }, limits);
    (gateway, good_request("/").replace("\r\n\r\n", &format!("\r\nX-Forwarded-For: {HIDDEN}\r\n\r\n")))
}

/// Too many of something.
pub(super) async fn full_rows() -> Vec<Row> {
    let good = good_request("/");
    let strained = start_strained(&watched());
    strained.memory_is(99, 10).await;
    let limited = |limits| start_with(&quiet(), limits);
    let source = limited(Limits { connections_per_source: 1, ..unlimited() });
    let in_source = shaken(&source).await;
    let service = limited(Limits { connections_total: 1, ..unlimited() });
    let in_service = shaken(&service).await;
    let route = config::Route { connections: 1, ..route("/") };
    let routed = start(&config::Gateway { routes: vec![route], ..quiet() });
    let on_route = shaken(&routed).await;
    let (fast, hidden) = behind_a_proxy(Limits { connection_rate: 1, connection_burst: 1, ..unlimited() });
    let (busy, _) = behind_a_proxy(Limits {
        connection_rate: 0,
        service_connection_rate: 1,
        service_connection_burst: 1,
        ..unlimited()
    });
    busy.policy.is_alone.store(true, Ordering::Relaxed);
    let together = limited(Limits { connections_total_all: 1, ..unlimited() });
    let in_all = shaken(&together).await;
    vec![
        Row::new("source_full", 429, "1 at a time", source, good.clone()).retry(5..=10).holding(in_source),
        Row::new("source_rate", 429, "from your address at once", fast, hidden.clone()).retry(1..=3),
        Row::new("service_rate", 503, "to this service at once", busy, hidden).retry(1..=3),
        Row::new("overloaded", 503, "overloaded", strained.gateway, good.clone())
            .retry(5..=45)
            .holding(strained.memory),
        Row::new("total_full", 503, "no room", together, good.clone()).retry(5..=15).holding(in_all),
        Row::new("service_full", 503, "no room", service, good.clone()).retry(5..=15).holding(in_service),
        Row::new("service_full", 503, "no room", routed, good).retry(5..=15).holding(on_route),
    ]
}

const UNAUTHORIZED: &str =
    "HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"x\"\r\nContent-Length: 0\r\n\r\n";
const BARE: &str = "HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n";
const FORBIDDEN: &str = "HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n";
const BROKEN: &str = "HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n";

/// Clients that must show who they are.
pub(super) async fn auth_rows() -> Vec<Row> {
    let mut rows = Vec::new();
    let with =
        |token: &str| good_request("/").replace("\r\n\r\n", &format!("\r\nAuthorization: Bearer {token}\r\n\r\n"));

    let mut setup = auth::Setup::new();
    let jwt = setup.auth.jwt.as_mut().unwrap();
    jwt.issuers = vec!["us".into()];
    jwt.audiences = vec!["chat".into()];
    let (_, entry) = new_api_key("robot", None, None, None).unwrap();
    let keys = setup.folder.path().join("keys.toml");
    std::fs::write(&keys, entry).unwrap();
    setup.auth.api_keys = Some(keys);
    let claims = |change: Value| {
        let mut claims = json!({"sub": "alice", "exp": now() + 60, "iss": "us", "aud": "chat"});
        claims.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        claims
    };
    let token = |change: Value| setup.signer.token(&claims(change));
    let shown = [
        ("token_malformed", "is not one that this server takes", "nonsense".to_owned()),
        ("token_signature", "not signed by a key", Signer::es256().token(&claims(json!({})))),
        ("key_unknown", "does not know the API key", new_api_key("other", None, None, None).unwrap().0),
        ("token_expired", "has expired", token(json!({"exp": now() - 60}))),
        ("token_not_yet", "not valid yet", token(json!({"nbf": now() + 600}))),
        ("token_issuer", "issuer", token(json!({"iss": "them"}))),
        ("token_audience", "not for this server", token(json!({"aud": "mail"}))),
        ("token_user", "names no user", token(json!({"sub": ""}))),
    ];
    let gateway = || start(&setup.config());
    rows.push(Row::new("no_token", 401, "with a token only", gateway(), good_request("/")).lines(CHALLENGE));
    for (name, detail, token) in shown {
        rows.push(Row::new(name, 401, detail, gateway(), with(&token)).lines(INVALID_TOKEN));
    }

    for (name, connections, attempts, retry) in [("user_full", 1, 0, 5..=10), ("user_attempts", 0, 1, 1..=61)] {
        let mut setup = auth::Setup::new();
        setup.auth.users = auth::users(connections, OnExcess::Refuse, attempts);
        let gateway = start(&setup.config());
        let request = with(&setup.signer.token_of("alice", 60));
        let mut first = TcpStream::connect(gateway.addr).await.unwrap();
        first.write_all(request.as_bytes()).await.unwrap();
        assert!(read_head(&mut first).await.starts_with("HTTP/1.1 101 "));
        rows.push(Row::new(name, 429, "of your user", gateway, request).retry(retry).holding((setup, first)));
    }

    let basic: &[&str] = &["www-authenticate: basic realm=\"x\""];
    for (answer, status, lines) in [(UNAUTHORIZED, 401, basic), (BARE, 401, CHALLENGE), (FORBIDDEN, 403, &[])] {
        let service = forward_auth::Service::start(answer).await;
        let gateway = start(&service.config());
        rows.push(
            Row::new("auth_refused", status, "does not take this client", gateway, good_request("/")).lines(lines),
        );
    }
    let service = forward_auth::Service::start(BROKEN).await;
    let gateway = start(&service.config());
    rows.push(Row::new("auth_unavailable", 503, "could not be found out", gateway, good_request("/")).retry(5..=15));
    rows
}

/// An upstream that gives one answer to everybody; none: never any.
async fn upstream(answer: &'static str) -> config::Upstream {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                read_head(&mut stream).await;
                _ = stream.write_all(answer.as_bytes()).await;
                // Until the gateway has had enough of it.
                _ = stream.read(&mut [0]).await;
            });
        }
    });
    format!("ws://{addr}").parse().unwrap()
}

/// What the client's status is, what the upstream answers, what Retry-After says, and what other lines there are.
type Answer = (u16, &'static str, Option<RangeInclusive<u16>>, &'static [&'static str]);

/// What is wrong with the upstream.
pub(super) async fn upstream_rows() -> Vec<Row> {
    let good = good_request("/");
    let nobody = {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        format!("ws://{}", listener.local_addr().unwrap()).parse().unwrap()
    };
    let to = |upstream| start(&config::Gateway { upstream, ..quiet() });
    let impatient =
        |upstream| start(&config::Gateway { upstream, handshake_timeout: Duration::from_millis(300), ..quiet() });
    let mut rows = vec![
        Row::new("upstream_unreachable", 502, "cannot be reached", to(nobody), good.clone()),
        Row::new("upstream_unreachable", 502, "cannot be reached", to(upstream("SSH-2.0-x\r\n").await), good.clone()),
        Row::new("upstream_timeout", 504, "in time", impatient(upstream("").await), good.clone()),
    ];
    let answers: [Answer; 4] = [
        (
            401,
            "HTTP/1.1 401 No\r\nWWW-Authenticate: Basic realm=\"x\"\r\nContent-Length: 0\r\n\r\n",
            None,
            &["www-authenticate: basic realm=\"x\""],
        ),
        (404, "HTTP/1.1 404 No\r\nContent-Length: 2\r\n\r\nno", None, &[]),
        (503, "HTTP/1.1 503 Later\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n", Some(7..=7), &[]),
        (502, "HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n", None, &[]),
    ];
    for (status, answer, retry_after, lines) in answers {
        let row =
            Row::new("upstream_refused", status, "refused the connection", to(upstream(answer).await), good.clone());
        rows.push(Row { retry_after, ..row.lines(lines) });
    }
    rows
}

/// What comes ahead of a request.
pub(super) fn arrival_rows() -> Vec<Row> {
    let trusted_proxies = vec!["127.0.0.0/8".parse().unwrap()];
    let proxied = start(&config::Gateway { proxy_protocol: true, trusted_proxies, ..quiet() });
    let setup = tls::Setup::new("localhost");
    let (plain, broken) = (start(&setup.config()), start(&setup.config()));
    vec![
        Row::new("proxy_header", 400, "", proxied, good_request("/")).told(Told::End),
        Row::new("not_tls", 400, "wss://", plain, good_request("/")),
        Row::new("tls", 400, "", broken, b"\x16\x09\x09\x00\x04none").told(Told::Alert),
    ]
}
