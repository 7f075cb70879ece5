use std::{path::PathBuf, time::SystemTime};

use proptest::prelude::*;

use super::*;
use crate::config::{
    Algorithm, AttachMode, CertificateFiles, ChallengeMode, EXAMPLE, Health, Kinds, LogFormat, Messages, Namespaces,
    OnDeny, OnFull, OnViolation, Overload, Overrides, Purpose, Sanitize, Tls, TlsHost, UpstreamTls,
};
use crate::policy::{Action, OwnLimits, Rule};

fn good(text: &str) -> Config {
    parse(Path::new("limiter.toml"), text).unwrap().config
}

/// The lines of the refusal.
fn refused(text: &str) -> Vec<String> {
    match parse(Path::new("limiter.toml"), text) {
        Err(ConfigError::Invalid(problems)) => problems.iter().map(ToString::to_string).collect(),
        other => panic!("{text:?} gave {other:?}"),
    }
}

#[test]
fn an_empty_file_is_the_defaults() {
    assert_eq!(good(""), Config::default());
}

#[test]
fn every_key_is_read() {
    let text = r#"
        [kernel]
        interfaces = ["eth0", "lo"]
        attach_mode = "generic"
        on_deny = "observe"
        on_full = "closed"
        pin_path = "/run/bpf/x"
        max_connections = 1_000
        max_rules = 2_000
        audit_interval = "0s"
        challenge = "auto"
        challenge_threshold = 2
        challenge_timestamps = true
        debug_log = true
        [limits]
        connections_per_source = 0
        connection_rate = 7
        connection_burst = 1000000
        connections_total = 4294967295
        connections_per_wide_source = 50
        connections_total_all = 60
        service_connection_rate = 70
        service_connection_burst = 80
        ipv4_prefix = 24
        ipv6_prefix = 128
        wide_ipv4_prefix = 16
        wide_ipv6_prefix = 32
        [[service]]
        name = "chat"
        port = [8080, 0x20fb]
        [[service]]
        name = "quiet"
        port = 9000
        socket_port = [9001, 9002]
        namespaces = "others"
        connections_per_source = 3
        connections_total = 4
        ipv4_prefix = 8
        ipv6_prefix = 48
        wide_ipv4_prefix = 0
        on_deny = "drop"
        [[rule]]
        cidr = "192.0.2.0/24"
        action = "deny"
        [[rule]]
        cidr = "2001:db8::7"
        action = "allow"
        [[rule]]
        cidr = "100.64.0.0/10"
        connections_per_source = 500
        connections_per_wide_source = 900
        connection_rate = 9
        expires = 2026-01-30T23:00:00.25+01:00
        [gateway]
        listen = ["[::]:8080", "unix:/run/ws.sock", "systemd", "fd:ws"]
        unix_mode = "600"
        reuse_port = true
        upstream = "ws://127.0.0.1:9000"
        trusted_proxies = ["10.0.0.0/8", "unix", "192.0.2.7", "2001:db8::/32"]
        proxy_protocol = true
        allowed_origins = ["https://example.com", "*.example.com", "null"]
        handshake_timeout = "1s"
        idle_timeout = "0s"
        ping_interval = "1m 30s"
        pong_timeout = "500ms"
        max_lifetime = "1h"
        drain_timeout = "0s"
        [gateway.messages]
        max_size = "1MiB"
        rate = 0
        window = "10s"
        max_fragments = 0
        max_frame_size = "2KiB"
        allow = "text"
        algorithm = "token-bucket"
        burst = 5
        bytes_per_second = "1MiB"
        rate_per_user = 11
        rate_per_source = 12
        bytes_per_second_per_user = "3KiB"
        bytes_per_second_per_source = "4KiB"
        schema = "/m.json"
        sanitize = "html"
        on_violation = "drop"
        deny_after = 3
        deny_for = "1h"
        [gateway.push]
        queue = "64KiB"
        [gateway.overload]
        memory = 1
        memory_pressure = 2
        cpu_pressure = 99
        descriptors = 0
        lag = "1s"
        [gateway.tls]
        certificate = "/c.pem"
        key = "/k.pem"
        hosts = [{ name = "A.example.com", certificate = "/a.pem", key = "/a.key" }]
        [admin]
        listen = ""
        token_file = "/t"
        [log]
        level = "info,limiter::gateway=debug"
        format = "json"
    "#;
    let limits = Limits {
        connections_per_source: 0,
        connections_per_wide_source: 50,
        connections_total: u32::MAX,
        connections_total_all: 60,
        connection_rate: 7,
        connection_burst: 1_000_000,
        service_connection_rate: 70,
        service_connection_burst: 80,
        ipv4_prefix: 24,
        ipv6_prefix: 128,
        wide_ipv4_prefix: 16,
        wide_ipv6_prefix: 32,
    };
    let expected = Config {
        kernel: Kernel {
            interfaces: vec!["eth0".into(), "lo".into()],
            attach_mode: AttachMode::Generic,
            on_deny: OnDeny::Observe,
            on_full: OnFull::Closed,
            pin_path: PathBuf::from("/run/bpf/x"),
            max_connections: 1000,
            max_rules: 2000,
            audit_interval: Duration::ZERO,
            challenge: ChallengeMode::Auto,
            challenge_threshold: 2,
            challenge_timestamps: true,
            debug_log: true,
        },
        limits,
        services: vec![
            Service { limits, on_deny: OnDeny::Observe, ..Service::new("chat", [8080, 8443]) },
            Service {
                limits: Limits {
                    connections_per_source: 3,
                    connections_total: 4,
                    ipv4_prefix: 8,
                    ipv6_prefix: 48,
                    wide_ipv4_prefix: 0,
                    ..limits
                },
                socket_ports: vec![9001, 9002],
                namespaces: Namespaces::Others,
                ..Service::new("quiet", [9000])
            },
        ],
        rules: vec![
            Rule::new("192.0.2.0/24".parse().unwrap(), Action::Deny),
            Rule::new("2001:db8::7/128".parse().unwrap(), Action::Allow),
            Rule {
                cidr: "100.64.0.0/10".parse().unwrap(),
                action: Action::Limit(OwnLimits {
                    connections_per_source: Some(500),
                    connections_per_wide_source: Some(900),
                    rate: Some((9, 1_000_000)),
                }),
                expires: Some(SystemTime::UNIX_EPOCH + Duration::from_millis(1_769_810_400_250)),
            },
        ],
        gateway: Gateway {
            listen: ["[::]:8080", "unix:/run/ws.sock", "systemd", "fd:ws"].map(|text| text.parse().unwrap()).into(),
            unix_mode: 0o600,
            reuse_port: true,
            trusts_unix: true,
            upstream: "ws://127.0.0.1:9000".parse().unwrap(),
            upstream_tls: UpstreamTls::default(),
            health: Health::default(),
            trusted_proxies: ["10.0.0.0/8", "192.0.2.7/32", "2001:db8::/32"]
                .map(|network| network.parse().unwrap())
                .into(),
            proxy_protocol: true,
            allowed_origins: ["https://example.com", "*.example.com", "null"]
                .map(|origin| origin.parse().unwrap())
                .into(),
            handshake_timeout: Duration::from_secs(1),
            idle_timeout: Duration::ZERO,
            ping_interval: Duration::from_secs(90),
            pong_timeout: Duration::from_millis(500),
            max_lifetime: Duration::from_hours(1),
            drain_timeout: Duration::ZERO,
            tls: Some(Tls {
                default: CertificateFiles { certificate: "/c.pem".into(), key: "/k.pem".into() },
                hosts: vec![TlsHost {
                    name: "a.example.com".into(),
                    files: CertificateFiles { certificate: "/a.pem".into(), key: "/a.key".into() },
                }],
            }),
            auth: None,
            routes: Vec::new(),
            messages: Messages {
                max_size: 1 << 20,
                rate: 0,
                max_fragments: 0,
                max_frame_size: 2048,
                allow: Kinds::Text,
                window: Duration::from_secs(10),
                algorithm: Algorithm::TokenBucket,
                burst: 5,
                bytes_per_second: 1 << 20,
                rate_per_user: 11,
                rate_per_source: 12,
                bytes_per_second_per_user: 3072,
                bytes_per_second_per_source: 4096,
                schema: Some("/m.json".into()),
                sanitize: Sanitize::Html,
                on_violation: OnViolation::Drop,
                deny_after: 3,
                deny_for: Duration::from_hours(1),
            },
            push: Push { queue: 1 << 16 },
            overload: Overload {
                memory: 1,
                memory_pressure: 2,
                cpu_pressure: 99,
                descriptors: 0,
                lag: Duration::from_secs(1),
            },
        },
        admin: Admin { listen: None, token_file: Some("/t".into()) },
        log: Log { level: "info,limiter::gateway=debug".into(), format: LogFormat::Json },
    };
    assert_eq!(good(text), expected);
}

