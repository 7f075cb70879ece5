//! Whether a request asks for a WebSocket as RFC 6455 section 4 has it.

use hyper::{
    HeaderMap, Method, Uri, Version,
    header::{
        CONNECTION, CONTENT_LENGTH, HOST, HeaderName, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION,
        TRANSFER_ENCODING, UPGRADE,
    },
    http::{HeaderValue, request::Parts, uri::Authority},
};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::answer::Refusal;

/// What the answer to a good handshake needs.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Handshake {
    /// The value of Sec-WebSocket-Accept.
    pub(super) accept: String,
    /// The subprotocols that the client offers, in one comma-separated list; `None`: none.
    pub(super) protocols: Option<HeaderValue>,
    /// What is answered if the application chooses none of them; `None`: nothing.
    pub(super) fallback_protocol: Option<HeaderValue>,
}

/// Checks a request's head.
pub(super) fn check(head: &Parts) -> Result<Handshake, Refusal> {
    let headers = &head.headers;
    if !has_token(headers, &UPGRADE, "websocket") {
        return Err(Refusal::NotWebSocket);
    }
    if head.method != Method::GET {
        return Err(Refusal::Bad("a WebSocket handshake is a GET request"));
    }
    if head.version != Version::HTTP_11 {
        return Err(Refusal::Bad("a WebSocket handshake takes HTTP/1.1"));
    }
    if !has_token(headers, &CONNECTION, "upgrade") {
        return Err(Refusal::Bad("the Connection header does not say \"Upgrade\""));
    }
    let host = only(headers, &HOST, "the handshake must have one Host header")?;
    if !is_host(host) {
        return Err(Refusal::Bad("the Host header names no host"));
    }
    if !is_target(&head.uri) {
        return Err(Refusal::Bad("the request asks for neither a path nor a URL of HTTP or WebSocket"));
    }
    // A proxy may have chosen us by the one, and the application's virtual hosts go by the other.
    if head.uri.authority().is_some_and(|target| !host.as_bytes().eq_ignore_ascii_case(target.as_str().as_bytes())) {
        return Err(Refusal::Bad("the request names one host in its first line and another in its Host header"));
    }
    let version = only(headers, &SEC_WEBSOCKET_VERSION, "the handshake must have one Sec-WebSocket-Version header")?;
    if version != "13" {
        return Err(Refusal::Version);
    }
    let key = only(headers, &SEC_WEBSOCKET_KEY, "the handshake must have one Sec-WebSocket-Key header")?;
    if !is_key(key.as_bytes()) {
        return Err(Refusal::Bad("Sec-WebSocket-Key is not 16 bytes in base64"));
    }
    if headers.contains_key(TRANSFER_ENCODING) || headers.get_all(CONTENT_LENGTH).iter().any(|length| length != "0") {
        return Err(Refusal::Bad("a WebSocket handshake has no body"));
    }
    Ok(Handshake { accept: derive_accept_key(key.as_bytes()), protocols: protocols(headers)?, fallback_protocol: None })
}

/// Whether a header that is a comma-separated list, over one or several lines, has `token` in it.
fn has_token(headers: &HeaderMap, name: &HeaderName, token: &str) -> bool {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|item| item.trim().eq_ignore_ascii_case(token))
}

/// The value of a header that must be there once. Two of them is how one server is made to see something else than the
/// next.
fn only<'a>(headers: &'a HeaderMap, name: &HeaderName, otherwise: &'static str) -> Result<&'a HeaderValue, Refusal> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (Some(value), None) => Ok(value),
        _ => Err(Refusal::Bad(otherwise)),
    }
}

/// Whether it is a host and perhaps a port (RFC 9110, 7.2).
fn is_host(host: &HeaderValue) -> bool {
    let Some(authority) = host.to_str().ok().and_then(|host| host.parse::<Authority>().ok()) else { return false };
    let port = authority.as_str().strip_prefix(authority.host());
    let is_port = |port: &str| port.strip_prefix(':').is_some_and(|port| port.bytes().all(|b| b.is_ascii_digit()));
    !authority.host().is_empty() && port.is_some_and(|port| port.is_empty() || is_port(port))
}

/// Whether it is a path or a whole URL: other targets are for other methods (RFC 9112, 3.2), or for what we are not.
fn is_target(target: &Uri) -> bool {
    match (target.scheme_str(), target.authority()) {
        (None, None) => target.path().starts_with('/'),
        (Some(scheme), Some(_)) => {
            ["http", "https", "ws", "wss"].iter().any(|known| known.eq_ignore_ascii_case(scheme))
        }
        _ => false,
    }
}

