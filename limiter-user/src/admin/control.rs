//! `/v1/`: messages to the gateway's clients, and their end.

use std::{collections::BTreeMap, fmt, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use axum::{
    Json,
    body::Body,
    extract::Request,
    http::{HeaderMap, HeaderValue, Method, StatusCode, header},
    response::{IntoResponse, Response},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use futures_util::future::join_all;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::timeout;

use super::{door, door::Door, problem::Problem};
use crate::{
    config::{AdminTokenError, user_name},
    gateway::{Content, Listed, Push, Recipients, room_name},
};

/// Longest body of a request.
pub const LONGEST_BODY_BYTES: usize = 1 << 20;

/// How long a body may take.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// How many are listed where nobody says how many, and at most.
const PAGE: usize = 100;
const LONGEST_PAGE: usize = 1000;

/// The close code of a user that is disconnected, unless somebody says another.
pub const DISCONNECTED: u16 = 4403;

/// Longest reason that fits into a Close frame.
const LONGEST_REASON_BYTES: usize = 123;

/// What control leads to.
#[derive(Clone)]
pub struct Control {
    door: Arc<Door>,
    gateways: Vec<Push>,
}

impl Control {
    /// For whoever shows the secret in that file. It leads to nobody yet.
    ///
    /// # Errors
    /// [`AdminTokenError`] says why the file can't be used.
    pub fn new(token_file: &Path) -> Result<Self, AdminTokenError> {
        Ok(Self { door: Arc::new(Door::new(token_file)?), gateways: Vec::new() })
    }

    /// Has it reach the clients of that gateway, too.
    pub fn lead_to(&mut self, gateway: Push) {
        self.gateways.push(gateway);
    }

    /// Reads the file again whenever it changes, for ever.
    pub(super) async fn watch(self) {
        self.door.watch().await;
    }
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control").field("gateways", &self.gateways.len()).finish_non_exhaustive()
    }
}

/// What can be asked for.
#[derive(Clone, Copy, Debug)]
enum Call {
    Publish,
    Disconnect,
    Rooms,
    Users,
}

impl Call {
    fn of(path: &str) -> Option<(Self, Method)> {
        Some(match path {
            "/v1/publish" => (Self::Publish, Method::POST),
            "/v1/disconnect" => (Self::Disconnect, Method::POST),
            "/v1/rooms" => (Self::Rooms, Method::GET),
            "/v1/users" => (Self::Users, Method::GET),
            _ => return None,
        })
    }
}

/// The answer to any request below `/v1/`. `is_loopback`: whether the address is one.
pub(super) async fn answer(
    control: Option<&Control>,
    is_loopback: bool,
    peer: SocketAddr,
    request: Request,
) -> Response {
    match try_answer(control, is_loopback, peer, request).await {
        Ok(document) => Json(document).into_response(),
        Err(problem) => {
            // What comes behind is not worth reading.
            let closes = problem.status() != StatusCode::NOT_FOUND;
            let mut response = problem.into_response();
            if closes {
                response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            response
        }
    }
}

async fn try_answer(
    control: Option<&Control>,
    is_loopback: bool,
    peer: SocketAddr,
    request: Request,
) -> Result<Value, Problem> {
    let (head, body) = request.into_parts();
    door::refuse_pages(&head.headers, &head.uri, is_loopback)?;
    let Some(control) = control else {
        let detail = "nobody may control this limiter: write a secret into a file (`openssl rand -hex 32`), name the file as \
                      admin.token_file, and start limiter again";
        return Err(Problem::new(StatusCode::FORBIDDEN, detail));
    };
    control.door.check(&head.headers, peer.ip())?;
    let Some((call, method)) = Call::of(head.uri.path()) else {
        let detail = "there are POST /v1/publish, POST /v1/disconnect, GET /v1/rooms and GET /v1/users";
        return Err(Problem::new(StatusCode::NOT_FOUND, detail));
    };
    if head.method != method {
        let allow = if method == Method::POST { "POST" } else { "GET" };
        let problem = Problem::new(StatusCode::METHOD_NOT_ALLOWED, format!("this is for {allow}"));
        return Err(problem.with(header::ALLOW, HeaderValue::from_static(allow)));
    }
    match call {
        Call::Publish => publish(control, peer, &read(&head.headers, body).await?).await,
        Call::Disconnect => disconnect(control, peer, &read(&head.headers, body).await?).await,
        Call::Rooms => {
            let page = Page::parse(head.uri.query().unwrap_or_default())?;
            Ok(page.of(control, Push::rooms, "rooms", "room", "members"))
        }
        Call::Users => {
            let page = Page::parse(head.uri.query().unwrap_or_default())?;
            Ok(page.of(control, Push::users, "users", "user", "sessions"))
        }
    }
}

/// A body that is JSON, whole.
async fn read(headers: &HeaderMap, body: Body) -> Result<Bytes, Problem> {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    if !kind.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case("application/json") {
        let detail = "the body must be JSON, and say so: Content-Type: application/json";
        return Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, detail));
    }
    let too_long = || {
        let detail = format!("the body may have {LONGEST_BODY_BYTES} bytes at most");
        Problem::new(StatusCode::PAYLOAD_TOO_LARGE, detail)
    };
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    if announced.is_some_and(|length| length > LONGEST_BODY_BYTES) {
        return Err(too_long());
    }
    match timeout(BODY_TIMEOUT, Limited::new(body, LONGEST_BODY_BYTES).collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_long()),
        Ok(Err(_)) => Err(bad("the body ends too early")),
        Err(_) => Err(Problem::new(StatusCode::REQUEST_TIMEOUT, "the body did not come in time")),
    }
}

