//! A client's request: the head of one, read by hand, since every connection begins with it. Nothing of a body is read; whoever sends
//! one is refused.

use std::{
    future::{pending, poll_fn},
    mem::MaybeUninit,
    pin::Pin,
    task::ready,
};

use bytes::{BufMut as _, Bytes, BytesMut};
use hyper::{
    Method, Request, StatusCode, Uri, Version,
    header::{HeaderMap, HeaderName, HeaderValue},
    http::request::Parts,
};
use tokio::io::{AsyncRead, AsyncReadExt, ReadBuf};

/// Longest head of a request, in bytes, and most header lines in it. A cookie and a token fit with room to spare.
pub(super) const MAX_HEAD: usize = 16 * 1024;
const MAX_HEADERS: usize = 64;

/// Most bytes of empty lines in front of a head: some clients send one behind the request before (RFC 9112, 2.2).
const MAX_EMPTY: usize = 16;

/// The room for a head to begin with: that of most.
const USUAL_HEAD: usize = 1024;

/// How much of what follows a request is taken while it has no answer.
const MAX_EARLY: usize = 16 * 1024;

/// Why there is no request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoRequest {
    /// The client is gone.
    Left,
    /// What it sends is none, or is too long; with the status that says which.
    Malformed(StatusCode),
}

/// Reads the head of a request; with what came right behind it.
pub(super) async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Result<(Parts, Vec<u8>), NoRequest> {
    let mut read = BytesMut::with_capacity(USUAL_HEAD);
    // How much was looked at for its end, and how much was parsed.
    let (mut seen, mut parsed) = (0, 0);
    loop {
        let room = MAX_HEAD - read.len();
        match stream.read_buf(&mut (&mut read).limit(room)).await {
            Ok(0) | Err(_) => return Err(NoRequest::Left),
            Ok(_) => {}
        }
        // What ends a line may end the head, so to a stream of these the next rule would not apply.
        if read.len() > MAX_EMPTY && read[..=MAX_EMPTY].iter().all(|byte| b"\r\n".contains(byte)) {
            return Err(NoRequest::Malformed(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE));
        }
        // To parse it all at every byte would cost the square of its length.
        if read.len() >= 2 * parsed || has_end(&read[seen..]) {
            parsed = read.len();
            let bytes = read.freeze();
            if let Some((head, length)) = parse(&bytes)? {
                return Ok((head, bytes[length..].to_vec()));
            }
            read = bytes.into();
        }
        if read.len() >= MAX_HEAD {
            return Err(NoRequest::Malformed(too_long(&read)));
        }
        // The end may come in pieces: CR LF CR LF.
        seen = read.len().saturating_sub(3);
    }
}

/// Completes when the client leaves. What it sends before, it sends early: that is kept, until it is much.
pub(super) async fn leaves(stream: &mut (impl AsyncRead + Unpin), early: &mut Vec<u8>) {
    let left = poll_fn(|cx| {
        // On the stack: of most clients nothing comes.
        let mut room = [MaybeUninit::uninit(); 1024];
        while early.len() < MAX_EARLY {
            let most = room.len().min(MAX_EARLY - early.len());
            let mut read = ReadBuf::uninit(&mut room[..most]);
            if ready!(Pin::new(&mut *stream).poll_read(cx, &mut read)).is_err() || read.filled().is_empty() {
                return true.into();
            }
            early.extend_from_slice(read.filled());
        }
        false.into()
    });
    if !left.await {
        pending::<()>().await;
    }
}

/// Whether there is an empty line in it, or what may be the end of one.
fn has_end(bytes: &[u8]) -> bool {
    bytes.windows(2).any(|two| two == b"\n\n") || bytes.windows(3).any(|three| three == b"\n\r\n")
}

/// The first line, as far as it has come. Empty ones before it do not count.
fn first_line(bytes: &[u8]) -> &[u8] {
    let start = bytes.iter().position(|byte| !b"\r\n".contains(byte)).unwrap_or(bytes.len());
    bytes[start..].split(|byte| *byte == b'\n').next().unwrap_or_default()
}

