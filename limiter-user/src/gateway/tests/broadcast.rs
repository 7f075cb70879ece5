//! Sessions with the broadcast application, and messages from outside for sessions with any.

use std::{future::pending, sync::Arc, time::Duration};

use futures_util::{SinkExt, future::join_all};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    sync::Notify,
    time::timeout,
};
use tokio_tungstenite::tungstenite::{Error, Message};

use super::{
    relays::{echo, relay_to},
    support::*,
};
use crate::{
    cli::raise_open_files,
    config::{self, Push as Settings, Upstream},
    gateway::{Content, Push, Recipients},
};

fn broadcast() -> config::Gateway {
    config::Gateway { upstream: Upstream::Broadcast, ..quiet() }
}

async fn join(gateway: &Running, path: &str) -> Client {
    tokio_tungstenite::connect_async(format!("ws://{}{path}", gateway.addr)).await.unwrap().0
}

fn push(gateway: &Running) -> Push {
    gateway.settings.0.borrow().hub.push()
}

const PASSED_OUT: &str = "limiter_messages_total{direction=\"out\",verdict=\"passed\"}";
const SLOW: &str = "limiter_sessions_closed_total{reason=\"slow_consumer\"}";

#[tokio::test]
async fn everybody_else_in_the_room_gets_each_message_in_one_order() {
    let gateway = start(&broadcast());
    let mut a = join(&gateway, "/a").await;
    let mut b = join(&gateway, "/a").await;
    let mut c = join(&gateway, "/a").await;
    let mut elsewhere = join(&gateway, "/a/b").await;
    for n in 0..50 {
        a.feed(Message::text(format!("{n}"))).await.unwrap();
    }
    a.send(Message::binary(vec![0, 255])).await.unwrap();
    for client in [&mut b, &mut c] {
        for n in 0..50 {
            assert_eq!(next(client).await, Message::text(format!("{n}")));
        }
        assert_eq!(next(client).await, Message::binary(vec![0, 255]));
    }
    // What comes first is what was sent last: nothing of its own, and nothing of another room.
    b.send(Message::text("from b")).await.unwrap();
    assert_eq!(next(&mut a).await, Message::text("from b"));
    assert_eq!(next(&mut c).await, Message::text("from b"));
    let mut neighbour = join(&gateway, "/a/b?whatever").await;
    neighbour.send(Message::text("hello")).await.unwrap();
    assert_eq!(next(&mut elsewhere).await, Message::text("hello"));

    assert_eq!(gateway.metric("limiter_rooms"), 2);
    assert_eq!(gateway.metric(PASSED_OUT), 2 * 51 + 2 + 1);
    assert_eq!(gateway.metric("limiter_published_total{by=\"client\"}"), 51 + 1 + 1);
    assert_eq!(gateway.metric("limiter_published_receivers_total{by=\"client\"}"), 2 * 51 + 2 + 1);
    a.send(close(4000, "bye")).await.unwrap();
    assert_eq!(next_close(&mut a).await, (4000, "bye".to_owned()));
    drop((b, c, elsewhere, neighbour));
    gateway.policy.wait_closed(5).await;
    assert_eq!(gateway.metric("limiter_rooms"), 0);
}

#[tokio::test]
async fn two_ways_to_write_a_path_are_one_room_and_doubtful_ones_none() {
    let gateway = start(&broadcast());
    let mut a = join(&gateway, "/caf%C3%A9").await;
    let mut b = join(&gateway, "/%63af%c3%a9").await;
    a.send(Message::text("x")).await.unwrap();
    assert_eq!(next(&mut b).await, Message::text("x"));
    let long = format!("/{}", "x".repeat(512));
    for path in ["/a/../b", "/a//b", "/a%2fb", "/%", "/a%00", &long] {
        match tokio_tungstenite::connect_async(format!("ws://{}{path}", gateway.addr)).await {
            Err(Error::Http(response)) => assert_eq!(response.status().as_u16(), 400, "{path}"),
            other => panic!("{path}: {other:?}"),
        }
    }
    drop(join(&gateway, &long[..512]).await);
}

