//! A handshake that does not become a session.

mod rows;

use std::{any::Any, io::ErrorKind, ops::RangeInclusive, sync::Arc};

use http_body_util::{BodyExt, Full};
use hyper::{Request, StatusCode};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tower_layer::Layer as _;
use tower_service::Service as _;

use super::{super::support::*, assert_each_has_a_row, names};
use crate::{
    gateway::{
        answer::Refusal,
        auth::{Crowded, Rejection},
    },
    guard::AdmitLayer,
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
    let mut rows = rows::plain_rows();
    rows.extend(rows::full_rows().await);
    rows.extend(rows::auth_rows().await);
    rows.extend(rows::upstream_rows().await);
    rows.extend(rows::arrival_rows());
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