#[test]
fn services_take_the_limits_wherever_they_stand() {
    let config =
        good("[[service]]\nname = \"a\"\nport = 1\n[limits]\nconnections_total = 7\n[kernel]\non_deny = \"observe\"");
    assert_eq!(config.services[0].limits.connections_total, 7);
    assert_eq!(config.services[0].on_deny, OnDeny::Observe);
}

#[test]
fn each_problem_is_told_with_its_place() {
    // The text and what must be in its only complaint, which begins with the place.
    let cases: &[(&str, &str, &str)] = &[
        ("x = 1", "1:1", "unknown key x; known here: kernel, limits, service, rule, gateway, admin, log"),
        ("[kernel]\ninterface = [\"lo\"]", "2:1", "unknown key kernel.interface; did you mean interfaces?"),
        ("[limit]\n", "1:2", "unknown key limit; did you mean limits?"),
        ("[kernel]\naudit_interval = \"50ms\"", "2:18", "100ms at least"),
        ("[gateway.pusher]\n", "1:10", "unknown key gateway.pusher; did you mean push?"),
        ("[gateway.push]\nqueue = \"1KiB\"", "2:9", "expected a size from 4.0 KiB"),
        (
            "[gateway.overload]\nmemory = 100",
            "2:10",
            "expected a whole number from 0 to 99 (percent; 0: not looked at)",
        ),
        ("[gateway.overload]\nlag = \"1ms\"", "2:7", "10ms at least"),
        ("[gateway.overload]\nmemroy = 1", "2:1", "did you mean memory?"),
        ("[gateway.tls]\ncert = \"/c\"", "2:1", "unknown key gateway.tls.cert; known here: certificate, key, hosts"),
        ("[gateway.tls]\ncertificate = \"c\"\nkey = \"/k\"", "2:15", "expected an absolute path, or \"\" for none"),
        ("[gateway.tls]\ncertificate = \"/c\"", "1:1", "gateway.tls.key: a certificate is of no use without its key"),
        ("[gateway.tls]\nkey = \"/k\"", "1:1", "gateway.tls.certificate: a key is of no use"),
        (
            "[[gateway.tls.hosts]]\nname = \"a.b\"\ncertificate = \"/c\"\nkey = \"/k\"",
            "1:11",
            "gateway.tls.certificate: needed, too",
        ),
        (
            "[gateway.tls]\ncertificate = \"/c\"\nkey = \"/k\"\n[[gateway.tls.hosts]]\nname = \"a.b\"\nkey = \"/k\"",
            "4:1",
            "certificate: every one of gateway.tls.hosts needs it",
        ),
        (
            "[gateway.tls]\ncertificate = \"/c\"\nkey = \"/k\"\nhosts = [{ name = \"10.0.0.1\", certificate = \"/c\", key = \"/k\" }]",
            "4:19",
            "expected the name of a host",
        ),
        ("[[rule]]\naction = \"deny\"", "1:1", "every [[rule]] needs a cidr"),
        ("[[rule]]\ncidr = \"192.0.2.0/24\"", "1:1", "it says nothing"),
        ("[[rule]]\ncidr = \"192.0.2.7/24\"\naction = \"deny\"", "2:8", "did you mean 192.0.2.0/24?"),
        ("[[rule]]\ncidr = \"all\"\naction = \"deny\"", "2:8", "expected an address or a prefix"),
        ("[[rule]]\ncidr = \"::/0\"\naction = \"drop\"", "3:10", "expected one of allow, deny"),
        ("[[rule]]\ncidr = \"::/0\"\naction = \"deny\"\nconnection_rate = 1", "3:10", "has no limits"),
        ("[[rule]]\ncidr = \"::/0\"\nconnection_burst = 1", "3:20", "it goes with a connection_rate"),
        (
            "[[rule]]\ncidr = \"192.0.2.7\"\naction = \"deny\"\n[[rule]]\ncidr = \"192.0.2.7/32\"\naction = \"allow\"",
            "5:8",
            "line 1 has a rule for 192.0.2.7/32 already",
        ),
        ("[limits]\nconnection_rte = 10", "2:1", "unknown key limits.connection_rte; did you mean connection_rate?"),
        (
            "[limits]\nconnection_burst = 0",
            "2:20",
            "expected a whole number from 1 to 1000000 (new connections at once)",
        ),
        ("[limits]\nconnection_rate = 1000001", "2:19", "from 0 to 1000000"),
        (
            "[kernel]\nattach_mode = \"natve\"",
            "2:15",
            "found the string \"natve\", expected one of auto, native, generic, tc; did you mean \"native\"?",
        ),
        ("[kernel]\nattach_mode = \"skb\"", "2:15", "expected one of auto, native, generic, tc"),
        ("[kernel]\non_deny = true", "2:11", "kernel.on_deny: found true, expected one of drop, reset, observe"),
        (
            "[kernel]\nchallenge = \"on\"",
            "2:13",
            "kernel.challenge: found the string \"on\", expected one of never, auto, always",
        ),
        ("[kernel]\nchallenge_threshold = 1", "2:23", "from 2 to 100000000 (SYNs per second)"),
        ("kernel = 5", "1:10", "kernel: found the number 5, expected a table"),
        ("service = 5", "1:11", "service: found the number 5, expected tables, each under [[service]]"),
        ("[service]\nname = \"a\"", "1:1", "service: found a table, expected tables, each under [[service]]"),
        ("service = [5]", "1:12", "service: found the number 5, expected a table"),
        ("[kernel]\ninterfaces = \"lo\"", "2:14", "expected an array of network interfaces"),
        ("[kernel]\ninterfaces = [\"lo\", \"lo\"]", "2:21", "the string \"lo\" is given twice"),
        ("[kernel]\ninterfaces = [\"a name that is too long\"]", "2:15", "can't be the name of a network interface"),
        ("[kernel]\npin_path = \"bpf/limiter\"", "2:12", "expected an absolute path"),
        ("[kernel]\nmax_rules = 0", "2:13", "expected a whole number from 1 to 16777216 (rules)"),
        ("[kernel]\nmax_connections = 0", "2:19", "expected a whole number from 1 to 16777216 (connections)"),
        ("[kernel]\nmax_connections = 99999999999999999999999", "2:19", "from 1 to 16777216"),
        (
            "[limits]\nconnections_per_source = -1",
            "2:26",
            "found the number -1, expected a whole number from 0 to 4294967295 (connections; 0: any number)",
        ),
        ("[limits]\nconnections_total = 1.5", "2:21", "found the number 1.5"),
        ("[limits]\nconnections_total = \"10\"", "2:21", "found the string \"10\""),
        ("[limits]\nipv4_prefix = 33", "2:15", "from 1 to 32"),
        ("[limits]\nipv4_prefix = 0", "2:15", "from 1 to 32"),
        ("[limits]\nwide_ipv4_prefix = 32", "2:20", "from 0 to 31"),
        (
            "[limits]\nwide_ipv6_prefix = 64",
            "2:20",
            "a wider source has a shorter prefix: found 64, and ipv6_prefix is 64",
        ),
        ("[limits]\nconnections_per_wide_source = 5", "2:31", "there is no wider source"),
        (
            "[[service]]\nname = \"a\"\nport = 1\nconnections_total_all = 5",
            "4:1",
            "unknown key service.connections_total_all",
        ),
        ("[limits]\nipv6_prefix = 129", "2:15", "from 1 to 128"),
        ("[[service]]\nport = 1", "1:1", "service.name: every [[service]] needs a name"),
        ("[[service]]\nname = \"a\"", "1:1", "service.port: every [[service]] needs a port"),
        ("[[service]]\nname = \"\"\nport = 1", "2:8", "found 0 bytes, expected 1 to 64"),
        ("[[service]]\nname = \" a\"\nport = 1", "2:8", "neither begins nor ends with a space"),
        ("[[service]]\nname = \"a\\u0000\"\nport = 1", "2:8", "control character"),
        ("[[service]]\nname = \"a\"\nport = 0", "3:8", "from 1 to 65535 (a TCP port)"),
        ("[[service]]\nname = \"a\"\nport = 65536", "3:8", "from 1 to 65535"),
        ("[[service]]\nname = \"a\"\nport = []", "3:8", "expected at least one TCP port"),
        ("[[service]]\nname = \"a\"\nport = [1, 1]", "3:12", "the number 1 is given twice"),
        ("[[service]]\nname = \"a\"\nports = 1\nport = 1", "3:1", "unknown key service.ports; did you mean port?"),
        ("[[service]]\nname = \"a\"\nport = 1\nsocket_port = 0", "4:15", "from 1 to 65535 (a TCP port)"),
        ("[[service]]\nname = \"a\"\nport = 1\nsocket_port = []", "4:15", "expected at least one TCP port"),
        ("[[service]]\nname = \"a\"\nport = 1\nsocket_port = [2, 2]", "4:19", "the number 2 is given twice"),
        ("[[service]]\nname = \"a\"\nport = 1\nnamespaces = \"docker\"", "4:14", "expected one of host, others, all"),
        ("[[service]]\nname = \"a\"\nport = 1\nnamespace = \"all\"", "4:1", "did you mean namespaces?"),
        ("[gateway]\nlisten = \"0.0.0.0:8080\"", "2:10", "expected an array of addresses"),
        ("[gateway]\nlisten = []", "2:10", "expected at least one address"),
        ("[gateway]\nlisten = [\"8080\"]", "2:11", "expected an address and a port"),
        ("[gateway]\nlisten = [\"unix:ws.sock\"]", "2:11", "its path is not an absolute one"),
        ("[gateway]\nunix_mode = \"rw\"", "2:13", "octal digits"),
        ("[gateway]\nunix_mode = \"1777\"", "2:13", "octal digits"),
        ("[gateway]\nunix_mode = 660", "2:13", "octal digits"),
        ("[gateway]\nreuse_port = 1", "2:14", "true or false"),
        ("[gateway]\nlisten = [\"0.0.0.0:0\"]", "2:11", "a port other than 0"),
        ("[gateway]\nlisten = [\"[::]:1\", \"[::]:1\"]", "2:21", "given twice"),
        ("[gateway]\nupstream = \"http://x\"", "2:12", "it does not begin with ws://"),
        ("[gateway]\ntrusted_proxies = \"10.0.0.0/8\"", "2:19", "expected an array of addresses and networks"),
        ("[gateway]\ntrusted_proxies = [\"proxy\"]", "2:20", "expected an address or a network, such as"),
        ("[gateway]\ntrusted_proxies = [\"10.0.0.0/33\"]", "2:20", "expected an address or a network, such as"),
        ("[gateway]\ntrusted_proxies = [\"10.0.0.1/8\"]", "2:20", "did you mean \"10.0.0.0/8\"?"),
        ("[gateway]\ntrusted_proxies = [\"::ffff:10.0.0.0/104\"]", "2:20", "an IPv4 network to be written as one"),
        ("[gateway]\ntrusted_proxies = [\"::1\", \"::1/128\"]", "2:27", "given twice"),
        ("[gateway]\nproxy_protocol = 1", "2:18", "gateway.proxy_protocol: found the number 1, expected true or false"),
        ("[gateway]\nproxy_protocol = true", "2:18", "gateway.proxy_protocol: without trusted_proxies"),
        ("[gateway]\nproxy_protocol = true\ntrusted_proxies = []", "2:18", "without trusted_proxies"),
        ("[gateway]\nproxy_protocol = true\ntrusted_proxies = [1]", "3:20", "found the number 1"),
        ("[gateway]\nallowed_origins = [5]", "2:20", "found the number 5, expected an origin such as"),
        ("[gateway]\nallowed_origins = [\"example.com\"]", "2:20", "\"example.com\" is no origin: it has no scheme"),
        ("[gateway]\nallowed_origins = [\"*\"]", "2:20", "leave the list empty"),
        ("[gateway]\nallowed_origins = [\"null\", \"null\"]", "2:28", "given twice"),
        ("[gateway]\nhandshake_timeout = 10", "2:21", "found the number 10, expected a duration with its unit"),
        ("[gateway]\nhandshake_timeout = \"10\"", "2:21", "expected a duration with its unit"),
        ("[gateway]\nhandshake_timeout = \"0s\"", "2:21", "expected a duration from 1ms to "),
        ("[gateway]\nidle_timeout = \"2years\"", "2:16", "expected a duration from 0s to "),
        ("[gateway.messages]\nmax_size = \"64 apples\"", "2:12", "expected a size with its unit"),
        ("[gateway.messages]\nmax_size = -5", "2:12", "expected a size with its unit"),
        ("[gateway.messages]\nmax_size = \"0B\"", "2:12", "expected a size from 1 B to 1.0 GiB"),
        ("[gateway.messages]\nburst = 5", "2:9", "gateway.messages.burst: it goes with algorithm = \"token-bucket\""),
        ("[gateway.messages]\nallow = \"json\"", "2:9", "expected one of any, text, binary"),
        ("[gateway.messages]\nbytes_per_second = -1", "2:20", "expected a size with its unit"),
        ("[gateway.messages]\nschema = \"m.json\"", "2:10", "expected an absolute path, or \"\" for none"),
        (
            "[gateway.messages]\nallow = \"binary\"\nsanitize = \"html\"",
            "3:12",
            "gateway.messages.sanitize: it is for text",
        ),
        ("[gateway.messages]\ndeny_for = \"0s\"", "2:12", "expected a duration from 1s to "),
        ("[gateway]\nmax_lifetime = \"soon\"", "2:16", "expected a duration with its unit"),
        ("[admin]\nlisten = \"localhost\"", "2:10", "or \"\" for none"),
        ("[admin]\nlisten = \"0.0.0.0:8080\"", "2:10", "the gateway listens on 0.0.0.0:8080 too"),
        ("[log]\nlevel = \"inof\"", "2:9", "expected a level"),
        ("[log]\nlevel = \"\"", "2:9", "expected a level"),
        ("[log]\nformat = \"xml\"", "2:10", "expected one of text, json"),
        (
            "[[service]]\nname = \"a\"\nport = 1\n[gateway]\nlisten = [\"0.0.0.0:2\"]",
            "5:10",
            "no [[service]] counts sockets at port 2",
        ),
        ("[limits]\nipv4_prefix = 24\nipv4_prefix = 32", "3:1", "duplicate key"),
        ("[limits", "1:8", ""),
        ("# ä\nxä = \"ö\"", "2:2", ""),
    ];
    for (text, place, complaint) in cases {
        let lines = refused(text);
        assert_eq!(lines.len(), 1, "{text:?} gave {lines:#?}");
        let place = format!("limiter.toml:{place}: ");
        assert!(lines[0].starts_with(&place) && lines[0].contains(complaint), "{text:?} gave {:?}", lines[0]);
    }
}