#[tokio::test]
async fn rooms_of_a_route_for_one_host_are_its_own() {
    let route = config::Route { host: Some("one.example".into()), ..route("/") };
    let gateway = start(&config::Gateway { routes: vec![route], ..broadcast() });
    let push = push(&gateway);
    let request = good_request("/a").replace("localhost", "one.example");
    let mut stream = TcpStream::connect(gateway.addr).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    assert!(read_head(&mut stream).await.starts_with("HTTP/1.1 101 "));
    let _other = join(&gateway, "/a").await;
    let names: Vec<String> = push.rooms("", 9).iter().map(|(name, _)| name.to_string()).collect();
    assert_eq!(names, ["/a", "one.example/a"]);
}

#[tokio::test]
async fn a_message_in_fragments_arrives_whole_and_once_and_pings_are_answered_on_the_way() {
    let gateway = start(&broadcast());
    let mut stream = shaken(&gateway).await;
    let mut other = gateway.connect().await;
    for part in [frame(0x01, b"a"), frame(0x89, b"?"), frame(0x00, b""), frame(0x00, b"b"), frame(0x80, b"c")].concat()
    {
        stream.write_all(&[part]).await.unwrap();
    }
    assert_eq!(next(&mut other).await, Message::text("abc"));
    let mut pong = [0; 3];
    timeout(PATIENCE, stream.read_exact(&mut pong)).await.unwrap().unwrap();
    assert_eq!(&pong, b"\x8a\x01?");
}

#[tokio::test]
async fn what_is_said_together_with_the_end_is_heard() {
    let gateway = start(&broadcast());
    let mut other = gateway.connect().await;
    for (end, text) in [(frame(0x88, &[]), "bye"), (vec![0x83], "oops")] {
        let mut stream = shaken(&gateway).await;
        let before = frame(0x81, text.as_bytes());
        stream.write_all(&[before, end].concat()).await.unwrap();
        assert_eq!(next(&mut other).await, Message::text(text));
    }
}

