//! What holds for whatever a client or a proxy sends; see [`crate::fuzz`].

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr},
    pin::{Pin, pin},
    sync::LazyLock,
    task::{Context, Poll, Waker},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use hyper::{
    HeaderMap,
    header::{CONTENT_LENGTH, FORWARDED, HOST, HeaderValue, TRANSFER_ENCODING},
    http::request::Parts,
};
use ring::hmac;
use serde_json::Value;
use tokio::{
    io::{AsyncRead, ReadBuf},
    time::Instant,
};
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;

use super::{
    auth::token::Tokens,
    forwarded::{self, X_FORWARDED_FOR, identify},
    handshake::{self, Handshake},
    json::{Screen, Screened, is_forbidden},
    messages::Violation,
    proxy_protocol::{self, Header},
    relay::{Inspector, Judge, Sender, Stop, Verdict},
    request::{self, MAX_HEAD},
};
use crate::config::{Jwt, Sanitize};

pub(crate) use super::upstream::fuzz::upstream;

/// Cuts of a stream, by its own first byte: the same input is always cut in the same way.
pub(super) fn cuts(data: &[u8]) -> (usize, &[u8]) {
    match data.split_first() {
        Some((first, rest)) => (usize::from(*first).max(1), rest),
        None => (1, data),
    }
}

/// What comes from the other side, in pieces.
pub(super) struct Pieces<'a> {
    pub(super) rest: &'a [u8],
    pub(super) most: usize,
}

impl AsyncRead for Pieces<'_> {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let (now, later) = self.rest.split_at(self.most.min(self.rest.len()).min(buf.remaining()));
        buf.put_slice(now);
        self.rest = later;
        Poll::Ready(Ok(()))
    }
}

/// A request, and what the check of its head says.
type Found = (Parts, Option<Handshake>);

/// The first request of a stream, if there is one.
fn first_request(stream: &[u8], most: usize) -> Option<Found> {
    let mut pieces = Pieces { rest: stream, most };
    let mut reading = pin!(request::read(&mut pieces));
    let mut cx = Context::from_waker(Waker::noop());
    // What is read is always there.
    let Poll::Ready(read) = reading.as_mut().poll(&mut cx) else { unreachable!("it waits for nothing") };
    let (head, _) = read.ok()?;
    let checked = handshake::check(&head).ok();
    Some((head, checked))
}

/// A request is the same however it is cut. One that is taken has one host and no body, and is taken again as we would write it.
pub(crate) fn handshake(data: &[u8]) {
    let (most, stream) = cuts(data);
    let whole = first_request(stream, usize::MAX);
    let cut = first_request(stream, most);
    let accept = |found: &Option<Found>| {
        found.as_ref().map(|(_, checked)| checked.as_ref().map(|handshake| handshake.accept.clone()))
    };
    assert_eq!(accept(&whole), accept(&cut));
    let Some((head, Some(taken))) = whole else { return };
    assert_eq!(head.headers.get_all(HOST).iter().count(), 1);
    assert!(!head.headers.contains_key(TRANSFER_ENCODING));
    assert!(head.headers.get_all(CONTENT_LENGTH).iter().all(|length| length == "0"));
    assert_eq!(taken.accept.len(), 28);

    let mut written =
        format!("GET {} HTTP/1.1\r\n", head.uri.path_and_query().map_or("/", |path| path.as_str())).into_bytes();
    for (name, value) in &head.headers {
        written.extend_from_slice(name.as_str().as_bytes());
        written.extend_from_slice(b": ");
        written.extend_from_slice(value.as_bytes());
        written.extend_from_slice(b"\r\n");
    }
    written.extend_from_slice(b"\r\n");
    if written.len() < MAX_HEAD {
        let again = first_request(&written, usize::MAX);
        assert_eq!(again.and_then(|(_, checked)| checked), Some(taken), "{}", String::from_utf8_lossy(&written));
    }
}

