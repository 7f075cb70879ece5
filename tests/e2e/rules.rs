//! Rules by prefix: whom they deny, whom they allow, whose limits they change, and for how long.

use std::{
    fmt::Write as _,
    fs,
    io::{ErrorKind, Read as _},
    net::IpAddr,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result};
use limiter_tests::{
    both_families,
    lab::{Client, Family, Lab, PORT},
    limiter::Limiter,
    process::Process,
    raw::RawClient,
    tcp::{Crowd, PlainServer, connect_served},
    wait::{NO_ANSWER, SOON, eventually, eventually_equal},
};
use serde_json::Value;

both_families!(
    whom_a_rule_denies_gets_no_answer_and_keeps_what_is_open,
    whom_a_rule_cuts_is_closed_at_once,
    a_rule_ends_by_itself,
    a_handshake_under_way_is_refused,
    whom_a_rule_allows_is_counted_and_not_limited,
    a_rule_has_limits_of_its_own,
    rules_of_the_file_come_and_go_with_it,
    a_rule_of_the_file_ends_at_its_time,
    what_is_saved_is_in_force_and_in_the_file,
);

fn whom_a_rule_denies_gets_no_answer_and_keeps_what_is_open(family: Family) -> Result<()> {
    let lab = Lab::new(2)?;
    let (client, other) = (&lab.clients[0], &lab.clients[1]);
    let server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 5, &[])?;
    let before = connect_served(&client.namespace, client.service(family), SOON)?;
    let cidr = client.address(family).to_string();

    assert_eq!(limiter.output(["deny", &cidr])?, format!("denied: {}\n", host(client.address(family))));
    let denied = Crowd::connect(&client.namespace, client.service(family), 1, NO_ANSWER)?;
    assert_eq!(denied.unanswered.len(), 1, "no answer");
    assert!(limiter.counter("syn_rule")? >= 1);
    assert_eq!(server.seen(client.address(family)).open, 1, "what was open stays open");
    connect_served(&other.namespace, other.service(family), SOON).context("nobody else is denied")?;

    limiter.output(["forget", &cidr])?;
    let after = connect_served(&client.namespace, client.service(family), SOON)?;
    let again = limiter.outcome(["forget", &cidr])?;
    assert_eq!(again.status.code(), Some(1));
    assert!(again.stderr.contains("there is no rule for"), "{}", again.stderr);
    drop((before, denied, after));
    limiter.wait_empty()
}

fn whom_a_rule_cuts_is_closed_at_once(family: Family) -> Result<()> {
    let lab = Lab::new(2)?;
    let (client, other) = (&lab.clients[0], &lab.clients[1]);
    let server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 5, &[])?;
    let mut open =
        (0..3).map(|_| connect_served(&client.namespace, client.service(family), SOON)).collect::<Result<Vec<_>>>()?;
    let elsewhere = connect_served(&other.namespace, other.service(family), SOON)?;
    let cidr = host(client.address(family));

    let output = limiter.output(["deny", &cidr, "--for", "1h", "--cut", "--json"])?;
    let document: Value = serde_json::from_str(&output)?;
    assert_eq!(document["rule"]["cidr"], *cidr);
    assert_eq!((&document["rule"]["action"], &document["instead_of"]), (&Value::from("deny"), &Value::Null));
    let mut cut: Vec<_> = document["cut"].as_array().context("a list")?.iter().collect();
    let mut expected =
        open.iter().map(|stream| Ok(Value::from(stream.local_addr()?.to_string()))).collect::<Result<Vec<_>>>()?;
    cut.sort_by_key(ToString::to_string);
    expected.sort_by_key(ToString::to_string);
    assert_eq!(cut, expected.iter().collect::<Vec<_>>());
    for stream in &mut open {
        stream.set_read_timeout(Some(SOON))?;
        let error = stream.read(&mut [0]).expect_err("it was reset");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
    limiter.wait_held(client.address(family), 0)?;
    assert_eq!(server.seen(other.address(family)).open, 1, "nobody else is cut");
    let denied = Crowd::connect(&client.namespace, client.service(family), 1, NO_ANSWER)?;
    assert_eq!(denied.unanswered.len(), 1);
    // It would try again while it is allowed.
    drop(denied);

    // The other verbs, as documents.
    let allowed: Value = serde_json::from_str(&limiter.output(["allow", &cidr, "--json"])?)?;
    assert_eq!((&allowed["instead_of"], &allowed["cut"]), (&Value::from("deny"), &Value::Null));
    let forgotten: Value = serde_json::from_str(&limiter.output(["forget", &cidr, "--json"])?)?;
    assert_eq!(forgotten["forgotten"], *cidr);
    assert_eq!(limiter.output(["deny", &cidr, "--cut"])?, format!("denied: {cidr}\nclosed 0 connections\n"));
    drop(elsewhere);
    limiter.wait_empty()
}

