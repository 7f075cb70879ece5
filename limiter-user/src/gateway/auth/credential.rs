//! Where a client shows who it is. None of it is ever logged.

use hyper::{
    HeaderMap, Uri,
    header::{AUTHORIZATION, COOKIE, HeaderValue},
    http::{request::Parts, uri::PathAndQuery},
};

use super::super::{answer::Refusal, handshake::Handshake};
use crate::config::Places;

/// What a client shows. Has no `Debug`, so that it does not get into a log by mistake.
pub(super) struct Credential(String);

impl Credential {
    pub(super) fn text(&self) -> &str {
        &self.0
    }
}

/// What the client shows in one of `places`. Of several, what a program must have put there goes before a cookie,
/// which a browser sends by itself.
///
/// An error if a place has two: another server might take the other one.
pub(super) fn find(head: &Parts, handshake: &Handshake, places: &Places) -> Result<Option<Credential>, Refusal> {
    if places.authorization
        && let Some(token) = bearer(&head.headers)?
    {
        return Ok(Some(token));
    }
    if let Some(name) = &places.subprotocol
        && let Some(token) = offered(handshake.protocols.as_ref(), name)?
    {
        return Ok(Some(token));
    }
    if let Some(name) = &places.query
        && let Some(token) = parameter(&head.uri, name)?
    {
        return Ok(Some(token));
    }
    places.cookie.as_ref().map_or(Ok(None), |name| cookie(&head.headers, name))
}

/// Takes credentials out of the request that the application will see, unless they are to be `passed_on`. The subprotocol
/// that announces one is always for us alone; it is answered if the application chooses none, since a browser gives up
/// on a server that takes none of its offers.
pub(super) fn take_out(head: &mut Parts, handshake: &mut Handshake, places: &Places, passed_on: bool) {
    if let Some(name) = &places.subprotocol {
        take_offered(handshake, name);
    }
    if passed_on {
        return;
    }
    if places.authorization && is_bearer(&head.headers) {
        head.headers.remove(AUTHORIZATION);
    }
    if let Some(name) = &places.query {
        take_parameter(&mut head.uri, name);
    }
    if let Some(name) = &places.cookie {
        take_cookie(&mut head.headers, name);
    }
}

/// The one of several, or none.
fn only(mut found: impl Iterator<Item = String>, otherwise: &'static str) -> Result<Option<Credential>, Refusal> {
    match (found.next(), found.next()) {
        (one, None) => Ok(one.map(Credential)),
        (_, Some(_)) => Err(Refusal::Bad(otherwise)),
    }
}

fn bearer(headers: &HeaderMap) -> Result<Option<Credential>, Refusal> {
    let mut lines = headers.get_all(AUTHORIZATION).iter();
    match (lines.next(), lines.next()) {
        (Some(_), Some(_)) => Err(Refusal::Bad("there is more than one Authorization header")),
        (Some(line), None) => Ok(bearer_token(line).map(|token| Credential(token.to_owned()))),
        (None, _) => Ok(None),
    }
}

