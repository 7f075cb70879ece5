//! What becomes of frames on their way through the relay, byte for byte.

use std::{future::pending, time::Duration};

use futures_util::{SinkExt, StreamExt};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::{mpsc, oneshot},
    time::timeout,
};
use tokio_tungstenite::tungstenite::{Error, Message, error::ProtocolError};

use super::{
    relays::{Server, echo, relay_to, relay_with},
    support::*,
};
use crate::config;

const SHORT: Duration = Duration::from_millis(50);

/// Everything that an upstream gets, up to the end of its connection. `None` at the end: there was no Close frame.
async fn upstream_hears(gateway_config: config::Gateway) -> (Running, oneshot::Receiver<Vec<Option<Message>>>) {
    let (told, heard) = oneshot::channel();
    let (gateway, _) = relay_with(gateway_config, "", |mut server| async move {
        let mut received = Vec::new();
        loop {
            match server.next().await {
                Some(Ok(message)) => received.push(Some(message)),
                Some(Err(Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) | Error::Io(_))) => {
                    received.push(None);
                    break;
                }
                Some(Err(error)) => panic!("the upstream gets what is no WebSocket: {error}"),
                None => break,
            }
        }
        told.send(received).unwrap();
    })
    .await;
    (gateway, heard)
}

async fn exactly(stream: &mut (impl AsyncReadExt + Unpin), bytes: &[u8]) {
    let mut read = vec![0; bytes.len()];
    timeout(PATIENCE, stream.read_exact(&mut read)).await.expect("enough bytes").unwrap();
    assert_eq!(read, bytes);
}

/// What it is called, the code that the client gets, what it sends, and what the upstream gets.
type Case = (&'static str, u16, Vec<u8>, Vec<Option<Message>>);

#[tokio::test]
async fn each_breach_gets_its_code_and_the_upstream_is_told_where_a_frame_may_be() {
    let max = quiet().messages.max_size;
    let long = |first: u8, length: u64| [&[first, 0xff][..], &length.to_be_bytes(), &[0; 4]].concat();
    let text = |text: &str| Some(Message::text(text));
    let away = Some(close(1001, "client went away"));
    let cases: Vec<Case> = vec![
        ("unmasked", 1002, [frame(0x81, b"a"), vec![0x81, 1, b'b']].concat(), vec![text("a"), away.clone()]),
        ("reserved bit", 1002, frame(0xc1, b"x"), vec![away.clone()]),
        ("reserved opcode", 1002, frame(0x83, b"x"), vec![away.clone()]),
        ("fragmented ping", 1002, frame(0x09, b"x"), vec![away.clone()]),
        ("continuation of nothing", 1002, frame(0x80, b"x"), vec![away.clone()]),
        ("message in a message", 1002, [frame(0x01, b"a"), frame(0x81, b"b")].concat(), vec![away.clone()]),
        ("long ping", 1002, [&[0x89, 0xfe, 0, 126, 0, 0, 0, 0][..], &[b'x'; 126]].concat(), vec![away.clone()]),
        ("length in too many bytes", 1002, vec![0x82, 0xfe, 0, 1, 0, 0, 0, 0, 9], vec![away.clone()]),
        ("close code out of range", 1002, frame(0x88, &[0x03, 0xe7]), vec![away.clone()]),
        ("invalid text", 1007, [frame(0x81, b"a"), frame(0x81, &[0xff])].concat(), vec![text("a"), away.clone()]),
        ("character cut off", 1007, frame(0x81, &[0xe2, 0x82]), vec![away.clone()]),
        ("invalid over fragments", 1007, [frame(0x01, &[0xce]), frame(0x80, &[0xce])].concat(), vec![away.clone()]),
        ("length of 2^63", 1009, long(0x82, 1 << 63), vec![away.clone()]),
        ("one byte too long", 1009, long(0x82, max as u64 + 1), vec![away.clone()]),
        ("too long in fragments", 1009, [frame(0x02, b"x"), long(0x80, max as u64)].concat(), vec![away.clone()]),
        ("pings without end", 1008, frame(0x89, b"").repeat(300), {
            let mut pings = vec![Some(Message::Ping(Vec::new().into())); 200];
            pings.push(away);
            pings
        }),
    ];
    for (case, code, bytes, expected) in cases {
        let (gateway, heard) = upstream_hears(quiet()).await;
        let mut stream = shaken(&gateway).await;
        stream.write_all(&bytes).await.unwrap();
        let mut answer = Vec::new();
        timeout(PATIENCE, stream.read_to_end(&mut answer)).await.expect("an end").unwrap();
        // Pongs of the upstream may come before.
        while answer.starts_with(&[0x8a, 0]) {
            answer.drain(..2);
        }
        assert_eq!(answer.first(), Some(&0x88), "{case}: {answer:?}");
        assert_eq!(u16::from_be_bytes([answer[2], answer[3]]), code, "{case}");
        assert_eq!(answer.len(), 2 + usize::from(answer[1]), "{case}: something follows the Close frame");
        let heard = timeout(PATIENCE, heard).await.unwrap().unwrap();
        assert_eq!(heard, expected, "{case}");
        gateway.policy.wait_closed(1).await;
    }
}

#[tokio::test]
async fn an_upstream_that_has_part_of_a_bad_frame_is_cut_off_rather_than_sent_something_else() {
    let (gateway, heard) = upstream_hears(quiet()).await;
    let mut stream = shaken(&gateway).await;
    let bad = frame(0x81, b"it begins well and ends \xff");
    let passed = "limiter_messages_total{direction=\"in\",verdict=\"passed\"}";
    // A whole message in front shows that what came with it was looked at.
    stream.write_all(&[&frame(0x81, b"a"), &bad[..20]].concat()).await.unwrap();
    eventually("the beginning has passed", || gateway.metric(passed) == 1).await;
    stream.write_all(&bad[20..]).await.unwrap();
    let mut answer = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut answer)).await.expect("an end").unwrap();
    assert_eq!(answer[..4], [0x88, 15, 0x03, 0xef]);
    assert_eq!(timeout(PATIENCE, heard).await.unwrap().unwrap(), [Some(Message::text("a")), None]);
}