fn a_rule_ends_by_itself(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let _server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 5, &[])?;
    let around = wide(client.address(family), family);
    limiter.output(["allow", &around])?;
    let begin = Instant::now();
    limiter.output(["deny", &client.address(family).to_string(), "--for", "2s"])?;
    let listed = limiter.json("rules")?;
    let rule = listed["rules"].as_array().context("a list")?.iter().find(|rule| rule["action"] == "deny");
    let left = rule.context("the rule is listed")?["seconds_left"].as_u64().context("it has an end")?;
    assert!((1..=2).contains(&left), "{left}");
    let denied = Crowd::connect(&client.namespace, client.service(family), 1, NO_ANSWER)?;
    assert_eq!(denied.unanswered.len(), 1);
    drop(denied);
    // No daemon is there to end it.
    eventually(SOON, "it has ended", || {
        Ok(Crowd::connect(&client.namespace, client.service(family), 1, NO_ANSWER)?.served.len() == 1)
    })?;
    assert!(begin.elapsed() >= Duration::from_secs(2), "and not before its time: {:?}", begin.elapsed());
    assert_eq!(limiter.json("rules")?["rules"].as_array().map(Vec::len), Some(1), "the one around it is left");
    limiter.wait_empty()
}

/// Denied between its SYN and its ACK.
fn a_handshake_under_way_is_refused(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 5, &[])?;
    let mut raw = RawClient::new(&lab.clients[0], family)?;
    let mut connections = raw.half_open(3)?;
    limiter.output(["deny", &raw.address().to_string()])?;
    raw.complete(&connections)?;
    eventually_equal(SOON, "every ACK is refused", &3, || limiter.counter("handshake_rule"))?;
    assert_eq!(raw.reset_when_sending(&mut connections, 3)?, 3, "told that they are not connected");
    assert_eq!(server.seen(raw.address()).accepted, 0);
    limiter.wait_empty()
}

fn whom_a_rule_allows_is_counted_and_not_limited(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let _server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 2, &["--connections-total", "3", "--connection-rate", "1"])?;
    limiter.output(["allow", &wide(client.address(family), family)])?;
    let crowd = Crowd::connect(&client.namespace, client.service(family), 40, SOON)?;
    assert_eq!(crowd.served.len(), 40);
    limiter.wait_held(client.address(family), 40)?;
    drop(crowd);
    limiter.wait_empty()
}

