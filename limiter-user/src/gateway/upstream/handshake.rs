//! The handshake with an upstream: what it is told of the client, and what it must answer.

use std::net::IpAddr;

use hyper::{
    HeaderMap, StatusCode,
    header::{
        CONNECTION, CONTENT_LENGTH, FORWARDED, HOST, HeaderName, HeaderValue, SEC_WEBSOCKET_ACCEPT,
        SEC_WEBSOCKET_EXTENSIONS, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION, TE, TRAILER,
        TRANSFER_ENCODING, UPGRADE,
    },
    http::{request::Parts, uri::PathAndQuery},
};
use tokio_tungstenite::tungstenite::handshake::{client::generate_key, derive_accept_key};

use super::{
    super::{
        answer::Refusal,
        arrival::Endpoints,
        exchange::{Request, exchange, may_be_among},
        forwarded::{Identity, Scheme, X_FORWARDED_FOR, X_FORWARDED_PROTO},
        handshake::Handshake,
    },
    Stream,
};

/// Headers of a request that hold for one hop, or that only the gateway may set.
static NOT_PASSED_ON: [HeaderName; 14] = [
    CONNECTION,
    UPGRADE,
    TE,
    TRAILER,
    TRANSFER_ENCODING,
    CONTENT_LENGTH,
    SEC_WEBSOCKET_KEY,
    SEC_WEBSOCKET_VERSION,
    SEC_WEBSOCKET_EXTENSIONS,
    SEC_WEBSOCKET_PROTOCOL,
    FORWARDED,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("x-real-ip"),
    HeaderName::from_static("x-request-id"),
];

/// The same, by how they begin.
const NOT_PASSED_ON_PREFIXES: [&str; 3] = ["x-forwarded-", "x-limiter-", "proxy-"];

/// Whom the gateway connects for.
#[derive(Clone, Debug)]
pub(in crate::gateway) struct Client {
    ip: IpAddr,
    scheme: Scheme,
    /// The port that it connected to, if we know.
    port: Option<u16>,
    /// Ties the upstream's log lines to ours.
    request_id: u128,
    /// The user, where clients must show who they are.
    user: Option<HeaderValue>,
}

impl Client {
    pub(in crate::gateway) fn new(identity: Identity, endpoints: Endpoints, user: Option<&str>) -> Self {
        // Through an HTTP proxy, it is the proxy that connected to us.
        let is_direct = identity.ip == endpoints.remote.ip();
        Self {
            ip: identity.ip,
            scheme: identity.scheme.unwrap_or(endpoints.scheme),
            port: Some(endpoints.local.port()).filter(|port| is_direct && *port != 0),
            request_id: fastrand::u128(..),
            // A name has no control characters, so it is a legal value.
            user: user.and_then(|name| HeaderValue::from_bytes(name.as_bytes()).ok()),
        }
    }
}

/// Asks for a WebSocket, at `path` if there is one and else where the client asked for: the connection, what came right after the
/// answer, and the subprotocol that the upstream chose.
pub(super) async fn shake_hands(
    path: Option<&PathAndQuery>,
    mut stream: Stream,
    head: &Parts,
    handshake: &Handshake,
    client: Client,
) -> Result<(Stream, Vec<u8>, Option<HeaderValue>), Refusal> {
    let key = generate_key();
    let request = request(path, head, handshake, client, &key).ok_or(Refusal::Bad("the handshake names no host"))?;
    let answer = exchange(&mut stream, request)
        .await
        .map_err(|error| Refusal::UpstreamUnreachable(format!("the upstream's answer: {error}")))?;
    if answer.status != StatusCode::SWITCHING_PROTOCOLS {
        return Err(Refusal::UpstreamRefused(answer.status, answer.headers));
    }
    let protocol = chosen_protocol(&answer.headers, handshake, &key)
        .map_err(|problem| Refusal::UpstreamUnreachable(format!("the upstream's answer: {problem}")))?;
    Ok((stream, answer.rest, protocol))
}

/// The request for the upstream. `None` only without a Host header, which `handshake::check` has refused.
fn request(
    path: Option<&PathAndQuery>,
    head: &Parts,
    handshake: &Handshake,
    client: Client,
    key: &str,
) -> Option<Request> {
    const ROOT: PathAndQuery = PathAndQuery::from_static("/");
    let mut request = Request::get(path.or(head.uri.path_and_query()).unwrap_or(&ROOT));
    // As the client sent it: applications compare it with the Origin.
    request.header(&HOST, head.headers.get(HOST)?);
    request.own("connection", b"Upgrade");
    request.own("upgrade", b"websocket");
    request.own("sec-websocket-version", b"13");
    request.own("sec-websocket-key", key.as_bytes());
    if let Some(protocols) = &handshake.protocols {
        request.header(&SEC_WEBSOCKET_PROTOCOL, protocols);
    }
    for (name, value) in &head.headers {
        if *name != HOST && is_passed_on(name) && !is_for_one_hop(name, &head.headers) {
            request.header(name, value);
        }
    }
    request.own_shown(X_FORWARDED_FOR.as_str(), format_args!("{}", client.ip));
    request.own(X_FORWARDED_PROTO.as_str(), client.scheme.name().as_bytes());
    if let Some(port) = client.port {
        request.own_shown("x-forwarded-port", format_args!("{port}"));
    }
    request.own_shown("x-request-id", format_args!("{:032x}", client.request_id));
    if let Some(user) = client.user {
        request.own("x-limiter-user", user.as_bytes());
    }
    Some(request)
}