#[test]
fn a_name_of_64_bytes_is_taken_and_one_of_65_refused() {
    let with_name = |length: usize| format!("[[service]]\nname = \"{}\"\nport = 1", "n".repeat(length));
    assert_eq!(good(&with_name(64)).services[0].name.len(), 64);
    assert!(refused(&with_name(65))[0].contains("found 65 bytes, expected 1 to 64"));
}

#[test]
fn where_a_services_sockets_are_is_read() {
    let plain = &good("[[service]]\nname = \"a\"\nport = [1, 2]").services[0];
    assert_eq!((plain.ports_here(), plain.ports_elsewhere()), (&[1, 2][..], &[][..]));
    assert!(!plain.has_sockets_elsewhere());
    for (keys, here, elsewhere) in [
        ("socket_port = 8443", &[8443][..], &[][..]),
        ("socket_port = [1, 8443]", &[1, 8443], &[]),
        ("socket_port = 1", &[1], &[]),
        ("namespaces = \"others\"", &[], &[1, 2]),
        ("namespaces = \"all\"", &[1, 2], &[1, 2]),
        ("namespaces = \"others\"\nsocket_port = 8443", &[], &[8443]),
    ] {
        let service = &good(&format!("[[service]]\nname = \"a\"\nport = [1, 2]\n{keys}")).services[0];
        assert_eq!((service.ports_here(), service.ports_elsewhere()), (here, elsewhere), "{keys}");
        assert!(service.has_sockets_elsewhere(), "{keys}");
    }
    let same = &good("[[service]]\nname = \"a\"\nport = [1, 2]\nsocket_port = [2, 1]").services[0];
    assert!(!same.has_sockets_elsewhere());
}

