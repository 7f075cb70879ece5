//! A request of the gateway's to an upstream, or to the service that is asked who may connect, and the head of the answer.
//!
//! By hand, since there is one for each connection of a client: a client of a library's, with its queue of requests and its bodies,
//! takes several times as long to make as this takes to write and to read.

use std::{
    fmt,
    future::poll_fn,
    io::{self, Write as _},
    mem,
    pin::{Pin, pin},
    task::{Context, Poll, ready},
};

use bytes::BufMut;
use hyper::{
    HeaderMap, StatusCode,
    header::{HeaderName, HeaderValue},
    http::uri::PathAndQuery,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};

/// Longest head of an answer, in bytes, with those that say that another comes; and the most header lines in one.
pub(super) const MAX_HEAD: usize = 16 * 1024;
pub(super) const MAX_HEADERS: usize = 100;

/// The room for an answer to begin with: that of most.
const USUAL_HEAD: usize = 512;

/// A GET request, as it is written.
pub(super) struct Request(Vec<u8>);

impl Request {
    pub(super) fn get(path: &PathAndQuery) -> Self {
        let mut text = Vec::with_capacity(1024);
        text.extend_from_slice(b"GET ");
        text.extend_from_slice(path.as_str().as_bytes());
        text.extend_from_slice(b" HTTP/1.1\r\n");
        Self(text)
    }

    /// Adds a header. Its name begins with a capital in each part, as some servers want it.
    pub(super) fn header(&mut self, name: &HeaderName, value: &HeaderValue) {
        self.own(name.as_str(), value.as_bytes());
    }

    /// Adds one of our own. In its value there is nothing that ends a line.
    pub(super) fn own(&mut self, name: &str, value: &[u8]) {
        self.name(name);
        self.0.extend_from_slice(value);
        self.0.extend_from_slice(b"\r\n");
    }

    /// The same, as it is shown.
    pub(super) fn own_shown(&mut self, name: &str, value: fmt::Arguments<'_>) {
        self.name(name);
        // There is always room in memory.
        _ = self.0.write_fmt(value);
        self.0.extend_from_slice(b"\r\n");
    }

    fn name(&mut self, name: &str) {
        let Self(text) = self;
        let start = text.len();
        text.extend_from_slice(name.as_bytes());
        let mut begins = true;
        for byte in &mut text[start..] {
            if begins {
                byte.make_ascii_uppercase();
            }
            begins = *byte == b'-';
        }
        text.extend_from_slice(b": ");
    }

    #[cfg(test)]
    pub(super) fn text(&self) -> &str {
        str::from_utf8(&self.0).unwrap()
    }
}

/// Whether a header is one of these, or begins like one of those, or may be taken for one: to CGI, and what has its names of it,
/// `X_Forwarded_For` is the same as `X-Forwarded-For`.
pub(super) fn may_be_among(name: &HeaderName, names: &[HeaderName], prefixes: &[&str]) -> bool {
    if !name.as_str().contains('_') {
        return names.contains(name) || prefixes.iter().any(|prefix| name.as_str().starts_with(prefix));
    }
    let read = name.as_str().replace('_', "-");
    names.iter().any(|name| *name == *read) || prefixes.iter().any(|prefix| read.starts_with(prefix))
}

/// The head of an answer.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    /// What came behind it.
    pub(super) rest: Vec<u8>,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum ExchangeError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("the connection ended before the answer was whole")]
    Ended,
    #[error("what it sends is not HTTP: {0}")]
    Malformed(#[from] httparse::Error),
    #[error("its head is longer than {MAX_HEAD} bytes")]
    TooLong,
    #[error("it switches protocols in HTTP/1.0, which can't")]
    TooOld,
}

/// Sends a request and reads the head of the answer. That may come before the request is sent to its end: a server may refuse by its
/// first lines, or whoever asks, and close, or read no further.
pub(super) async fn exchange<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    request: Request,
) -> Result<Answer, ExchangeError> {
    let mut sending = Sending::new(request);
    let mut reading = Reading::new();
    let answered = poll_fn(|cx| {
        _ = sending.poll(stream, cx);
        reading.poll(stream, cx)
    });
    match answered.await {
        // That it took half a request and left says more than that it left.
        Err(ExchangeError::Ended) => Err(sending.error().map_or(ExchangeError::Ended, ExchangeError::Io)),
        Ok(answer) if answer.status == StatusCode::SWITCHING_PROTOCOLS => {
            // It waits for the rest, and what is sent next would be taken for that.
            poll_fn(|cx| sending.poll(stream, cx)).await;
            sending.error().map_or(Ok(answer), |error| Err(error.into()))
        }
        answered => answered,
    }
}

