//! `[[gateway.route]]`: what holds for some paths and hosts.

use std::{collections::HashMap, ops::Range};

use super::{
    Messages, Upstream,
    read::{Fault, Item, Report, Section},
    upstream_parse, value,
};

/// Most routes: each handshake is held against them one by one.
const MOST_ROUTES: usize = 256;

/// `[[gateway.route]]`: what holds for some paths and hosts, in the place of what holds for the others.
#[derive(Clone, Debug, PartialEq)]
pub struct Route {
    /// The path: this one, and those below it unless `exact`.
    pub path: String,
    /// Whether it is for this very path alone.
    pub exact: bool,
    /// The host that clients name, in lower case, without a port; `None`: any.
    pub host: Option<String>,
    /// What stands behind it; `None`: what stands behind the gateway.
    pub upstream: Option<Upstream>,
    /// Whether clients must show who they are, where `[gateway.auth]` says how.
    pub auth: bool,
    /// Whether limits are not kept: connections per source and in all, rates, those of users, and those on messages but for
    /// their size.
    pub exempt: bool,
    /// Sessions of this route at a time; 0: any number.
    pub connections: u32,
    /// What one client may send.
    pub messages: Messages,
}

/// Reads every route of `gateway`. `base`: what one says that says nothing of messages.
pub(super) fn parse(
    report: &Report,
    gateway: &mut Section,
    base: &Messages,
    has_auth: bool,
    read_messages: impl Fn(Section, &mut Messages),
) -> Vec<Route> {
    let mut routes: Vec<Route> = Vec::new();
    let mut seen: HashMap<(String, bool, Option<String>), usize> = HashMap::new();
    for (span, mut section) in gateway.sections("route") {
        let mut route = Route {
            path: String::new(),
            exact: false,
            host: None,
            upstream: None,
            auth: true,
            exempt: false,
            connections: 0,
            messages: base.clone(),
        };
        if section.item("path").is_none() {
            section.complain(&span, "path", "every [[gateway.route]] needs one, such as \"/chat\"; \"/\" is for all");
        }
        section.read("path", &mut route.path, path);
        section.read("exact", &mut route.exact, value::boolean);
        section.read("host", &mut route.host, host);
        section.read("upstream", &mut route.upstream, |item| match item.get_ref().as_str() {
            Some("") => Ok(None),
            _ => upstream_parse::upstream(item).map(Some),
        });
        let auth_at = section.read("auth", &mut route.auth, value::boolean);
        section.read("exempt", &mut route.exempt, value::boolean);
        section.read("connections", &mut route.connections, |item| {
            value::integer(item, 0..=u32::MAX, "sessions of the route; 0: any number")
        });
        read_messages(section.section("messages"), &mut route.messages);
        if let (Some(at), true, false) = (auth_at, route.auth, has_auth) {
            section.complain(&at, "auth", "nothing says how clients show who they are: configure [gateway.auth]");
        }
        section.finish();
        tell_twice(report, &span, &route, &mut seen);
        if routes.len() == MOST_ROUTES {
            report.add(&span, format!("gateway.route: there may be {MOST_ROUTES} routes at most"));
        }
        routes.push(route);
    }
    routes
}

fn tell_twice(
    report: &Report,
    span: &Range<usize>,
    route: &Route,
    seen: &mut HashMap<(String, bool, Option<String>), usize>,
) {
    let key = (route.path.clone(), route.exact, route.host.clone());
    if let Some(line) = seen.insert(key, report.line(span.start)) {
        report.add(span, format!("gateway.route: line {line} has a route for {:?} already", route.path));
    }
}

fn path(item: &Item) -> Result<String, Fault> {
    let what = r#"a path such as "/chat", as clients see it: without a query, "..", "//" or a slash at the end"#;
    let path = value::text(item, what)?;
    let is_good = path == "/"
        || (path.starts_with('/')
            && path[1..].split('/').all(|part| !matches!(part, "" | "." | ".."))
            && path.bytes().all(|b| b.is_ascii_graphic() && !b"?#%\\\"<>^`{|}".contains(&b)));
    if is_good { Ok(path.to_owned()) } else { Err(value::expected(item, what)) }
}

fn host(item: &Item) -> Result<Option<String>, Fault> {
    let what = r#"a host such as "chat.example.com", without a port, or "" for any"#;
    match value::text(item, what)? {
        "" => Ok(None),
        host if host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.[]:".contains(&b))
            && (host.starts_with('[') || !host.contains(':')) =>
        {
            Ok(Some(host.to_ascii_lowercase()))
        }
        _ => Err(value::expected(item, what)),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::{ConfigError, parse::parse as parse_file};
    use super::*;

    fn routes(text: &str) -> Vec<Route> {
        parse_file(Path::new("f"), text).unwrap().config.gateway.routes
    }

    #[test]
    fn a_route_has_what_it_says_and_else_what_the_gateway_has() {
        let text = r#"
            [[gateway.route]]
            path = "/federation"
            exact = true
            host = "Chat.Example.com"
            upstream = "ws://app"
            auth = false
            exempt = true
            connections = 5
            messages = { rate = 7 }
            [[gateway.route]]
            path = "/"
            [gateway.messages]
            max_size = "1KiB"
        "#;
        let base = Messages { max_size: 1024, ..Messages::default() };
        let first_has = Messages { rate: 7, ..base.clone() };
        let first = Route {
            path: "/federation".into(),
            exact: true,
            host: Some("chat.example.com".into()),
            upstream: Some("ws://app".parse().unwrap()),
            auth: false,
            exempt: true,
            connections: 5,
            messages: first_has,
        };
        let second = Route {
            path: "/".into(),
            exact: false,
            host: None,
            upstream: None,
            auth: true,
            exempt: false,
            connections: 0,
            messages: base,
        };
        assert_eq!(routes(text), [first, second]);
    }

    #[test]
    fn what_no_request_could_take_is_refused_with_its_place() {
        for (text, place, complaint) in [
            ("", "1:1", "every [[gateway.route]] needs one"),
            ("path = \"chat\"", "2:8", "expected a path such as"),
            ("path = \"/chat/\"", "2:8", "expected a path such as"),
            ("path = \"/a/../b\"", "2:8", "expected a path such as"),
            ("path = \"/a%2fb\"", "2:8", "expected a path such as"),
            ("path = \"/a?b\"", "2:8", "expected a path such as"),
            ("path = \"/\"\nhost = \"a:8080\"", "3:8", "without a port"),
            ("path = \"/\"\nauth = true", "3:8", "configure [gateway.auth]"),
            ("path = \"/\"\n[[gateway.route]]\npath = \"/\"", "3:1", "line 1 has a route for \"/\" already"),
            ("path = \"/\"\nupsteam = \"echo\"", "3:1", "did you mean upstream?"),
            ("path = \"/\"\nupstream = \"http://a\"", "3:12", "is no upstream"),
        ] {
            let text = format!("[[gateway.route]]\n{text}");
            let Err(ConfigError::Invalid(problems)) = parse_file(Path::new("f"), &text) else {
                panic!("{text} was taken")
            };
            let problems: Vec<String> = problems.iter().map(ToString::to_string).collect();
            let expected = format!("f:{place}: ");
            assert!(problems.iter().any(|p| p.starts_with(&expected) && p.contains(complaint)), "{text}: {problems:?}");
        }
    }
}