fn a_rule_has_limits_of_its_own(family: Family) -> Result<()> {
    let lab = Lab::new(2)?;
    let (client, other) = (&lab.clients[0], &lab.clients[1]);
    let server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 2, &[])?;
    let cidr = Family::source(client.address(family));
    let set = |value: &str| limiter.output(["limit", "set", value, "--rule", &cidr]);
    assert_eq!(set("connections_per_source=4")?, format!("{cidr}: connections_per_source 4\n"));
    let crowd = Crowd::connect(&client.namespace, client.service(family), 10, NO_ANSWER)?;
    assert_eq!(crowd.served.len(), 4);
    let elsewhere = Crowd::connect(&other.namespace, other.service(family), 10, NO_ANSWER)?;
    assert_eq!(elsewhere.served.len(), 2, "of a source without a rule");
    let sources = limiter.json("sources")?;
    let held = sources["sources"].as_array().context("a list")?;
    assert!(held.iter().any(|row| row["source"] == Family::source(client.address(family)) && row["limit"] == 4));

    set("connections_per_source=0")?;
    limiter.output(["limit", "set", "connection_rate=1", "connection_burst=3", "--rule", &cidr])?;
    drop(crowd.unanswered);
    let before = server.seen(client.address(family)).accepted;
    let more = Crowd::connect(&client.namespace, client.service(family), 10, NO_ANSWER)?;
    let accepted = server.seen(client.address(family)).accepted - before;
    assert!((3..=4).contains(&accepted), "{accepted} with a burst of three");
    for (arguments, complaint) in [
        (vec!["limit", "set", "connections_total=1", "--rule", &cidr], "a rule has no connections_total"),
        (vec!["limit", "set", "connection_burst=1", "--rule", "203.0.113.9"], "goes with a connection_rate"),
        (vec!["limit", "set", "connection_rate=1", "--rule", &cidr, "--save"], "--save needs --config"),
        (vec!["deny", "192.0.2.7", "--save"], "--save needs --config"),
        (vec!["deny", "192.0.2.7/24"], "did you mean 192.0.2.0/24?"),
        (vec!["deny", "192.0.2.7", "--for", "10"], "with its unit"),
    ] {
        let outcome = limiter.outcome(&arguments)?;
        assert_eq!(outcome.status.code(), Some(2), "{arguments:?}: {}", outcome.stderr);
        assert!(outcome.stderr.contains(complaint), "{arguments:?}: {}", outcome.stderr);
    }
    drop((crowd.served, elsewhere, more));
    limiter.wait_empty()
}

fn rules_of_the_file_come_and_go_with_it(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let _server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    let own = host(client.address(family));
    let file = |rules: &str| {
        Limiter::config_file(&format!(
            "[kernel]\ninterfaces = [\"{}\"]\n[[service]]\nname = \"chat\"\nport = {PORT}\n{rules}",
            client.server_interface()
        ))
    };
    let attach = |rules: &str| -> Result<()> {
        let file = file(rules)?;
        limiter.attach(["--config".as_ref(), file.path().as_os_str()])
    };
    let denied = format!("[[rule]]\ncidr = \"{own}\"\naction = \"deny\"\n");
    attach(&denied)?;
    let refused = Crowd::connect(&client.namespace, client.service(family), 1, NO_ANSWER)?;
    assert_eq!(refused.unanswered.len(), 1);
    limiter.output(["allow", "203.0.113.0/24"])?;

    // A bad file leaves the old one in force.
    assert!(attach("[[rule]]\ncidr = \"x\"\naction = \"deny\"\n").is_err());
    let still = Crowd::connect(&client.namespace, client.service(family), 1, NO_ANSWER)?;
    assert_eq!(still.unanswered.len(), 1);

    attach("")?;
    connect_served(&client.namespace, client.service(family), SOON)?;
    let rules = limiter.json("rules")?;
    let left: Vec<_> = rules["rules"].as_array().context("a list")?.iter().map(|rule| &rule["cidr"]).collect();
    assert_eq!(left, [&Value::from("203.0.113.0/24")], "that of the command stays");
    drop((refused, still));
    limiter.wait_empty()
}

fn a_rule_of_the_file_ends_at_its_time(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let _server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    let own = host(client.address(family));
    // Long enough for what is tried before it ends.
    let ends = SystemTime::now() + Duration::from_secs(8);
    let file = Limiter::config_file(&format!(
        "[kernel]\ninterfaces = [\"{}\"]\n[limits]\nconnection_rate = 0\n[[service]]\nname = \"chat\"\nport = {PORT}\n\
         [[rule]]\ncidr = \"203.0.113.0/24\"\naction = \"deny\"\nexpires = 2001-02-03T04:05:06Z\n\
         [[rule]]\ncidr = \"{own}\"\naction = \"deny\"\nexpires = {}\n",
        client.server_interface(),
        humantime::format_rfc3339_millis(ends),
    ))?;
    let attached = limiter.outcome(["attach".as_ref(), "--config".as_ref(), file.path().as_os_str()])?;
    assert!(attached.status.success(), "{}", attached.stderr);
    assert!(
        attached.stderr.contains("203.0.113.0/24 ended at 2001-02-03T04:05:06Z and is left out"),
        "{}",
        attached.stderr
    );
    let listed = limiter.json("rules")?;
    let rules = listed["rules"].as_array().context("a list")?;
    assert_eq!(rules.len(), 1, "what has ended is not loaded: {listed}");
    assert_eq!((&rules[0]["cidr"], &rules[0]["from"]), (&Value::from(own), &Value::from("file")));
    let shown = humantime::parse_rfc3339(rules[0]["expires"].as_str().context("it has an end")?)?;
    let apart = shown.duration_since(ends).unwrap_or_else(|error| error.duration());
    assert!(apart <= Duration::from_secs(1), "{apart:?}");
    let left = rules[0]["seconds_left"].as_u64().context("a number")?;
    assert!((1..=8).contains(&left), "{left}");

    let denied = Crowd::connect(&client.namespace, client.service(family), 1, NO_ANSWER)?;
    assert_eq!(denied.unanswered.len(), 1);
    drop(denied);
    // No daemon is there to end it.
    eventually(SOON, "it has ended", || {
        Ok(Crowd::connect(&client.namespace, client.service(family), 1, NO_ANSWER)?.served.len() == 1)
    })?;
    // The two clocks may be a moment apart.
    assert!(SystemTime::now() + Duration::from_millis(100) >= ends, "and not before its time");
    assert_eq!(limiter.json("rules")?["rules"].as_array().map(Vec::len), Some(0));
    limiter.wait_empty()
}