/// A request on its way.
enum Sending {
    /// So many bytes of it are gone.
    Going(Vec<u8>, usize),
    Over(io::Result<()>),
}

impl Sending {
    fn new(Request(mut text): Request) -> Self {
        text.extend_from_slice(b"\r\n");
        Self::Going(text, 0)
    }

    /// Sends what can be sent. Ready: it is over, for good or not.
    fn poll<S: AsyncWrite + Unpin>(&mut self, stream: &mut S, cx: &mut Context<'_>) -> Poll<()> {
        if let Self::Going(text, sent) = self {
            let ended = ready!(poll_send(stream, text, sent, cx));
            // The text is needed no more.
            *self = Self::Over(ended);
        }
        Poll::Ready(())
    }

    fn error(self) -> Option<io::Error> {
        match self {
            Self::Over(Err(error)) => Some(error),
            Self::Over(Ok(())) | Self::Going(..) => None,
        }
    }
}

fn poll_send<S: AsyncWrite + Unpin>(
    stream: &mut S,
    text: &[u8],
    sent: &mut usize,
    cx: &mut Context<'_>,
) -> Poll<io::Result<()>> {
    let mut stream = Pin::new(stream);
    while *sent < text.len() {
        match ready!(stream.as_mut().poll_write(cx, &text[*sent..]))? {
            0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
            more => *sent += more,
        }
    }
    stream.poll_flush(cx)
}

/// Reads the head of an answer. However it comes in pieces, the same comes of it, and no more than [`MAX_HEAD`] bytes are read.
#[cfg(any(test, limiter_fuzz))]
pub(super) async fn read_answer<S: AsyncRead + Unpin>(stream: &mut S) -> Result<Answer, ExchangeError> {
    let mut reading = Reading::new();
    poll_fn(|cx| reading.poll(stream, cx)).await
}

/// An answer on its way.
struct Reading {
    read: Vec<u8>,
    /// Where the head begins: behind those that announced it.
    start: usize,
}

impl Reading {
    fn new() -> Self {
        Self { read: Vec::with_capacity(USUAL_HEAD), start: 0 }
    }

    fn poll<S: AsyncRead + Unpin>(
        &mut self,
        stream: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Answer, ExchangeError>> {
        loop {
            let room = MAX_HEAD - self.read.len();
            if room == 0 {
                return Poll::Ready(Err(ExchangeError::TooLong));
            }
            // Nothing is lost with this future: it reads at once or not at all.
            if ready!(pin!(stream.read_buf(&mut (&mut self.read).limit(room))).poll(cx))? == 0 {
                return Poll::Ready(Err(ExchangeError::Ended));
            }
            loop {
                match parse(&self.read[self.start..])? {
                    Head::Partial => break,
                    Head::Announcement { length } => self.start += length,
                    Head::Whole { length, status, headers } => {
                        let mut rest = mem::take(&mut self.read);
                        rest.drain(..self.start + length);
                        return Poll::Ready(Ok(Answer { status, headers, rest }));
                    }
                }
            }
            self.read.reserve(USUAL_HEAD);
        }
    }
}

/// What bytes begin with.
enum Head {
    /// The rest has not come yet.
    Partial,
    /// It only says that another comes (RFC 9110, 15.2).
    Announcement {
        length: usize,
    },
    Whole {
        length: usize,
        status: StatusCode,
        headers: HeaderMap,
    },
}

fn parse(bytes: &[u8]) -> Result<Head, ExchangeError> {
    let mut lines = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut head = httparse::Response::new(&mut lines);
    let httparse::Status::Complete(length) = head.parse(bytes)? else { return Ok(Head::Partial) };
    let status = head.code.and_then(|code| StatusCode::from_u16(code).ok()).ok_or(httparse::Error::Status)?;
    if status == StatusCode::SWITCHING_PROTOCOLS && head.version != Some(1) {
        return Err(ExchangeError::TooOld);
    }
    if status.is_informational() && status != StatusCode::SWITCHING_PROTOCOLS {
        return Ok(Head::Announcement { length });
    }
    let mut headers = HeaderMap::with_capacity(head.headers.len());
    for line in head.headers {
        let name = HeaderName::from_bytes(line.name.as_bytes()).map_err(|_| httparse::Error::HeaderName)?;
        let value = HeaderValue::from_bytes(line.value).map_err(|_| httparse::Error::HeaderValue)?;
        headers.append(name, value);
    }
    Ok(Head::Whole { length, status, headers })
}

#[cfg(test)]
mod tests {
    use socket2::SockRef;
    use tokio::{io::AsyncWriteExt, net::UnixStream};