#[tokio::test]
async fn what_a_limit_does_not_let_pass_reaches_nobody() {
    let messages = config::Messages {
        rate: 1,
        window: Duration::from_hours(1),
        on_violation: config::OnViolation::Drop,
        ..config::Messages::default()
    };
    let gateway = start(&config::Gateway { messages, ..broadcast() });
    let mut a = gateway.connect().await;
    let mut b = gateway.connect().await;
    for text in ["first", "too many"] {
        a.send(Message::text(text)).await.unwrap();
    }
    a.send(close(1000, "")).await.unwrap();
    assert_eq!(next(&mut b).await, Message::text("first"));
    assert_eq!(next_close(&mut a).await.0, 1000);
    b.send(close(1000, "")).await.unwrap();
    assert_eq!(next_close(&mut b).await.0, 1000, "nothing came in between");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_in_one_room_hear_the_same() {
    const MEMBERS: usize = 1000;
    const EACH: usize = 5;
    const SPEAKERS: usize = 4;
    // Two for each client.
    raise_open_files();
    let gateway = start(&broadcast());
    let mut members = Vec::new();
    for _ in 0..MEMBERS / 50 {
        members.extend(join_all((0..50).map(|_| gateway.connect())).await);
    }
    let speakers = members.split_off(MEMBERS - SPEAKERS);
    let speaking: Vec<_> = speakers
        .into_iter()
        .enumerate()
        .map(|(speaker, mut client)| {
            tokio::spawn(async move {
                for n in 0..EACH {
                    client.send(Message::text(format!("{speaker}:{n}"))).await.unwrap();
                }
                for _ in 0..(SPEAKERS - 1) * EACH {
                    let Message::Text(text) = next(&mut client).await else { panic!("text was sent") };
                    assert!(!text.starts_with(&format!("{speaker}:")), "its own");
                }
                client
            })
        })
        .collect();
    let listening: Vec<_> = members
        .into_iter()
        .map(|mut client| {
            tokio::spawn(async move {
                let mut heard = Vec::new();
                for _ in 0..SPEAKERS * EACH {
                    heard.push(next(&mut client).await);
                }
                (heard, client)
            })
        })
        .collect();
    let heard: Vec<_> = join_all(listening).await.into_iter().map(Result::unwrap).collect();
    let speakers: Vec<_> = join_all(speaking).await.into_iter().map(Result::unwrap).collect();
    for (messages, _) in &heard {
        assert_eq!(messages, &heard[0].0, "one order for all");
    }
    for speaker in 0..SPEAKERS {
        let begin = format!("{speaker}:");
        let own: Vec<_> = heard[0].0.iter().filter(|m| m.to_text().unwrap().starts_with(&begin)).cloned().collect();
        let said: Vec<_> = (0..EACH).map(|n| Message::text(format!("{speaker}:{n}"))).collect();
        assert_eq!(own, said);
    }
    drop((heard, speakers));
    gateway.policy.wait_closed(MEMBERS).await;
    assert_eq!(gateway.metric("limiter_rooms"), 0);
}

/// A client that takes little and reads nothing.
async fn deaf(gateway: &Running) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut stream = socket.connect(gateway.addr).await.unwrap();
    stream.write_all(good_request("/").as_bytes()).await.unwrap();
    assert!(read_head(&mut stream).await.starts_with("HTTP/1.1 101 "));
    stream
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_does_not_read_is_closed_while_others_get_everything() {
    let gateway = start(&config::Gateway { push: Settings { queue: 64 * 1024 }, ..broadcast() });
    let mut sender = gateway.connect().await;
    let mut listener = gateway.connect().await;
    let mut deaf = deaf(&gateway).await;
    let long = "x".repeat(8192);
    let listening = tokio::spawn(async move {
        let mut expected = 0;
        loop {
            let Message::Text(text) = next(&mut listener).await else { panic!("text was sent") };
            if text == "end" {
                return expected;
            }
            assert_eq!(text.split(' ').next(), Some(expected.to_string().as_str()));
            expected += 1;
        }
    });
    let mut said = 0;
    while gateway.metric("limiter_published_lost_total") == 0 {
        sender.send(Message::text(format!("{said} {long}"))).await.unwrap();
        said += 1;
        assert!(said < 20_000, "it is never closed");
    }
    // What it gets, if it reads after all, are whole frames and then why.
    let mut all = Vec::new();
    timeout(PATIENCE, deaf.read_to_end(&mut all)).await.unwrap().unwrap();
    let mut rest = &all[..];
    let mut frames = 0;
    while let [0x81, 126, a, b, more @ ..] = rest {
        rest = &more[usize::from(u16::from_be_bytes([*a, *b]))..];
        frames += 1;
    }
    assert!(frames < said, "it has not got everything");
    assert_eq!(rest[..4], [0x88, rest[1], 0x03, 0xf0], "1008 at the end");
    eventually("it is counted", || gateway.metric(SLOW) == 1).await;

    sender.send(Message::text("end")).await.unwrap();
    assert_eq!(timeout(PATIENCE, listening).await.unwrap().unwrap(), said);
    sender.send(close(1000, "")).await.unwrap();
    assert_eq!(next_close(&mut sender).await.0, 1000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sender_without_a_limit_pushes_nobody_out_who_reads() {
    const MESSAGES: u32 = 20_000;
    let gateway = start(&config::Gateway { push: Settings { queue: 16 * 1024 }, ..broadcast() });
    let listeners = join_all((0..20).map(|_| gateway.connect())).await;
    let mut sender = gateway.connect().await;
    let listening: Vec<_> = listeners
        .into_iter()
        .map(|mut client| {
            tokio::spawn(async move {
                for n in 0..MESSAGES {
                    assert_eq!(next(&mut client).await, Message::text(n.to_string()));
                }
            })
        })
        .collect();
    for n in 0..MESSAGES {
        sender.feed(Message::text(n.to_string())).await.unwrap();
    }
    sender.flush().await.unwrap();
    for listener in listening {
        timeout(PATIENCE, listener).await.unwrap().unwrap();
    }
    assert_eq!(gateway.metric(SLOW), 0);
}

#[tokio::test]
async fn a_drain_closes_rooms_like_everything_else() {
    let gateway = start(&broadcast());
    let mut a = gateway.connect().await;
    let mut b = gateway.connect().await;
    let stopped = gateway.begin_stop();
    for client in [&mut a, &mut b] {
        assert_eq!(without_hint(next_close(client).await), (1001, "server is shutting down".to_owned()));
    }
    let report = timeout(PATIENCE, stopped).await.unwrap().unwrap();
    assert_eq!((report.closed, report.cut), (2, 0));
}

#[tokio::test]
async fn hearing_others_keeps_a_client_from_being_idle() {
    let gateway = start(&config::Gateway { idle_timeout: Duration::from_millis(400), ..broadcast() });
    let push = push(&gateway);
    let mut client = gateway.connect().await;
    let began = tokio::time::Instant::now();
    while began.elapsed() < Duration::from_millis(900) {
        assert_eq!(push.publish(Recipients::All, Content::Text("x")).await, 1);
        assert_eq!(next(&mut client).await, Message::text("x"));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(next_close(&mut client).await, (1001, "idle".to_owned()));
}

#[tokio::test]
async fn messages_from_outside_reach_sessions_with_every_application() {
    let (relay, _) = relay_to("", echo).await;
    for gateway in [start(&quiet()), start(&broadcast()), relay] {
        let push = push(&gateway);
        let mut client = gateway.connect().await;
        assert_eq!(push.publish(Recipients::All, Content::Text("to all")).await, 1);
        assert_eq!(push.publish(Recipients::All, Content::Binary(&[1, 2])).await, 1);
        assert_eq!(next(&mut client).await, Message::text("to all"));
        assert_eq!(next(&mut client).await, Message::binary(vec![1, 2]));
        assert_eq!(gateway.metric("limiter_published_total{by=\"control\"}"), 2);
        client.send(close(1000, "")).await.unwrap();
        assert_eq!(next_close(&mut client).await.0, 1000);
    }
}

#[tokio::test]
async fn a_message_from_outside_waits_for_the_end_of_one_of_the_upstream() {
    let ready = Arc::new(Notify::new());
    let go_on = Arc::clone(&ready);
    let (gateway, _) = relay_to("", |mut server| async move {
        let stream = server.get_mut();
        stream.write_all(&[0x01, 2, b'a', b'b']).await.unwrap();
        go_on.notified().await;
        // Between two frames of a message, no other may begin (RFC 6455, 5.4); a ping may.
        stream.write_all(&[0x00, 1, b'c', 0x89, 0, 0x80, 1]).await.unwrap();
        go_on.notified().await;
        stream.write_all(b"d").await.unwrap();
        pending::<()>().await;
    })
    .await;
    let push = push(&gateway);
    let mut stream = shaken(&gateway).await;
    let mut expect = async |bytes: &[u8]| {
        let mut read = vec![0; bytes.len()];
        timeout(PATIENCE, stream.read_exact(&mut read)).await.expect("enough bytes").unwrap();
        assert_eq!(read, bytes);
    };
    expect(b"\x01\x02ab").await;
    assert_eq!(push.publish(Recipients::All, Content::Text("x")).await, 1);
    ready.notify_one();
    expect(b"\x00\x01c\x89\x00\x80\x01").await;
    ready.notify_one();
    expect(b"d\x81\x01x").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_from_outside_find_their_place_in_a_busy_upstreams_stream() {
    const MESSAGES: usize = 3000;
    let (gateway, _) = relay_to("", |mut server| async move {
        // Each in two fragments, in pieces that are no frames.
        let mut wire = Vec::new();
        for n in 0..MESSAGES {
            let text = format!("{n:8}");
            wire.extend([0x01, 4].iter().chain(&text.as_bytes()[..4]).chain(&[0x80, 4]).chain(&text.as_bytes()[4..]));
        }
        for piece in wire.chunks(1001) {
            server.get_mut().write_all(piece).await.unwrap();
        }
        pending::<()>().await;
    })
    .await;
    let push = push(&gateway);
    let mut client = gateway.connect().await;
    let pushing = tokio::spawn(async move {
        for n in 0..100 {
            assert_eq!(push.publish(Recipients::All, Content::Text(&format!("pushed {n}"))).await, 1);
            tokio::task::yield_now().await;
        }
    });
    let (mut own, mut pushed) = (0, 0);
    while own < MESSAGES || pushed < 100 {
        let message = next(&mut client).await;
        if message == Message::text(format!("pushed {pushed}")) {
            pushed += 1;
        } else {
            assert_eq!(message, Message::text(format!("{own:8}")));
            own += 1;
        }
    }
    pushing.await.unwrap();
}