/// Hands the raw connection of the upstream over, after the handshake.
async fn raw_upstream(config: config::Gateway) -> (Running, TcpStream, TcpStream) {
    let (give, mut given) = mpsc::channel(1);
    let (gateway, _) = relay_with(config, "", |server: Server| async move {
        give.send(server.into_inner()).await.unwrap();
        pending::<()>().await;
    })
    .await;
    let client = shaken(&gateway).await;
    let upstream = timeout(PATIENCE, given.recv()).await.unwrap().unwrap();
    (gateway, client, upstream)
}

#[tokio::test]
async fn every_byte_passes_as_it_is_in_both_directions_and_in_any_pieces() {
    let (_gateway, mut client, mut upstream) = raw_upstream(quiet()).await;
    // Masks, fragments, empty frames, a ping inside a message, and a character over two fragments.
    let masked = [
        &[0x01, 0x81, 9, 8, 7, 6, 0xe2 ^ 9][..],
        &[0x89, 0x82, 1, 1, 1, 1, 5, 6],
        &[0x00, 0x80, 3, 3, 3, 3],
        &[0x80, 0x82, 1, 2, 3, 4, 0x82 ^ 1, 0xac ^ 2],
        &[0x82, 0x80, 0, 0, 0, 0],
    ]
    .concat();
    for byte in &masked {
        client.write_all(std::slice::from_ref(byte)).await.unwrap();
        tokio::task::yield_now().await;
    }
    exactly(&mut upstream, &masked).await;
    let plain = [&[0x02, 126, 0, 200][..], &[7; 200], &[0x8a, 1, b'p'], &[0x80, 0], &[0x81, 2, b'h', b'i']].concat();
    for part in plain.chunks(3) {
        upstream.write_all(part).await.unwrap();
        tokio::task::yield_now().await;
    }
    exactly(&mut client, &plain).await;
}

#[tokio::test]
async fn our_pings_and_their_answers_stay_with_us_and_those_of_others_pass() {
    let config = config::Gateway { ping_interval: SHORT, pong_timeout: PATIENCE, ..quiet() };
    let (_gateway, mut client, mut upstream) = raw_upstream(config).await;
    exactly(&mut client, b"\x89\x07limiter").await;
    client.write_all(&frame(0x8a, b"limiter")).await.unwrap();
    client.write_all(&frame(0x8a, b"theirs")).await.unwrap();
    exactly(&mut upstream, &frame(0x8a, b"theirs")).await;
    // Having answered, it is asked again.
    exactly(&mut client, b"\x89\x07limiter").await;
}

#[tokio::test]
async fn a_ping_goes_between_frames_and_never_into_one() {
    let config = config::Gateway { ping_interval: SHORT, pong_timeout: PATIENCE, ..quiet() };
    let (_gateway, mut client, mut upstream) = raw_upstream(config).await;
    exactly(&mut client, b"\x89\x07limiter").await;
    client.write_all(&frame(0x8a, b"limiter")).await.unwrap();
    upstream.write_all(&[0x02, 10, 1, 2, 3]).await.unwrap();
    exactly(&mut client, &[0x02, 10, 1, 2, 3]).await;
    // Far longer than until the next ping is due.
    assert!(timeout(4 * SHORT, client.read_u8()).await.is_err(), "something was put into the frame");
    upstream.write_all(&[4, 5, 6, 7, 8, 9, 10, 0x80, 2, 11]).await.unwrap();
    exactly(&mut client, &[4, 5, 6, 7, 8, 9, 10]).await;
    exactly(&mut client, b"\x89\x07limiter").await;
    exactly(&mut client, &[0x80, 2, 11]).await;
}