#[test]
fn no_socket_is_counted_for_two_services() {
    let two = |first: &str, second: &str| {
        format!("[[service]]\nname = \"a\"\nport = 1\n{first}\n[[service]]\nname = \"b\"\nport = 2\n{second}")
    };
    for (first, second, place, complaint) in [
        (
            "socket_port = 9",
            "socket_port = 9",
            "8:15",
            "sockets at 9 on the host are counted for the service \"a\" already",
        ),
        ("socket_port = 2", "", "7:8", "sockets at 2 on the host are counted for the service \"a\" already"),
        (
            "namespaces = \"others\"\nsocket_port = 9",
            "namespaces = \"all\"\nsocket_port = 9",
            "10:15",
            "sockets at 9 in other namespaces",
        ),
        (
            "socket_port = 9\nnamespaces = \"all\"",
            "namespaces = \"all\"\nsocket_port = 9",
            "10:15",
            "give one of the two other ports, or other namespaces",
        ),
    ] {
        let lines = refused(&two(first, second));
        assert_eq!(lines.len(), 1, "{lines:#?}");
        assert!(lines[0].starts_with(&format!("limiter.toml:{place}: ")) && lines[0].contains(complaint), "{lines:#?}");
    }
    // One in containers, the other on the host.
    assert_eq!(good(&two("namespaces = \"others\"\nsocket_port = 2", "")).services.len(), 2);
}

