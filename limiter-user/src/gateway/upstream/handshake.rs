//! The handshake with an upstream: what it is told of the client, and what it must answer.

use std::{future::poll_fn, net::IpAddr, pin::pin, task::Poll};

use bytes::Bytes;
use http_body_util::Empty;
use hyper::{
    HeaderMap, Request, Response, StatusCode, Uri,
    body::Incoming,
    client::conn::http1,
    header::{
        CONNECTION, CONTENT_LENGTH, FORWARDED, HOST, HeaderName, HeaderValue, SEC_WEBSOCKET_ACCEPT,
        SEC_WEBSOCKET_EXTENSIONS, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION, TE, TRAILER,
        TRANSFER_ENCODING, UPGRADE,
    },
    http::{request::Parts, uri::PathAndQuery},
};
use hyper_util::rt::TokioIo;
use tokio_tungstenite::tungstenite::handshake::{client::generate_key, derive_accept_key};

use super::{
    super::{
        answer::Refusal,
        arrival::Endpoints,
        forwarded::{Identity, Scheme, X_FORWARDED_FOR, X_FORWARDED_PROTO},
        handshake::Handshake,
    },
    Stream,
};

/// Headers of a request that hold for one hop, or that only the gateway may set.
const NOT_PASSED_ON: [HeaderName; 14] = [
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

const X_FORWARDED_PORT: HeaderName = HeaderName::from_static("x-forwarded-port");
const X_LIMITER_USER: HeaderName = HeaderName::from_static("x-limiter-user");
const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Longest head of an upstream's answer, in bytes, and the most that is read beyond it.
const MAX_HEAD: usize = 16 * 1024;

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
    stream: Stream,
    head: &Parts,
    handshake: &Handshake,
    client: Client,
) -> Result<(Stream, Vec<u8>, Option<HeaderValue>), Refusal> {
    let key = generate_key();
    let request = request(path, head, handshake, client, &key).ok_or(Refusal::Bad("a header cannot be passed on"))?;
    let exchanged = exchange(stream, request)
        .await
        .map_err(|error| Refusal::UpstreamUnreachable(format!("the upstream's answer: {error}")))?;
    let (response, stream, read) = match exchanged {
        Exchanged::Upgraded { response, stream, read } => (response, stream, read),
        Exchanged::Refused { status, headers } => return Err(Refusal::UpstreamRefused(status, headers)),
    };
    let protocol = chosen_protocol(&response, handshake, &key)
        .map_err(|problem| Refusal::UpstreamUnreachable(format!("the upstream's answer: {problem}")))?;
    Ok((stream, read.to_vec(), protocol))
}

/// The request for the upstream. `None` only for what is no header value, which the parser would not have let in.
fn request(
    path: Option<&PathAndQuery>,
    head: &Parts,
    handshake: &Handshake,
    client: Client,
    key: &str,
) -> Option<Request<Empty<Bytes>>> {
    let path = path.or(head.uri.path_and_query());
    let mut request = Request::new(Empty::new());
    *request.uri_mut() = Uri::from(path.cloned().unwrap_or_else(|| PathAndQuery::from_static("/")));
    let headers = request.headers_mut();
    // As the client sent it: applications compare it with the Origin.
    headers.insert(HOST, head.headers.get(HOST)?.clone());
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
    headers.insert(SEC_WEBSOCKET_KEY, HeaderValue::from_str(key).ok()?);
    if let Some(protocols) = &handshake.protocols {
        headers.insert(SEC_WEBSOCKET_PROTOCOL, protocols.clone());
    }
    let hop = named_by_connection(&head.headers);
    for (name, value) in &head.headers {
        if *name != HOST && is_passed_on(name) && !hop.contains(name) {
            headers.append(name, value.clone());
        }
    }
    headers.insert(X_FORWARDED_FOR, HeaderValue::from_str(&client.ip.to_string()).ok()?);
    headers.insert(X_FORWARDED_PROTO, HeaderValue::from_static(client.scheme.name()));
    if let Some(port) = client.port {
        headers.insert(X_FORWARDED_PORT, port.into());
    }
    headers.insert(X_REQUEST_ID, HeaderValue::from_str(&format!("{:032x}", client.request_id)).ok()?);
    if let Some(user) = client.user {
        headers.insert(X_LIMITER_USER, user);
    }
    Some(request)
}