/// What a head is refused with that has more bytes than it may (RFC 9112, 3, for the first line).
fn too_long(bytes: &[u8]) -> StatusCode {
    let line = first_line(bytes);
    if !bytes.ends_with(line) || line.is_empty() {
        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE
    } else if line.contains(&b' ') {
        StatusCode::URI_TOO_LONG
    } else {
        StatusCode::BAD_REQUEST
    }
}

/// Whether the first line is that of a request in another version of HTTP.
fn has_other_version(bytes: &[u8]) -> bool {
    let version = first_line(bytes).splitn(3, |byte| *byte == b' ').nth(2).unwrap_or_default();
    matches!(version.trim_ascii_end(), [b'H', b'T', b'T', b'P', b'/', b'0'..=b'9', b'.', b'0'..=b'9'])
}

/// A whole URL may have a query and no path; the path is "/" then (RFC 9112, 3.2.1), as it has to be said to an upstream.
fn with_path(target: Uri) -> Option<Uri> {
    let has_none = target.path_and_query().is_some_and(|path| path.as_str().starts_with('?'));
    if !has_none {
        return Some(target);
    }
    let mut parts = target.into_parts();
    parts.path_and_query = Some(format!("/{}", parts.path_and_query?.as_str()).parse().ok()?);
    Uri::from_parts(parts).ok()
}

/// The head that `bytes` begin with, and its length; `None`: the rest has not come yet.
fn parse(bytes: &Bytes) -> Result<Option<(Parts, usize)>, NoRequest> {
    let mut lines = [MaybeUninit::uninit(); MAX_HEADERS];
    let mut head = httparse::Request::new(&mut []);
    let length = match head.parse_with_uninit_headers(bytes, &mut lines) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => {
            return Err(NoRequest::Malformed(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE));
        }
        Err(httparse::Error::Version) if has_other_version(bytes) => {
            return Err(NoRequest::Malformed(StatusCode::HTTP_VERSION_NOT_SUPPORTED));
        }
        Err(_) => return Err(NoRequest::Malformed(StatusCode::BAD_REQUEST)),
    };
    fill(bytes, &head).map(|head| Some((head, length))).ok_or(NoRequest::Malformed(StatusCode::BAD_REQUEST))
}

