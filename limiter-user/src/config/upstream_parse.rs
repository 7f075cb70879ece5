//! `gateway.upstream`, `[gateway.upstream_tls]` and `[gateway.health]`, from their text.

use std::{ops::Range, time::Duration};

use rustls::pki_types::ServerName;

use super::{
    CertificateFiles, Health, InvalidUpstream, Target, Upstream, UpstreamTls,
    read::{Fault, Item, Section},
    value,
};

/// More than anybody has, and few enough to look at each for every client.
const MOST_SERVERS: usize = 64;

/// One upstream, or an array of servers.
pub(super) fn upstream(item: &Item) -> Result<Upstream, Fault> {
    let invalid = |item: &Item, why: InvalidUpstream| Fault::new(item, why.to_string());
    if item.get_ref().as_array().is_none() {
        let what = r#""echo", "broadcast", a URL such as "ws://127.0.0.1:9000", or an array of URLs"#;
        return value::text(item, what)?.parse().map_err(|why| invalid(item, why));
    }
    let target = |item: &Item| match value::text(item, r#"a URL such as "ws://127.0.0.1:9000""#)? {
        built_in @ ("echo" | "broadcast") => {
            Err(Fault::new(item, format!("{built_in:?} is built in, and can't be one of several")))
        }
        url => url.parse::<Target>().map_err(|why| invalid(item, why)),
    };
    let targets = value::list(item, target, "URLs")?;
    match targets.len() {
        0 => Err(Fault::new(item, "expected at least one URL")),
        1..=MOST_SERVERS => Ok(Upstream::Relay(targets)),
        _ => Err(Fault::new(item, format!("there may be {MOST_SERVERS} servers at most"))),
    }
}

/// Reads `[gateway.upstream_tls]`, and gives its place.
pub(super) fn tls(gateway: &mut Section, tls: &mut UpstreamTls) -> Range<usize> {
    let span = gateway.item("upstream_tls").map(Item::span).unwrap_or_default();
    let mut section = gateway.section("upstream_tls");
    section.read("ca", &mut tls.ca, value::optional_path);
    section.read("server_name", &mut tls.server_name, server_name);
    let (mut certificate, mut key) = (None, None);
    section.read("certificate", &mut certificate, value::optional_path);
    section.read("key", &mut key, value::optional_path);
    match (certificate, key) {
        (Some(certificate), Some(key)) => tls.certificate = Some(CertificateFiles { certificate, key }),
        (Some(_), None) if section.item("key").is_none_or(is_empty) => {
            section.complain(&span, "key", "a certificate is of no use without its key");
        }
        (None, Some(_)) if section.item("certificate").is_none_or(is_empty) => {
            section.complain(&span, "certificate", "a key is of no use without its certificate");
        }
        _ => {}
    }
    section.finish();
    span
}

fn is_empty(item: &Item) -> bool {
    item.get_ref().as_str() == Some("")
}

fn server_name(item: &Item) -> Result<Option<ServerName<'static>>, Fault> {
    let what = r#"the name or address that a certificate is for, such as "app.internal", or "" for that in the URL"#;
    match value::text(item, what)? {
        "" => Ok(None),
        name => ServerName::try_from(name.to_owned()).map(Some).map_err(|_| value::expected(item, what)),
    }
}

/// Reads `[gateway.health]`.
pub(super) fn health(mut section: Section, health: &mut Health) {
    section.read("path", &mut health.path, |item| {
        let what = r#"a path such as "/healthz", or "" to connect only"#;
        match value::text(item, what)? {
            "" => Ok(None),
            path if path.starts_with('/') => path.parse().map(Some).map_err(|_| value::expected(item, what)),
            _ => Err(value::expected(item, what)),
        }
    });
    section.read("interval", &mut health.interval, |item| value::duration(item, Duration::ZERO, value::LONGEST));
    section
        .read("timeout", &mut health.timeout, |item| value::duration(item, Duration::from_millis(1), value::LONGEST));
    section.read("rise", &mut health.rise, |item| value::integer(item, 1..=1000, "good checks in a row"));
    section.read("fall", &mut health.fall, |item| value::integer(item, 1..=1000, "bad checks in a row"));
    section.finish();
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::{ConfigError, Gateway, parse::parse as parse_file};
    use super::*;

    fn gateway(text: &str) -> Gateway {
        parse_file(Path::new("f"), &format!("[gateway]\n{text}")).unwrap().config.gateway
    }

    #[test]
    fn one_or_several_servers_are_taken() {
        let target = |url: &str| url.parse::<Target>().unwrap();
        assert_eq!(gateway("upstream = \"wss://a\"").upstream.targets(), [target("wss://a")]);
        let several = gateway("upstream = [\"ws://a\", \"unix:/run/b.sock\"]").upstream;
        assert_eq!(several.targets(), [target("ws://a"), target("unix:/run/b.sock")]);
    }

    #[test]
    fn tls_and_health_are_read() {
        let text = "[gateway.upstream_tls]\nca = \"/ca.pem\"\nserver_name = \"app\"\ncertificate = \"/c.pem\"\nkey = \
                    \"/k.pem\"\n[gateway.health]\npath = \"/up\"\ninterval = \"5s\"\nrise = 1\nfall = 4";
        let gateway = gateway(text);
        let tls = UpstreamTls {
            ca: Some("/ca.pem".into()),
            server_name: Some("app".try_into().unwrap()),
            certificate: Some(CertificateFiles { certificate: "/c.pem".into(), key: "/k.pem".into() }),
        };
        assert_eq!(gateway.upstream_tls, tls);
        let interval = Duration::from_secs(5);
        let health = Health { path: Some("/up".parse().unwrap()), interval, rise: 1, fall: 4, ..Health::default() };
        assert_eq!(gateway.health, health);
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_its_place() {
        for (text, place, complaint) in [
            ("upstream = []", "2:12", "at least one URL"),
            ("upstream = [\"ws://a\", \"echo\"]", "2:23", "can't be one of several"),
            ("upstream = [\"ws://a\", \"ws://a\"]", "2:23", "given twice"),
            ("upstream = [\"http://a\"]", "2:13", "is no upstream"),
            ("upstream = 1", "2:12", "or an array of URLs"),
            ("[gateway.upstream_tls]\ncertificate = \"/c.pem\"", "2:1", "without its key"),
            ("[gateway.upstream_tls]\nkey = \"/c.pem\"", "2:1", "without its certificate"),
            ("[gateway.upstream_tls]\nserver_name = \"a b\"", "3:15", "such as \"app.internal\""),
            ("[gateway.health]\npath = \"up\"", "3:8", "a path such as"),
            ("[gateway.health]\nfall = 0", "3:8", "bad checks in a row"),
        ] {
            let text = format!("[gateway]\n{text}");
            let Err(ConfigError::Invalid(problems)) = parse_file(Path::new("f"), &text) else {
                panic!("{text} was taken")
            };
            let problems: Vec<String> = problems.iter().map(ToString::to_string).collect();
            let expected = format!("f:{place}: ");
            assert!(problems.iter().any(|p| p.starts_with(&expected) && p.contains(complaint)), "{text}: {problems:?}");
        }
    }
}
