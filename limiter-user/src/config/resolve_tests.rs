use super::*;

const CHAT: &str = "[[service]]\nname = \"chat\"\nport = 8080\nconnections_per_source = 9\n";
const TWO: &str = "[[service]]\nname = \"a\"\nport = 8080\n[[service]]\nname = \"b\"\nport = 81\n";

fn resolve(text: &str, overrides: &Overrides, purpose: Purpose) -> Result<Config, ConfigError> {
    merge(parse::parse(Path::new("limiter.toml"), text).unwrap(), overrides, purpose)
}

fn run(text: &str, overrides: &Overrides) -> Config {
    resolve(text, overrides, Purpose::Run).unwrap()
}

fn refused(text: &str, overrides: &Overrides, purpose: Purpose) -> String {
    resolve(text, overrides, purpose).unwrap_err().to_string()
}

/// Overrides by which nothing is wrong under [`Purpose::Attach`].
fn on_lo() -> Overrides {
    Overrides { interfaces: Some(vec!["lo".into()]), ..Overrides::default() }
}

#[test]
fn flags_take_the_place_of_the_file_in_every_service() {
    let file = "[kernel]\ninterfaces = [\"eth0\"]\n[[service]]\nname = \"a\"\nport = 80\non_deny = \"drop\"\n\
                connections_per_source = 9\nconnections_total = 99\n[gateway]\nlisten = [\"0.0.0.0:80\"]";
    let overrides = Overrides {
        interfaces: Some(vec!["lo".into()]),
        ports: Some(vec![81]),
        listen: Some(vec!["127.0.0.1:81".parse().unwrap()]),
        upstream: Some("ws://h".parse().unwrap()),
        connections_per_source: Some(1),
        connection_rate: Some(8),
        connections_total: Some(2),
        on_deny: Some(OnDeny::Observe),
        attach_mode: Some(AttachMode::Native),
        pin_path: Some("/p".into()),
        admin: Some(None),
    };
    let config = run(file, &overrides);
    assert_eq!(config.kernel.interfaces, ["lo"]);
    assert_eq!(config.kernel.attach_mode, AttachMode::Native);
    assert_eq!(config.kernel.pin_path, Path::new("/p"));
    assert_eq!(config.gateway.listen, ["127.0.0.1:81".parse().unwrap()]);
    assert_eq!(config.gateway.upstream, "ws://h".parse().unwrap());
    assert_eq!(config.admin.listen, None);
    let service = &config.services[0];
    assert_eq!((service.name.as_str(), service.ports.as_slice()), ("a", &[81][..]));
    for limits in [service.limits, config.limits] {
        assert_eq!((limits.connections_per_source, limits.connections_total, limits.connection_rate), (1, 2, 8));
    }
    assert_eq!((service.on_deny, config.kernel.on_deny), (OnDeny::Observe, OnDeny::Observe));
}

#[test]
fn without_flags_the_file_is_in_force_and_without_a_file_the_defaults() {
    let config = run(CHAT, &Overrides::default());
    assert_eq!(config.services[0].limits.connections_per_source, 9);
    assert_eq!(config.limits, crate::policy::Limits::default());

    let config = run("", &Overrides::default());
    assert_eq!(config.services.len(), 1);
    assert_eq!((config.services[0].name.as_str(), config.services[0].ports.as_slice()), ("default", &[8080][..]));
    assert_eq!(Config { services: Vec::new(), ..config }, Config::default());
}

#[test]
fn without_services_the_ports_are_those_of_the_gateway() {
    let file = "[gateway]\nlisten = [\"0.0.0.0:82\", \"[::]:82\", \"0.0.0.0:81\"]";
    assert_eq!(run(file, &Overrides::default()).services[0].ports, [81, 82]);
    assert_eq!(resolve(file, &on_lo(), Purpose::Attach).unwrap().services[0].ports, [81, 82]);
}

#[test]
fn a_port_by_flag_moves_the_gateway_unless_something_says_where_it_listens() {
    let overrides = Overrides { ports: Some(vec![9000]), ..Overrides::default() };
    let config = run("", &overrides);
    assert_eq!(config.services[0].ports, [9000]);
    assert_eq!(config.gateway.listen, ["0.0.0.0:9000".parse().unwrap()]);
    let listens = "[gateway]\nlisten = [\"127.0.0.1:9000\"]";
    assert_eq!(run(listens, &overrides).gateway.listen, ["127.0.0.1:9000".parse().unwrap()]);
    let elsewhere = "[gateway]\nlisten = [\"127.0.0.1:9001\"]";
    assert!(refused(elsewhere, &overrides, Purpose::Run).contains("no [[service]] counts sockets at port 9001"));
}

#[test]
fn attach_protects_no_port_that_nobody_mentioned() {
    assert!(refused("", &on_lo(), Purpose::Attach).contains("--port"));
    let overrides = Overrides { ports: Some(vec![80, 443]), ..on_lo() };
    assert_eq!(resolve("", &overrides, Purpose::Attach).unwrap().services[0].ports, [80, 443]);
    let nginx = "[[service]]\nname = \"nginx\"\nport = 80";
    assert_eq!(resolve(nginx, &on_lo(), Purpose::Attach).unwrap().services[0].ports, [80]);
}

#[test]
fn attach_needs_an_interface() {
    assert!(refused(CHAT, &Overrides::default(), Purpose::Attach).contains("--interface"));
}

