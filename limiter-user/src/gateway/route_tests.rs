use hyper::Request;
use proptest::prelude::*;

use super::*;
use crate::config::{Gateway, Messages};

fn route(path: &str, exact: bool, host: Option<&str>) -> config::Route {
    config::Route {
        path: path.into(),
        exact,
        host: host.map(str::to_owned),
        upstream: None,
        auth: true,
        exempt: false,
        connections: 0,
        messages: Messages::default(),
    }
}

fn head(uri: &str, host: &str) -> Parts {
    Request::get(uri).header("host", host).body(()).unwrap().into_parts().0
}

/// The path of the route that a request takes, with its host; "-" for none of them.
fn taken(routes: &Routes, uri: &str, host: &str) -> String {
    match routes.of(&head(uri, host)) {
        Ok(route) => route.matches.as_ref().map_or("-".into(), |found| {
            format!("{}{}{}", found.host.as_deref().unwrap_or_default(), found.path, if found.exact { "!" } else { "" })
        }),
        Err(_) => "refused".into(),
    }
}

#[test]
fn the_host_the_longest_path_and_the_exact_one_go_first() {
    let routes = vec![
        route("/", false, Some("a.example")),
        route("/chat", false, None),
        route("/chat/admin", false, None),
        route("/chat", true, None),
    ];
    let routes = Routes::new(&Gateway { routes, ..Gateway::default() }, None).unwrap();
    for (uri, host, expected) in [
        ("/chat", "x", "/chat!"),
        ("/chat?x=/chat/admin", "x", "/chat!"),
        ("/chat/", "x", "/chat"),
        ("/chat/1", "x", "/chat"),
        ("/chatter", "x", "-"),
        ("/chat/admin", "x", "/chat/admin"),
        ("/chat/%61dmin", "x", "/chat/admin"),
        ("/chat/administrator", "x", "/chat"),
        ("/", "x", "-"),
        ("/chat", "A.example:8080", "a.example/"),
        ("/x", "a.example.", "a.example/"),
        ("/x", "b.a.example", "-"),
    ] {
        assert_eq!(taken(&routes, uri, host), expected, "{uri} at {host}");
    }
    for odd in [
        "/chat/../x",
        "/chat/%2e%2E/x",
        "/chat/.",
        "//chat",
        "/chat//admin",
        "/chat%2fadmin",
        "/chat%5cadmin",
        "/chat/..;/x",
        "/chat/%",
        "/chat/%zz",
        "/chat%00",
        "/a%252f",
    ] {
        assert_eq!(taken(&routes, odd, "x"), "refused", "{odd}");
    }
    // Without routes there is nothing to get past.
    let none = Routes::new(&Gateway::default(), None).unwrap();
    assert_eq!(taken(&none, "/a//../b", "x"), "-");
}

#[test]
fn a_route_has_as_many_sessions_as_it_may() {
    let routes = vec![config::Route { connections: 2, ..route("/", false, None) }];
    let routes = Routes::new(&Gateway { routes, ..Gateway::default() }, None).unwrap();
    // Other settings for the same gateway go on counting.
    let again = vec![config::Route { connections: 2, auth: false, ..route("/", false, None) }];
    let again = Routes::new(&Gateway { routes: again, ..Gateway::default() }, Some(&routes)).unwrap();
    let after = again.of(&head("/", "x")).unwrap();
    let route = routes.of(&head("/", "x")).unwrap();
    let first = route.enter().unwrap();
    let _second = route.enter().unwrap();
    assert!(route.enter().is_none());
    assert!(after.enter().is_none());
    drop(first);
    assert!(after.enter().is_some() && route.enter().is_some());
}

proptest! {
    #[test]
    fn what_is_taken_for_a_path_has_nothing_that_leads_elsewhere(path in "/[a-z/.%0-9;\\\\]{0,30}") {
        if let Some(plain) = plain(&path) {
            prop_assert!(plain.starts_with('/') && !plain.contains("//") && !plain.contains('\\'));
            prop_assert!(!plain.split('/').any(|part| part == ".." || part == "."));
        }
    }
}
