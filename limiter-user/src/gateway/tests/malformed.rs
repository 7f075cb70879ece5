//! Frames that break RFC 6455: each gets its Close frame before the connection is closed.

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};

use super::{message_limits::both, support::*};

/// What it is called, the code that it gets, and the bytes.
type Case = (String, u16, Vec<u8>);

fn cases() -> Vec<Case> {
    let max = u64::try_from(quiet().messages.max_size).unwrap();
    let header = |first: u8, length: u64| [&[first, 0xff][..], &length.to_be_bytes(), &[0; 4]].concat();
    let medium = |first: u8, payload: &[u8]| {
        let length = u16::try_from(payload.len()).unwrap().to_be_bytes();
        [&[first, 0xfe], &length[..], &[0; 4], payload].concat()
    };
    let close_code = |code: u16| frame(0x88, &code.to_be_bytes());
    let flood = vec![0; 4 << 20];
    let mut cases: Vec<(String, u16, Vec<u8>)> = [
        ("unmasked", 1002, vec![0x81, 2, b'h', b'i']),
        ("unmasked ping", 1002, vec![0x89, 0]),
        ("unmasked close", 1002, vec![0x88, 2, 0x03, 0xe8]),
        ("fragmented ping", 1002, frame(0x09, b"x")),
        ("fragmented pong", 1002, frame(0x0a, b"")),
        ("fragmented close", 1002, frame(0x08, &[0x03, 0xe8])),
        ("continuation of nothing", 1002, frame(0x80, b"x")),
        ("continuation after a message", 1002, [frame(0x01, b"a"), frame(0x80, b"b"), frame(0x00, b"c")].concat()),
        ("a second message inside a first", 1002, [frame(0x01, b"a"), frame(0x81, b"b")].concat()),
        ("a second, behind a ping", 1002, [frame(0x02, b"a"), frame(0x89, b""), frame(0x02, b"b")].concat()),
        ("ping of 126 bytes", 1002, medium(0x89, &[b'x'; 126])),
        ("close of 126 bytes", 1002, medium(0x88, &[b'x'; 126])),
        ("ping of 64 KiB", 1002, header(0x89, 1 << 16)),
        ("ping of 2^63 bytes", 1002, header(0x89, 1 << 63)),
        ("length in three bytes that one would hold", 1002, medium(0x82, &[b'x'; 125])),
        ("length in nine bytes that three would hold", 1002, header(0x82, 0xffff)),
        ("close with half a code", 1002, frame(0x88, &[3])),
        ("text that is no UTF-8", 1007, frame(0x81, &[0xff, 0xfe])),
        ("overlong form of a slash", 1007, frame(0x81, &[0xc0, 0xaf])),
        ("half of a surrogate pair", 1007, frame(0x81, &[0xed, 0xa0, 0x80])),
        ("beyond the last code point", 1007, frame(0x81, &[0xf4, 0x90, 0x80, 0x80])),
        ("a character that is cut off", 1007, frame(0x81, &[b'a', 0xf0, 0x9f, 0x98])),
        ("UTF-8 cut off over fragments", 1007, [frame(0x01, &[0xce]), frame(0x80, &[0xce])].concat()),
        (
            "UTF-8 that goes wrong in a third fragment",
            1007,
            [frame(0x01, &[0xf0]), frame(0x00, &[0x9f]), frame(0x89, b"?"), frame(0x80, &[0x98, 0x28])].concat(),
        ),
        (
            "UTF-8 that an empty last fragment leaves open",
            1007,
            [frame(0x01, &[0xe2, 0x82]), frame(0x80, b"")].concat(),
        ),
        ("close reason that is no UTF-8", 1007, frame(0x88, &[0x03, 0xe8, 0xff])),
        ("length of 2^63", 1009, header(0x82, 1 << 63)),
        ("length of 2^64 - 1", 1009, header(0x82, u64::MAX)),
        ("lengths whose sum is past 2^64", 1009, [frame(0x02, b"x"), header(0x80, u64::MAX)].concat()),
        ("one byte too long, all of it sent", 1009, [header(0x82, max + 1), vec![0; 64 * 1024 + 1]].concat()),
        ("far too long, and still sending", 1009, [header(0x82, 4 << 20), flood].concat()),
        ("too long in fragments", 1009, [header(0x02, max), vec![0; 64 * 1024], frame(0x80, b"x")].concat()),
    ]
    .map(|(case, code, bytes)| (case.to_owned(), code, bytes))
    .into();
    for bits in 1..=7 {
        cases.push((format!("reserved bits {bits:03b}, and no extension"), 1002, frame(0x81 | bits << 4, b"x")));
    }
    for opcode in [3, 4, 5, 6, 7, 0xb, 0xc, 0xd, 0xe, 0xf] {
        cases.push((format!("opcode {opcode}"), 1002, frame(0x80 | opcode, b"x")));
    }
    for code in [0, 999, 1004, 1005, 1006, 1015, 1016, 1999, 2000, 2999, 5000, u16::MAX] {
        cases.push((format!("close with {code}"), 1002, close_code(code)));
    }
    cases
}