#[test]
fn a_port_for_several_services_is_refused() {
    let overrides = Overrides { ports: Some(vec![82]), ..Overrides::default() };
    assert!(refused(TWO, &overrides, Purpose::Run).contains("which service"));
}

#[test]
fn sockets_without_a_port_belong_to_the_default_service() {
    let listen = |listen: &str| format!("[gateway]\nlisten = [{listen}]");
    let config = run(&listen("\"unix:/run/a.sock\""), &Overrides::default());
    assert_eq!((config.services.len(), config.services[0].ports.as_slice()), (1, [].as_slice()));
    let message = refused(&listen("\"unix:/run/a.sock\""), &on_lo(), Purpose::Run);
    assert!(message.contains("kernel.interfaces") && message.contains("unix sockets alone"), "{message}");
    let mut config = run(&listen("\"systemd\""), &on_lo());
    config.cover(&[443, 80, 443]);
    assert_eq!(config.services[0].ports, [80, 443]);
    let mut config = run("", &Overrides::default());
    config.cover(&[443]);
    assert_eq!(config.services[0].ports, [8080], "the file says which");
}

#[test]
fn a_gateway_without_limits_is_refused() {
    let nginx = "[[service]]\nname = \"nginx\"\nport = 80";
    let message = refused(nginx, &Overrides::default(), Purpose::Run);
    assert!(
        message
            .contains("no [[service]] counts sockets at port 8080 on the host, so 0.0.0.0:8080 would have no limits"),
        "{message}"
    );
}

#[test]
fn what_a_flag_gets_wrong_is_refused_like_in_the_file() {
    let address = |text: &str| text.parse::<SocketAddr>().unwrap();
    let cases = [
        (Overrides { interfaces: Some(vec!["a/b".into()]), ..on_lo() }, "can't be the name"),
        (Overrides { interfaces: Some(vec!["lo".into(), "lo".into()]), ..on_lo() }, "the interface lo is given twice"),
        (Overrides { ports: Some(vec![80, 80]), ..on_lo() }, "the port 80 is given twice"),
        (Overrides { ports: Some(vec![0]), ..on_lo() }, "port 0"),
        (Overrides { listen: Some(vec![address("[::]:0").into()]), ..on_lo() }, "port 0"),
        (Overrides { listen: Some(vec![address("[::]:8080").into(); 2]), ..on_lo() }, "[::]:8080 is given twice"),
        (Overrides { pin_path: Some("bpf".into()), ..on_lo() }, "not an absolute path"),
        (Overrides { admin: Some(Some(address("0.0.0.0:8080"))), ..on_lo() }, "both listen on 0.0.0.0:8080"),
    ];
    for (overrides, complaint) in cases {
        let message = refused("", &overrides, Purpose::Run);
        assert!(message.contains(complaint), "{message:?} lacks {complaint:?}");
    }
}

#[test]
fn a_file_that_cannot_be_read_says_which_and_why() {
    let place = tempfile::tempdir().unwrap();
    let missing = place.path().join("none.toml");
    let error = anyhow::Error::from(Config::from_file(&missing).unwrap_err());
    assert!(format!("{error:#}").contains("none.toml: No such file"), "{error:#}");

    let endless = Config::from_file(Path::new("/dev/zero")).unwrap_err();
    assert!(matches!(endless, ConfigError::Unreadable { .. }));
}

#[test]
fn an_open_relay_on_a_public_address_is_warned_of() {
    let auth = "[gateway.auth.forward]\nurl = \"http://127.0.0.1:1/\"";
    for (listen, upstream, auth, warned) in [
        ("0.0.0.0", "ws://app", "", true),
        ("[::]", "ws://app", "", true),
        ("203.0.113.1", "ws://app", "", true),
        ("127.0.0.1", "ws://app", "", false),
        ("10.0.0.1", "ws://app", "", false),
        ("[fd00::1]", "ws://app", "", false),
        ("0.0.0.0", "echo", "", false),
        ("0.0.0.0", "ws://app", auth, false),
    ] {
        let text = format!("[gateway]\nlisten = [\"{listen}:8080\"]\nupstream = \"{upstream}\"\n{auth}");
        let config = resolve(&text, &Overrides::default(), Purpose::Run).unwrap();
        let warnings = config.warnings();
        assert_eq!(!warnings.is_empty(), warned, "{text}");
        assert!(warnings.iter().all(|warning| warning.contains(listen) && warning.contains("[gateway.auth]")));
    }
}

#[test]
fn rules_that_have_ended_are_warned_of_and_counted() {
    let rules = |count: u8| -> String {
        let ended =
            |n| format!("[[rule]]\ncidr = \"192.0.2.{n}\"\naction = \"deny\"\nexpires = 2001-02-03T04:05:06Z\n");
        (0..count).map(ended).collect()
    };
    let warnings = |count| {
        let text = rules(count) + "[[rule]]\ncidr = \"::/0\"\naction = \"deny\"\nexpires = 9999-01-01T00:00:00Z\n";
        resolve(&text, &Overrides::default(), Purpose::Run).unwrap().warnings()
    };
    assert_eq!(
        warnings(1),
        ["rule: that for 192.0.2.0/32 ended at 2001-02-03T04:05:06Z and is left out; take it out of the file"]
    );
    assert_eq!(warnings(0), [""; 0]);
    let many = warnings(13);
    assert_eq!((many.len(), many[10].as_str()), (11, "rule: 3 more have ended and are left out"));
}