/// Whether `key` is base64 of 16 bytes: 22 digits and the padding.
fn is_key(key: &[u8]) -> bool {
    let Some((digits, padding)) = key.split_last_chunk::<2>() else { return false };
    padding == b"=="
        && digits.len() == 22
        && digits.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'/'))
}

/// The lines of Sec-WebSocket-Protocol as one.
fn protocols(headers: &HeaderMap) -> Result<Option<HeaderValue>, Refusal> {
    const WRONG: Refusal = Refusal::Bad("Sec-WebSocket-Protocol is not a list of names");
    let mut names = Vec::new();
    for value in headers.get_all(SEC_WEBSOCKET_PROTOCOL) {
        for name in value.to_str().map_err(|_| WRONG)?.split(',').map(str::trim) {
            if !is_token(name) {
                return Err(WRONG);
            }
            names.push(name);
        }
    }
    if names.is_empty() {
        return Ok(None);
    }
    HeaderValue::from_str(&names.join(", ")).map(Some).map_err(|_| WRONG)
}

/// RFC 9110's `token`.
fn is_token(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
}

#[cfg(test)]
mod tests {
    use hyper::Request;

    use super::*;

    const GOOD: [(&str, &str); 5] = [
        ("host", "example.com"),
        ("connection", "keep-alive, Upgrade"),
        ("upgrade", "websocket"),
        ("sec-websocket-version", "13"),
        ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ];

    fn head(headers: &[(&str, &str)]) -> Parts {
        let mut request = Request::get("/chat");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    /// The good handshake with every header `name` replaced by `values`.
    fn with(name: &str, values: &[&str]) -> Parts {
        let mut headers: Vec<_> = GOOD.into_iter().filter(|(n, _)| *n != name).collect();
        headers.extend(values.iter().map(|value| (name, *value)));
        head(&headers)
    }

    #[test]
    fn the_example_of_the_rfc_is_accepted() {
        let handshake = check(&head(&GOOD)).unwrap();
        assert_eq!(handshake.accept, "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        assert_eq!(handshake.protocols, None);
    }

    #[test]
    fn a_plain_request_is_asked_to_upgrade() {
        assert_eq!(check(&head(&[("host", "example.com")])), Err(Refusal::NotWebSocket));
        assert_eq!(check(&with("upgrade", &["h2c"])), Err(Refusal::NotWebSocket));
    }

    #[test]
    fn another_version_is_told_the_right_one() {
        assert_eq!(check(&with("sec-websocket-version", &["8"])), Err(Refusal::Version));
    }

    #[test]
    fn what_breaks_the_rfc_is_bad() {
        let cases: &[(&str, &[&str])] = &[
            ("host", &[]),
            ("host", &["a", "b"]),
            ("connection", &["keep-alive"]),
            ("sec-websocket-version", &[]),
            ("sec-websocket-version", &["13", "13"]),
            ("sec-websocket-key", &[]),
            ("sec-websocket-key", &["dGhlIHNhbXBsZSBub25jZQ==", "dGhlIHNhbXBsZSBub25jZQ=="]),
            ("sec-websocket-key", &[""]),
            ("sec-websocket-key", &["dGhlIHNhbXBsZSBub25jZQ="]),
            ("sec-websocket-key", &["dGhlIHNhbXBsZSBub25jZTE="]),
            ("sec-websocket-key", &["dGhlIHNhbXBs!SBub25jZQ=="]),
            ("content-length", &["5"]),
            ("transfer-encoding", &["chunked"]),
            ("sec-websocket-protocol", &["a,,b"]),
            ("sec-websocket-protocol", &["a b"]),
        ];
        for (name, values) in cases {
            let checked = check(&with(name, values));
            assert!(matches!(checked, Err(Refusal::Bad(_))), "{name}: {values:?} gave {checked:?}");
        }
    }

    #[test]
    fn other_methods_and_versions_are_bad() {
        let mut post = head(&GOOD);
        post.method = Method::POST;
        assert!(matches!(check(&post), Err(Refusal::Bad(_))));
        let mut old = head(&GOOD);
        old.version = Version::HTTP_10;
        assert!(matches!(check(&old), Err(Refusal::Bad(_))));
    }

    #[test]
    fn subprotocols_of_several_lines_become_one_list() {
        let handshake = check(&with("sec-websocket-protocol", &["a,b", "c"])).unwrap();
        assert_eq!(handshake.protocols.unwrap(), "a, b, c");
    }
}
