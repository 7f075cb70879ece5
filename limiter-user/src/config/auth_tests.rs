use std::path::Path;

use super::super::{ConfigError, OnExcess, parse::parse};
use super::*;

fn auth(text: &str) -> Option<Auth> {
    parse(Path::new("f"), text).unwrap().config.gateway.auth
}

#[test]
fn every_key_is_read() {
    let text = r#"
        [gateway]
        allowed_origins = ["https://example.com"]
        [gateway.auth]
        authorization = true
        cookie = "session"
        query = "access_token"
        subprotocol = "bearer"
        pass_on = true
        reauth_interval = "1m"
        api_keys = "/k.toml"
        [gateway.auth.users]
        connections = 3
        on_excess = "refuse"
        attempts_per_minute = 0
        [gateway.auth.jwt]
        public_keys = ["/a.pem"]
        secrets = ["/b"]
        jwks = "/c.json"
        issuers = ["https://id.example.com"]
        audiences = ["chat"]
        leeway = "0s"
        user_claim = "email"
    "#;
    let expected = Auth {
        places: Places {
            authorization: true,
            cookie: Some("session".into()),
            query: Some("access_token".into()),
            subprotocol: Some("bearer".into()),
        },
        pass_on: true,
        reauth_interval: Duration::from_mins(1),
        users: UserLimits { connections: 3, on_excess: OnExcess::Refuse, attempts_per_minute: 0 },
        api_keys: Some("/k.toml".into()),
        jwt: Some(Jwt {
            public_keys: vec!["/a.pem".into()],
            secrets: vec!["/b".into()],
            jwks: Some("/c.json".into()),
            issuers: vec!["https://id.example.com".into()],
            audiences: vec!["chat".into()],
            leeway: Duration::ZERO,
            user_claim: "email".into(),
        }),
        forward: None,
    };
    assert_eq!(auth(text), Some(expected));
}

#[test]
fn without_keys_anybody_may_connect() {
    assert_eq!(auth("[gateway.auth]\n[gateway.auth.jwt]\nleeway = \"1s\""), None);
}

#[test]
fn what_would_not_protect_is_refused_with_its_place() {
    for (text, place, complaint) in [
        ("[gateway.auth.jwt]\nsecrets = [\"/s\"]", "1:10", "gateway.auth.authorization: it says where no credential"),
        ("[gateway.auth]\nquery = \"token\"", "1:1", "gateway.auth.jwt: there is nothing to check a credential with"),
        (
            "[gateway.auth]\ncookie = \"session\"\n[gateway.auth.jwt]\njwks = \"/j\"",
            "2:10",
            "name those that may connect in gateway.allowed_origins",
        ),
        ("[gateway.auth]\ncookie = \"a b\"", "2:10", "expected the name of a cookie"),
        (
            "[gateway.auth]\nquery = \"token\"\n[gateway.auth.forward]\nurl = \"http://auth/\"",
            "3:1",
            "the service is asked about every client",
        ),
        ("[gateway.auth.forward]\nurl = \"https://auth/\"", "2:7", "it does not begin with http://"),
        ("[gateway.auth.forward]\nuser_header = \"\"", "2:15", "expected the name of a header"),
        ("[gateway.auth.users]\nattempts_per_minute = 1001", "2:23", "from 0 to 1000"),
        ("[gateway.auth.users]\non_excess = \"close\"", "2:13", "expected one of replace, refuse"),
        ("[gateway.auth]\nreauth_interval = \"10ms\"", "2:19", "or 1s at least"),
        ("[gateway.auth.jwt]\naudiences = [\"chat\"]", "1:1", "tokens can't be checked without keys"),
        ("[gateway.auth.jwt]\nleeway = \"1h\"", "2:10", "to 10m"),
        ("[gateway.auth.jwt]\npublic_keys = [\"key.pem\"]", "2:16", "expected an absolute path"),
        ("[gateway.auth.jwt]\nkeys = [\"/key.pem\"]", "2:1", "unknown key gateway.auth.jwt.keys"),
    ] {
        let Err(ConfigError::Invalid(problems)) = parse(Path::new("f"), text) else { panic!("{text} was taken") };
        let problems: Vec<String> = problems.iter().map(ToString::to_string).collect();
        let expected = format!("f:{place}: ");
        assert!(problems.iter().any(|p| p.starts_with(&expected) && p.contains(complaint)), "{text}: {problems:?}");
    }
}

#[test]
fn a_service_to_ask_is_read_and_goes_alone() {
    let text = "[gateway.auth.forward]\nurl = \"http://[::1]:9001/auth?x\"\ntimeout = \"1s\"\nuser_header = \"X-Name\"";
    let url = HttpUrl { host: "::1".into(), port: 9001, authority: "[::1]:9001".into(), path: "/auth?x".into() };
    let forward = Forward { url, timeout: Duration::from_secs(1), user_header: "X-Name".into() };
    assert_eq!(auth(text), Some(Auth { forward: Some(forward), ..Auth::default() }));
    assert_eq!("http://auth".parse::<HttpUrl>().map(|url| (url.port, url.path)), Ok((80, "/".into())));
    for bad in [
        "",
        "auth:9001",
        "https://auth",
        "http://",
        "http://u:secret@auth/",
        "http://auth:0",
        "http://auth:x",
        "http://auth:",
    ] {
        assert!(bad.parse::<HttpUrl>().is_err(), "{bad}");
    }
}

#[test]
fn files_that_are_no_good_are_told_with_the_place_that_names_them() {
    let text = "[gateway.auth]\nauthorization = true\n[gateway.auth.jwt]\nsecrets = [\"/nowhere/secret\"]";
    let file = parse(Path::new("f"), text).unwrap();
    let problems = check_files(file.config.gateway.auth.as_ref().unwrap(), &file.auth);
    assert_eq!(problems.len(), 1);
    assert!(problems[0].1.starts_with("gateway.auth.jwt: cannot read /nowhere/secret: No such file"), "{problems:?}");
    assert_eq!(problems[0].0.start, text.find("[gateway.auth.jwt]").unwrap());
}