/// Values and target are parts of `bytes` and not copies.
fn fill(bytes: &Bytes, head: &httparse::Request) -> Option<Parts> {
    let mut headers = HeaderMap::with_capacity(head.headers.len());
    for line in &*head.headers {
        let name = HeaderName::from_bytes(line.name.as_bytes()).ok()?;
        headers.append(name, HeaderValue::from_maybe_shared(bytes.slice_ref(line.value)).ok()?);
    }
    let mut request = Request::new(());
    *request.method_mut() = Method::from_bytes(head.method?.as_bytes()).ok()?;
    // A URI would be made of what is in front of a fragment, and a target has none.
    let target = head.path.filter(|target| !target.contains('#'))?;
    *request.uri_mut() = with_path(Uri::from_maybe_shared(bytes.slice_ref(target.as_bytes())).ok()?)?;
    *request.version_mut() = if head.version? == 0 { Version::HTTP_10 } else { Version::HTTP_11 };
    *request.headers_mut() = headers;
    Some(request.into_parts().0)
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncWriteExt, duplex};

    use super::*;

    const GOOD: &[u8] = b"\r\nGET /a?b HTTP/1.1\r\nHost: x\r\nA: 1\r\na:  2 \r\n\r\n\x81\x80";

    /// What is read of these pieces, which come one after the other and then end.
    async fn read_of(pieces: &[&[u8]]) -> Result<(Parts, Vec<u8>), NoRequest> {
        let (mut client, mut server) = duplex(1 << 20);
        let writing = async {
            for piece in pieces {
                // The other side may have read enough.
                _ = client.write_all(piece).await;
                tokio::task::yield_now().await;
            }
            drop(client);
        };
        tokio::join!(read(&mut server), writing).0
    }

    #[tokio::test]
    async fn a_url_without_a_path_asks_for_the_root() {
        for (target, path) in [
            ("http://a?b=c", "/?b=c"),
            ("http://a?/b", "/?/b"),
            ("http://a", "/"),
            ("http://a/?b", "/?b"),
            ("ws://a/b?c", "/b?c"),
            ("/b", "/b"),
        ] {
            let (head, _) = read_of(&[format!("GET {target} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes()]).await.unwrap();
            assert_eq!(head.uri.path_and_query().unwrap().as_str(), path, "{target}");
        }
    }

    #[tokio::test]
    async fn a_few_empty_lines_may_come_before_it_and_not_many() {
        let head = |empty: usize| [b"\r\n".repeat(empty), b"GET / HTTP/1.1\r\nHost: a\r\n\r\n".to_vec()].concat();
        let most = head(MAX_EMPTY / 2);
        assert!(read_of(&[&most]).await.is_ok());
        let more = head(MAX_EMPTY / 2 + 1);
        let pieces: Vec<&[u8]> = more.chunks(2).collect();
        for pieces in [vec![more.as_slice()], pieces] {
            let too_many = NoRequest::Malformed(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
            assert_eq!(read_of(&pieces).await.unwrap_err(), too_many);
        }
    }

    #[tokio::test]
    async fn it_is_the_same_in_any_pieces() {
        for at in 0..GOOD.len() {
            let (one, two) = GOOD.split_at(at);
            let (head, behind) = read_of(&[one, two]).await.unwrap();
            assert_eq!((head.method, head.version), (Method::GET, Version::HTTP_11));
            assert_eq!(head.uri, "/a?b");
            assert_eq!(head.headers.get_all("a").iter().collect::<Vec<_>>(), ["1", "2"]);
            // Of what comes later nothing is read.
            assert!(b"\x81\x80".starts_with(&behind), "{behind:?}");
        }
        let bytes: Vec<&[u8]> = GOOD.chunks(1).collect();
        assert_eq!(read_of(&bytes).await.unwrap().0.headers.len(), 3);
        assert_eq!(read_of(&[GOOD]).await.unwrap().1, b"\x81\x80");
    }

    #[tokio::test]
    async fn a_client_may_leave_at_any_byte() {
        for at in 0..GOOD.len() - 2 {
            assert_eq!(read_of(&[&GOOD[..at]]).await.unwrap_err(), NoRequest::Left, "{at}");
        }
    }

    #[tokio::test]
    async fn a_head_fits_or_is_too_long() {
        const TOO_LONG: NoRequest = NoRequest::Malformed(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
        let request = |length: usize| {
            let frame = "GET / HTTP/1.1\r\nA: \r\n\r\n".len();
            format!("GET / HTTP/1.1\r\nA: {}\r\n\r\n", "x".repeat(length - frame)).into_bytes()
        };
        assert!(read_of(&[&request(MAX_HEAD)]).await.is_ok());
        assert_eq!(read_of(&[&request(MAX_HEAD + 1)]).await.unwrap_err(), TOO_LONG);
        let lines = |count| [b"GET / HTTP/1.1\r\n", &*b"A: b\r\n".repeat(count), b"\r\n"].concat();
        assert!(read_of(&[&lines(MAX_HEADERS)]).await.is_ok());
        assert_eq!(read_of(&[&lines(MAX_HEADERS + 1)]).await.unwrap_err(), TOO_LONG);
    }

    #[tokio::test]
    async fn who_leaves_is_noticed_and_what_is_sent_before_is_kept() {
        let (mut client, mut server) = duplex(64 * 1024);
        let mut early = Vec::new();
        client.write_all(&vec![7; 5000]).await.unwrap();
        drop(client);
        leaves(&mut server, &mut early).await;
        assert_eq!(early, [7; 5000]);
    }

    #[tokio::test]
    async fn of_what_is_sent_early_no_more_is_taken_than_fits() {
        let (mut client, mut server) = duplex(64 * 1024);
        let mut early = vec![1];
        client.write_all(&vec![7; 2 * MAX_EARLY]).await.unwrap();
        drop(client);
        tokio::select! {
            biased;
            () = leaves(&mut server, &mut early) => panic!("there is more to come before it leaves"),
            () = tokio::task::yield_now() => {}
        }
        assert_eq!(early.len(), MAX_EARLY);
    }
}
