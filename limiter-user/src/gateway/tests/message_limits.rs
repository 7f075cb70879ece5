//! Limits on messages, with the built-in application and through the relay.

use std::time::Duration;

use futures_util::SinkExt;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    time::timeout,
};
use tokio_tungstenite::tungstenite::{Error, Message};

use super::{relays::echo, support::*};
use crate::{
    config::{self, Algorithm, Kinds, Messages, OnViolation, Upstream},
    policy::Policy as _,
};

/// A gateway with those limits to each of the two: the built-in echo, and an upstream that echoes.
pub async fn both(messages: Messages) -> [Running; 2] {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let upstream = format!("ws://{}", listener.local_addr().unwrap()).parse().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move { echo(tokio_tungstenite::accept_async(stream).await.unwrap()).await });
        }
    });
    [Upstream::Echo, upstream]
        .map(|upstream| start(&config::Gateway { upstream, messages: messages.clone(), ..quiet() }))
}

fn none() -> Messages {
    Messages { rate: 0, ..Messages::default() }
}

async fn closes_with(client: &mut Client, message: Message, code: u16, reason: &str) {
    client.send(message).await.unwrap();
    assert_eq!(next_close(client).await, (code, reason.to_owned()));
}

#[tokio::test]
async fn a_token_bucket_gives_its_burst_and_no_more() {
    let messages = Messages {
        rate: 1,
        window: Duration::from_hours(1),
        algorithm: Algorithm::TokenBucket,
        burst: 4,
        ..Messages::default()
    };
    for gateway in both(messages).await {
        let mut client = gateway.connect().await;
        for n in 0..4 {
            echoes(&mut client, &format!("{n}")).await;
        }
        closes_with(&mut client, Message::text("5"), 1008, "too many messages").await;
        assert_eq!(gateway.metric("limiter_messages_total{direction=\"in\",verdict=\"over_rate\"}"), 1);
    }
}

#[tokio::test]
async fn messages_over_the_rate_are_left_out_where_that_is_asked_for() {
    let messages =
        Messages { rate: 2, window: Duration::from_hours(1), on_violation: OnViolation::Drop, ..Messages::default() };
    for gateway in both(messages).await {
        let mut client = gateway.connect().await;
        for text in ["a", "b", "c", "d"] {
            client.send(Message::text(text)).await.unwrap();
        }
        client.send(close(1000, "")).await.unwrap();
        assert_eq!(next(&mut client).await, Message::text("a"));
        assert_eq!(next(&mut client).await, Message::text("b"));
        assert_eq!(next_close(&mut client).await.0, 1000);
        assert_eq!(gateway.metric("limiter_messages_total{direction=\"in\",verdict=\"over_rate\"}"), 2);
    }
}

#[tokio::test]
async fn bytes_are_limited_whatever_they_come_in() {
    // A longest message at once, and then next to nothing.
    let messages = Messages { max_size: 10_000, bytes_per_second: 1, ..none() };
    for gateway in both(messages).await {
        let mut client = gateway.connect().await;
        echoes(&mut client, &"x".repeat(6_000)).await;
        echoes(&mut client, &"x".repeat(3_000)).await;
        closes_with(&mut client, Message::text("x".repeat(2_000)), 1008, "too many bytes").await;
    }
}

#[tokio::test]
async fn only_the_kind_of_messages_that_is_allowed_passes() {
    for (allow, good, bad) in [
        (Kinds::Text, Message::text("x"), Message::binary(vec![1])),
        (Kinds::Binary, Message::binary(vec![1]), Message::text("x")),
    ] {
        for gateway in both(Messages { allow, ..none() }).await {
            let mut client = gateway.connect().await;
            client.send(good.clone()).await.unwrap();
            assert_eq!(next(&mut client).await, good);
            closes_with(&mut client, bad.clone(), 1003, "this kind of message is not taken").await;
        }
    }
}

#[tokio::test]
async fn a_message_in_too_many_fragments_closes() {
    let [_, gateway] = both(Messages { max_fragments: 3, ..none() }).await;
    let mut stream = shaken(&gateway).await;
    let three = [frame(0x01, b"a"), frame(0x00, b"b"), frame(0x80, b"c")].concat();
    stream.write_all(&three).await.unwrap();
    let mut answer = [0; 5];
    timeout(PATIENCE, stream.read_exact(&mut answer)).await.unwrap().unwrap();
    assert_eq!(&answer, b"\x81\x03abc");
    // Empty ones are fragments, too.
    stream.write_all(&[frame(0x01, b""), frame(0x00, b"").repeat(3)].concat()).await.unwrap();
    let mut rest = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut rest)).await.unwrap().unwrap();
    assert_eq!(rest, b"\x88\x14\x03\xf0too many fragments");
}

