//! What holds above single sources: the wider tier, all services together, the rate of a whole service.

use std::{net::SocketAddr, time::Instant};

use anyhow::{Context, Result};
use limiter::config::LimitKey;
use limiter_tests::{
    both_families,
    lab::{Family, Lab, PORT},
    limiter::Limiter,
    raw::RawClient,
    tcp::{Crowd, PlainServer, Seen, connect_served},
    wait::{SOON, eventually_equal},
};
use serde_json::Value;

both_families!(
    a_wider_source_gets_its_limit_exactly,
    a_rule_lifts_the_limit_of_a_wider_source,
    all_services_together_get_their_limit,
    a_service_takes_connections_at_its_rate,
);

/// How long a client that should get no answer waits for one; shorter than any token takes here.
const NO_ANSWER: std::time::Duration = std::time::Duration::from_millis(300);

/// Puts the two addresses of a client into sources of their own, and into one of the wider tier.
fn set_tiers(limiter: &Limiter, limit: u32) -> Result<()> {
    let limit = format!("connections_per_wide_source={limit}");
    limiter.output(["limit", "set", "wide_ipv4_prefix=24", "ipv6_prefix=128", "wide_ipv6_prefix=64", &limit])?;
    Ok(())
}

/// The rows of the wider tier: source, connections, limit.
fn wide_sources(limiter: &Limiter) -> Result<Vec<(String, u64, u64)>> {
    let document = limiter.json("sources")?;
    let rows = document["sources"].as_array().context("a list")?.iter();
    let row =
        |row: &Value| Some((row["source"].as_str()?.to_owned(), row["connections"].as_u64()?, row["limit"].as_u64()?));
    rows.filter(|row| row["tier"] == "wide").map(|found| row(found).context("a row of a source")).collect()
}

fn a_wider_source_gets_its_limit_exactly(family: Family) -> Result<()> {
    let lab = Lab::new(2)?;
    let (client, other) = (&lab.clients[0], &lab.clients[1]);
    let server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 5, &[])?;
    set_tiers(&limiter, 7)?;

    let crowd = Crowd::connect(&client.namespace, client.service(family), 20, NO_ANSWER)?;
    assert_eq!(crowd.served.len(), 5, "one source of the two");
    // The other asks while there is room, and proves itself fifty times in one batch.
    let mut raw = RawClient::new(client, family)?;
    let mut connections = raw.half_open(50)?;
    raw.complete(&connections)?;
    eventually_equal(SOON, "every ACK is decided on", &50, || {
        Ok(limiter.counter("opened_reserved")? - 5 + limiter.counter("handshake_wide_source_limit")?)
    })?;
    assert_eq!(limiter.counter("handshake_wide_source_limit")?, 48);
    eventually_equal(SOON, "two are accepted", &Seen { accepted: 2, open: 2, peak: 2 }, || {
        Ok(server.seen(raw.address()))
    })?;
    assert_eq!(raw.reset_when_sending(&mut connections, 48)?, 48, "told that they are not connected");
    assert_eq!(raw.half_open_within(1, NO_ANSWER)?.len(), 0, "a SYN past the limit is not answered");
    assert!(limiter.counter("syn_wide_source_limit")? >= 1);

    let wide = wide_sources(&limiter)?;
    let prefix = if family == Family::V4 { "198.18.1.0/24" } else { "2001:db8:0:1::/64" };
    assert_eq!(wide, [(prefix.to_owned(), 7, 7)]);
    let elsewhere = Crowd::connect(&other.namespace, other.service(family), 5, SOON)?;
    assert_eq!(elsewhere.served.len(), 5, "of another wide source");

    // One that closes makes room for one, whichever source it was of.
    let mut served = crowd.served;
    drop(served.pop());
    eventually_equal(SOON, "a slot is free", &6, || {
        Ok(wide_sources(&limiter)?.iter().find(|row| row.0 == prefix).map_or(0, |row| row.1))
    })?;
    let again = raw.half_open(1)?;
    raw.complete(&again)?;
    eventually_equal(SOON, "three are accepted", &3, || Ok(server.seen(raw.address()).accepted))?;

    drop((served, crowd.unanswered, elsewhere));
    raw.reset(&connections)?;
    raw.reset(&again)?;
    limiter.wait_empty()?;
    assert_eq!(limiter.json("status")?["drift"], 0);
    Ok(())
}

