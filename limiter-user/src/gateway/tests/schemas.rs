//! Texts that must fit a schema, and strings that are sanitised, with the built-in applications and through the relay.

use std::{fs, path::PathBuf};

use futures_util::{SinkExt, StreamExt};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    time::timeout,
};
use tokio_tungstenite::tungstenite::Message;

use super::{message_limits::both, relays::relay_with, support::*};
use crate::{
    config::{self, Kinds, Messages, OnViolation, Sanitize},
    gateway::{BindError, Gateway, Metrics},
};

const SCHEMA: &str = r#"{"type": "object", "required": ["to"], "properties": {"to": {"type": "string"}}}"#;

struct Folder(TempDir);

impl Folder {
    fn new(schema: &str) -> Self {
        let folder = Self(TempDir::new().unwrap());
        folder.write(schema);
        folder
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("message.json")
    }

    /// In one step, as whoever deploys it does.
    fn write(&self, schema: &str) {
        let new = self.0.path().join("new");
        fs::write(&new, schema).unwrap();
        fs::rename(new, self.path()).unwrap();
    }

    fn messages(&self) -> Messages {
        Messages { schema: Some(self.path()), rate: 0, ..Messages::default() }
    }
}

async fn unfit(client: &mut Client, message: Message) {
    client.send(message).await.unwrap();
    assert_eq!(next_close(client).await, (1008, "message does not fit the schema".to_owned()));
}

