use hyper::Request;
use proptest::prelude::*;

use super::*;

fn everywhere() -> Places {
    Places {
        authorization: true,
        cookie: Some("session".into()),
        query: Some("token".into()),
        subprotocol: Some("bearer".into()),
    }
}

fn head(uri: &str, headers: &[(&str, &str)]) -> Parts {
    let mut request = Request::get(uri);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(()).unwrap().into_parts().0
}

fn handshake(protocols: &str) -> Handshake {
    let protocols = (!protocols.is_empty()).then(|| HeaderValue::from_str(protocols).unwrap());
    Handshake { accept: String::new(), protocols, fallback_protocol: None }
}

fn shown(head: &Parts, protocols: &str, places: &Places) -> Result<Option<String>, Refusal> {
    find(head, &handshake(protocols), places).map(|found| found.map(|credential| credential.0))
}

#[test]
fn each_place_is_looked_at_only_if_it_is_allowed() {
    let full = head(
        "/chat?a=1&token=in%2Equery&b=2",
        &[("authorization", "bearer in.header"), ("cookie", "a=b; session=\"in.cookie\"")],
    );
    let protocols = "chat, bearer, in.offer, v2";
    let one = |places: Places| shown(&full, protocols, &places).unwrap();
    let none = Places::default;
    assert_eq!(one(none()), None);
    assert_eq!(one(Places { authorization: true, ..none() }).unwrap(), "in.header");
    assert_eq!(one(Places { cookie: Some("session".into()), ..none() }).unwrap(), "in.cookie");
    assert_eq!(one(Places { query: Some("token".into()), ..none() }).unwrap(), "in.query");
    assert_eq!(one(Places { subprotocol: Some("bearer".into()), ..none() }).unwrap(), "in.offer");
    assert_eq!(one(Places { cookie: Some("Session".into()), ..none() }), None, "names of cookies have case");
    assert_eq!(one(Places { subprotocol: Some("v2x".into()), ..none() }), None);
    assert_eq!(one(everywhere()).unwrap(), "in.header", "a cookie comes by itself and goes last");
}

#[test]
fn another_scheme_is_for_the_application() {
    let mut basic = head("/", &[("authorization", "Basic dTpw")]);
    assert_eq!(shown(&basic, "", &everywhere()).unwrap(), None);
    take_out(&mut basic, &mut handshake(""), &everywhere(), false);
    assert_eq!(basic.headers["authorization"], "Basic dTpw");
}

#[test]
fn two_in_one_place_are_refused() {
    let cases: [(Parts, &str); 5] = [
        (head("/", &[("authorization", "Bearer a"), ("authorization", "Bearer b")]), ""),
        (head("/?token=a&x&%74oken=b", &[]), ""),
        (head("/", &[("cookie", "session=a"), ("cookie", "b=c; session=b")]), ""),
        (head("/", &[]), "bearer, a, bearer, b"),
        (head("/", &[]), "chat, bearer"),
    ];
    for (head, protocols) in cases {
        assert!(matches!(shown(&head, protocols, &everywhere()), Err(Refusal::Bad(_))), "{head:?} {protocols}");
    }
}

#[test]
fn what_was_shown_is_not_passed_on_and_the_rest_is() {
    let mut full = head(
        "/chat?a=1&token=x&b=%26&%74oken=y",
        &[
            ("authorization", "Bearer t"),
            ("cookie", "a=b; session=c; d=e"),
            ("cookie", "session=f"),
            ("x-other", "kept"),
        ],
    );
    let mut shake = handshake("chat, bearer, t, v2");
    take_out(&mut full, &mut shake, &everywhere(), false);
    assert_eq!(full.uri, "/chat?a=1&b=%26");
    assert!(!full.headers.contains_key("authorization"));
    assert_eq!(full.headers.get_all("cookie").iter().collect::<Vec<_>>(), ["a=b; d=e"]);
    assert_eq!(full.headers["x-other"], "kept");
    assert_eq!(shake.protocols.unwrap(), "chat, v2");
    assert_eq!(shake.fallback_protocol.unwrap(), "bearer");

    let mut bare = head("/?token=x", &[("cookie", "session=f")]);
    let mut shake = handshake("bearer, t");
    take_out(&mut bare, &mut shake, &everywhere(), false);
    assert_eq!(bare.uri, "/");
    assert!(!bare.headers.contains_key("cookie") && shake.protocols.is_none());
}

#[test]
fn passed_on_all_stays_but_the_subprotocol() {
    let mut full = head("/?token=x", &[("authorization", "Bearer t"), ("cookie", "session=c")]);
    let mut shake = handshake("chat, bearer, t");
    take_out(&mut full, &mut shake, &everywhere(), true);
    assert_eq!(full.uri, "/?token=x");
    assert!(full.headers.contains_key("authorization") && full.headers.contains_key("cookie"));
    assert_eq!(shake.protocols.unwrap(), "chat");
}

proptest! {
    /// Whatever else is in the request, nothing of the kind is left of it.
    #[test]
    fn nothing_is_left_to_find(
        query in "[a-z0-9&=%;+]{0,30}",
        cookies in prop::collection::vec("[ -~]{0,30}", 0..3),
        session in prop::bool::ANY,
    ) {
        let places = everywhere();
        let cookies = cookies.iter().enumerate().map(|(i, c)| {
            ("cookie", if session && i == 0 { format!("{c};session=secret") } else { c.clone() })
        });
        let cookies: Vec<_> = cookies.collect();
        let headers: Vec<(&str, &str)> = cookies.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let mut head = head("/", &headers);
        if let Ok(uri) = format!("/x?{query}&token=secret&{query}").parse() {
            head.uri = uri;
        }
        let mut shake = handshake("bearer, secret");
        let _ = find(&head, &shake, &places);
        take_out(&mut head, &mut shake, &places, false);
        prop_assert!(find(&head, &shake, &places).is_ok_and(|found| found.is_none()));
        let left = format!("{} {:?}", head.uri, head.headers);
        prop_assert!(!left.contains("secret"));
    }
}