    use super::*;

    const ASKED: &str = "GET /a?b HTTP/1.1\r\nX-Request-Id: 1\r\n\r\n";

    /// What comes of it when the upstream sends these pieces one after the other and closes.
    async fn answered(pieces: &[&[u8]]) -> Result<Answer, ExchangeError> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut request = Request::get(&PathAndQuery::from_static("/a?b"));
        request.own("x-request-id", b"1");
        let mut stream = ours;
        let upstream = async move {
            let mut asked = vec![0; ASKED.len()];
            theirs.read_exact(&mut asked).await.unwrap();
            assert_eq!(asked, ASKED.as_bytes());
            for piece in pieces {
                // The other side may have heard enough.
                _ = theirs.write_all(piece).await;
                tokio::task::yield_now().await;
            }
        };
        tokio::join!(exchange(&mut stream, request), upstream).0
    }

    #[tokio::test]
    async fn what_comes_behind_the_head_is_kept() {
        let text = b"HTTP/1.1 101 Switching Protocols\r\nA: 1\r\na: 2\r\n\r\n\x81\x01x";
        for at in 1..text.len() - 3 {
            let (one, two) = text.split_at(at);
            let answer = answered(&[one, two]).await.unwrap();
            assert_eq!(answer.status, StatusCode::SWITCHING_PROTOCOLS);
            assert_eq!(answer.headers.get_all("a").iter().collect::<Vec<_>>(), ["1", "2"]);
            // Of what came later, nothing is read.
            assert!(b"\x81\x01x".starts_with(&answer.rest), "{:?}", answer.rest);
        }
        let whole = answered(&[text]).await.unwrap();
        assert_eq!(whole.rest, b"\x81\x01x");
    }

    #[tokio::test]
    async fn an_answer_that_announces_another_is_passed_over() {
        let early = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n".as_slice();
        let last = b"HTTP/1.1 404 No\r\n\r\n".as_slice();
        let answer = answered(&[early, early, last]).await.unwrap();
        assert_eq!((answer.status, answer.headers.len()), (StatusCode::NOT_FOUND, 0));
        let answer = answered(&[&[early, last].concat()]).await.unwrap();
        assert_eq!((answer.status, answer.headers.len()), (StatusCode::NOT_FOUND, 0));
    }

    #[tokio::test]
    async fn what_is_no_answer_is_an_error() {
        let error = async |pieces: &[&[u8]]| answered(pieces).await.err().unwrap();
        assert!(matches!(error(&[]).await, ExchangeError::Ended));
        assert!(matches!(error(&[b"HTTP/1.1 101 Switch"]).await, ExchangeError::Ended));
        assert!(matches!(error(&[b"SSH-2.0-OpenSSH_9.2\r\n"]).await, ExchangeError::Malformed(_)));
        assert!(matches!(error(&[b"HTTP/1.1 099 Low\r\n\r\n"]).await, ExchangeError::Malformed(_)));
        assert!(matches!(error(&[b"HTTP/1.0 101 Switching\r\n\r\n"]).await, ExchangeError::TooOld));
        let many = [b"HTTP/1.1 200 OK\r\n".as_slice(), &b"a: b\r\n".repeat(101), b"\r\n"].concat();
        assert!(matches!(error(&[&many]).await, ExchangeError::Malformed(_)));
    }