/// A header says the same whatever follows it, and is waited for as long as it may become one, and no longer.
pub(crate) fn proxy_protocol(data: &[u8]) {
    let Ok(whole) = proxy_protocol::parse(data) else {
        // What is no header is none with more behind it.
        assert!(proxy_protocol::parse(&[data, b"\r\n"].concat()).is_err());
        return;
    };
    let Some((header, length)) = whole else {
        assert!((0..data.len()).all(|end| matches!(proxy_protocol::parse(&data[..end]), Ok(None))));
        return;
    };
    assert!(length <= data.len());
    for end in 0..length {
        assert!(matches!(proxy_protocol::parse(&data[..end]), Ok(None)), "{end} of {length}");
    }
    assert_eq!(proxy_protocol::parse(&data[..length]).ok().flatten(), whole);
    let Header::Proxied { source, destination } = header else { return };
    // Written again, in version 1, it says the same.
    let family = if source.is_ipv4() && destination.is_ipv4() { "TCP4" } else { "TCP6" };
    let text = |ip: IpAddr| match ip {
        IpAddr::V4(ip) if family == "TCP6" => ip.to_ipv6_mapped().to_string(),
        ip => ip.to_string(),
    };
    let (from, to) = (text(source.ip()), text(destination.ip()));
    let written = format!("PROXY {family} {from} {to} {} {}\r\n", source.port(), destination.port());
    assert_eq!(proxy_protocol::parse(written.as_bytes()).ok().flatten(), Some((header, written.len())), "{written}");
}

/// Room for some messages, and a limit that others are over.
struct Limit {
    /// Lengths of the messages that passed.
    passed: Vec<u64>,
    controls: usize,
}

impl Judge for Limit {
    fn begins(&mut self, _: bool, length: u64, _: Instant) -> Verdict {
        match length {
            0..300 => Verdict::Pass,
            300..400 => Verdict::Drop,
            _ => Verdict::Close(Violation::TooBig),
        }
    }

    fn goes_on(&mut self, _: u64, total: u64, _: u32, _: Instant) -> Result<(), Violation> {
        if total < 1000 { Ok(()) } else { Err(Violation::TooBig) }
    }

    fn passed(&mut self, total: u64, _: Instant) {
        self.passed.push(total);
    }

    fn control(&mut self, _: Instant) -> Result<(), Violation> {
        self.controls += 1;
        if self.controls > 50 { Err(Violation::ControlFlood) } else { Ok(()) }
    }
}

/// What passes of a stream that comes in pieces of at most so many bytes.
fn passing(stream: &[u8], most: usize, sender: Sender) -> (Vec<u8>, Option<Stop>, Limit) {
    let mut inspector = Inspector::new(sender);
    let mut limit = Limit { passed: Vec::new(), controls: 0 };
    let (mut passed, mut carried) = (Vec::new(), Vec::new());
    for piece in stream.chunks(most) {
        let mut buffer = [carried, piece.to_vec()].concat();
        let seen = inspector.look(&mut buffer, &mut limit, Instant::now());
        passed.extend_from_slice(seen.bytes(&buffer));
        if let Some(stop) = seen.stop {
            return (passed, Some(stop), limit);
        }
        carried = buffer[seen.consumed..].to_vec();
        assert!(carried.len() < 14 + 125, "{} bytes are held, more than a header or control frame has", carried.len());
    }
    (passed, None, limit)
}

/// The same frames pass, and the same end comes, however the stream is cut; and what has passed is good.
pub(crate) fn frames(data: &[u8]) {
    let Some((first, rest)) = data.split_first() else { return };
    let sender = if first & 1 == 0 { Sender::Client } else { Sender::Server };
    let (most, stream) = cuts(rest);
    let (passed, stop, limit) = passing(stream, usize::MAX, sender);
    let (passed_cut, stop_cut, limit_cut) = passing(stream, most, sender);
    assert_eq!(stop, stop_cut);
    assert_eq!((limit.passed, limit.controls), (limit_cut.passed, limit_cut.controls));
    if matches!(stop, Some(Stop::Malformed(CloseCode::Invalid, _))) {
        // How much of a text passes before it shows to be none depends on how it comes.
        assert!(passed_cut.starts_with(&passed));
        return;
    }
    assert_eq!(passed, passed_cut);
    assert!(passed.len() <= stream.len());
    // Nothing is wrong with what has passed. (Answers to our own pings are taken out, and so are messages over the limit.)
    let (again, stop_again, _) = passing(&passed, usize::MAX, sender);
    assert_eq!(again, passed);
    match stop_again {
        None => assert!(!matches!(stop, Some(Stop::Close(_)))),
        Some(_) => assert_eq!(stop_again, stop),
    }
}