fn a_rule_lifts_the_limit_of_a_wider_source(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let _server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 0, &[])?;
    set_tiers(&limiter, 2)?;
    let address = client.address(family).to_string();
    limiter.output(["limit", "set", "connections_per_wide_source=4", "--rule", &address])?;
    let crowd = Crowd::connect(&client.namespace, client.service(family), 20, NO_ANSWER)?;
    assert_eq!(crowd.served.len(), 4);

    // For the tier, the rule is for a part.
    let document = limiter.json("sources")?;
    let rows = document["sources"].as_array().context("a list")?;
    let wide = rows.iter().find(|row| row["tier"] == "wide").context("a wide source")?;
    assert_eq!((&wide["limit"], &wide["exceptions"][0]["limit"]), (&2.into(), &4.into()), "{wide}");
    let explained: Value = serde_json::from_str(&limiter.output(["explain", &address, "--json"])?)?;
    let explained = &explained["services"][0];
    assert_eq!(explained["wide_connections"], 4, "{explained}");
    assert_eq!(explained["next_syn"]["reason"], "wide_source_limit", "{explained}");
    drop(crowd);
    limiter.wait_empty()
}

fn all_services_together_get_their_limit(family: Family) -> Result<()> {
    let lab = Lab::new(2)?;
    let clients = [&lab.clients[0], &lab.clients[1]];
    let ports = [PORT, PORT + 1, PORT + 2];
    let _servers: Vec<_> = ports
        .iter()
        .map(|&port| PlainServer::listen(&lab.server, SocketAddr::new(family.unspecified(), port)))
        .collect::<Result<_>>()?;
    let limiter = Limiter::new(&lab.server)?;
    // Two services, one of which has two ports and one limit for both.
    let file = Limiter::config_file(&format!(
        "[kernel]\ninterfaces = [\"{}\", \"{}\"]\n\
         [limits]\nconnection_rate = 0\nconnections_total_all = 6\n\
         [[service]]\nname = \"chat\"\nport = [{}, {}]\nconnections_total = 4\n\
         [[service]]\nname = \"game\"\nport = {}\n",
        clients[0].server_interface(),
        clients[1].server_interface(),
        ports[0],
        ports[1],
        ports[2],
    ))?;
    limiter.attach(["--config".as_ref(), file.path().as_os_str()])?;
    let connect = |client: usize, port: u16, count| {
        let server = SocketAddr::new(clients[client].server_address(family), port);
        Crowd::connect(&clients[client].namespace, server, count, NO_ANSWER)
    };
    let first = connect(0, ports[0], 3)?;
    assert_eq!(first.served.len(), 3);
    let second = connect(1, ports[1], 3)?;
    assert_eq!(second.served.len(), 1, "what the service has left, on whichever port");
    let third = connect(1, ports[2], 5)?;
    assert_eq!(third.served.len(), 2, "what all services have left");
    assert!(limiter.counter("syn_service_limit")? >= 2);
    assert!(limiter.counter("syn_total_limit")? >= 1);
    drop(first);
    eventually_equal(SOON, "three are left", &3, || Ok(limiter.ledger()?.len()))?;
    let fourth = connect(0, ports[2], 5)?;
    assert_eq!(fourth.served.len(), 3);

    let refused = limiter.outcome(["limit", "set", "connections_total_all=9", "--service", "chat"])?;
    assert_eq!(refused.status.code(), Some(2), "{}", refused.stderr);
    limiter.set_limit("connections_total_all", 7)?;
    let fifth = connect(0, ports[2], 5)?;
    assert_eq!(fifth.served.len(), 1);
    drop((second, third, fourth, fifth));
    limiter.wait_empty()
}

