use hyper::header::HeaderValue;
use proptest::prelude::*;

use super::*;

const PROXY: &str = "10.0.0.1";

fn trusted() -> Vec<IpNet> {
    ["10.0.0.0/8", "2001:db8:ffff::/48"].map(|network| network.parse().unwrap()).to_vec()
}

fn headers(lines: &[(&str, &str)]) -> HeaderMap {
    let mut map = HeaderMap::new();
    for (name, value) in lines {
        map.append(name.parse::<HeaderName>().unwrap(), HeaderValue::from_bytes(value.as_bytes()).unwrap());
    }
    map
}

/// Whom the lines of `name` lead to from a trusted proxy.
fn found(name: &str, lines: &[&str]) -> Result<String, Refusal> {
    let lines: Vec<_> = lines.iter().map(|line| (name, *line)).collect();
    identify(PROXY.parse().unwrap(), true, &headers(&lines), &trusted()).map(|identity| identity.ip.to_string())
}

#[test]
fn x_forwarded_for_is_walked_to_the_first_that_is_not_trusted() {
    let cases: &[(&[&str], &str)] = &[
        (&[], PROXY),
        (&["192.0.2.7"], "192.0.2.7"),
        (&["203.0.113.1, 192.0.2.7"], "192.0.2.7"),
        (&["203.0.113.1, 192.0.2.7, 10.9.9.9,10.1.1.1"], "192.0.2.7"),
        (&["203.0.113.1", "192.0.2.7", "10.1.1.1"], "192.0.2.7"),
        (&["192.0.2.7, 192.0.2.7, 10.1.1.1, 10.1.1.1"], "192.0.2.7"),
        (&["192.0.2.7, , 10.1.1.1, "], "192.0.2.7"),
        (&["", ""], PROXY),
        (&["192.0.2.7:51234"], "192.0.2.7"),
        (&["[2001:db8::7]:51234"], "2001:db8::7"),
        (&["[2001:db8::7]"], "2001:db8::7"),
        (&["2001:db8::7"], "2001:db8::7"),
        (&["192.0.2.7, 2001:db8:ffff::2"], "192.0.2.7"),
        (&["::ffff:192.0.2.7"], "192.0.2.7"),
        (&["192.0.2.7, ::ffff:10.1.1.1"], "192.0.2.7"),
        // All of them trusted: the one farthest away is the client.
        (&["10.3.3.3, 10.2.2.2"], "10.3.3.3"),
        // Nothing is believed beyond what can't be read: its reporter counts.
        (&["192.0.2.7, unknown"], PROXY),
        (&["192.0.2.7, _hidden, 10.2.2.2"], "10.2.2.2"),
        (&["192.0.2.7, garbage!, 10.2.2.2"], "10.2.2.2"),
        (&["192.0.2.7, unix:"], PROXY),
        (&["192.0.2.7, \u{e4}"], PROXY),
        (&["192.0.2.7:port"], PROXY),
        (&["192.0.2.7:123456"], PROXY),
        (&["[2001:db8::7"], PROXY),
        (&["[192.0.2.7]"], PROXY),
        (&["192.0.2.007"], PROXY),
        (&["fe80::1%eth0"], PROXY),
        // What a client made up is never looked at.
        (&["garbage!, 192.0.2.7"], "192.0.2.7"),
    ];
    for (lines, expected) in cases {
        assert_eq!(found("x-forwarded-for", lines).unwrap(), *expected, "{lines:?}");
    }
}

#[test]
fn forwarded_is_read_as_the_rfc_has_it() {
    let cases: &[(&[&str], &str)] = &[
        (&["for=192.0.2.7"], "192.0.2.7"),
        (&["For=192.0.2.7;Proto=https;by=203.0.113.43"], "192.0.2.7"),
        (&["for=203.0.113.1, for=192.0.2.7;by=10.1.1.1, for=10.1.1.1"], "192.0.2.7"),
        (&["for=203.0.113.1", "for=192.0.2.7", "for=10.1.1.1"], "192.0.2.7"),
        (&["for=\"[2001:db8:cafe::17]:4711\""], "2001:db8:cafe::17"),
        (&["for=\"[2001:db8:cafe::17]\""], "2001:db8:cafe::17"),
        (&["for=\"192.0.2.7:_port\""], "192.0.2.7"),
        (&["for=192.0.2.7:80"], "192.0.2.7"),
        (&["for=\"192\\.0.2.7\""], "192.0.2.7"),
        (&["by=\"a,b;for=203.0.113.1\";for=192.0.2.7"], "192.0.2.7"),
        (&[";;for=192.0.2.7;;, ,"], "192.0.2.7"),
        (&["for=192.0.2.7, for=unknown"], PROXY),
        (&["for=192.0.2.7, for=_SEVKISEK"], PROXY),
        (&["for=192.0.2.7, for=\"_gazonk\";proto=http, for=10.2.2.2"], "10.2.2.2"),
        (&["for=192.0.2.7, proto=https"], PROXY),
        (&[""], PROXY),
        // A line that the walk does not come to may be anything.
        (&["for=\"open", "for=192.0.2.7"], "192.0.2.7"),
    ];
    for (lines, expected) in cases {
        assert_eq!(found("forwarded", lines).unwrap(), *expected, "{lines:?}");
    }
}

