//! A session that ends: what its client is told.

use std::{any::Any, time::Duration};

use futures_util::{SinkExt, StreamExt, future::join_all};
use serde_json::json;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_tungstenite::tungstenite::Message;

use super::{
    super::{
        auth, forward_auth,
        message_limits::both,
        relays::{Server, relay_with},
        support::*,
    },
    assert_each_has_a_row, names,
};
use crate::{
    config::{self, Kinds, Messages, OnExcess, Sanitize},
    gateway::{auth::signing::now, close::End, messages::Violation},
};

/// A session that is about to end.
struct Ending {
    /// What the metrics call it.
    name: &'static str,
    /// The payload of the Close frame that the client gets; `None`: it gets none.
    close: Option<Vec<u8>>,
    gateway: Running,
    stream: TcpStream,
    /// What the end depends on.
    _held: Box<dyn Any>,
}

impl Ending {
    fn new(name: &'static str, code: u16, reason: &str, gateway: Running, stream: TcpStream) -> Self {
        Self { name, close: Some(payload(code, reason)), gateway, stream, _held: Box::new(()) }
    }

    fn holding(self, held: impl Any) -> Self {
        Self { _held: Box::new(held), ..self }
    }
}

fn payload(code: u16, reason: &str) -> Vec<u8> {
    [&code.to_be_bytes(), reason.as_bytes()].concat()
}

/// A text frame of any length.
fn text(payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len()).unwrap();
    if length <= 125 {
        frame(0x81, payload)
    } else {
        [&[0x81, 0xfe], &length.to_be_bytes()[..], &[0; 4], payload].concat()
    }
}