const SECRET: [u8; 32] = *b"a secret of thirty-two bytes....";
/// Of the tokens' clock, in seconds.
const NOW: u64 = 1_000_000;
const LEEWAY: Duration = Duration::from_mins(1);

fn now() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(NOW)
}

static TOKENS: LazyLock<Tokens> = LazyLock::new(|| {
    let mut file = tempfile::NamedTempFile::new().expect("a folder for temporary files");
    io::Write::write_all(&mut file, &SECRET).expect("room for a file");
    assert!(fs::metadata(file.path()).is_ok());
    let jwt = Jwt {
        secrets: vec![file.path().to_owned()],
        issuers: vec!["us".into()],
        audiences: vec!["chat".into()],
        leeway: LEEWAY,
        ..Jwt::default()
    };
    Tokens::new(&jwt).expect("the secret can be used")
});

/// No token is taken that nobody has signed; and of signed ones, only those whose claims are for us and now.
pub(crate) fn token(data: &[u8]) {
    if let Ok(token) = str::from_utf8(data) {
        assert!(TOKENS.verify(token, now()).is_err(), "nobody has signed it");
    }
    // A line with the head, and the claims behind it.
    let split = data.iter().position(|byte| *byte == b'\n').unwrap_or(0);
    let (head, claims) = data.split_at(split);
    let head = if head.is_empty() { br#"{"alg":"HS256"}"# } else { head };
    let claims = claims.strip_prefix(b"\n").unwrap_or(claims);
    let message = format!("{}.{}", URL_SAFE_NO_PAD.encode(head), URL_SAFE_NO_PAD.encode(claims));
    let signature = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &SECRET), message.as_bytes());
    let signed = format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature));
    let Ok(taken) = TOKENS.verify(&signed, now()) else { return };
    let head: Value = serde_json::from_slice(head).expect("a head that was read is JSON");
    assert_eq!(head["alg"], "HS256");
    assert!(head.get("crit").is_none_or(Value::is_null));
    let claims: Value = serde_json::from_slice(claims).expect("claims that were read are JSON");
    let user = claims["sub"].as_str().map_or_else(|| claims["sub"].to_string(), ToOwned::to_owned);
    assert_eq!(*taken.user, *user);
    assert!(!user.is_empty() && user.len() <= 128 && !user.chars().any(char::is_control));
    let seconds = Duration::from_secs(NOW).as_secs_f64();
    let leeway = LEEWAY.as_secs_f64();
    assert!(claims["exp"].as_f64().is_some_and(|at| at + leeway > seconds));
    assert!(claims.get("nbf").is_none_or(|from| from.as_f64().is_some_and(|from| from <= seconds + leeway)));
    assert_eq!(claims["iss"], "us");
    let audience = &claims["aud"];
    assert!(audience == "chat" || audience.as_array().is_some_and(|list| list.iter().any(|one| one == "chat")));
    // Changed by a bit, it is nobody's.
    let at = signed.len() / 2;
    let mut changed = signed.into_bytes();
    changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
    let changed = String::from_utf8(changed).expect("base64 is ASCII");
    assert!(TOKENS.verify(&changed, now()).is_err());
}