#[tokio::test]
async fn a_text_that_does_not_fit_the_schema_closes() {
    let folder = Folder::new(SCHEMA);
    for gateway in both(folder.messages()).await {
        for text in ["{}", "no json", "", r#"{"to": 1}"#, r#"{"to": "a", "to": "b"}"#, &"[".repeat(60_000)] {
            let mut client = gateway.connect().await;
            echoes(&mut client, r#" { "to" : "a", "n" : 1.0e0 } "#).await;
            unfit(&mut client, Message::text(text)).await;
        }
        assert_eq!(gateway.metric("limiter_messages_total{direction=\"in\",verdict=\"schema\"}"), 6);
        assert_eq!(gateway.metric("limiter_messages_total{direction=\"in\",verdict=\"passed\"}"), 6);
    }
}

#[tokio::test]
async fn a_text_that_does_not_fit_is_left_out_where_that_is_asked_for() {
    let folder = Folder::new(SCHEMA);
    let messages = Messages { on_violation: OnViolation::Drop, deny_after: 2, ..folder.messages() };
    for gateway in both(messages).await {
        let mut client = gateway.connect().await;
        client.send(Message::text("{}")).await.unwrap();
        echoes(&mut client, r#"{"to":"a"}"#).await;
        unfit(&mut client, Message::text("the last straw")).await;
        assert_eq!(gateway.policy.convicted.lock().unwrap().len(), 1);
    }
}

#[tokio::test]
async fn there_is_no_way_past_a_schema_in_a_binary_message() {
    let folder = Folder::new(SCHEMA);
    for allow in [Kinds::Any, Kinds::Text] {
        for gateway in both(Messages { allow, ..folder.messages() }).await {
            let mut client = gateway.connect().await;
            client.send(Message::binary(r#"{"to":"a"}"#)).await.unwrap();
            assert_eq!(next_close(&mut client).await, (1003, "this kind of message is not taken".to_owned()));
        }
    }
}

#[tokio::test]
async fn a_room_hears_what_fits_and_as_it_is_sanitised() {
    let folder = Folder::new(SCHEMA);
    let messages = Messages { sanitize: Sanitize::Html, ..folder.messages() };
    let gateway = start(&config::Gateway { upstream: config::Upstream::Broadcast, messages, ..quiet() });
    let (mut speaks, mut hears) = (gateway.connect().await, gateway.connect().await);
    speaks.send(Message::text(r#"{"to":"<b>\u0000"}"#)).await.unwrap();
    assert_eq!(next(&mut hears).await, Message::text(r#"{"to":"&lt;b&gt;"}"#));
    unfit(&mut speaks, Message::text("{}")).await;
}

#[tokio::test]
async fn fragments_reach_the_upstream_as_they_were_and_only_when_the_message_fits() {
    let folder = Folder::new(SCHEMA);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let upstream = format!("ws://{}", listener.local_addr().unwrap()).parse().unwrap();
    let gateway = start(&config::Gateway { upstream, messages: folder.messages(), ..quiet() });
    let accepted = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        // From here on it is bytes.
        tokio_tungstenite::accept_async(stream).await.unwrap().into_inner()
    });
    let mut client = shaken(&gateway).await;
    let mut server = timeout(PATIENCE, accepted).await.unwrap().unwrap();
    let text = [frame(0x01, br#"{"to""#), frame(0x00, b""), frame(0x80, br#":"a"}"#)];
    let ping = frame(0x89, b"ping");
    client.write_all(&[&text[0], &ping, &text[1]].map(Vec::as_slice).concat()).await.unwrap();
    let mut heard = vec![0; ping.len()];
    timeout(PATIENCE, server.read_exact(&mut heard)).await.unwrap().unwrap();
    assert_eq!(heard, ping, "a ping does not wait for the message that it is in");
    client.write_all(&text[2]).await.unwrap();
    let mut heard = vec![0; text.concat().len()];
    timeout(PATIENCE, server.read_exact(&mut heard)).await.unwrap().unwrap();
    assert_eq!(heard, text.concat());

    // Of one that does not fit the upstream gets nothing, and it is closed between two frames.
    client.write_all(&[frame(0x01, b"{"), frame(0x80, b"}")].concat()).await.unwrap();
    let mut heard = [0; 2];
    timeout(PATIENCE, server.read_exact(&mut heard)).await.unwrap().unwrap();
    assert_eq!(heard[0], 0x88);
    let mut end = Vec::new();
    timeout(PATIENCE, client.read_to_end(&mut end)).await.unwrap().unwrap();
    assert!(end.ends_with(b"\x03\xf0message does not fit the schema"), "{end:?}");
}

#[tokio::test]
async fn a_text_of_which_only_a_part_came_is_forgotten_with_its_client() {
    let folder = Folder::new(SCHEMA);
    let (gateway, _) =
        relay_with(config::Gateway { messages: folder.messages(), ..quiet() }, "", |mut server| async move {
            assert!(matches!(server.next().await, Some(Ok(Message::Close(_)))), "nothing but the end");
        })
        .await;
    let mut client = shaken(&gateway).await;
    client.write_all(&[frame(0x01, br#"{"to""#), frame(0x88, &[0x03, 0xe8])].concat()).await.unwrap();
    let mut end = Vec::new();
    timeout(PATIENCE, client.read_to_end(&mut end)).await.unwrap().unwrap();
    assert_eq!(end, [0x88, 2, 0x03, 0xe8]);
    gateway.policy.wait_closed(1).await;
}

#[tokio::test]
async fn strings_are_sanitised_and_what_is_clean_passes_as_it_came() {
    let messages = Messages { sanitize: Sanitize::Control, rate: 0, ..Messages::default() };
    for gateway in both(messages).await {
        let mut client = gateway.connect().await;
        echoes(&mut client, r#" ["<clean>", 1.50, "\u0041" ] "#).await;
        client.send(Message::text(r#"{"a\u202e":["b\u0007",1.50]}"#)).await.unwrap();
        assert_eq!(next(&mut client).await, Message::text(r#"{"a":["b",1.50]}"#));
        let long = "x".repeat(50_000);
        client.send(Message::text(format!("\"{long}\u{7f}\""))).await.unwrap();
        assert_eq!(next(&mut client).await, Message::text(format!("\"{long}\"")));
        client.send(Message::text("not json")).await.unwrap();
        assert_eq!(next_close(&mut client).await, (1008, "message is not JSON".to_owned()));
    }
}

#[tokio::test]
async fn a_schema_that_changes_holds_for_open_sessions_and_a_bad_one_changes_nothing() {
    let folder = Folder::new(SCHEMA);
    let gateway = start(&config::Gateway { messages: folder.messages(), ..quiet() });
    let mut client = gateway.connect().await;
    echoes(&mut client, r#"{"to":"a"}"#).await;
    folder.write(r#"{"type": "nothing"}"#);
    let reloads = |result: &str| gateway.metric(&format!("limiter_schema_reloads_total{{result=\"{result}\"}}"));
    eventually("the bad one was looked at", || reloads("failed") == 1).await;
    echoes(&mut client, r#"{"to":"a"}"#).await;
    folder.write(r#"{"type": "integer"}"#);
    eventually("the new one is in use", || reloads("ok") == 1).await;
    echoes(&mut client, "7").await;
    unfit(&mut client, Message::text(r#"{"to":"a"}"#)).await;
}

#[tokio::test]
async fn a_gateway_does_not_start_with_a_schema_that_is_none() {
    for schema in ["{", r#"{"type": "nothing"}"#, r#"{"$ref": "https://example.com/schema.json"}"#] {
        let folder = Folder::new(schema);
        let config = config::Gateway { messages: folder.messages(), ..quiet() };
        match Gateway::bind(&config, std::sync::Arc::new(Recorder::default()), std::sync::Arc::new(Metrics::default()))
        {
            Err(BindError::Schema(error)) => assert!(error.to_string().contains("message.json"), "{error}"),
            Err(error) => panic!("{error}"),
            Ok(_) => panic!("{schema} was taken"),
        }
    }
}