#[tokio::test]
async fn a_frame_that_has_begun_is_brought_to_its_end_before_the_close_frame() {
    let (gateway, mut client, mut upstream) = raw_upstream(quiet()).await;
    upstream.write_all(&[0x82, 4, 1, 2]).await.unwrap();
    exactly(&mut client, &[0x82, 4, 1, 2]).await;
    client.write_all(&frame(0x82, &[1, 2, 3, 4])[..8]).await.unwrap();
    exactly(&mut upstream, &frame(0x82, &[1, 2, 3, 4])[..8]).await;
    let stopping = gateway.begin_stop();
    upstream.write_all(&[3, 4]).await.unwrap();
    client.write_all(&[3, 4]).await.unwrap();
    exactly(&mut client, &[3, 4, 0x88]).await;
    exactly(&mut upstream, &[3, 4, 0x88]).await;
    drop((client, upstream));
    timeout(PATIENCE, stopping).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_client_that_does_not_read_is_closed_and_the_upstream_told() {
    let (told, heard) = oneshot::channel();
    let config = config::Gateway { pong_timeout: Duration::from_millis(200), ..quiet() };
    let (gateway, _) = relay_with(config, "", |server| async move {
        let (mut write, mut read) = server.split();
        let flood = async {
            while write.send(Message::binary(vec![0; 60_000])).await.is_ok() {}
            pending::<()>().await;
        };
        tokio::select! {
            () = flood => {}
            message = read.next() => told.send(message.unwrap().unwrap()).unwrap(),
        }
    })
    .await;
    let stream = shaken(&gateway).await;
    let slow = "limiter_sessions_closed_total{reason=\"slow_consumer\"}";
    eventually("it is given up", || gateway.metric(slow) == 1).await;
    assert_eq!(timeout(PATIENCE, heard).await.unwrap().unwrap(), close(1001, "client went away"));
    gateway.policy.wait_closed(1).await;
    drop(stream);
}

#[tokio::test]
async fn a_client_behind_the_relay_that_falls_silent_is_given_up() {
    let config = config::Gateway { ping_interval: SHORT, pong_timeout: SHORT, ..quiet() };
    let (gateway, heard) = upstream_hears(config).await;
    let mut stream = shaken(&gateway).await;
    let mut received = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut received)).await.unwrap().unwrap();
    assert_eq!(received, b"\x89\x07limiter\x88\x13\x03\xe9no answer to ping");
    assert_eq!(timeout(PATIENCE, heard).await.unwrap().unwrap(), [Some(close(1001, "client went away"))]);
    eventually("it is counted", || gateway.metric("limiter_sessions_closed_total{reason=\"no_pong\"}") == 1).await;
}

#[tokio::test]
async fn a_relayed_client_is_idle_without_messages_however_it_pings() {
    let config = config::Gateway { idle_timeout: Duration::from_millis(300), ..quiet() };
    let (gateway, _) = relay_with(config, "", echo).await;
    let mut client = gateway.connect().await;
    let reason = loop {
        // A ping that comes too late is no matter.
        _ = client.send(Message::Ping(Vec::new().into())).await;
        match timeout(SHORT, client.next()).await {
            Ok(Some(Ok(Message::Close(Some(frame))))) => break frame,
            Ok(Some(Ok(_))) => tokio::time::sleep(Duration::from_millis(10)).await,
            Ok(ended) => panic!("no Close frame: {ended:?}"),
            Err(_) => {}
        }
    };
    assert_eq!((u16::from(reason.code), reason.reason.as_str()), (1001, "idle"));
}

#[tokio::test]
async fn what_an_upstream_has_said_before_it_answers_a_close_still_arrives() {
    let (gateway, _) = relay_to("", |mut server| async move {
        assert!(server.next().await.unwrap().unwrap().is_close());
        // The library has its answer ready; these go first.
        let raw = server.get_mut();
        raw.write_all(&[0x81, 4, b'l', b'a', b's', b't']).await.unwrap();
        server.flush().await.unwrap();
        pending::<()>().await;
    })
    .await;
    let mut client = shaken(&gateway).await;
    client.write_all(&frame(0x88, &[0x03, 0xe8])).await.unwrap();
    exactly(&mut client, b"\x81\x04last\x88\x02\x03\xe8").await;
    gateway.policy.wait_closed(1).await;
}