/// What a client does to be closed, with limits that make it wrong, by the gateway's echo and before an upstream.
async fn of_the_client() -> Vec<Ending> {
    let none = || Messages { rate: 0, ..Messages::default() };
    let hour = Duration::from_hours(1);
    let folder = TempDir::new().unwrap();
    let schema = folder.path().join("schema.json");
    std::fs::write(&schema, r#"{"type": "object"}"#).unwrap();
    let (a, b) = (text(b"a"), frame(0x82, b"b"));
    let long = text(&[b'x'; 300]);
    let rows: Vec<(&str, u16, &str, Messages, Vec<u8>)> = vec![
        ("client", 4321, "my own reason", none(), frame(0x88, &payload(4321, "my own reason"))),
        ("client", 1000, "", none(), frame(0x88, &payload(1000, ""))),
        ("malformed", 1002, "unknown opcode", none(), frame(0x83, b"x")),
        ("malformed", 1002, "frame without mask", none(), vec![0x81, 1, b'x']),
        ("malformed", 1007, "invalid UTF-8", none(), frame(0x81, &[0xff])),
        ("too_big", 1009, "message too big", Messages { max_size: 200, ..none() }, long.clone()),
        ("frame_too_big", 1009, "frame too big", Messages { max_frame_size: 200, ..none() }, long.clone()),
        ("over_rate", 1008, "too many messages", Messages { rate: 1, window: hour, ..none() }, a.repeat(2)),
        (
            "over_bytes",
            1008,
            "too many bytes",
            Messages { max_size: 400, bytes_per_second: 1, ..none() },
            long.repeat(2),
        ),
        (
            "over_shared_rate",
            1008,
            "too many messages over all connections",
            Messages { rate_per_source: 1, window: hour, ..none() },
            a.repeat(2),
        ),
        (
            "over_shared_bytes",
            1008,
            "too many bytes over all connections",
            Messages { max_size: 400, bytes_per_second_per_source: 1, ..none() },
            long.repeat(2),
        ),
        (
            "fragments",
            1008,
            "too many fragments",
            Messages { max_fragments: 2, ..none() },
            [frame(0x01, b""), frame(0x00, b"").repeat(2)].concat(),
        ),
        ("wrong_kind", 1003, "this kind of message is not taken", Messages { allow: Kinds::Text, ..none() }, b),
        ("not_json", 1008, "message is not JSON", Messages { sanitize: Sanitize::Control, ..none() }, a),
        ("schema", 1008, "message does not fit the schema", Messages { schema: Some(schema), ..none() }, text(b"[]")),
        ("control_flood", 1008, "too many pings or pongs", none(), frame(0x8a, b"").repeat(300)),
    ];
    let mut endings = Vec::new();
    for (name, code, reason, messages, sent) in rows {
        for gateway in both(messages).await {
            let mut stream = shaken(&gateway).await;
            stream.write_all(&sent).await.unwrap();
            endings.push(Ending::new(name, code, reason, gateway, stream));
        }
    }
    for gateway in both(none()).await {
        let mut stream = shaken(&gateway).await;
        // Half a message, and then the end of what it sends: there is nobody to be told anything.
        stream.write_all(&frame(0x01, b"a")).await.unwrap();
        stream.shutdown().await.unwrap();
        endings.push(Ending { close: None, ..Ending::new("lost", 0, "", gateway, stream) });
    }
    endings
}

/// What a client does not do.
async fn of_silence() -> Vec<Ending> {
    let short = Duration::from_millis(50);
    let rows = [
        ("idle", "idle", config::Gateway { idle_timeout: short, ..quiet() }),
        ("too_old", "open for as long as it may be", config::Gateway { max_lifetime: short, ..quiet() }),
        ("no_pong", "no answer to ping", config::Gateway { ping_interval: short, pong_timeout: short, ..quiet() }),
    ];
    let mut endings = Vec::new();
    for (name, reason, config) in rows {
        let (relay, _) = relay_with(config.clone(), "", listen).await;
        for gateway in [start(&config), relay] {
            let stream = shaken(&gateway).await;
            endings.push(Ending::new(name, 1001, reason, gateway, stream));
        }
    }
    endings
}

/// An upstream that says nothing.
async fn listen(mut server: Server) {
    while let Some(Ok(_)) = server.next().await {}
}

/// Clients whose right to be there ends.
async fn of_users() -> Vec<Ending> {
    let login = async |gateway: &Running, token: &str| {
        let mut stream = TcpStream::connect(gateway.addr).await.unwrap();
        let request = good_request("/").replace("\r\n\r\n", &format!("\r\nAuthorization: Bearer {token}\r\n\r\n"));
        stream.write_all(request.as_bytes()).await.unwrap();
        assert!(read_head(&mut stream).await.starts_with("HTTP/1.1 101 "));
        stream
    };
    let mut endings = Vec::new();

    let setup = auth::Setup::new();
    let gateway = start(&setup.config());
    let stream = login(&gateway, &setup.signer.token(&json!({"sub": "alice", "exp": now() + 2}))).await;
    endings.push(Ending::new("expired", 4401, "token expired", gateway, stream).holding(setup));

    let mut setup = auth::Setup::new();
    setup.auth.users = auth::users(1, OnExcess::Replace, 0);
    let gateway = start(&setup.config());
    let token = setup.signer.token_of("alice", 60);
    let stream = login(&gateway, &token).await;
    let newer = login(&gateway, &token).await;
    endings.push(Ending::new("replaced", 4409, "replaced by a newer login", gateway, stream).holding((setup, newer)));

    let setup = auth::Setup::new();
    let gateway = start(&setup.config());
    let push = gateway.settings.0.borrow().hub.push();
    let stream = login(&gateway, &setup.signer.token_of("alice", 60)).await;
    assert_eq!(push.disconnect("alice", 4000, Some("bye")).await, 1);
    endings.push(Ending::new("kicked", 4000, "bye", gateway, stream).holding(setup));

    let service = forward_auth::Service::start(forward_auth::ALICE).await;
    let mut config = service.config();
    config.auth.as_mut().unwrap().reauth_interval = Duration::from_secs(1);
    let gateway = start(&config);
    let stream = shaken(&gateway).await;
    service.answers("HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n");
    endings.push(Ending::new("revoked", 4401, "not authenticated any more", gateway, stream));
    endings
}

/// What the upstream does.
async fn of_the_upstream() -> Vec<Ending> {
    let mut endings = Vec::new();
    let (gateway, _) = relay_with(quiet(), "", |mut server| async move {
        server.send(close(4001, "log in again")).await.unwrap();
        listen(server).await;
    })
    .await;
    let stream = shaken(&gateway).await;
    endings.push(Ending::new("upstream", 4001, "log in again", gateway, stream));

    let (gateway, _) = relay_with(quiet(), "", |server| async move { drop(server) }).await;
    let stream = shaken(&gateway).await;
    endings.push(Ending::new("upstream_gone", 1012, "application went away", gateway, stream));

    // A masked frame, which no server may send.
    let (gateway, _) = relay_with(quiet(), "", |mut server| async move {
        server.get_mut().write_all(&frame(0x81, b"x")).await.unwrap();
        listen(server).await;
    })
    .await;
    let stream = shaken(&gateway).await;
    endings.push(Ending::new("upstream_malformed", 1011, "application error", gateway, stream));
    endings
}

/// Reads to the Close frame, answers it as a client does, and finds the end behind it and nothing else.
async fn check(ending: Ending) -> &'static str {
    let Ending { name, close, gateway, mut stream, _held } = ending;
    let remote = stream.local_addr().unwrap();
    if let Some(expected) = close {
        let got = next_close_of(&mut stream, name).await;
        let got = if matches!(name, "too_old" | "upstream_gone") { unhinted(&got) } else { got };
        assert_eq!(got, expected, "{name}: {:?}", String::from_utf8_lossy(&got));
        // Who began does not answer; and what is given up is not waited for.
        if !matches!(name, "client" | "no_pong") {
            stream.write_all(&frame(0x88, &expected)).await.unwrap();
        }
    }
    let mut rest = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut rest))
        .await
        .unwrap_or_else(|_| panic!("{name}: no end"))
        .unwrap_or_else(|e| panic!("{name}: {e}; a client may lose the Close frame so"));
    assert!(rest.is_empty(), "{name}: behind the Close frame is {rest:?}");
    drop(stream);
    gone(&gateway, name, remote).await;
    name
}