fn what_is_saved_is_in_force_and_in_the_file(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let _server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    let own = host(client.address(family));
    let text = format!(
        "# mine\n[kernel]\ninterfaces = [\"{}\"]\n\n[limits]\nconnection_rate = 0\n\n[[service]]\nname = \"chat\" # ours\nport = \
         {PORT}\n",
        client.server_interface()
    );
    let file = Limiter::config_file(&text)?;
    let path = file.path().to_str().context("a path")?;
    limiter.attach(["--config", path])?;
    let now = || Ok::<_, anyhow::Error>(fs::read_to_string(path)?);
    let rule = |says: &str| format!("{text}\n[[rule]]\ncidr = \"{own}\"\n{says}");

    let denied: Value = serde_json::from_str(&limiter.output(["deny", &own, "--save", "--json", "--config", path])?)?;
    assert_eq!((&denied["saved"], &denied["rule"]["from"]), (&Value::from(true), &Value::from("file")));
    assert_eq!(now()?, rule("action = \"deny\"\n"));
    let refused = Crowd::connect(&client.namespace, client.service(family), 1, NO_ANSWER)?;
    assert_eq!(refused.unanswered.len(), 1);
    // It would ask again, and get a slot.
    drop(refused);
    // It says what the file says, so that the file changes nothing.
    limiter.attach(["--config", path])?;
    assert_eq!(limiter.json("rules")?["rules"].as_array().map(Vec::len), Some(1));

    // Limits would take the place of a decision: nothing changes.
    let outcome =
        limiter.outcome(["limit", "set", "connections_per_source=2", "--rule", &own, "--save", "--config", path])?;
    assert_eq!(outcome.status.code(), Some(2), "{}", outcome.stderr);
    assert_eq!(now()?, rule("action = \"deny\"\n"));

    limiter.output(["allow", &own, "--save", "--config", path])?;
    assert_eq!(now()?, rule("action = \"allow\"\n"));
    limiter.output(["deny", &own, "--for", "1h", "--save", "--config", path])?;
    assert!(now()?.starts_with(&rule("action = \"deny\"\nexpires = 2")), "{}", now()?);
    limiter.output(["forget", &own, "--save", "--config", path])?;
    assert_eq!(now()?, text);
    let again = limiter.outcome(["forget", &own, "--save", "--config", path])?;
    assert_eq!(again.status.code(), Some(1), "{}", again.stderr);
    assert!(again.stderr.contains("there is no rule for"), "{}", again.stderr);
    limiter.output(["limit", "set", "connections_per_source=2", "--rule", &own, "--save", "--config", path])?;
    assert_eq!(now()?, rule("connections_per_source = 2\n"));
    let crowd = Crowd::connect(&client.namespace, client.service(family), 5, NO_ANSWER)?;
    assert_eq!(crowd.served.len(), 2);
    limiter.attach(["--config", path])?;
    assert_eq!(limiter.json("rules")?["rules"][0]["connections_per_source"], 2);

    // A file that is wrong is left as it is, and so is what is in force.
    let wrong = format!("{text}wrong = 1\n");
    fs::write(path, &wrong)?;
    for arguments in
        [vec!["deny", &own], vec!["forget", &own], vec!["limit", "set", "connection_rate=1", "--rule", &own]]
    {
        let outcome = limiter.outcome(arguments.into_iter().chain(["--save", "--config", path]))?;
        assert_eq!(outcome.status.code(), Some(2), "{}", outcome.stderr);
        assert!(outcome.stderr.contains("wrong"), "{}", outcome.stderr);
    }
    assert_eq!(now()?, wrong);
    let rules = limiter.json("rules")?;
    assert_eq!(
        (&rules["rules"][0]["action"], &rules["rules"][0]["connection_rate"]),
        (&Value::from("limit"), &Value::Null)
    );
    drop(crowd);
    limiter.wait_empty()
}

