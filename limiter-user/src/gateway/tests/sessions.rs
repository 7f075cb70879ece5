//! Sessions with the echo application.

use std::time::Duration;

use futures_util::SinkExt;
use tokio_tungstenite::tungstenite::Message;

use super::support::*;
use crate::config::{self, Messages, OnViolation};

#[tokio::test]
async fn messages_come_back_in_order_and_the_close_with_its_code() {
    let gateway = start(&quiet());
    let mut client = gateway.connect().await;
    for n in 0..50 {
        client.feed(Message::text(format!("{n}"))).await.unwrap();
    }
    client.send(Message::binary(vec![0, 255])).await.unwrap();
    for n in 0..50 {
        assert_eq!(next(&mut client).await, Message::text(format!("{n}")));
    }
    assert_eq!(next(&mut client).await, Message::binary(vec![0, 255]));
    assert_eq!(gateway.metric("limiter_messages_total{direction=\"in\",verdict=\"passed\"}"), 51);
    assert_eq!(gateway.metric("limiter_messages_total{direction=\"out\",verdict=\"passed\"}"), 51);
    assert_eq!(gateway.metric("limiter_message_bytes_total{direction=\"in\"}"), 92);

    client.send(close(4000, "bye")).await.unwrap();
    assert_eq!(next_close(&mut client).await, (4000, "bye".to_owned()));
    gateway.policy.wait_closed(1).await;
    assert_eq!(gateway.policy.closed(address(&client)), 1);
    eventually("it is counted", || gateway.metric("limiter_sessions_closed_total{reason=\"client\"}") == 1).await;
    assert_eq!(gateway.metric("limiter_connection_seconds_count"), 1);
}

#[tokio::test]
async fn a_close_frame_may_be_longer_than_a_message() {
    let messages = Messages { max_size: 8, ..Messages::default() };
    let gateway = start(&config::Gateway { messages, ..quiet() });
    let mut client = gateway.connect().await;
    echoes(&mut client, "8 bytes!").await;
    let reason = "x".repeat(100);
    client.send(close(4000, &reason)).await.unwrap();
    assert_eq!(next_close(&mut client).await, (4000, reason));

    // What is no control frame is held to the limit all the same.
    let mut client = gateway.connect().await;
    client.send(Message::text("x".repeat(9))).await.unwrap();
    assert_eq!(next_close(&mut client).await, (1009, "message too big".to_owned()));
}

fn limited(on_violation: OnViolation) -> config::Gateway {
    let messages = Messages { rate: 3, window: Duration::from_mins(10), on_violation, ..Messages::default() };
    config::Gateway { messages, ..quiet() }
}

#[tokio::test]
async fn one_message_too_many_closes_with_1008() {
    let gateway = start(&limited(OnViolation::Close));
    let mut client = gateway.connect().await;
    for n in 0..3 {
        echoes(&mut client, &format!("{n}")).await;
    }
    client.send(Message::text("too many")).await.unwrap();
    assert_eq!(next_close(&mut client).await, (1008, "too many messages".to_owned()));
    gateway.policy.wait_closed(1).await;

    // The rate is the connection's own.
    echoes(&mut gateway.connect().await, "fresh").await;
}

#[tokio::test]
async fn messages_too_many_are_dropped_where_that_is_asked_for() {
    let gateway = start(&limited(OnViolation::Drop));
    let mut client = gateway.connect().await;
    for n in 0..3 {
        echoes(&mut client, &format!("{n}")).await;
    }
    client.send(Message::text("dropped")).await.unwrap();
    client.send(Message::text("dropped too")).await.unwrap();
    client.send(close(1000, "")).await.unwrap();
    // The Close comes next: nothing was echoed in between.
    assert_eq!(next_close(&mut client).await.0, 1000);
    assert_eq!(gateway.metric("limiter_messages_total{direction=\"in\",verdict=\"over_rate\"}"), 2);
}

#[tokio::test]
async fn an_ipv6_client_is_told_by_its_own_address() {
    let gateway = start(&config::Gateway { listen: vec!["[::1]:0".parse().unwrap()], ..quiet() });
    let mut client = gateway.connect().await;
    echoes(&mut client, "six").await;
    let own = address(&client);
    assert!(own.is_ipv6());
    client.close(None).await.unwrap();
    gateway.policy.wait_closed(1).await;
    assert_eq!(gateway.policy.closed(own), 1);
}