/// The payload of the Close frame that comes after any others.
async fn next_close_of(stream: &mut TcpStream, name: &str) -> Vec<u8> {
    let read = async {
        loop {
            let mut header = [0; 2];
            stream.read_exact(&mut header).await.unwrap_or_else(|e| panic!("{name}: no Close frame: {e}"));
            let length = match header[1] {
                126 => usize::from(stream.read_u16().await.unwrap()),
                short @ 0..=125 => usize::from(short),
                other => panic!("{name}: a length of {other}"),
            };
            let mut payload = vec![0; length];
            stream.read_exact(&mut payload).await.unwrap();
            if header[0] == 0x88 {
                return payload;
            }
        }
    };
    timeout(PATIENCE, read).await.unwrap_or_else(|_| panic!("{name}: no Close frame"))
}

/// The payload of a Close frame without the hint, which has to be there, when to come back.
fn unhinted(close: &[u8]) -> Vec<u8> {
    let (code, reason) = close.split_first_chunk().unwrap();
    let (code, reason) = without_hint((u16::from_be_bytes(*code), String::from_utf8(reason.to_vec()).unwrap()));
    payload(code, &reason)
}

/// The session is counted by its name, and nothing of it is held.
async fn gone(gateway: &Running, name: &str, remote: std::net::SocketAddr) {
    eventually("the policy is told", || gateway.policy.closed(remote) > 0).await;
    assert_eq!(gateway.policy.closed(remote), 1, "{name}");
    let ended = format!("limiter_sessions_closed_total{{reason=\"{name}\"}}");
    eventually("it is counted", || gateway.metric(&ended) == 1).await;
}

/// A client that takes nothing of what it is sent gets all of it, and the Close frame behind, if it takes it in the end.
async fn check_slow_consumer() -> &'static str {
    let config = config::Gateway { pong_timeout: Duration::from_millis(200), ..quiet() };
    let (gateway, _) = relay_with(config, "", |server| async move {
        let (mut write, mut read) = server.split();
        let flood = async { while write.send(Message::binary(vec![0; 60_000])).await.is_ok() {} };
        tokio::join!(flood, async { while let Some(Ok(_)) = read.next().await {} });
    })
    .await;
    let stream = shaken(&gateway).await;
    gone(&gateway, "slow_consumer", stream.local_addr().unwrap()).await;
    "slow_consumer"
}

async fn check_draining() -> &'static str {
    let gateway = start(&quiet());
    let mut stream = shaken(&gateway).await;
    let metric = gateway.sampler();
    let ended = gateway.begin_stop();
    let got = next_close_of(&mut stream, "draining").await;
    assert_eq!(unhinted(&got), payload(1001, "server is shutting down"));
    stream.write_all(&frame(0x88, &got)).await.unwrap();
    assert_eq!(timeout(PATIENCE, stream.read(&mut [0])).await.unwrap().unwrap(), 0, "the end");
    let report = timeout(PATIENCE, ended).await.unwrap().unwrap();
    assert_eq!((report.closed, report.cut), (1, 0));
    assert_eq!(metric("limiter_sessions_closed_total{reason=\"draining\"}"), 1);
    "draining"
}

#[tokio::test]
async fn each_end_has_its_code_and_reason_and_the_client_gets_them_whole() {
    let mut endings = of_the_client().await;
    endings.extend(of_silence().await);
    endings.extend(of_users().await);
    endings.extend(of_the_upstream().await);
    let mut seen = join_all(endings.into_iter().map(check)).await;
    seen.push(check_slow_consumer().await);
    seen.push(check_draining().await);

    let names = names!(End {
        End::Client(_) => "client",
        End::Lost => "lost",
        End::Malformed(..) => "malformed",
        End::Violation(Violation::TooBig) => "too_big",
        End::Violation(Violation::FrameTooBig) => "frame_too_big",
        End::Violation(Violation::TooMany) => "over_rate",
        End::Violation(Violation::TooFast) => "over_bytes",
        End::Violation(Violation::TooManyTogether) => "over_shared_rate",
        End::Violation(Violation::TooFastTogether) => "over_shared_bytes",
        End::Violation(Violation::Fragments) => "fragments",
        End::Violation(Violation::WrongKind) => "wrong_kind",
        End::Violation(Violation::NotJson) => "not_json",
        End::Violation(Violation::Unfit) => "schema",
        End::Violation(Violation::ControlFlood) => "control_flood",
        End::Idle => "idle",
        End::TooOld => "too_old",
        End::NoPong => "no_pong",
        End::SlowConsumer => "slow_consumer",
        End::Expired => "expired",
        End::Revoked => "revoked",
        End::Replaced => "replaced",
        End::Kicked(_) => "kicked",
        End::Draining => "draining",
        End::Upstream(_) => "upstream",
        End::UpstreamGone => "upstream_gone",
        End::UpstreamMalformed => "upstream_malformed",
    });
    assert_each_has_a_row(&names, seen);
}