/// Sends bytes after a good handshake, and says what comes back up to the end.
async fn answer_to(gateway: &Running, case: &str, bytes: &[u8]) -> Vec<u8> {
    let mut stream = shaken(gateway).await;
    let (mut read, mut write) = stream.split();
    let mut answer = Vec::new();
    let sent_and_read = async { tokio::join!(write.write_all(bytes), read.read_to_end(&mut answer)) };
    let (sent, ended) = timeout(PATIENCE, sent_and_read).await.unwrap_or_else(|_| panic!("{case}: no end"));
    sent.and(ended).unwrap_or_else(|e| panic!("{case}: {e}; a client may lose the Close frame so"));
    answer
}

#[tokio::test]
async fn each_gets_its_code_and_holds_nothing_and_nobody_up() {
    for gateway in both(quiet().messages).await {
        let mut bystander = gateway.connect().await;
        let cases = cases();
        for (case, code, bytes) in &cases {
            let answer = answer_to(&gateway, case, bytes).await;
            // What came before was good, and was answered.
            let answer = answer.strip_prefix(b"\x81\x02ab").unwrap_or(&answer);
            let answer =
                [&b"\x8a\x00"[..], b"\x8a\x01?"].iter().find_map(|pong| answer.strip_prefix(*pong)).unwrap_or(answer);
            assert_eq!(answer.first(), Some(&0x88), "{case}: {answer:?}");
            assert_eq!(u16::from_be_bytes([answer[2], answer[3]]), *code, "{case}");
            assert_eq!(answer.len(), 2 + usize::from(answer[1]), "{case}: something follows the Close frame");
            echoes(&mut bystander, case).await;
        }
        gateway.policy.wait_closed(cases.len()).await;
        assert_eq!(gateway.metric("limiter_messages_total{direction=\"in\",verdict=\"too_big\"}"), 6);
        let malformed = gateway.metric("limiter_messages_total{direction=\"in\",verdict=\"malformed\"}");
        assert_eq!(malformed, cases.len() as u64 - 6);
        assert_eq!(gateway.metric("limiter_sessions"), 1);
        drop(bystander);
        gateway.policy.wait_closed(cases.len() + 1).await;
        gateway.wait_released().await;
        assert_eq!(gateway.metric("limiter_sessions"), 0);
    }
}

/// A client may close in each of these ways, and is answered with the same.
#[tokio::test]
async fn every_close_that_the_rfc_has_is_answered_in_kind() {
    // The library of the upstream does not know the newest.
    for (gateway, newest) in both(quiet().messages).await.into_iter().zip([Some(1014), None]) {
        let codes = [1000_u16, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 3000, 3999, 4000, 4999];
        let mut payloads: Vec<Vec<u8>> =
            codes.into_iter().chain(newest).map(|code| code.to_be_bytes().into()).collect();
        payloads.extend([
            vec![],
            [&[0x03, 0xe8], &[b'r'; 123][..]].concat(),
            [&[0x03, 0xe8], "caf\u{e9}".as_bytes()].concat(),
        ]);
        for payload in &payloads {
            let answer = answer_to(&gateway, "a close", &frame(0x88, payload)).await;
            assert_eq!(answer[..2], [0x88, u8::try_from(payload.len()).unwrap()], "{payload:?}");
            assert_eq!(answer[2..], payload[..], "{payload:?}");
        }
        gateway.policy.wait_closed(payloads.len()).await;
    }
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