#[test]
fn two_services_share_neither_name_nor_port() {
    let lines = refused(
        "[[service]]\nname = \"a\"\nport = [80, 81]\n[[service]]\nname = \"b\"\nport = 81\n[[service]]\nname = \"a\"\nport = 82",
    );
    assert_eq!(
        lines,
        [
            "limiter.toml:6:8: service.port: 81 is a port of the service \"a\" already",
            "limiter.toml:8:8: service.name: line 2 has a service \"a\" already",
        ]
    );
}

#[test]
fn the_65th_service_is_refused_once() {
    let services: Vec<_> = (1..=66).map(|n| format!("[[service]]\nname = \"s{n}\"\nport = {n}\n")).collect();
    assert_eq!(refused(&services.concat()), ["limiter.toml:193:1: service: there may be 64 services at most"]);
}

#[test]
fn all_problems_are_told_in_the_order_of_the_file() {
    let lines = refused("[limits]\nipv4_prefix = 99\nwidth = 3\n[kernel]\npin_path = 1\n[gateway]\nupstream = \"x\"\n");
    let places: Vec<_> = lines.iter().map(|line| line.split(": ").next().unwrap()).collect();
    assert_eq!(places, ["limiter.toml:2:15", "limiter.toml:3:1", "limiter.toml:5:12", "limiter.toml:7:12"]);
}

