//! The control of a running gateway with real clients, over real HTTP.

use std::{fs, sync::Arc};

use futures_util::StreamExt as _;
use serde_json::{Value, json};
use tempfile::NamedTempFile;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::timeout,
};
use tokio_tungstenite::tungstenite::Message;

use super::{super::*, *};
use crate::{config, gateway::Gateway, policy};

const PATIENCE: Duration = Duration::from_secs(20);
const SECRET: &str = "0123456789abcdef0123456789abcdef";

struct Setup {
    admin: SocketAddr,
    rooms: SocketAddr,
    echo: SocketAddr,
    secret: NamedTempFile,
    _running: JoinSet<()>,
}

/// Two gateways, one with rooms and one that echoes, and what controls both.
async fn setup() -> Setup {
    let secret = NamedTempFile::new().unwrap();
    fs::write(&secret, format!("{SECRET}\n")).unwrap();
    let mut control = Control::new(secret.path()).unwrap();
    let mut running = JoinSet::new();
    let mut start = |upstream| {
        let config =
            config::Gateway { listen: vec!["127.0.0.1:0".parse().unwrap()], upstream, ..config::Gateway::default() };
        let policy = policy::Fixed::new(policy::Limits { connections_per_source: 0, ..policy::Limits::default() }, &[]);
        let gateway = Gateway::bind(&config, Arc::new(policy), Arc::default()).unwrap();
        let address = gateway.local_addrs()[0];
        control.lead_to(gateway.push());
        running.spawn(async { _ = gateway.run(std::future::pending()).await });
        address
    };
    let (rooms, echo) = (start(config::Upstream::Broadcast), start(config::Upstream::Echo));
    let admin = Admin::bind(([127, 0, 0, 1], 0).into()).await.unwrap();
    let admin = admin.showing(Metrics::default(), Readiness::default(), Arc::default(), Some(control));
    let address = admin.local_addr();
    running.spawn(admin.run(std::future::pending()));
    Setup { admin: address, rooms, echo, secret, _running: running }
}

/// Status, head and body of the answer to a request as it is.
async fn ask(admin: SocketAddr, request: &[u8]) -> (u16, String, Value) {
    let mut stream = TcpStream::connect(admin).await.unwrap();
    // The server may have answered before it has all.
    _ = stream.write_all(request).await;
    let mut answer = Vec::new();
    _ = timeout(PATIENCE, stream.read_to_end(&mut answer)).await.expect("an answer");
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {answer:?}"));
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, head.to_lowercase(), serde_json::from_str(body).unwrap_or(Value::Null))
}