#[test]
fn a_hundred_thousand_rules_load_in_seconds_and_hold() -> Result<()> {
    const RULES: u32 = 100_000;
    let lab = Lab::new(3)?;
    let (client, denied, other) = (&lab.clients[0], &lab.clients[1], &lab.clients[2]);
    let _server = PlainServer::start(&lab.server, Family::V4)?;
    let limiter = Limiter::new(&lab.server)?;
    let interfaces: Vec<_> = lab.clients.iter().map(Client::server_interface).collect();
    let mut text = format!(
        "[kernel]\ninterfaces = {interfaces:?}\nmax_rules = 150_000\n[limits]\nconnections_per_source = 3\n[[service]]\nname = \
         \"chat\"\nport = {PORT}\n"
    );
    for number in 0..RULES {
        let network = std::net::Ipv4Addr::from_bits(10 << 24 | number << 6);
        writeln!(text, "[[rule]]\ncidr = \"{network}/26\"\naction = \"deny\"")?;
    }
    writeln!(text, "[[rule]]\ncidr = \"{}\"\nconnections_per_source = 2", client.address(Family::V4))?;
    writeln!(text, "[[rule]]\ncidr = \"{}\"\naction = \"deny\"", denied.address(Family::V4))?;
    let file = Limiter::config_file(&text)?;
    let begin = Instant::now();
    // Seconds for what is shipped on a quiet host; a debug build on one that is busy takes its time.
    let mut attach = limiter.command(["attach".as_ref(), "--config".as_ref(), file.path().as_os_str()]);
    let attached = Process::start(&mut attach)?.wait(Duration::from_mins(2))?;
    let taken = begin.elapsed();
    assert!(attached.status.success(), "{}", attached.stderr);
    let crowd = Crowd::connect(&client.namespace, client.service(Family::V4), 5, NO_ANSWER)?;
    assert_eq!(crowd.served.len(), 2, "it has a limit of its own");
    let refused = Crowd::connect(&denied.namespace, denied.service(Family::V4), 1, NO_ANSWER)?;
    assert_eq!(refused.unanswered.len(), 1, "it is denied");
    let elsewhere = Crowd::connect(&other.namespace, other.service(Family::V4), 5, NO_ANSWER)?;
    assert_eq!(elsewhere.served.len(), 3, "no rule is about it");
    for (address, verdict) in [("10.0.0.1", "denied"), ("10.97.167.255", "denied"), ("10.97.168.0", "admitted")] {
        let explained: Value = serde_json::from_str(&limiter.output(["explain", address, "--json"])?)?;
        assert!(explained.to_string().contains(verdict), "{address}: {explained}");
    }
    let rules = limiter.json("rules")?;
    assert_eq!(rules["rules"].as_array().map(Vec::len), Some(RULES as usize + 2));
    eprintln!("{RULES} rules were attached in {taken:?}");
    drop((crowd, refused, elsewhere));
    limiter.wait_empty()
}

/// An address as limiter writes the prefix that is it alone.
fn host(address: IpAddr) -> String {
    format!("{address}/{}", if address.is_ipv4() { 32 } else { 128 })
}

/// A prefix around an address.
fn wide(address: IpAddr, family: Family) -> String {
    match (family, address) {
        (Family::V4, IpAddr::V4(address)) => {
            let [a, b, ..] = address.octets();
            format!("{a}.{b}.0.0/16")
        }
        _ => "2001:db8::/32".to_owned(),
    }
}