#[tokio::test]
async fn who_goes_on_breaking_the_rules_is_denied_for_a_time() {
    let messages = Messages { max_size: 10, deny_after: 3, deny_for: Duration::from_hours(1), ..none() };
    for gateway in both(messages).await {
        for n in 1..=3 {
            let mut client = gateway.connect().await;
            assert!(gateway.policy.convicted.lock().unwrap().is_empty(), "before violation {n}");
            closes_with(&mut client, Message::text("x".repeat(11)), 1009, "message too big").await;
        }
        let source = (gateway.policy.limits().source(gateway.addr.ip()), Duration::from_hours(1));
        assert_eq!(*gateway.policy.convicted.lock().unwrap(), [source]);
        assert_eq!(gateway.metric("limiter_sources_denied_total"), 1);
        // Whether the kernel does its part or not.
        match tokio_tungstenite::connect_async(gateway.url()).await {
            Err(Error::Http(response)) => assert_eq!(response.status(), 403),
            other => panic!("expected a refusal, got {other:?}"),
        }
    }
}

#[tokio::test]
async fn dropped_messages_count_as_violations_and_the_last_one_closes() {
    let messages = Messages {
        rate: 1,
        window: Duration::from_hours(1),
        on_violation: OnViolation::Drop,
        deny_after: 2,
        ..Messages::default()
    };
    for gateway in both(messages).await {
        let mut client = gateway.connect().await;
        echoes(&mut client, "one").await;
        client.send(Message::text("dropped")).await.unwrap();
        closes_with(&mut client, Message::text("the last straw"), 1008, "too many messages").await;
        assert_eq!(gateway.policy.convicted.lock().unwrap().len(), 1);
    }
}

#[tokio::test]
async fn a_proxy_is_never_denied_for_its_clients() {
    let messages = Messages { max_size: 10, deny_after: 1, ..none() };
    let trusted_proxies = vec!["127.0.0.0/8".parse().unwrap()];
    let gateway = start(&config::Gateway { trusted_proxies, messages, ..quiet() });
    for _ in 0..2 {
        let mut client = gateway.connect().await;
        closes_with(&mut client, Message::text("x".repeat(11)), 1009, "message too big").await;
    }
    assert!(gateway.policy.convicted.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_connection_that_is_too_old_is_closed_however_busy() {
    let gateway = start(&config::Gateway { max_lifetime: Duration::from_millis(300), ..quiet() });
    let began = tokio::time::Instant::now();
    let mut client = gateway.connect().await;
    let (code, reason) = loop {
        // It may be closed at any time.
        _ = client.send(Message::text("busy")).await;
        match next(&mut client).await {
            Message::Close(Some(frame)) => break (u16::from(frame.code), frame.reason.to_string()),
            _ => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    };
    assert_eq!(without_hint((code, reason)), (1001, "open for as long as it may be".to_owned()));
    assert!(began.elapsed() >= Duration::from_millis(270), "{:?}", began.elapsed());
    gateway.policy.wait_closed(1).await;
}

#[tokio::test]
async fn a_source_has_so_many_messages_over_all_its_connections() {
    let messages =
        Messages { rate_per_source: 3, window: Duration::from_hours(1), on_violation: OnViolation::Close, ..none() };
    for gateway in both(messages).await {
        let (mut first, mut second) = (gateway.connect().await, gateway.connect().await);
        echoes(&mut first, "1").await;
        echoes(&mut second, "2").await;
        echoes(&mut first, "3").await;
        closes_with(&mut second, Message::text("4"), 1008, "too many messages over all connections").await;
        drop((first, second));
        gateway.policy.wait_closed(2).await;
        // Coming back does not help.
        let mut third = gateway.connect().await;
        closes_with(&mut third, Message::text("5"), 1008, "too many messages over all connections").await;
        assert_eq!(gateway.metric("limiter_messages_total{direction=\"in\",verdict=\"over_shared_rate\"}"), 2);
    }
}

#[tokio::test]
async fn what_a_source_is_denied_for_is_what_it_sends_together_too() {
    let messages = Messages {
        bytes_per_second_per_source: 1,
        max_size: 1000,
        on_violation: OnViolation::Drop,
        deny_after: 2,
        ..none()
    };
    for gateway in both(messages).await {
        let (mut first, mut second) = (gateway.connect().await, gateway.connect().await);
        echoes(&mut first, &"x".repeat(600)).await;
        second.send(Message::text("x".repeat(600))).await.unwrap();
        // What was left out counts for nothing.
        echoes(&mut second, &"x".repeat(390)).await;
        closes_with(&mut first, Message::text("x".repeat(600)), 1008, "too many bytes over all connections").await;
        assert_eq!(gateway.policy.convicted.lock().unwrap().len(), 1);
    }
}

#[tokio::test]
async fn a_frame_longer_than_one_may_be_closes() {
    for gateway in both(Messages { max_frame_size: 3, ..none() }).await {
        let mut stream = shaken(&gateway).await;
        // The first message is longer than a frame, and none of its frames is.
        stream.write_all(&[frame(0x01, b"abc"), frame(0x80, b"def"), frame(0x01, b"g")].concat()).await.unwrap();
        stream.write_all(&frame(0x80, b"hijk")).await.unwrap();
        let mut rest = Vec::new();
        timeout(PATIENCE, stream.read_to_end(&mut rest)).await.unwrap().unwrap();
        assert!(rest.ends_with(b"\x88\x0f\x03\xf1frame too big"), "{rest:?}");
        assert_eq!(gateway.metric("limiter_messages_total{direction=\"in\",verdict=\"frame_too_big\"}"), 1);
    }
}