fn is_passed_on(name: &HeaderName) -> bool {
    !NOT_PASSED_ON.contains(name) && !NOT_PASSED_ON_PREFIXES.iter().any(|prefix| name.as_str().starts_with(prefix))
}

/// The headers that the client says are for this hop alone (RFC 9110, 7.6.1).
fn named_by_connection(headers: &HeaderMap) -> Vec<HeaderName> {
    headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect()
}

/// What came of a handshake with the upstream.
pub(super) enum Exchanged {
    Upgraded { response: Response<Incoming>, stream: Stream, read: Bytes },
    Refused { status: StatusCode, headers: HeaderMap },
}

/// Sends a request and, if the answer is 101, takes the socket back with what was read beyond it.
pub(super) async fn exchange(stream: Stream, request: Request<Empty<Bytes>>) -> hyper::Result<Exchanged> {
    let (mut sender, mut connection) =
        http1::Builder::new().title_case_headers(true).max_buf_size(MAX_HEAD).handshake(TokioIo::new(stream)).await?;
    let mut done = false;
    let response = {
        let mut sending = pin!(sender.send_request(request));
        // Both in this task: whoever gives up on the handshake drops the socket with it.
        poll_fn(|cx| {
            if !done && let Poll::Ready(ended) = connection.poll_without_shutdown(cx) {
                done = true;
                ended?;
            }
            sending.as_mut().poll(cx)
        })
        .await?
    };
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        let (head, _) = response.into_parts();
        return Ok(Exchanged::Refused { status: head.status, headers: head.headers });
    }
    if !done {
        poll_fn(|cx| connection.poll_without_shutdown(cx)).await?;
    }
    let parts = connection.into_parts();
    Ok(Exchanged::Upgraded { response, stream: parts.io.into_inner(), read: parts.read_buf })
}

/// The subprotocol of an upstream's 101; an error says what is wrong with the answer (RFC 6455, 4.1).
fn chosen_protocol(
    response: &Response<Incoming>,
    handshake: &Handshake,
    key: &str,
) -> Result<Option<HeaderValue>, &'static str> {
    let headers = response.headers();
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
        let (head, ()) = Request::get("/chat?token=t")
            .header("host", "example.com")
            .header("connection", "Upgrade, X-Hop")
            .header("x-hop", "1")
            .header("x-forwarded-for", "203.0.113.1")
            .header("x-forwarded-host", "evil")
            .header("forwarded", "for=203.0.113.1")
            .header("x-limiter-user", "root")
            .header("x-request-id", "mine")
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

        assert_eq!(request.uri(), "/chat?token=t");
        let header =
            |name: &str| request.headers().get_all(name).iter().map(|v| v.to_str().unwrap()).collect::<Vec<_>>();
        assert_eq!(header("host"), ["example.com"]);
        assert_eq!(header("cookie"), ["a=1", "b=2"]);
        assert_eq!(header("x-forwarded-for"), ["192.0.2.7"]);
        assert_eq!(header("x-forwarded-proto"), ["http"]);
        assert_eq!(header("x-forwarded-port"), ["8080"]);
        assert_eq!(header("x-request-id"), ["00000000000000000000000000000001"]);
        assert_eq!(header("sec-websocket-protocol"), ["a, b"]);
        for gone in ["x-hop", "x-forwarded-host", "forwarded", "x-limiter-user", "sec-websocket-extensions"] {
            assert!(header(gone).is_empty(), "{gone}");
        }
    }

    #[test]
    fn a_path_in_the_url_replaces_the_clients() {
        let (head, ()) = Request::get("/chat?token=t").header("host", "x").body(()).unwrap().into_parts();
        let handshake = Handshake { accept: String::new(), protocols: None, fallback_protocol: None };
        let client = Client { ip: [192, 0, 2, 7].into(), scheme: Scheme::Http, port: None, request_id: 1, user: None };
        let request = request(Some(&PathAndQuery::from_static("/fixed")), &head, &handshake, client, "key").unwrap();
        assert_eq!(request.uri(), "/fixed");
    }
}