#[test]
fn all_syntax_errors_are_told() {
    assert!(refused("a = \nb = 1\nc = [1, \n").len() >= 2);
}

/// The example with what it has in comments as keys.
fn example_in_full() -> String {
    EXAMPLE
        .lines()
        .map(|line| match line.strip_prefix("# ") {
            Some("[[rule]]") => "[[rule]]",
            Some("[[gateway.route]]") => "[[gateway.route]]",
            Some(rest) if rest.split_once(" = ").is_some_and(|(key, _)| !key.contains(' ')) => rest,
            _ => line,
        })
        .collect::<Vec<_>>()
        .join("\n")
}

#[test]
fn the_example_is_the_defaults() {
    let defaults = Config::resolve(None, &Overrides::default(), Purpose::Run).unwrap();
    assert_eq!(good(EXAMPLE), defaults);
    let full = good(&example_in_full());
    assert_eq!(full.rules.len(), 2, "the rules are examples, not defaults");
    assert_eq!(full.gateway.routes.len(), 1, "so is the route");
    let gateway = Gateway { routes: Vec::new(), ..full.gateway };
    assert_eq!(Config { rules: Vec::new(), gateway, ..full }, defaults);
}

#[test]
fn the_example_has_every_key() {
    let text = example_in_full();
    let table = DeTable::parse(&text).unwrap();
    let report = Report::new(Path::new("example.toml"), &text);
    file(&report, table.get_ref());
    let document: toml::Value = toml::from_str(&text).unwrap();
    // The messages of a route have the keys of the gateway's.
    for key in report.keys().into_iter().filter(|key| !key.starts_with("gateway.route.messages.")) {
        let mut value = &document;
        for part in key.split('.') {
            // Of several tables of one name, any may have it.
            let next = match value.as_array().filter(|tables| tables.iter().any(toml::Value::is_table)) {
                Some(tables) => tables.iter().find_map(|table| table.get(part)),
                None => value.get(part),
            };
            value = next.unwrap_or_else(|| panic!("the example lacks {key}"));
        }
    }
    assert!(
        report.keys().contains("service.on_deny")
            && report.keys().contains("rule.action")
            && report.keys().contains("gateway.messages.window")
    );
}