fn request(method: &str, path: &str, headers: &str, body: &str) -> Vec<u8> {
    format!(
        "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:9180\r\nConnection: close\r\n{headers}Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

fn authorized() -> String {
    format!("Authorization: Bearer {SECRET}\r\nContent-Type: application/json\r\n")
}

impl Setup {
    async fn call(&self, path: &str, body: &Value) -> (u16, Value) {
        let (status, _, document) = ask(self.admin, &request("POST", path, &authorized(), &body.to_string())).await;
        (status, document)
    }

    async fn get(&self, path: &str) -> (u16, Value) {
        let (status, _, document) = ask(self.admin, &request("GET", path, &authorized(), "")).await;
        (status, document)
    }
}

type Client = tokio_tungstenite::WebSocketStream<tokio_tungstenite::MaybeTlsStream<TcpStream>>;

async fn join(address: SocketAddr, path: &str) -> Client {
    tokio_tungstenite::connect_async(format!("ws://{address}{path}")).await.unwrap().0
}

async fn next(client: &mut Client) -> Message {
    timeout(PATIENCE, client.next()).await.expect("a message").unwrap().unwrap()
}

#[tokio::test]
async fn messages_reach_whom_they_are_for() {
    let setup = setup().await;
    let mut a = join(setup.rooms, "/caf%C3%A9").await;
    let mut b = join(setup.rooms, "/b").await;
    let mut c = join(setup.echo, "/b").await;
    let publish = async |body: Value, receivers: u32| {
        assert_eq!(setup.call("/v1/publish", &body).await, (200, json!({ "receivers": receivers })), "{body}");
    };
    publish(json!({ "to": { "room": "/café" }, "text": "one" }), 1).await;
    publish(json!({ "to": { "room": "/caf%C3%A9" }, "binary": "AP8=" }), 1).await;
    publish(json!({ "to": { "room": "/nobody" }, "text": "x" }), 0).await;
    publish(json!({ "to": { "user": "alice" }, "text": "x" }), 0).await;
    publish(json!({ "to": { "room": "/b" }, "text": "two" }), 1).await;
    publish(json!({ "to": { "all": true }, "text": "" }), 3).await;
    for (client, expected) in [
        (&mut a, vec![Message::text("one"), Message::binary(vec![0, 255]), Message::text("")]),
        (&mut b, vec![Message::text("two"), Message::text("")]),
        (&mut c, vec![Message::text("")]),
    ] {
        for message in expected {
            assert_eq!(next(client).await, message);
        }
    }
    let long = "x".repeat(1_000_000);
    publish(json!({ "to": { "room": "/b" }, "text": long }), 1).await;
    assert_eq!(next(&mut b).await, Message::text(long));
}

#[tokio::test]
async fn rooms_and_users_are_listed_in_pages() {
    let setup = setup().await;
    let mut clients = Vec::new();
    for path in ["/a", "/b", "/b", "/c"] {
        clients.push(join(setup.rooms, path).await);
    }
    let all = json!({
        "rooms": [{ "room": "/a", "members": 1 }, { "room": "/b", "members": 2 }, { "room": "/c", "members": 1 }],
        "next": null,
    });
    assert_eq!(setup.get("/v1/rooms").await, (200, all.clone()));
    assert_eq!(setup.get("/v1/rooms?limit=3").await.1, all);
    let first = json!({ "rooms": [{ "room": "/a", "members": 1 }], "next": "/a" });
    assert_eq!(setup.get("/v1/rooms?limit=1").await, (200, first));
    let rest = json!({ "rooms": [{ "room": "/c", "members": 1 }], "next": null });
    assert_eq!(setup.get("/v1/rooms?limit=1&after=%2Fb").await, (200, rest));
    assert_eq!(setup.get("/v1/users").await, (200, json!({ "users": [], "next": null })));
    for query in ["limit=0", "limit=1001", "limit=x", "page=2"] {
        assert_eq!(setup.get(&format!("/v1/rooms?{query}")).await.0, 400, "{query}");
    }
}

#[tokio::test]
async fn each_bad_request_gets_its_problem() {
    let setup = setup().await;
    let json = "Content-Type: application/json\r\n";
    let wrong = "Authorization: Bearer 0123456789abcdef0123456789abcdee\r\n";
    let good = authorized();
    let twice = format!("{good}Authorization: Bearer {SECRET}\r\n");
    let text = good.replace("json", "x-www-form-urlencoded");
    let page = format!("{good}Origin: http://127.0.0.1:9180\r\n");
    let fetched = format!("{good}Sec-Fetch-Site: same-origin\r\n");
    let publish = r#"{"to": {"all": true}, "text": "x"}"#;
    let cases: Vec<(u16, &str, &str, &str, &str)> = vec![
        (401, "POST", "/v1/publish", json, publish),
        (401, "POST", "/v1/publish", wrong, publish),
        (401, "POST", "/v1/publish", "Authorization: Basic eDp5\r\n", publish),
        (401, "POST", "/v1/publish", &twice, publish),
        (401, "GET", "/v1/nothing", json, ""),
        (403, "POST", "/v1/publish", &page, publish),
        (403, "GET", "/v1/rooms", &fetched, ""),
        (404, "GET", "/v1/nothing", &good, ""),
        (404, "POST", "/v1/publish/", &good, publish),
        (405, "GET", "/v1/publish", &good, ""),
        (405, "DELETE", "/v1/disconnect", &good, ""),
        (405, "POST", "/v1/rooms", &good, ""),
        (415, "POST", "/v1/publish", &text, publish),
        (400, "POST", "/v1/publish", &good, ""),
        (400, "POST", "/v1/publish", &good, "[]"),
        (400, "POST", "/v1/publish", &good, r#"{"to": {"all": true}, "text": "x""#),
        (400, "POST", "/v1/publish", &good, r#"{"to": {"all": true}}"#),
        (400, "POST", "/v1/publish", &good, r#"{"to": {"all": true}, "text": "x", "binary": "eA=="}"#),
        (400, "POST", "/v1/publish", &good, r#"{"to": {"all": true}, "binary": "eA"}"#),
        (400, "POST", "/v1/publish", &good, r#"{"to": {"all": true}, "text": "x", "more": 1}"#),
        (400, "POST", "/v1/publish", &good, r#"{"to": {"all": false}, "text": "x"}"#),
        (400, "POST", "/v1/publish", &good, r#"{"to": {}, "text": "x"}"#),
        (400, "POST", "/v1/publish", &good, r#"{"to": {"all": true, "room": "/a"}, "text": "x"}"#),
        (400, "POST", "/v1/publish", &good, r#"{"to": {"room": "lobby"}, "text": "x"}"#),
        (400, "POST", "/v1/publish", &good, r#"{"to": {"room": "/a/../b"}, "text": "x"}"#),
        (400, "POST", "/v1/publish", &good, r#"{"to": {"user": ""}, "text": "x"}"#),
        (400, "POST", "/v1/publish", &good, "{\"to\": {\"all\": true}, \"text\": \"\u{0}\"}"),
        (400, "POST", "/v1/disconnect", &good, "{}"),
        (400, "POST", "/v1/disconnect", &good, r#"{"user": "a\nb"}"#),
        (400, "POST", "/v1/disconnect", &good, r#"{"user": "alice", "code": 1005}"#),
        (400, "POST", "/v1/disconnect", &good, r#"{"user": "alice", "code": 70000}"#),
    ];
    for (expected, method, path, headers, body) in cases {
        let (status, head, problem) = ask(setup.admin, &request(method, path, headers, body)).await;
        let case = format!("{method} {path} {headers:?} {body}");
        assert_eq!(status, expected, "{case}: {problem}");
        assert!(head.contains("content-type: application/problem+json"), "{case}: {head}");
        assert_eq!(problem["status"], expected, "{case}");
        assert!(problem["detail"].as_str().is_some_and(|detail| !detail.contains(SECRET)), "{case}");
        assert_eq!(head.contains("www-authenticate: bearer"), expected == 401, "{case}");
        assert_eq!(head.contains("allow: "), expected == 405, "{case}");
    }
    let reason = json!({ "user": "alice", "reason": "x".repeat(124) });
    assert_eq!(setup.call("/v1/disconnect", &reason).await.0, 400);
}

#[tokio::test]
async fn a_body_too_long_is_refused_whether_it_says_so_or_not() {
    let setup = setup().await;
    let good = authorized();
    let announced = format!("POST /v1/publish HTTP/1.1\r\nHost: localhost\r\n{good}Content-Length: 1048577\r\n\r\n");
    assert_eq!(ask(setup.admin, announced.as_bytes()).await.0, 413);
    let chunk = format!("{:x}\r\n{}\r\n", 1 << 16, " ".repeat(1 << 16));
    let chunked = format!(
        "POST /v1/publish HTTP/1.1\r\nHost: localhost\r\n{good}Transfer-Encoding: chunked\r\n\r\n{}1\r\n \r\n",
        chunk.repeat(16)
    );
    assert_eq!(ask(setup.admin, chunked.as_bytes()).await.0, 413);
}

#[tokio::test]
async fn a_name_that_leads_to_a_loopback_address_is_not_taken() {
    let setup = setup().await;
    for (host, expected) in [("localhost:9180", 200), ("[::1]", 200), ("evil.example:9180", 403)] {
        let request = format!("GET /v1/rooms HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{}\r\n", authorized());
        assert_eq!(ask(setup.admin, request.as_bytes()).await.0, expected, "{host}");
    }
}

#[tokio::test]
async fn wrong_secrets_are_slowed_down_and_the_right_one_is_not() {
    let setup = setup().await;
    let wrong = request("GET", "/v1/rooms", "Authorization: Bearer nonsense\r\n", "");
    let mut refused = 0;
    while ask(setup.admin, &wrong).await.0 == 401 {
        refused += 1;
        assert!(refused < 1000, "there is no limit");
    }
    let (status, head, _) = ask(setup.admin, &wrong).await;
    assert_eq!((status, head.contains("retry-after: 1")), (429, true));
    assert_eq!(setup.get("/v1/rooms").await.0, 200);
}

#[tokio::test]
async fn without_a_token_file_nobody_controls_and_is_told_how_to() {
    let admin = Admin::bind(([127, 0, 0, 1], 0).into()).await.unwrap();
    let admin = admin.showing(Metrics::default(), Readiness::default(), Arc::default(), None);
    let address = admin.local_addr();
    let running = tokio::spawn(admin.run(std::future::pending()));
    let (status, head, problem) = ask(address, &request("POST", "/v1/publish", &authorized(), "{}")).await;
    assert_eq!(status, 403);
    assert!(
        head.contains("application/problem+json") && problem["detail"].as_str().unwrap().contains("admin.token_file")
    );
    assert_eq!(ask(address, &request("GET", "/healthz", "", "")).await.0, 200);
    running.abort();
}

#[tokio::test]
async fn a_new_secret_takes_the_place_of_the_old_one() {
    let setup = setup().await;
    fs::write(&setup.secret, "another secret").unwrap();
    let new = "f".repeat(40);
    fs::write(&setup.secret, &new).unwrap();
    let with_new = request("GET", "/v1/rooms", &format!("Authorization: Bearer {new}\r\n"), "");
    timeout(PATIENCE, async {
        while ask(setup.admin, &with_new).await.0 != 200 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .expect("the new secret is taken");
    assert_ne!(setup.get("/v1/rooms").await.0, 200);
}
