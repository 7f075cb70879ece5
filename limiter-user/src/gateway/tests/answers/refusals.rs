//! A handshake that does not become a session.

use std::{
    any::Any,
    io::ErrorKind,
    ops::RangeInclusive,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use http_body_util::{BodyExt, Full};
use hyper::{Request, StatusCode};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tower_layer::Layer as _;
use tower_service::Service as _;

use super::{
    super::{
        auth, forward_auth,
        overloads::{start_strained, watched},
        support::*,
        tls,
    },
    assert_each_has_a_row, names,
};
use crate::{
    config::{self, OnExcess, new_api_key},
    gateway::{
        answer::Refusal,
        auth::{
            Crowded, Rejection,
            signing::{Signer, now},
        },
    },
    guard::AdmitLayer,
    policy::Limits,
};

/// How a client is told.
enum Told {
    /// By an HTTP answer.
    Http,
    /// In TLS, which is all that a client that gets no further in it understands.
    Alert,
    /// By nothing but the end of the connection.
    End,
}

/// One refusal.
struct Row {
    /// What the metrics call it.
    name: &'static str,
    status: u16,
    /// Part of what the body says.
    detail: &'static str,
    told: Told,
    /// The seconds that Retry-After may say; none: it is not there.
    retry_after: Option<RangeInclusive<u16>>,
    /// Further lines of the answer's head, or parts of them.
    lines: &'static [&'static str],
    /// There until it is drained.
    gateway: Option<Running>,
    request: Vec<u8>,
    /// What the refusal depends on.
    _held: Box<dyn Any>,
}

impl Row {
    fn new(
        name: &'static str,
        status: u16,
        detail: &'static str,
        gateway: Running,
        request: impl Into<Vec<u8>>,
    ) -> Self {
        let request = request.into();
        Self {
            name,
            status,
            detail,
            told: Told::Http,
            retry_after: None,
            lines: &[],
            gateway: Some(gateway),
            request,
            _held: Box::new(()),
        }
    }

    fn retry(self, seconds: RangeInclusive<u16>) -> Self {
        Self { retry_after: Some(seconds), ..self }
    }

    fn lines(self, lines: &'static [&'static str]) -> Self {
        Self { lines, ..self }
    }

    fn told(self, told: Told) -> Self {
        Self { told, ..self }
    }

    fn holding(self, held: impl Any) -> Self {
        Self { _held: Box::new(held), ..self }
    }
}

const UPGRADE: &[&str] = &["upgrade: websocket", "connection: close, upgrade", "sec-websocket-version: 13"];
const CHALLENGE: &[&str] = &["www-authenticate: bearer realm=\"limiter\""];
const INVALID_TOKEN: &[&str] = &["www-authenticate: bearer realm=\"limiter\", error=\"invalid_token\""];