    /// What comes of it when the upstream has sent this and closed before it was asked.
    async fn answered_before(answer: &[u8]) -> Result<Answer, ExchangeError> {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(answer).await.unwrap();
        drop(theirs);
        exchange(&mut ours, Request::get(&PathAndQuery::from_static("/"))).await
    }

    #[tokio::test]
    async fn an_answer_counts_though_the_upstream_has_closed_before_it_was_asked_to_the_end() {
        let answer =
            answered_before(b"HTTP/1.1 429 Wait\r\nRetry-After: 7\r\nContent-Length: 2\r\n\r\nno").await.unwrap();
        assert_eq!(
            (answer.status, &answer.headers["retry-after"]),
            (StatusCode::TOO_MANY_REQUESTS, &"7".parse().unwrap())
        );
        // But what is none does not, and what it takes to send is told.
        for no_answer in [b"".as_slice(), b"HTTP/1.1 429 Wa", b"HTTP/1.1 101 Switching Protocols\r\n\r\n"] {
            let error = answered_before(no_answer).await.err().unwrap();
            assert!(
                matches!(&error, ExchangeError::Io(error) if error.kind() == io::ErrorKind::BrokenPipe),
                "{no_answer:?}: {error}"
            );
        }
        let error = answered_before(b"220 mail.example ESMTP\r\n").await.err().unwrap();
        assert!(matches!(error, ExchangeError::Malformed(_)), "{error}");
    }

    /// A request that does not fit between the two ends, and its upstream's end.
    async fn blocked(said: &[u8]) -> (UnixStream, Request, UnixStream) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        SockRef::from(&ours).set_send_buffer_size(0).unwrap();
        let mut request = Request::get(&PathAndQuery::from_static("/"));
        request.own("cookie", &[b'c'; 15 * 1024]);
        theirs.write_all(said).await.unwrap();
        (ours, request, theirs)
    }

    #[tokio::test]
    async fn an_answer_counts_though_the_upstream_does_not_read_on() {
        let said = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 403 No\r\nContent-Length: 2\r\n\r\nno";
        let (mut stream, request, theirs) = blocked(said).await;
        let answer = exchange(&mut stream, request).await.unwrap();
        assert_eq!((answer.status, answer.rest.as_slice()), (StatusCode::FORBIDDEN, b"no".as_slice()));
        // It held nothing but the beginning.
        let mut seen = vec![0; 16 * 1024];
        assert!((1..15 * 1024).contains(&theirs.try_read(&mut seen).unwrap()));

        // Nor is the rest sent to who has nothing more to say.
        let (mut stream, request, mut theirs) = blocked(b"").await;
        theirs.shutdown().await.unwrap();
        assert!(matches!(exchange(&mut stream, request).await, Err(ExchangeError::Ended)));
    }

    #[tokio::test]
    async fn who_switches_protocols_early_is_sent_the_rest_first() {
        let said = b"HTTP/1.1 101 Switching Protocols\r\n\r\n\x81\x01x";
        let (mut stream, request, mut theirs) = blocked(said).await;
        let upstream = async {
            let mut asked = Vec::new();
            while !asked.ends_with(b"\r\n\r\n") {
                tokio::task::yield_now().await;
                theirs.read_buf(&mut asked).await.unwrap();
            }
            asked
        };
        let (answer, asked) = tokio::join!(exchange(&mut stream, request), upstream);
        assert_eq!(answer.unwrap().rest, b"\x81\x01x");
        assert!(asked.len() > 15 * 1024);

        let (mut stream, request, theirs) = blocked(said).await;
        let (answer, ()) = tokio::join!(exchange(&mut stream, request), async { drop(theirs) });
        assert!(matches!(answer, Err(ExchangeError::Io(_))), "it has left, and is no session");
    }

    #[tokio::test]
    async fn a_head_has_an_end() {
        let line = [b"HTTP/1.1 200 OK\r\na: ".as_slice(), &vec![b'x'; 2 * MAX_HEAD]].concat();
        assert!(matches!(answered(&[&line]).await, Err(ExchangeError::TooLong)));
        // Nor do announcements go on for ever.
        let early = b"HTTP/1.1 103 Early Hints\r\n\r\n".repeat(MAX_HEAD / 20);
        assert!(matches!(answered(&[&early]).await, Err(ExchangeError::TooLong)));
    }
}