proptest! {
    #[test]
    fn no_text_makes_it_panic(text in "\\PC{0,200}") {
        let _ = parse(Path::new("f"), &text);
    }

    #[test]
    fn no_value_makes_it_panic(
        key in prop::sample::select(vec!["kernel.interfaces", "kernel.pin_path", "limits.ipv4_prefix", "service",
            "gateway.listen", "gateway.upstream", "gateway.trusted_proxies", "gateway.allowed_origins", "gateway.idle_timeout", "gateway.messages.max_size", "admin.listen",
            "log.level"]),
        value in "[-0-9a-z.:\"\\[\\]{}= ]{0,30}",
    ) {
        let _ = parse(Path::new("f"), &format!("{key} = {value}"));
        let _ = parse(Path::new("f"), &format!("{key} = [\"{value}\"]"));
        let _ = parse(Path::new("f"), &format!("{key} = '{value}'"));
    }
}

#[test]
fn rules_that_have_ended_take_no_room() {
    let rule = |last: u8, more: &str| format!("[[rule]]\ncidr = \"192.0.2.{last}\"\naction = \"deny\"\n{more}");
    let ended = rule(1, "expires = 2001-09-09T01:46:40Z\n");
    let two = format!("[kernel]\nmax_rules = 2\n{ended}{}{}", rule(2, ""), rule(3, ""));
    assert_eq!(good(&two).rules.len(), 3);
    let problems = refused(&format!("{two}{}{}", rule(4, ""), rule(5, "")));
    assert_eq!(problems, ["limiter.toml:13:1: rule: there may be 2 rules at most (kernel.max_rules)"]);
}

#[test]
fn the_end_of_a_rule_is_a_point_in_time() {
    let rule = |expires: &str| format!("[[rule]]\ncidr = \"192.0.2.7\"\naction = \"deny\"\nexpires = {expires}\n");
    let end = |expires: &str| good(&rule(expires)).rules[0].expires;
    let second = |number| Some(SystemTime::UNIX_EPOCH + Duration::from_secs(number));
    assert_eq!(end("2001-09-09T01:46:40Z"), second(1_000_000_000));
    assert_eq!(end("2001-09-08 18:16:40-07:30"), second(1_000_000_000));
    assert_eq!(end("2000-02-29T23:59:59+00:00"), second(951_868_799));
    assert_eq!(end("9999-12-31T23:59:59Z"), second(253_402_300_799));
    for bad in
        ["2030-01-31", "2030-01-31T00:00:00", "00:00:00", "\"2030-01-31T00:00:00Z\"", "5", "1969-01-01T00:00:00Z"]
    {
        let problems = refused(&rule(bad));
        assert!(problems[0].contains("rule.expires: found"), "{bad}: {problems:?}");
        assert!(problems[0].ends_with("such as 2030-01-31T00:00:00Z"), "{bad}: {problems:?}");
    }
}
