//! What `limiter explain` says of an address agrees with what a client there then meets, for each reason to refuse it.

use anyhow::{Context, Result};
use limiter_tests::{
    both_families,
    lab::{Client, Family, Lab, PORT},
    limiter::Limiter,
    state::State,
    tcp::{Crowd, PlainServer, connect_served},
    wait::{NO_ANSWER, SOON},
};
use serde_json::{Value, json};
use std::{net::TcpStream, time::Duration};

both_families!(
    an_address_that_nothing_speaks_against,
    a_source_at_its_limit,
    a_service_that_is_full,
    a_source_that_was_too_fast,
    whom_a_rule_denies,
    a_ledger_without_room,
    a_service_that_only_observes,
);

/// What is explained of a client at the lab's one service.
fn explain(limiter: &Limiter<'_>, client: &Client, family: Family) -> Result<Value> {
    let counters = || -> Result<Value> { Ok(limiter.json("status")?["services"][0]["counters"].clone()) };
    let before = counters()?;
    let address = client.address(family).to_string();
    let output = limiter.output(["explain", &address, "--json"])?;
    assert_eq!(counters()?, before, "nothing is counted by asking");
    let mut document: Value = serde_json::from_str(&output)?;
    assert_eq!(document["ip"], *address);
    let mut service = document["services"][0].take();
    assert_eq!(service["source"], Family::source(client.address(family)));
    service["rule"] = document["rule"].take();
    Ok(service)
}

fn denied(stage: &str, reason: &str) -> Value {
    json!({ "verdict": "denied", "stage": stage, "reason": reason })
}

fn open(client: &Client, family: Family, count: usize) -> Result<Vec<TcpStream>> {
    (0..count).map(|_| connect_served(&client.namespace, client.service(family), SOON)).collect()
}

/// A connect gets no answer, and that is counted as expected.
fn meets_silence(limiter: &Limiter<'_>, client: &Client, family: Family, counter: &str) -> Result<()> {
    let before = limiter.counter(counter)?;
    let crowd = Crowd::connect(&client.namespace, client.service(family), 1, NO_ANSWER)?;
    assert_eq!(crowd.unanswered.len(), 1, "{crowd:?}");
    assert!(limiter.counter(counter)? > before, "{counter}");
    Ok(())
}

fn an_address_that_nothing_speaks_against(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let _server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 2, &["--connection-rate", "1"])?;
    let explained = explain(&limiter, client, family)?;
    assert_eq!(explained["next_syn"], json!({ "verdict": "admitted", "stage": null, "reason": null }));
    assert_eq!(explained["rule"], Value::Null);
    assert_eq!((&explained["connections"], &explained["tokens"]), (&json!(0), &json!(20)));
    let open = open(client, family, 1)?;
    let explained = explain(&limiter, client, family)?;
    assert_eq!((&explained["connections"], &explained["connections_per_source"]), (&json!(1), &json!(2)));
    assert_eq!(explained["service_connections"], 1);
    drop(open);
    limiter.wait_empty()
}

fn a_source_at_its_limit(family: Family) -> Result<()> {
    let lab = Lab::new(2)?;
    let (client, other) = (&lab.clients[0], &lab.clients[1]);
    let _server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 2, &[])?;
    let held = open(client, family, 2)?;
    let explained = explain(&limiter, client, family)?;
    assert_eq!(explained["next_syn"], denied("syn", "source_limit"));
    assert_eq!(explained["tokens"], Value::Null, "no limit");
    meets_silence(&limiter, client, family, "syn_source_limit")?;
    assert_eq!(explain(&limiter, other, family)?["next_syn"]["verdict"], "admitted", "of another source");
    let more = open(other, family, 1)?;
    drop((held, more));
    limiter.wait_empty()
}

fn a_service_that_is_full(family: Family) -> Result<()> {
    let lab = Lab::new(2)?;
    let (client, other) = (&lab.clients[0], &lab.clients[1]);
    let _server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 5, &["--connections-total", "3"])?;
    let held = open(other, family, 3)?;
    let explained = explain(&limiter, client, family)?;
    assert_eq!(explained["next_syn"], denied("syn", "service_limit"));
    assert_eq!((&explained["connections"], &explained["service_connections"]), (&json!(0), &json!(3)));
    meets_silence(&limiter, client, family, "syn_service_limit")?;
    drop(held);
    limiter.wait_empty()
}