fn a_service_takes_connections_at_its_rate(family: Family) -> Result<()> {
    let lab = Lab::new(2)?;
    let clients = [&lab.clients[0], &lab.clients[1]];
    let server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 0, &[])?;
    limiter.output(["limit", "set", "service_connection_rate=1", "service_connection_burst=6"])?;

    // SYNs spend nothing, so all of them ask while there are tokens; fifty from each of two sources prove themselves.
    let mut raws = [RawClient::new(clients[0], family)?, RawClient::new(clients[1], family)?];
    let begin = Instant::now();
    let halves = [raws[0].half_open(50)?, raws[1].half_open(50)?];
    for (raw, connections) in raws.iter().zip(&halves) {
        raw.complete(connections)?;
    }
    eventually_equal(SOON, "every ACK is decided on", &100, || {
        Ok(limiter.counter("opened_reserved")? + limiter.counter("handshake_service_rate_limit")?)
    })?;
    let opened = limiter.counter("opened_reserved")?;
    let returned = begin.elapsed().as_secs();
    assert!((6..=6 + returned).contains(&opened), "{opened} of a burst of 6");
    eventually_equal(SOON, "they are accepted", &opened, || {
        Ok(raws.iter().map(|raw| u64::from(server.seen(raw.address()).accepted)).sum())
    })?;

    // Without the limit everybody gets in at once.
    limiter.set_limit("service_connection_rate", 0)?;
    for client in clients {
        connect_served(&client.namespace, client.service(family), SOON)?;
    }
    for (raw, connections) in raws.iter().zip(&halves) {
        raw.reset(connections)?;
    }
    limiter.wait_empty()
}

/// Each key of `[limits]` can be set while connections are open, those that say what a source is among them: what is open stays
/// with the source that it was counted for.
#[test]
fn every_limit_changes_at_once_and_counts_stay_right() -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let (family, address) = (Family::V4, client.address(Family::V4));
    let _server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 2, &[])?;
    let mut values: Vec<(&str, u32)> = LimitKey::ALL
        .into_iter()
        .map(|key| {
            let (_, greatest) = key.range();
            (key.name(), if greatest > 1000 { 1000 } else { greatest })
        })
        .collect();
    for (key, value) in &mut values {
        match *key {
            "ipv4_prefix" => *value = 24,
            "wide_ipv4_prefix" => *value = 16,
            "ipv6_prefix" => *value = 128,
            "connections_per_source" => *value = 2,
            _ => {}
        }
    }
    let before = Crowd::connect(&client.namespace, client.service(family), 2, SOON)?;
    assert_eq!(before.served.len(), 2);
    limiter.wait_held(address, 2)?;
    let arguments: Vec<String> = values.iter().map(|(key, value)| format!("{key}={value}")).collect();
    limiter.output(["limit", "set"].into_iter().chain(arguments.iter().map(String::as_str)))?;
    let show: Value = serde_json::from_str(&limiter.output(["limit", "show", "--json"])?)?;
    for (key, value) in &values {
        assert_eq!(show["limits"][0][key], *value, "{key}");
    }

    // The new source begins anew beside the old one, with the limit for itself.
    let after = Crowd::connect(&client.namespace, client.service(family), 5, NO_ANSWER)?;
    assert_eq!(after.served.len(), 2);
    let sources = limiter.json("sources")?;
    let held = |source: &str, tier: &str| {
        let rows = sources["sources"].as_array()?;
        rows.iter().find(|row| row["source"] == source && row["tier"] == tier)?["connections"].as_u64()
    };
    assert_eq!(held("198.18.1.0/24", "narrow"), Some(2), "{sources}");
    assert_eq!(held("198.18.0.0/16", "wide"), Some(2), "{sources}");
    assert_eq!(held(&format!("{address}/32"), "narrow"), Some(2), "{sources}");
    // Back again: each is given back where it was taken.
    limiter.output(["limit", "set", "ipv4_prefix=32", "wide_ipv4_prefix=0"])?;
    drop((before, after));
    limiter.wait_empty()
}
