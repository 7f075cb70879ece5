//! Asking an HTTP service whether a client may connect, as nginx's `auth_request` does.

use std::{sync::Arc, time::Duration};

use hyper::{
    HeaderMap, Method, StatusCode,
    header::{
        CONNECTION, CONTENT_LENGTH, HOST, HeaderName, HeaderValue, SET_COOKIE, TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
        WWW_AUTHENTICATE,
    },
    http::{request::Parts, uri::PathAndQuery},
};
use tokio::time::timeout;

use super::super::{
    exchange::{Answer, ExchangeError, Request, exchange, may_be_among},
    upstream::connect,
};
use crate::config::{self, user_name};

/// Headers of a client that hold for its own connection, or that only we may set.
static NOT_FORWARDED: [HeaderName; 9] = [
    CONNECTION,
    UPGRADE,
    TE,
    TRAILER,
    TRANSFER_ENCODING,
    CONTENT_LENGTH,
    HOST,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("forwarded"),
];

/// The same, by how they begin.
const NOT_FORWARDED_PREFIXES: [&str; 4] = ["x-forwarded-", "x-original-", "x-limiter-", "proxy-"];

/// Headers of a refusal that a client can do something with.
const PASSED_ON: [HeaderName; 2] = [WWW_AUTHENTICATE, SET_COOKIE];

/// The service that is asked.
#[derive(Debug)]
pub(super) struct Forward {
    host: String,
    port: u16,
    authority: HeaderValue,
    path: PathAndQuery,
    timeout: Duration,
    user_header: HeaderName,
}

/// What it is asked about one client. Has no `Debug`: there are credentials in it.
#[derive(Clone)]
pub(super) struct Question(Arc<HeaderMap>);

/// Where a client comes from.
#[derive(Clone, Copy, Debug)]
pub(in crate::gateway) struct Visitor<'a> {
    /// Its address, behind whatever proxies.
    pub(in crate::gateway) address: std::net::IpAddr,
    /// `http` or `https`.
    pub(in crate::gateway) scheme: &'a str,
}

/// What the service says.
#[derive(Debug)]
pub(super) enum Verdict {
    /// The client is this user.
    Allowed(Arc<str>),
    /// It is not to come in: 401 or 403, with the headers that go with it.
    Refused(StatusCode, HeaderMap),
    /// There is no telling, for this reason.
    Unavailable(String),
}

impl Forward {
    pub(super) fn new(config: &config::Forward) -> Self {
        let url = &config.url;
        Self {
            host: url.host.clone(),
            port: url.port,
            // A host and a port, as a URL has them.
            authority: HeaderValue::from_str(&url.authority).unwrap_or(HeaderValue::from_static("auth")),
            path: PathAndQuery::try_from(url.path.as_str()).unwrap_or(PathAndQuery::from_static("/")),
            timeout: config.timeout,
            user_header: config.user_header.parse().unwrap_or(HeaderName::from_static("x-user")),
        }
    }

    pub(super) async fn ask(&self, question: &Question) -> Verdict {
        let answer = match timeout(self.timeout, self.exchange(question)).await {
            Err(_) => return Verdict::Unavailable(format!("no answer within {:?}", self.timeout)),
            Ok(Err(error)) => return Verdict::Unavailable(error.to_string()),
            Ok(Ok(answer)) => answer,
        };
        match answer.status {
            status if status.is_success() => self.user(&answer.headers).map_or_else(
                || {
                    Verdict::Unavailable(format!(
                        "it answers {status} without a user in the header {}",
                        self.user_header
                    ))
                },
                Verdict::Allowed,
            ),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                let mut headers = HeaderMap::new();
                for name in PASSED_ON {
                    for value in answer.headers.get_all(&name) {
                        headers.append(name.clone(), value.clone());
                    }
                }
                Verdict::Refused(answer.status, headers)
            }
            status => Verdict::Unavailable(format!("it answers {status}")),
        }
    }

    fn user(&self, headers: &HeaderMap) -> Option<Arc<str>> {
        let mut lines = headers.get_all(&self.user_header).iter();
        match (lines.next(), lines.next()) {
            (Some(line), None) => user_name(str::from_utf8(line.as_bytes()).ok()?),
            _ => None,
        }
    }

    async fn exchange(&self, Question(headers): &Question) -> Result<Answer, ExchangeError> {
        let mut stream = connect(&self.host, self.port).await?;
        let mut request = Request::get(&self.path);
        request.header(&HOST, &self.authority);
        request.own("connection", b"close");
        for (name, value) in headers.iter() {
            request.header(name, value);
        }
        exchange(&mut stream, request).await
    }
}

impl Question {
    /// About the client with this request.
    pub(super) fn new(head: &Parts, visitor: Visitor<'_>) -> Self {
        let mut headers = HeaderMap::new();
        for (name, value) in &head.headers {
            if !may_be_among(name, &NOT_FORWARDED, &NOT_FORWARDED_PREFIXES) {
                headers.append(name.clone(), value.clone());
            }
        }
        let mut set = |name: &'static str, value: &str| {
            // Each is a part of a request that was legal.
            if let Ok(value) = HeaderValue::from_str(value) {
                headers.insert(name, value);
            }
        };
        let target = head.uri.path_and_query().map_or("/", PathAndQuery::as_str);
        let host = head.headers.get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
        for (name, value) in [
            ("x-original-method", Method::GET.as_str()),
            ("x-forwarded-method", Method::GET.as_str()),
            ("x-original-uri", target),
            ("x-forwarded-uri", target),
            ("x-forwarded-host", host),
            ("x-forwarded-proto", visitor.scheme),
            ("x-forwarded-for", &visitor.address.to_string()),
        ] {
            set(name, value);
        }
        Self(Arc::new(headers))
    }
}