fn a_source_that_was_too_fast(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let _server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 5, &["--connection-rate", "1"])?;
    // A token that comes back between two steps would make the test depend on how fast it is.
    State::open(&limiter)?.slow_down(Duration::from_hours(1), 2)?;
    assert_eq!(explain(&limiter, client, family)?["tokens"], 2);
    let held = open(client, family, 2)?;
    let explained = explain(&limiter, client, family)?;
    assert_eq!(explained["next_syn"], denied("syn", "rate_limit"));
    assert_eq!(explained["tokens"], 0);
    meets_silence(&limiter, client, family, "syn_rate_limit")?;
    drop(held);
    limiter.wait_empty()
}

fn whom_a_rule_denies(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let _server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 5, &[])?;
    let (all, source) =
        (if family == Family::V4 { "0.0.0.0/0" } else { "::/0" }, Family::source(client.address(family)));
    limiter.output(["deny", all, "--for", "1h"])?;
    let explained = explain(&limiter, client, family)?;
    assert_eq!(explained["next_syn"], denied("syn", "rule"));
    assert_eq!((&explained["rule"]["cidr"], &explained["rule"]["action"]), (&json!(all), &json!("deny")));
    assert!(explained["rule"]["seconds_left"].as_u64().context("it has an end")? <= 3600);
    meets_silence(&limiter, client, family, "syn_rule")?;

    // The longer prefix holds, and its limits are those that are shown.
    limiter.output(["limit", "set", "connections_per_source=1", "--rule", &source])?;
    let explained = explain(&limiter, client, family)?;
    assert_eq!((&explained["rule"]["cidr"], &explained["connections_per_source"]), (&json!(source), &json!(1)));
    assert_eq!(explained["next_syn"]["verdict"], "admitted");
    let held = open(client, family, 1)?;
    assert_eq!(explain(&limiter, client, family)?["next_syn"], denied("syn", "source_limit"));
    meets_silence(&limiter, client, family, "syn_source_limit")?;
    drop(held);
    limiter.wait_empty()
}

fn a_ledger_without_room(family: Family) -> Result<()> {
    let lab = Lab::new(2)?;
    let (client, other) = (&lab.clients[0], &lab.clients[1]);
    let _server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    let interfaces: Vec<_> = lab.clients.iter().map(Client::server_interface).collect();
    let file = Limiter::config_file(&format!(
        "[kernel]\ninterfaces = {interfaces:?}\nmax_connections = 3\non_full = \"closed\"\n\
         [limits]\nconnection_rate = 0\n[[service]]\nname = \"chat\"\nport = {PORT}\n"
    ))?;
    limiter.attach(["--config".as_ref(), file.path().as_os_str()])?;
    let held = open(other, family, 3)?;
    assert_eq!(explain(&limiter, client, family)?["next_syn"], denied("handshake", "ledger_full"));
    let crowd = Crowd::connect(&client.namespace, client.service(family), 1, NO_ANSWER)?;
    assert_eq!((crowd.served.len(), crowd.unanswered.len()), (0, 0), "{crowd:?}");
    assert!(limiter.counter("handshake_ledger_full")? >= 1);
    drop((held, crowd));
    limiter.wait_empty()
}

fn a_service_that_only_observes(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let _server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 1, &["--on-deny", "observe"])?;
    let held = open(client, family, 1)?;
    let explained = explain(&limiter, client, family)?;
    assert_eq!(explained["next_syn"], json!({ "verdict": "observed", "stage": "syn", "reason": "source_limit" }));
    let more = open(client, family, 1)?;
    assert_eq!(limiter.counter("syn_observed_source_limit")?, 1);
    drop((held, more));
    limiter.wait_empty()
}

#[test]
fn explain_without_anything_attached_says_so() -> Result<()> {
    let lab = Lab::new(1)?;
    let outcome = Limiter::new(&lab.server)?.outcome(["explain", "192.0.2.7"])?;
    assert_eq!(outcome.status.code(), Some(3), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("nothing is attached"), "{}", outcome.stderr);
    Ok(())
}
