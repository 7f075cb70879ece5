//! The HTTP answers of the handshake: what a refused client is told, and what the log and the metrics call it.

use std::time::SystemTime;

use bytes::Bytes;
use hyper::{
    HeaderMap, Method, Response, StatusCode,
    header::{
        CONNECTION, CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER, SEC_WEBSOCKET_VERSION, UPGRADE,
        WWW_AUTHENTICATE,
    },
};
use serde::Serialize;

use super::{
    auth::{Crowded, Rejection},
    handshake::Handshake,
    overload::Overload,
    retry::Wait,
};

/// Headers of an upstream's refusal that a client can do something with.
const PASSED_ON: [HeaderName; 2] = [RETRY_AFTER, WWW_AUTHENTICATE];

/// Why a handshake does not become a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// A plain HTTP request.
    NotWebSocket,
    /// A version of the protocol that nobody speaks.
    Version,
    /// A handshake that breaks RFC 6455; with what is wrong.
    Bad(&'static str),
    /// No request of HTTP/1, or one that is too long; with the status that says which.
    Malformed(StatusCode),
    /// Not complete before `handshake_timeout`.
    Timeout,
    /// A web page of an origin that is not allowed; with the origin.
    Origin(String),
    /// It does not show who it is.
    Unauthenticated(Rejection),
    /// Its user has, or tries, too many.
    Crowded(Crowded),
    /// The service that is asked does not want it; with its status and the headers that go with it.
    ForwardRefused(StatusCode, HeaderMap),
    /// The service that is asked has no answer; with the cause, for the log.
    ForwardUnavailable(String),
    /// A rule denies the client's address.
    Denied,
    /// A trusted proxy that does not begin with a good PROXY header; with what is wrong.
    ProxyHeader(&'static str),
    /// No TLS handshake, or one that fails; with the reason.
    Tls(&'static str),
    /// HTTP without TLS on an address that speaks TLS.
    NotTls,
    /// The source holds this many connections and may hold no more.
    SourceFull(u32),
    /// The source opens connections faster than it may.
    SourceRate,
    /// The service holds as many connections as it may.
    ServiceFull,
    /// All services together hold as many connections as they may.
    AllFull,
    /// Connections to the service are opened faster than it takes them.
    ServiceRate,
    /// The host runs short of something.
    Overloaded,
    /// The gateway is being shut down.
    Draining,
    /// An application that uses [`crate::guard`] was put together wrong.
    Unguarded,
    /// Nothing answers at the upstream's address, or not in WebSocket; with the cause, for the log.
    UpstreamUnreachable(String),
    /// The upstream takes too long to answer.
    UpstreamTimeout,
    /// The upstream does not want this client; with its status and the headers that go with it.
    UpstreamRefused(StatusCode, HeaderMap),
}

#[derive(Serialize)]
struct Problem<'a> {
    r#type: &'static str,
    title: &'a str,
    status: u16,
    detail: &'a str,
}

impl Refusal {
    /// What metrics and logs call it.
    pub(super) fn label(&self) -> &'static str {
        match self {
            Self::NotWebSocket => "not_websocket",
            Self::Version => "version",
            Self::Bad(_) => "bad_request",
            Self::Malformed(_) => "malformed",
            Self::Timeout => "timeout",
            Self::Origin(_) => "origin",
            Self::Unauthenticated(rejection) => rejection.label(),
            Self::Crowded(Crowded::Connections(_)) => "user_full",
            Self::Crowded(Crowded::Attempts(_)) => "user_attempts",
            Self::ForwardRefused(..) => "auth_refused",
            Self::ForwardUnavailable(_) => "auth_unavailable",
            Self::Denied => "rule",
            Self::ProxyHeader(_) => "proxy_header",
            Self::Tls(_) => "tls",
            Self::NotTls => "not_tls",
            Self::SourceFull(_) => "source_full",
            Self::SourceRate => "source_rate",
            Self::ServiceFull => "service_full",
            Self::AllFull => "total_full",
            Self::ServiceRate => "service_rate",
            Self::Overloaded => "overloaded",
            Self::Draining => "draining",
            Self::Unguarded => "unguarded",
            Self::UpstreamUnreachable(_) => "upstream_unreachable",
            Self::UpstreamTimeout => "upstream_timeout",
            Self::UpstreamRefused(..) => "upstream_refused",
        }
    }

    pub(super) fn status(&self) -> StatusCode {
        match self {
            Self::NotWebSocket | Self::Version => StatusCode::UPGRADE_REQUIRED,
            Self::Bad(_) | Self::ProxyHeader(_) | Self::Tls(_) | Self::NotTls => StatusCode::BAD_REQUEST,
            Self::Timeout => StatusCode::REQUEST_TIMEOUT,
            Self::Malformed(status) | Self::ForwardRefused(status, _) => *status,
            Self::Unauthenticated(_) => StatusCode::UNAUTHORIZED,
            Self::Origin(_) | Self::Denied => StatusCode::FORBIDDEN,
            Self::SourceFull(_) | Self::SourceRate | Self::Crowded(_) => StatusCode::TOO_MANY_REQUESTS,
            Self::ServiceFull
            | Self::AllFull
            | Self::ServiceRate
            | Self::Overloaded
            | Self::Draining
            | Self::ForwardUnavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::UpstreamTimeout => StatusCode::GATEWAY_TIMEOUT,
            Self::Unguarded => StatusCode::INTERNAL_SERVER_ERROR,
            // What goes wrong behind the gateway is no fault of the client; only what it can act on is passed on.
            Self::UpstreamRefused(status, _)
                if status.is_client_error() || *status == StatusCode::SERVICE_UNAVAILABLE =>
            {
                *status
            }
            Self::UpstreamUnreachable(_) | Self::UpstreamRefused(..) => StatusCode::BAD_GATEWAY,
        }
    }

    /// What somebody has to mend, because it is no fault of the client.
    pub(super) fn fault(&self) -> Option<String> {
        match self {
            Self::ProxyHeader(what) => Some((*what).into()),
            Self::ForwardUnavailable(cause) => Some(format!("gateway.auth.forward: {cause}")),
            Self::UpstreamUnreachable(cause) => Some(cause.clone()),
            Self::UpstreamTimeout => Some("the upstream did not answer in time".into()),
            Self::UpstreamRefused(status, _) if status.is_server_error() => {
                Some(format!("the upstream answers {status}"))
            }
            _ => None,
        }
    }

    fn detail(&self) -> String {
        match self {
            Self::NotWebSocket => "this server speaks WebSocket only".into(),
            Self::Version => "this server speaks version 13 of the WebSocket protocol".into(),
            Self::NotTls => "this server speaks TLS: connect to wss://".into(),
            Self::Bad(what) | Self::ProxyHeader(what) | Self::Tls(what) => (*what).into(),
            Self::Malformed(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE | StatusCode::URI_TOO_LONG) => {
                "the head of the request is longer than this server takes, or has more lines".into()
            }
            Self::Malformed(StatusCode::HTTP_VERSION_NOT_SUPPORTED) => "this server speaks HTTP/1.1 only".into(),
            Self::Malformed(_) => "this is no HTTP/1.1 request".into(),
            Self::Timeout => "the handshake was not complete in time".into(),
            Self::Origin(origin) => format!("pages of the origin {origin:?} may not connect to this server"),
            Self::Unauthenticated(rejection) => rejection.detail().into(),
            Self::Crowded(Crowded::Connections(limit)) => {
                format!("too many connections of your user; {limit} at a time are allowed")
            }
            Self::Crowded(Crowded::Attempts(_)) => "too many connection attempts of your user in a minute".into(),
            Self::ForwardRefused(..) => "this server does not take this client".into(),
            Self::ForwardUnavailable(_) => "it could not be found out whether this client may connect".into(),
            Self::Denied => "connections from your address are not allowed".into(),
            Self::SourceFull(limit) => {
                format!("too many connections from your address; {limit} at a time are allowed")
            }
            Self::SourceRate => "too many new connections from your address at once".into(),
            Self::ServiceFull | Self::AllFull => "the service has no room for another connection at the moment".into(),
            Self::ServiceRate => "too many new connections to this service at once".into(),
            Self::Overloaded => "the server is overloaded at the moment".into(),
            Self::Draining => "the server is shutting down".into(),
            Self::Unguarded => "this server is not set up correctly".into(),
            Self::UpstreamUnreachable(_) => "the application behind this server cannot be reached".into(),
            Self::UpstreamTimeout => "the application behind this server did not answer in time".into(),
            Self::UpstreamRefused(..) => "the application refused the connection".into(),
        }
    }

    /// Seconds after which to try again. Jittered, so that those who were refused together don't return together.
    fn retry_after(&self, told: impl FnOnce(Wait) -> u16) -> Option<u16> {
        let wait = match self {
            // Whole seconds, and not a moment too early.
            Self::Crowded(Crowded::Attempts(wait)) => {
                return Some(u16::try_from(wait.as_secs() + 1).unwrap_or(u16::MAX));
            }
            Self::SourceFull(_) | Self::Crowded(Crowded::Connections(_)) => Wait::of_client(5, 5),
            Self::ServiceFull | Self::AllFull | Self::Overloaded | Self::ForwardUnavailable(_) => {
                Wait::of_service(5, 10)
            }
            Self::SourceRate => Wait::of_client(1, 2),
            Self::ServiceRate => Wait::of_service(1, 2),
            Self::Draining => Wait::of_service(1, 4),
            _ => return None,
        };
        Some(told(wait))
    }

    /// The answer for an HTTP library; `told` says after how many seconds to try again.
    pub(crate) fn response_as<B: From<Bytes>>(&self, told: impl FnOnce(Wait) -> u16) -> Response<B> {
        let status = self.status();
        let mut response = Response::new(B::from(self.body()));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
        if status == StatusCode::UPGRADE_REQUIRED {
            headers.insert(CONNECTION, HeaderValue::from_static("close, upgrade"));
            headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
            headers.insert(SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
        }
        if let Some(seconds) = self.retry_after(told) {
            headers.insert(RETRY_AFTER, seconds.into());
        }
        if let Self::Unauthenticated(rejection) = self {
            headers.insert(WWW_AUTHENTICATE, rejection.challenge());
        }
        if let Self::ForwardRefused(_, theirs) = self {
            headers.extend(theirs.clone());
        }
        if status == StatusCode::UNAUTHORIZED && !headers.contains_key(WWW_AUTHENTICATE) {
            // Every 401 has one (RFC 9110, 15.5.2).
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"limiter\""));
        }
        if let Self::UpstreamRefused(_, theirs) = self {
            for name in PASSED_ON {
                if let Some(value) = theirs.get(&name) {
                    headers.insert(name, value.clone());
                }
            }
        }
        response
    }

    /// The answer as it is sent.
    pub(super) fn raw(&self, overload: &Overload) -> Vec<u8> {
        self.raw_to(&Method::GET, overload)
    }

    /// The same to a request with that method. HEAD asks for all but the body.
    pub(super) fn raw_to(&self, method: &Method, overload: &Overload) -> Vec<u8> {
        let (head, body) = self.response_as::<Bytes>(|wait| overload.retry_after(wait)).into_parts();
        let mut raw = Vec::with_capacity(512);
        line(&mut raw, &[b"HTTP/1.1 ", head.status.to_string().as_bytes()]);
        line(&mut raw, &[b"date: ", httpdate::fmt_http_date(SystemTime::now()).as_bytes()]);
        line(&mut raw, &[b"content-length: ", body.len().to_string().as_bytes()]);
        for (name, value) in &head.headers {
            line(&mut raw, &[name.as_str().as_bytes(), b": ", value.as_bytes()]);
        }
        line(&mut raw, &[]);
        if method != Method::HEAD {
            raw.extend_from_slice(&body);
        }
        raw
    }

    fn body(&self) -> Bytes {
        let status = self.status();
        let problem = Problem {
            // No document of ours describes it further, so the title is the status's own (RFC 9457, 4.2.1).
            r#type: "about:blank",
            title: status.canonical_reason().unwrap_or("Error"),
            status: status.as_u16(),
            detail: &self.detail(),
        };
        // Strings and a number can't fail to serialise.
        serde_json::to_vec(&problem).unwrap_or_default().into()
    }
}

/// 101 as it is sent, with the subprotocol that was chosen. No extension is: a message that is small on the wire and large in
/// memory would go past the limits.
pub(super) fn switching_protocols(handshake: &Handshake, protocol: Option<&HeaderValue>) -> Vec<u8> {
    let mut raw = Vec::with_capacity(256);
    line(&mut raw, &[b"HTTP/1.1 101 Switching Protocols"]);
    line(&mut raw, &[b"Connection: Upgrade"]);
    line(&mut raw, &[b"Upgrade: websocket"]);
    line(&mut raw, &[b"Sec-WebSocket-Accept: ", handshake.accept.as_bytes()]);
    if let Some(protocol) = protocol {
        line(&mut raw, &[b"Sec-WebSocket-Protocol: ", protocol.as_bytes()]);
    }
    line(&mut raw, &[]);
    raw
}

/// Adds a line of a head. In its parts there is nothing that ends one.
fn line(raw: &mut Vec<u8>, parts: &[&[u8]]) {
    for part in parts {
        raw.extend_from_slice(part);
    }
    raw.extend_from_slice(b"\r\n");
}
