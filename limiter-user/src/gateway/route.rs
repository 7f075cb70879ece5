//! Which of the configured routes a request takes.
//!
//! A route may ask less of clients than others do, so a request must not be able to look like one for it and be served as
//! another: what an application could read in two ways is refused.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use hyper::{header::HOST, http::request::Parts};

use super::{
    answer::Refusal,
    application::Application,
    json::{SchemaFile, Schemas},
    listen::BindError,
    upstream::Reach,
};
use crate::config::{self, SchemaError};

/// Every route, those that are for less first.
pub(super) struct Routes {
    listed: Vec<Arc<Route>>,
    /// What requests take that none of them is for.
    default: Arc<Route>,
    reach: Reach,
    /// The schemas of all of them.
    schemas: Schemas,
}

/// What holds for some requests.
pub(super) struct Route {
    /// `None`: it is for every request.
    matches: Option<Pattern>,
    pub(super) application: Application,
    /// The gateway's settings, with what is the route's own.
    pub(super) config: config::Gateway,
    schema: Option<Arc<SchemaFile>>,
    pub(super) auth: bool,
    pub(super) exempt: bool,
    /// How many sessions it may have; 0: any number.
    limit: u32,
    sessions: Arc<AtomicU32>,
}

#[derive(Debug, PartialEq, Eq)]
struct Pattern {
    path: String,
    exact: bool,
    host: Option<String>,
}

/// A session on a route; dropping it makes room.
#[must_use]
pub(super) struct OnRoute(Arc<Route>);

impl Routes {
    /// `before`: those that held until now, whose sessions count on in the routes that are for the same.
    pub(super) fn new(gateway: &config::Gateway, before: Option<&Self>) -> Result<Self, BindError> {
        let mut ordered: Vec<&config::Route> = gateway.routes.iter().collect();
        ordered.sort_by_key(|route| (route.host.is_none(), std::cmp::Reverse(route.path.len()), !route.exact));
        let servers = before.map(|before| Arc::clone(before.reach.servers())).unwrap_or_default();
        let reach = Reach::new(gateway, servers).map_err(BindError::UpstreamTls)?;
        let mut schemas = Schemas::default();
        let routes = ordered.into_iter();
        let routes = routes.map(|route| Route::new(gateway, route, &reach, before, &mut schemas).map(Arc::new));
        let listed = routes.collect::<Result<_, SchemaError>>()?;
        let default = Arc::new(Route::default_of(gateway, &reach, &mut schemas)?);
        Ok(Self { listed, default, reach, schemas })
    }

    /// How the upstreams of all of them are reached.
    pub(super) fn reach(&self) -> &Reach {
        &self.reach
    }

    /// Whether there is one on which limits are not kept.
    pub(super) fn has_exempt(&self) -> bool {
        self.listed.iter().any(|route| route.exempt)
    }

    /// What stands behind each.
    pub(super) fn applications(&self) -> impl Iterator<Item = &Application> {
        self.listed.iter().chain([&self.default]).map(|route| &route.application)
    }

    /// The route that a request takes.
    pub(super) fn of(&self, head: &Parts) -> Result<&Arc<Route>, Refusal> {
        if self.listed.is_empty() {
            return Ok(&self.default);
        }
        let path = plain(head.uri.path()).ok_or(Refusal::Bad("the path can be read in more than one way"))?;
        let host = head.headers.get(HOST).and_then(|host| host.to_str().ok()).map(host_name).unwrap_or_default();
        Ok(self.listed.iter().find(|route| route.is_for(&path, &host)).unwrap_or(&self.default))
    }
}

impl Routes {
    /// The settings of the route that a session is on.
    pub(super) fn settings_of(&self, place: &OnRoute) -> &config::Gateway {
        &self.at(place).config
    }

    /// The schema that its messages must fit.
    pub(super) fn schema_of(&self, place: &OnRoute) -> Option<&SchemaFile> {
        self.at(place).schema.as_deref()
    }

    /// Every schema that a route has.
    pub(super) fn schemas(&self) -> &Schemas {
        &self.schemas
    }

    fn at(&self, place: &OnRoute) -> &Route {
        self.listed.iter().find(|route| Arc::ptr_eq(route, &place.0)).unwrap_or(&self.default)
    }
}

