//! Frames that break RFC 6455: each gets its Close frame before the connection is closed.

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};

use super::support::*;

#[tokio::test]
async fn each_gets_its_code() {
    let gateway = start(&quiet());
    let max = u64::try_from(quiet().messages.max_size).unwrap();
    let header = |first: u8, length: u64| [&[first, 0xff][..], &length.to_be_bytes(), &[0; 4]].concat();
    let flood = vec![0; 4 << 20];
    let cases: Vec<(&str, u16, Vec<u8>)> = vec![
        ("unmasked", 1002, vec![0x81, 2, b'h', b'i']),
        ("reserved bit (no extension)", 1002, frame(0xc1, b"x")),
        ("reserved opcode", 1002, frame(0x83, b"x")),
        ("reserved control opcode", 1002, frame(0x8b, b"x")),
        ("fragmented ping", 1002, frame(0x09, b"x")),
        ("continuation of nothing", 1002, frame(0x80, b"x")),
        ("a second message inside a first", 1002, [frame(0x01, b"a"), frame(0x81, b"b")].concat()),
        ("ping of 126 bytes", 1002, [&[0x89, 0xfe, 0, 126, 0, 0, 0, 0][..], &[b'x'; 126]].concat()),
        ("close with half a code", 1002, frame(0x88, &[3])),
        ("close with a code out of range", 1002, frame(0x88, &[0x03, 0xe7])),
        ("text that is no UTF-8", 1007, frame(0x81, &[0xff, 0xfe])),
        ("UTF-8 cut off over fragments", 1007, [frame(0x01, &[0xce]), frame(0x80, &[0xce])].concat()),
        ("close reason that is no UTF-8", 1007, frame(0x88, &[0x03, 0xe8, 0xff])),
        ("length of 2^63", 1009, header(0x82, 1 << 63)),
        ("one byte too long, all of it sent", 1009, [header(0x82, max + 1), vec![0; 64 * 1024 + 1]].concat()),
        ("far too long, and still sending", 1009, [header(0x82, 4 << 20), flood].concat()),
        ("too long in fragments", 1009, [header(0x02, max), vec![0; 64 * 1024], frame(0x80, b"x")].concat()),
    ];
    for (case, code, bytes) in &cases {
        let mut stream = shaken(&gateway).await;
        let (mut read, mut write) = stream.split();
        let mut answer = Vec::new();
        let sent_and_read = async { tokio::join!(write.write_all(bytes), read.read_to_end(&mut answer)) };
        let (sent, ended) = timeout(PATIENCE, sent_and_read).await.unwrap_or_else(|_| panic!("{case}: no end"));
        sent.and(ended).unwrap_or_else(|e| panic!("{case}: {e}; a client may lose the Close frame so"));
        assert_eq!(answer.first(), Some(&0x88), "{case}: {answer:?}");
        assert_eq!(u16::from_be_bytes([answer[2], answer[3]]), *code, "{case}");
        assert_eq!(answer.len(), 2 + usize::from(answer[1]), "{case}: something follows the Close frame");
    }
    gateway.policy.wait_closed(cases.len()).await;
    assert_eq!(gateway.metric("limiter_messages_total{direction=\"in\",verdict=\"too_big\"}"), 4);
    assert_eq!(gateway.metric("limiter_sessions"), 0);
}

#[tokio::test]
async fn the_longest_message_passes_whole_and_in_fragments() {
    let gateway = start(&quiet());
    let mut client = gateway.connect().await;
    echoes(&mut client, &"x".repeat(64 * 1024)).await;

    let mut stream = shaken(&gateway).await;
    stream.write_all(&[frame(0x01, b"a"), frame(0x89, b"?"), frame(0x80, b"b")].concat()).await.unwrap();
    let mut answer = [0; 7];
    timeout(PATIENCE, stream.read_exact(&mut answer)).await.unwrap().unwrap();
    assert_eq!(&answer, b"\x8a\x01?\x81\x02ab");
}