#[test]
fn what_breaks_the_grammar_of_forwarded_is_refused() {
    // In the first, an open quote of the client's hides what the proxy appended.
    for line in
        ["for=\"203.0.113.1, for=192.0.2.7", "for=1;for=2", "for", "=x", "for=", "for=\"a\"b", "f r=1", "for=\"\\"]
    {
        assert!(matches!(found("forwarded", &[line]), Err(Refusal::Bad(_))), "{line}");
    }
}

#[test]
fn headers_that_contradict_each_other_are_refused() {
    let both = |list, rfc| {
        let headers = headers(&[("x-forwarded-for", list), ("forwarded", rfc)]);
        identify(PROXY.parse().unwrap(), true, &headers, &trusted()).map(|identity| identity.ip.to_string())
    };
    assert_eq!(both("192.0.2.7", "for=192.0.2.7").unwrap(), "192.0.2.7");
    assert!(matches!(both("192.0.2.7", "for=203.0.113.1"), Err(Refusal::Bad(_))));
}

#[test]
fn from_others_nothing_is_believed() {
    let stranger = "192.0.2.200".parse().unwrap();
    let lines =
        headers(&[("x-forwarded-for", "203.0.113.1"), ("forwarded", "for=\"broken"), ("x-forwarded-proto", "https")]);
    assert_eq!(
        identify(stranger, false, &lines, &trusted()),
        Ok(Identity { ip: stranger, scheme: None, is_proxy: false })
    );
    let proxy = PROXY.parse().unwrap();
    assert_eq!(identify(proxy, false, &lines, &[]), Ok(Identity { ip: proxy, scheme: None, is_proxy: false }));
}

#[test]
fn the_scheme_comes_from_the_proxy() {
    let scheme =
        |lines: &[(&str, &str)]| identify(PROXY.parse().unwrap(), true, &headers(lines), &trusted()).unwrap().scheme;
    assert_eq!(scheme(&[("x-forwarded-proto", "https")]), Some(Scheme::Https));
    assert_eq!(scheme(&[("x-forwarded-proto", "WS")]), Some(Scheme::Http));
    assert_eq!(scheme(&[("x-forwarded-proto", "gopher")]), None);
    assert_eq!(scheme(&[("x-forwarded-proto", "https"), ("x-forwarded-proto", "http")]), None);
    assert_eq!(scheme(&[("forwarded", "for=192.0.2.7;proto=https, for=10.1.1.1;proto=http")]), Some(Scheme::Https));
}

/// Text as a client might make it up to lead the walk astray.
fn claim() -> impl Strategy<Value = String> {
    "[ -~\u{80}-\u{ff}]{0,60}"
}

fn ip() -> impl Strategy<Value = IpAddr> {
    prop_oneof![any::<Ipv4Addr>().prop_map(IpAddr::V4), any::<Ipv6Addr>().prop_map(IpAddr::V6)]
        .prop_map(|ip| ip.to_canonical())
}

/// A node as a proxy may write it.
fn written(ip: IpAddr, style: u8) -> String {
    match (ip, style % 3) {
        (_, 0) => ip.to_string(),
        (IpAddr::V4(ip), _) => format!("{ip}:4711"),
        (IpAddr::V6(ip), 1) => format!("[{ip}]"),
        (IpAddr::V6(ip), _) => format!("[{ip}]:4711"),
    }
}

proptest! {
    /// Whatever a client claims, and however the proxies between write down what they see, the walk ends at the client.
    #[test]
    fn x_forwarded_for_leads_to_the_client(
        claim in claim(),
        client in ip(),
        hops in proptest::collection::vec(any::<[u8; 3]>(), 0..5),
        style in any::<u8>(),
        own_line in any::<bool>(),
    ) {
        prop_assume!(!is_trusted(client, &trusted()));
        let mut lines = vec![claim];
        let mut seen = vec![client];
        seen.extend(hops.iter().map(|[a, b, c]| IpAddr::from([10, *a, *b, *c])));
        for ip in seen {
            let node = written(ip, style);
            match lines.last_mut() {
                Some(line) if !own_line => { line.push_str(", "); line.push_str(&node); }
                _ => lines.push(node),
            }
        }
        let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
        prop_assert_eq!(found("x-forwarded-for", &lines).unwrap(), client.to_string());
    }

    /// The same; here a claim can make a line unreadable, which is refused and never believed.
    #[test]
    fn forwarded_leads_to_the_client_or_nowhere(
        claim in claim(),
        client in ip(),
        hops in proptest::collection::vec(any::<[u8; 3]>(), 0..5),
        style in any::<u8>(),
        own_line in any::<bool>(),
    ) {
        prop_assume!(!is_trusted(client, &trusted()));
        let mut lines = vec![claim];
        let mut seen = vec![client];
        seen.extend(hops.iter().map(|[a, b, c]| IpAddr::from([10, *a, *b, *c])));
        for ip in seen {
            let node = format!("for=\"{}\";proto=http", written(ip, style));
            match lines.last_mut() {
                Some(line) if !own_line => { line.push_str(", "); line.push_str(&node); }
                _ => lines.push(node),
            }
        }
        let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
        match found("forwarded", &lines) {
            Ok(ip) => prop_assert_eq!(ip, client.to_string()),
            Err(_) => prop_assert!(!own_line),
        }
    }

    #[test]
    fn nothing_makes_it_panic(list in "[\\t -~\u{80}-\u{ff}]{0,200}", rfc in "[\\t forby=:;,\"\\\\\\[\\]0-9a-f.]{0,200}") {
        _ = found("x-forwarded-for", &[&list]);
        _ = found("forwarded", &[&list]);
        _ = found("forwarded", &[&rfc]);
    }
}