fn bad(detail: impl Into<String>) -> Problem {
    Problem::new(StatusCode::BAD_REQUEST, detail)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Publish {
    to: To,
    text: Option<String>,
    binary: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum To {
    All(bool),
    Room(String),
    User(String),
}

async fn publish(control: &Control, peer: SocketAddr, body: &[u8]) -> Result<Value, Problem> {
    let Publish { to, text, binary } = parse(body)?;
    let (to, name) = match to {
        To::All(true) => ("all", String::new()),
        To::All(false) => return Err(bad("to.all is true or not there")),
        To::Room(room) => ("room", room_name(&room).ok_or_else(|| bad("to.room: no room can have that name"))?),
        To::User(user) => ("user", known_name(&user)?),
    };
    let recipients = match to {
        "room" => Recipients::Room(&name),
        "user" => Recipients::User(&name),
        _ => Recipients::All,
    };
    let decoded;
    let (content, bytes) = match (&text, &binary) {
        (Some(text), None) => (Content::Text(text), text.len()),
        (None, Some(binary)) => {
            decoded = STANDARD.decode(binary).map_err(|_| bad("binary: it is not base64 (RFC 4648, with padding)"))?;
            (Content::Binary(&decoded), decoded.len())
        }
        _ => return Err(bad("the message is either text or binary")),
    };
    let receivers = join_all(control.gateways.iter().map(|gateway| gateway.publish(recipients, content))).await;
    let receivers: u32 = receivers.iter().sum();
    // Never what it says.
    tracing::info!(%peer, to, name, bytes, receivers, "published by the admin address");
    Ok(json!({ "receivers": receivers }))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Disconnect {
    user: String,
    code: Option<u16>,
    reason: Option<String>,
}

async fn disconnect(control: &Control, peer: SocketAddr, body: &[u8]) -> Result<Value, Problem> {
    let Disconnect { user, code, reason } = parse(body)?;
    let user = known_name(&user)?;
    let code = code.unwrap_or(DISCONNECTED);
    // Those that a server may send, and that mean something here.
    if !matches!(code, 1000 | 1001 | 1008 | 1011..=1013 | 3000..=4999) {
        return Err(bad("code: a server closes with 1000, 1001, 1008, 1011 to 1013, or 3000 to 4999"));
    }
    if reason.as_ref().is_some_and(|reason| reason.len() > LONGEST_REASON_BYTES) {
        return Err(bad(format!("reason: a Close frame has room for {LONGEST_REASON_BYTES} bytes")));
    }
    let gateways = control.gateways.iter();
    let sessions: u32 =
        join_all(gateways.map(|gateway| gateway.disconnect(&user, code, reason.as_deref()))).await.iter().sum();
    tracing::info!(%peer, user, code, sessions, "disconnected by the admin address");
    Ok(json!({ "sessions": sessions }))
}

fn known_name(user: &str) -> Result<String, Problem> {
    user_name(user).map(|name| name.to_string()).ok_or_else(|| bad("user: no user can have that name"))
}

fn parse<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, Problem> {
    serde_json::from_slice(body).map_err(|error| bad(format!("the body is not what it should be: {error}")))
}

/// A part of a list.
#[derive(Debug)]
struct Page {
    after: String,
    limit: usize,
}

impl Page {
    fn parse(query: &str) -> Result<Self, Problem> {
        let mut page = Self { after: String::new(), limit: PAGE };
        for (key, value) in form_urlencoded::parse(query.as_bytes()) {
            match &*key {
                "after" => page.after = value.into_owned(),
                "limit" => {
                    let limit = value.parse().ok().filter(|limit| (1..=LONGEST_PAGE).contains(limit));
                    page.limit = limit.ok_or_else(|| bad(format!("limit: expected 1 to {LONGEST_PAGE}")))?;
                }
                _ => return Err(bad("known parameters are after and limit")),
            }
        }
        Ok(page)
    }

    /// What all gateways have of it. One name in several is one.
    fn of(
        &self,
        control: &Control,
        list: impl Fn(&Push, &str, usize) -> Vec<Listed>,
        all: &str,
        name: &str,
        count: &str,
    ) -> Value {
        let mut merged: BTreeMap<Arc<str>, u32> = BTreeMap::new();
        for gateway in &control.gateways {
            // One more, to know whether there are more. What is among the first of all is among the first of each.
            for (name, count) in list(gateway, &self.after, self.limit + 1) {
                *merged.entry(name).or_default() += count;
            }
        }
        let page: Vec<Value> = merged
            .iter()
            .take(self.limit)
            .map(|(name_of, count_of)| json!({ name: &**name_of, count: count_of }))
            .collect();
        let next = merged.keys().nth(self.limit - 1).filter(|_| merged.len() > self.limit);
        json!({ all: page, "next": next.map(|name| &**name) })
    }
}

#[cfg(test)]
#[path = "control_tests.rs"]
mod tests;