/// `None`: another scheme, which is for the application.
fn bearer_token(line: &HeaderValue) -> Option<&str> {
    let (scheme, token) = line.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

fn is_bearer(headers: &HeaderMap) -> bool {
    headers.get(AUTHORIZATION).is_some_and(|line| bearer_token(line).is_some())
}

/// The names that the client offers, as `handshake` has put them together.
fn offers(protocols: Option<&HeaderValue>) -> impl Iterator<Item = &str> {
    protocols.and_then(|list| list.to_str().ok()).into_iter().flat_map(|list| list.split(", "))
}

fn offered(protocols: Option<&HeaderValue>, name: &str) -> Result<Option<Credential>, Refusal> {
    let mut offers = offers(protocols);
    if !offers.any(|offer| offer == name) {
        return Ok(None);
    }
    let Some(token) = offers.next() else {
        return Err(Refusal::Bad("the subprotocol that announces a token is followed by none"));
    };
    if offers.any(|offer| offer == name) {
        return Err(Refusal::Bad("there is more than one token among the subprotocols"));
    }
    Ok(Some(Credential(token.to_owned())))
}

fn take_offered(handshake: &mut Handshake, name: &str) {
    let mut kept = Vec::new();
    let mut announced = false;
    let list = handshake.protocols.take();
    let mut offers = offers(list.as_ref());
    while let Some(offer) = offers.next() {
        if offer == name {
            announced = true;
            _ = offers.next();
        } else {
            kept.push(offer);
        }
    }
    if !announced {
        drop(offers);
        handshake.protocols = list;
        return;
    }
    let kept = (!kept.is_empty()).then(|| kept.join(", "));
    // Parts of a value that was legal, and a name that is.
    handshake.protocols = kept.and_then(|list| HeaderValue::from_str(&list).ok());
    handshake.fallback_protocol = HeaderValue::from_str(name).ok();
}

fn parameter(uri: &Uri, name: &str) -> Result<Option<Credential>, Refusal> {
    let pairs = form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes());
    let values = pairs.filter(|(found, _)| found == name).map(|(_, value)| value.into_owned());
    only(values, "there is more than one token in the URL")
}

fn take_parameter(uri: &mut Uri, name: &str) {
    let Some(query) = uri.query() else { return };
    let is_ours = |part: &&str| form_urlencoded::parse(part.as_bytes()).any(|(found, _)| found == name);
    if !query.split('&').any(|part| is_ours(&part)) {
        return;
    }
    let kept: Vec<&str> = query.split('&').filter(|part| !is_ours(part)).collect();
    let path = uri.path();
    let path = if kept.is_empty() { path.to_owned() } else { format!("{path}?{}", kept.join("&")) };
    // A part of what was legal. Were it not, the application would get the root rather than the token.
    let path = PathAndQuery::try_from(path).unwrap_or_else(|_| PathAndQuery::from_static("/"));
    let mut parts = std::mem::take(uri).into_parts();
    parts.path_and_query = Some(path.clone());
    *uri = Uri::from_parts(parts).unwrap_or_else(|_| Uri::from(path));
}

/// The pairs of every Cookie header (RFC 6265, 4.2.1); a line that is no text has none.
fn pairs(headers: &HeaderMap) -> impl Iterator<Item = (&str, &str)> {
    let lines = headers.get_all(COOKIE).iter().filter_map(|line| line.to_str().ok());
    lines.flat_map(|line| line.split(';')).filter_map(|pair| pair.trim().split_once('='))
}

fn cookie(headers: &HeaderMap, name: &str) -> Result<Option<Credential>, Refusal> {
    let values = pairs(headers).filter(|(found, _)| found.trim() == name).map(|(_, value)| unquoted(value).to_owned());
    // A page of a neighbouring host name can set a second one.
    only(values, "the cookie with the token is there more than once")
}

fn unquoted(value: &str) -> &str {
    let value = value.trim();
    value.strip_prefix('"').and_then(|value| value.strip_suffix('"')).unwrap_or(value)
}

fn take_cookie(headers: &mut HeaderMap, name: &str) {
    let is_ours = |pair: &str| pair.split_once('=').is_some_and(|(found, _)| found.trim() == name);
    let lines: Vec<HeaderValue> = headers.get_all(COOKIE).iter().cloned().collect();
    let has_ours = |line: &HeaderValue| line.to_str().is_ok_and(|line| line.split(';').any(is_ours));
    if !lines.iter().any(has_ours) {
        return;
    }
    headers.remove(COOKIE);
    for line in lines {
        let Ok(text) = line.to_str() else {
            headers.append(COOKIE, line);
            continue;
        };
        let kept = text.split(';').map(str::trim).filter(|pair| !is_ours(pair)).collect::<Vec<_>>().join("; ");
        if let (false, Ok(line)) = (kept.is_empty(), HeaderValue::from_str(&kept)) {
            headers.append(COOKIE, line);
        }
    }
}

#[cfg(test)]
#[path = "credential_tests.rs"]
mod tests;