/// Every string of a value, keys too.
fn each_string(value: &Value, look: &mut impl FnMut(&str)) {
    match value {
        Value::String(text) => look(text),
        Value::Array(items) => items.iter().for_each(|item| each_string(item, look)),
        Value::Object(entries) => {
            for (key, value) in entries {
                look(key);
                each_string(value, look);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// How a value is built, whatever its strings say. (Keys may fall together, so objects show only that they are some.)
fn shape(value: &Value) -> String {
    match value {
        Value::Array(items) => format!("[{}]", items.iter().map(shape).collect::<String>()),
        Value::Object(_) => "{}".into(),
        Value::String(_) => "s".into(),
        other => other.to_string(),
    }
}

/// What is sanitised is JSON still and built as before, has nothing forbidden in its strings, and does not change again.
pub(crate) fn json(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    for sanitize in [Sanitize::Control, Sanitize::Html] {
        let screen = Screen { sanitize, schema: None };
        let clean = match screen.look(text) {
            Screened::Pass => text.to_owned(),
            Screened::Instead(clean) => clean,
            Screened::NotJson => continue,
            Screened::Unfit => panic!("there is no schema"),
        };
        assert_eq!(screen.look(&clean), Screened::Pass, "{clean:?} changes again");
        // A number may be too large for a value.
        let Ok(value) = serde_json::from_str::<Value>(&clean) else { continue };
        each_string(&value, &mut |text| {
            assert!(!text.chars().any(is_forbidden), "{text:?}");
            assert!(sanitize != Sanitize::Html || !text.contains(['<', '>', '"', '\'']), "{text:?}");
        });
        if let Ok(before) = serde_json::from_str::<Value>(text) {
            assert_eq!(shape(&before), shape(&value));
        }
    }
}

/// Whatever a client says of itself, it counts as the address that the trusted proxy saw, or is refused. What can be read says the
/// same when it is written again.
pub(crate) fn forwarded(data: &[u8]) {
    let proxy = IpAddr::from(Ipv4Addr::new(10, 0, 0, 1));
    let client = IpAddr::from(Ipv4Addr::new(192, 0, 2, 7));
    let trusted = ["10.0.0.0/8".parse().expect("a network")];
    let Ok(claim) = HeaderValue::from_bytes(data) else { return };
    for (name, seen) in [(X_FORWARDED_FOR, "192.0.2.7"), (FORWARDED, "for=192.0.2.7")] {
        let mut headers = HeaderMap::new();
        headers.insert(&name, claim.clone());
        let own = identify(proxy, true, &headers, &trusted);
        assert_eq!(identify(client, false, &headers, &trusted).map(|identity| identity.ip), Ok(client));

        // In a line of its own, and at the end of the client's.
        headers.append(&name, HeaderValue::from_static(seen));
        let mut appended = HeaderMap::new();
        let line = [data, b", ", seen.as_bytes()].concat();
        appended.insert(&name, HeaderValue::from_bytes(&line).expect("both parts are values"));
        for headers in [headers, appended] {
            if let Ok(identity) = identify(proxy, true, &headers, &trusted) {
                assert_eq!(identity.ip, client, "{headers:?}");
                assert!(!identity.is_proxy);
            }
        }

        let Ok(identity) = own else { continue };
        let mut again = HeaderMap::new();
        let node = match identity.ip {
            IpAddr::V4(ip) => ip.to_string(),
            IpAddr::V6(ip) => format!("\"[{ip}]\""),
        };
        let written = if name == FORWARDED { format!("for={node}") } else { identity.ip.to_string() };
        again.insert(&name, HeaderValue::from_str(&written).expect("an address is a value"));
        let read = identify(proxy, true, &again, &trusted);
        assert_eq!(read.map(|identity| identity.ip), Ok(identity.ip), "{written}");
    }
    if let Some(nodes) = forwarded::nodes(data) {
        let written: Vec<String> = nodes
            .iter()
            .map(|node| match node {
                None => "for=unknown".to_owned(),
                Some(IpAddr::V4(ip)) => format!("for={ip}"),
                Some(IpAddr::V6(ip)) => format!("for=\"[{ip}]\""),
            })
            .collect();
        assert_eq!(forwarded::nodes(written.join(", ").as_bytes()), Some(nodes));
    }
}