impl Route {
    fn new(
        gateway: &config::Gateway,
        route: &config::Route,
        reach: &Reach,
        before: Option<&Routes>,
        schemas: &mut Schemas,
    ) -> Result<Self, SchemaError> {
        let matches = Some(Pattern { path: route.path.clone(), exact: route.exact, host: route.host.clone() });
        let same = before.and_then(|before| before.listed.iter().find(|old| old.matches == matches));
        let mut config = gateway.clone();
        config.messages = route.messages.clone();
        if route.exempt {
            config.messages.rate = 0;
            config.messages.bytes_per_second = 0;
            config.messages.rate_per_user = 0;
            config.messages.rate_per_source = 0;
            config.messages.bytes_per_second_per_user = 0;
            config.messages.bytes_per_second_per_source = 0;
        }
        Ok(Self {
            matches,
            application: Application::new(route.upstream.as_ref().unwrap_or(&gateway.upstream), reach),
            schema: schema(&config, schemas)?,
            config,
            auth: route.auth,
            exempt: route.exempt,
            limit: route.connections,
            sessions: same.map(|old| Arc::clone(&old.sessions)).unwrap_or_default(),
        })
    }

    fn default_of(gateway: &config::Gateway, reach: &Reach, schemas: &mut Schemas) -> Result<Self, SchemaError> {
        Ok(Self {
            matches: None,
            application: Application::new(&gateway.upstream, reach),
            schema: schema(gateway, schemas)?,
            config: gateway.clone(),
            auth: true,
            exempt: false,
            limit: 0,
            sessions: Arc::default(),
        })
    }

    /// The host that it is for, if it is not for any.
    pub(super) fn host(&self) -> Option<&str> {
        self.matches.as_ref()?.host.as_deref()
    }

    fn is_for(&self, path: &str, host: &str) -> bool {
        let Some(Pattern { path: own, exact, host: own_host }) = &self.matches else { return true };
        let below = |rest: &str| rest.is_empty() || (!exact && (rest.starts_with('/') || own == "/"));
        own_host.as_deref().is_none_or(|own| own == host) && path.strip_prefix(own.as_str()).is_some_and(below)
    }

    /// Takes a place on the route, if there is one.
    pub(super) fn enter(self: &Arc<Self>) -> Option<OnRoute> {
        let taken = self.sessions.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |sessions| {
            (self.limit == 0 || sessions < self.limit).then_some(sessions + 1)
        });
        taken.is_ok().then(|| OnRoute(Arc::clone(self)))
    }
}

fn schema(config: &config::Gateway, schemas: &mut Schemas) -> Result<Option<Arc<SchemaFile>>, SchemaError> {
    config.messages.schema.as_deref().map(|path| schemas.get(path)).transpose()
}

impl Drop for OnRoute {
    fn drop(&mut self) {
        self.0.sessions.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A path with what need not be encoded decoded. `None` if it can be read in more than one way: with encoded slashes, dots
/// that lead up, empty parts, backslashes, or codes that stand for nothing.
pub(super) fn plain(path: &str) -> Option<String> {
    let mut plain = Vec::with_capacity(path.len());
    let mut bytes = path.bytes();
    while let Some(byte) = bytes.next() {
        let byte = if byte == b'%' {
            let digits = [bytes.next()?, bytes.next()?];
            if !digits.iter().all(u8::is_ascii_hexdigit) {
                return None;
            }
            match u8::from_str_radix(str::from_utf8(&digits).ok()?, 16).ok()? {
                b'/' | b'\\' | b'%' => return None,
                byte => byte,
            }
        } else {
            byte
        };
        if byte == b'\\' || byte.is_ascii_control() {
            return None;
        }
        plain.push(byte);
    }
    let plain = String::from_utf8(plain).ok()?;
    let rest = plain.strip_prefix('/')?;
    let parts = rest.strip_suffix('/').unwrap_or(rest);
    // A parameter of a part ("..;x") is none of it for some servers.
    let name = |part: &str| part.split(';').next().unwrap_or_default().to_owned();
    let is_odd = |part: &str| matches!(name(part).as_str(), "" | "." | "..");
    (parts.is_empty() && rest.is_empty() || !parts.split('/').any(is_odd)).then_some(plain)
}

/// The name in a Host header, in lower case: without a port, or the dot of a full name.
fn host_name(host: &str) -> String {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase()
}

#[cfg(test)]
#[path = "route_tests.rs"]
mod tests;