/// Requests that say nothing wrong of themselves, or all of it.
fn plain_rows() -> Vec<Row> {
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
async fn full_rows() -> Vec<Row> {
    let good = good_request("/");
    let strained = start_strained(&watched());
    strained.memory_is(99, 10).await;
    let limited = |limits| start_with(&quiet(), limits);
    let source = limited(Limits { connections_per_source: 1, ..unlimited() });
    let in_source = shaken(&source).await;
    let service = limited(Limits { connections_total: 1, ..unlimited() });
    let in_service = shaken(&service).await;
    let route = config::Route {
        path: "/".into(),
        exact: false,
        host: None,
        upstream: None,
        auth: true,
        exempt: false,
        connections: 1,
        messages: quiet().messages,
    };
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
async fn auth_rows() -> Vec<Row> {
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
async fn upstream_rows() -> Vec<Row> {
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
fn arrival_rows() -> Vec<Row> {
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

/// Checks an answer to its last byte.
fn check_http(row: &Row, answer: &str) {
    let Row { name, status, detail, .. } = row;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{name}: no answer: {answer:?}"));
    let status_line = format!("HTTP/1.1 {status} ");
    assert!(head.starts_with(&status_line), "{name}: {answer}");
    let head = head.to_ascii_lowercase();
    let lines: Vec<&str> = head.lines().skip(1).collect();
    let count = |start: &str| lines.iter().filter(|line| line.starts_with(start)).count();
    assert_eq!(count("content-type: "), 1, "{name}: {head}");
    for line in
        ["content-type: application/problem+json", "connection: close", &format!("content-length: {}", body.len())]
    {
        assert_eq!(count(line), 1, "{name}: {line} in {head}");
    }
    for line in row.lines {
        assert_eq!(count(line), 1, "{name}: {line} in {head}");
    }
    assert_eq!(count("www-authenticate: "), usize::from(*status == 401), "{name}: {head}");
    let retry: Vec<u16> =
        lines.iter().filter_map(|line| line.strip_prefix("retry-after: ")).map(|s| s.parse().unwrap()).collect();
    match &row.retry_after {
        None => assert!(retry.is_empty(), "{name}: {head}"),
        Some(seconds) => assert!(matches!(*retry, [one] if seconds.contains(&one)), "{name}: {head}"),
    }
    check_problem(name, *status, detail, &serde_json::from_str(body).unwrap_or_else(|e| panic!("{name}: {e}: {body}")));
}

/// RFC 9457.
fn check_problem(name: &str, status: u16, detail: &str, body: &Value) {
    assert_eq!(body["type"], "about:blank", "{name}");
    assert_eq!(body["status"], status, "{name}");
    let title = StatusCode::from_u16(status).unwrap().canonical_reason().unwrap();
    assert_eq!(body["title"], title, "{name}");
    assert!(body["detail"].as_str().unwrap().contains(detail), "{name}: {body}");
}

/// Makes the refusal, and looks at all that the client sees.
async fn check(row: Row) -> &'static str {
    if row.name.ends_with("_rate") {
        // On a slow machine the second that the next one has to wait for may be over already.
        let gateway = row.gateway.as_ref().unwrap();
        while gets_in(gateway, &row.request).await {}
    }
    let name = row.name;
    let gateway = row.gateway.as_ref().unwrap();
    let (policy, metric) = (Arc::clone(&gateway.policy), gateway.sampler());
    let count = format!("limiter_handshakes_total{{result=\"{name}\"}}");
    let before = metric(&count);
    let mut stream = TcpStream::connect(gateway.addr).await.unwrap();
    let remote = stream.local_addr().unwrap();
    stream.write_all(&row.request).await.unwrap();
    let is_whole = !row.request.is_empty() && !matches!((name, &row.told), ("timeout", _) | (_, Told::End));
    if is_whole {
        // Nobody reads that. A gateway that closes with it unread resets the connection, and the client loses its answer.
        stream.write_all("x".repeat(40_000).as_bytes()).await.unwrap();
    }
    let answer = until_the_end(&mut stream, name).await;
    match row.told {
        Told::Http => check_http(&row, &String::from_utf8_lossy(&answer)),
        Told::Alert => assert!(matches!(*answer, [21, 3, _, 0, 2, 2, _]), "{name}: {answer:?}"),
        Told::End => assert!(answer.is_empty(), "{name}: {answer:?}"),
    }
    drop(stream);
    eventually("the policy is told", || policy.closed(remote) > 0).await;
    assert_eq!(policy.closed(remote), 1, "{name}");
    assert_eq!(metric(&count), before + 1, "{name}");
    name
}

/// Whether a client that asks so gets in.
async fn gets_in(gateway: &Running, request: &[u8]) -> bool {
    gateway.raw(&[request, &frame(0x88, &[])].concat()).await.starts_with("HTTP/1.1 101 ")
}

async fn until_the_end(stream: &mut TcpStream, name: &str) -> Vec<u8> {
    let mut answer = Vec::new();
    let ended = timeout(PATIENCE, stream.read_to_end(&mut answer)).await;
    match ended.unwrap_or_else(|_| panic!("{name}: no end")) {
        Ok(_) => {}
        // Who is told nothing can lose nothing.
        Err(e) if e.kind() == ErrorKind::ConnectionReset && answer.is_empty() && name == "proxy_header" => {}
        Err(e) => panic!("{name}: {e}; what was answered may be lost"),
    }
    answer
}

/// The same for a client that has to be connected when the drain begins.
async fn check_draining() -> &'static str {
    let mut row = Row::new("draining", 503, "shutting down", start(&quiet()), good_request("/")).retry(1..=5);
    let gateway = row.gateway.take().unwrap();
    let mut stream = TcpStream::connect(gateway.addr).await.unwrap();
    // Accepted in order: once a later one is served, it is in.
    echoes(&mut gateway.connect().await, "in").await;
    let metric = gateway.sampler();
    let ended = gateway.begin_stop();
    stream.write_all(&row.request).await.unwrap();
    let answer = until_the_end(&mut stream, row.name).await;
    check_http(&row, str::from_utf8(&answer).unwrap());
    timeout(PATIENCE, ended).await.unwrap().unwrap();
    assert_eq!(metric("limiter_handshakes_total{result=\"draining\"}"), 1);
    row.name
}

/// The one that the gateway never gives: by the guard, to a request of nobody.
async fn check_unguarded() -> &'static str {
    let inner = tower::service_fn(|_: Request<()>| async {
        Ok::<_, std::convert::Infallible>(hyper::Response::new(Full::<bytes::Bytes>::default()))
    });
    let answer = AdmitLayer.layer(inner).call(Request::new(())).await.unwrap();
    assert_eq!(answer.status(), 500);
    assert_eq!(answer.headers()["content-type"], "application/problem+json");
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    check_problem("unguarded", 500, "not set up correctly", &serde_json::from_slice(&body).unwrap());
    "unguarded"
}

#[tokio::test]
async fn each_refusal_has_its_status_headers_and_body_and_the_client_gets_them_whole() {
    let mut rows = plain_rows();
    rows.extend(full_rows().await);
    rows.extend(auth_rows().await);
    rows.extend(upstream_rows().await);
    rows.extend(arrival_rows());
    let mut seen = futures_util::future::join_all(rows.into_iter().map(check)).await;
    seen.push(check_draining().await);
    seen.push(check_unguarded().await);

    let names = names!(Refusal {
        Refusal::NotWebSocket => "not_websocket",
        Refusal::Version => "version",
        Refusal::Bad(_) => "bad_request",
        Refusal::Malformed(_) => "malformed",
        Refusal::Timeout => "timeout",
        Refusal::Origin(_) => "origin",
        Refusal::Unauthenticated(Rejection::Missing) => "no_token",
        Refusal::Unauthenticated(Rejection::Malformed) => "token_malformed",
        Refusal::Unauthenticated(Rejection::Signature) => "token_signature",
        Refusal::Unauthenticated(Rejection::Key) => "key_unknown",
        Refusal::Unauthenticated(Rejection::Expired) => "token_expired",
        Refusal::Unauthenticated(Rejection::NotYet) => "token_not_yet",
        Refusal::Unauthenticated(Rejection::Issuer) => "token_issuer",
        Refusal::Unauthenticated(Rejection::Audience) => "token_audience",
        Refusal::Unauthenticated(Rejection::User) => "token_user",
        Refusal::Crowded(Crowded::Connections(_)) => "user_full",
        Refusal::Crowded(Crowded::Attempts(_)) => "user_attempts",
        Refusal::ForwardRefused(..) => "auth_refused",
        Refusal::ForwardUnavailable(_) => "auth_unavailable",
        Refusal::Denied => "rule",
        Refusal::ProxyHeader(_) => "proxy_header",
        Refusal::Tls(_) => "tls",
        Refusal::NotTls => "not_tls",
        Refusal::SourceFull(_) => "source_full",
        Refusal::SourceRate => "source_rate",
        Refusal::ServiceFull => "service_full",
        Refusal::AllFull => "total_full",
        Refusal::Overloaded => "overloaded",
        Refusal::ServiceRate => "service_rate",
        Refusal::Draining => "draining",
        Refusal::Unguarded => "unguarded",
        Refusal::UpstreamUnreachable(_) => "upstream_unreachable",
        Refusal::UpstreamTimeout => "upstream_timeout",
        Refusal::UpstreamRefused(..) => "upstream_refused",
    });
    assert_each_has_a_row(&names, seen);
}
