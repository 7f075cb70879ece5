//! What holds for whatever an upstream answers; see [`crate::fuzz`].

use std::{
    pin::pin,
    task::{Context, Poll, Waker},
};

use hyper::{StatusCode, header::HeaderValue};

use super::{
    super::{
        exchange::{Answer, ExchangeError, MAX_HEAD, MAX_HEADERS, read_answer},
        fuzz::{Pieces, cuts},
        handshake::Handshake,
    },
    handshake::chosen_protocol,
};

/// The key of RFC 6455, to which seeds have the right answer.
const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";

/// What comes of a stream that is read in pieces, and how much of it was read for that.
fn answer(stream: &[u8], most: usize) -> (Result<Answer, ExchangeError>, usize) {
    let mut pieces = Pieces { rest: stream, most };
    let answered = {
        match pin!(read_answer(&mut pieces)).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(answered) => answered,
            Poll::Pending => panic!("what is read is always there"),
        }
    };
    (answered, stream.len() - pieces.rest.len())
}

/// What two answers to the same are compared by, and how many bytes the head has.
fn told((answered, read): &(Result<Answer, ExchangeError>, usize)) -> String {
    match answered {
        Ok(Answer { status, headers, rest }) => format!("{status} {headers:?}, {} bytes", read - rest.len()),
        Err(error) => error.to_string(),
    }
}

/// An answer is the same however it comes, no more is read than its head may have, and it is taken again as we would write it. A
/// WebSocket is only what answers our key, with a subprotocol that was offered.
pub(crate) fn upstream(data: &[u8]) {
    let (most, data) = cuts(data);
    // What a fuzzer makes is short, and the limit is not.
    let (times, once) = cuts(data);
    let stream = once.repeat(times);
    let whole = answer(&stream, usize::MAX);
    let cut = answer(&stream, most);
    assert_eq!(told(&whole), told(&cut));
    for (answered, read) in [&whole, &cut] {
        assert!(*read <= MAX_HEAD, "{read} bytes were read");
        if let Ok(Answer { rest, .. }) = answered {
            assert!(rest.capacity() <= 2 * MAX_HEAD, "{} bytes are held", rest.capacity());
            assert!(stream[..*read].ends_with(rest));
        }
    }

    let (Ok(Answer { status, headers, .. }), _) = whole else { return };
    assert!(status == StatusCode::SWITCHING_PROTOCOLS || !status.is_informational());
    assert!(headers.len() <= MAX_HEADERS);
    let mut written = format!("HTTP/1.1 {}\r\n", status.as_str()).into_bytes();
    for (name, value) in &headers {
        written.extend_from_slice(&[name.as_str().as_bytes(), b":", value.as_bytes(), b"\r\n"].concat());
    }
    written.extend_from_slice(b"\r\n");
    // Without a reason and with one form of line ends it may only be longer where these were bare line feeds.
    if written.len() <= MAX_HEAD {
        let again = answer(&written, usize::MAX).0.expect("what was taken once is taken again");
        assert_eq!((again.status, &again.headers, again.rest.len()), (status, &headers, 0));
    }

    let offer = |protocols: Option<&'static str>| Handshake {
        accept: String::new(),
        protocols: protocols.map(HeaderValue::from_static),
        fallback_protocol: None,
    };
    if let Ok(protocol) = chosen_protocol(&headers, &offer(Some("a, b")), KEY) {
        assert_eq!(headers["sec-websocket-accept"], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        // A fuzzer that sees what is compared finds the answer to any key; but not one to two of them.
        assert!(chosen_protocol(&headers, &offer(Some("a, b")), "another key").is_err());
        assert!(protocol.as_ref().is_none_or(|chosen| chosen == "a" || chosen == "b"), "{protocol:?}");
        assert_eq!(chosen_protocol(&headers, &offer(None), KEY).is_ok(), protocol.is_none());
    }
}