fn is_passed_on(name: &HeaderName) -> bool {
    !may_be_among(name, &NOT_PASSED_ON, &NOT_PASSED_ON_PREFIXES)
}

/// Whether the client says that this header is for one hop alone (RFC 9110, 7.6.1).
fn is_for_one_hop(name: &HeaderName, headers: &HeaderMap) -> bool {
    headers
        .get_all(CONNECTION)
        .iter()
        .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
        .any(|named| named.trim_ascii().eq_ignore_ascii_case(name.as_str().as_bytes()))
}

/// The subprotocol of an upstream's 101; an error says what is wrong with the answer (RFC 6455, 4.1).
pub(super) fn chosen_protocol(
    headers: &HeaderMap,
    handshake: &Handshake,
    key: &str,
) -> Result<Option<HeaderValue>, &'static str> {
    if headers.get(SEC_WEBSOCKET_ACCEPT).is_none_or(|accept| *accept != derive_accept_key(key.as_bytes())) {
        return Err("Sec-WebSocket-Accept does not match the key");
    }
    if headers.contains_key(SEC_WEBSOCKET_EXTENSIONS) {
        return Err("it negotiates an extension that was not offered");
    }
    let Some(chosen) = headers.get(SEC_WEBSOCKET_PROTOCOL) else { return Ok(None) };
    let offered = handshake.protocols.as_ref().and_then(|offered| offered.to_str().ok()).unwrap_or_default();
    if !offered.split(", ").any(|name| chosen == name) {
        return Err("it chooses a subprotocol that was not offered");
    }
    Ok(Some(chosen.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spoofed_and_hop_headers_are_not_passed_on() {
        let (head, ()) = hyper::Request::get("/chat?token=t")
            .header("host", "example.com")
            .header("connection", "Upgrade, X-Hop")
            .header("x-hop", "1")
            .header("x-forwarded-for", "203.0.113.1")
            .header("x-forwarded-host", "evil")
            .header("forwarded", "for=203.0.113.1")
            .header("x-limiter-user", "root")
            .header("x-request-id", "mine")
            .header("x_forwarded_for", "203.0.113.2")
            .header("X_Limiter-User", "root")
            .header("x_real_ip", "203.0.113.2")
            .header("x_own", "theirs")
            .header("sec-websocket-extensions", "permessage-deflate")
            .header("cookie", "a=1")
            .header("cookie", "b=2")
            .body(())
            .unwrap()
            .into_parts();
        let handshake = Handshake {
            accept: String::new(),
            protocols: Some(HeaderValue::from_static("a, b")),
            fallback_protocol: None,
        };
        let client =
            Client { ip: [192, 0, 2, 7].into(), scheme: Scheme::Http, port: Some(8080), request_id: 1, user: None };
        let request = request(None, &head, &handshake, client, "key").unwrap();

        assert!(request.text().starts_with("GET /chat?token=t HTTP/1.1\r\n"), "{}", request.text());
        let lines: Vec<_> = request.text().lines().filter_map(|line| line.split_once(": ")).collect();
        let header = |name: &str| {
            let of_name = lines.iter().filter(|(known, _)| known.eq_ignore_ascii_case(name));
            of_name.map(|(_, value)| *value).collect::<Vec<_>>()
        };
        assert_eq!(header("host"), ["example.com"]);
        assert_eq!(header("cookie"), ["a=1", "b=2"]);
        assert_eq!(header("x_own"), ["theirs"]);
        assert_eq!(header("x-forwarded-for"), ["192.0.2.7"]);
        assert_eq!(header("x-forwarded-proto"), ["http"]);
        assert_eq!(header("x-forwarded-port"), ["8080"]);
        assert_eq!(header("x-request-id"), ["00000000000000000000000000000001"]);
        assert_eq!(header("sec-websocket-protocol"), ["a, b"]);
        for gone in ["x-hop", "x-forwarded-host", "forwarded", "x-limiter-user", "sec-websocket-extensions"] {
            assert!(header(gone).is_empty(), "{gone}");
        }
        // Nor by a name that an application may take for one of these.
        for spoofed in ["203.0.113.2", "root"] {
            assert!(!request.text().contains(spoofed), "{}", request.text());
        }
    }

    #[test]
    fn a_path_in_the_url_replaces_the_clients() {
        let (head, ()) = hyper::Request::get("/chat?token=t").header("host", "x").body(()).unwrap().into_parts();
        let handshake = Handshake { accept: String::new(), protocols: None, fallback_protocol: None };
        let client = Client { ip: [192, 0, 2, 7].into(), scheme: Scheme::Http, port: None, request_id: 1, user: None };
        let request = request(Some(&PathAndQuery::from_static("/fixed")), &head, &handshake, client, "key").unwrap();
        assert!(request.text().starts_with("GET /fixed HTTP/1.1\r\n"), "{}", request.text());
    }
}
