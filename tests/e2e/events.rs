//! `limiter events`: with a daemon, without one, and several at once.

use std::{net::TcpStream, time::Duration};

use anyhow::{Context, Result};
use limiter_tests::{
    both_families,
    lab::{Client, Family, Lab, PORT},
    limiter::Limiter,
    process::Process,
    tcp::{Crowd, PlainServer, connect_served},
    wait::{SOON, eventually},
};
use serde_json::Value;

both_families!(
    without_a_daemon_events_are_there_to_be_read_again,
    beside_a_daemon_every_follower_sees_every_event,
    what_was_left_out_is_told,
);

/// How long a client that should get no answer waits for one.
const NO_ANSWER: Duration = Duration::from_millis(100);

fn events(limiter: &Limiter<'_>, more: &[&str]) -> Result<Vec<Value>> {
    let output = limiter.output(["events", "--json"].iter().chain(more))?;
    parse(&output)
}

fn parse(lines: &str) -> Result<Vec<Value>> {
    lines.lines().map(|line| serde_json::from_str(line).with_context(|| format!("no JSON: {line}"))).collect()
}

/// Begins a connect that is refused.
fn knock(client: &Client, family: Family) -> Result<()> {
    let crowd = Crowd::connect(&client.namespace, client.service(family), 1, NO_ANSWER)?;
    assert_eq!(crowd.unanswered.len(), 1);
    Ok(())
}

fn is_of(event: &Value, client: &Client, family: Family) -> bool {
    event["remote"].as_str().and_then(|remote| remote.parse::<std::net::SocketAddr>().ok()).map(|remote| remote.ip())
        == Some(client.address(family))
}

fn without_a_daemon_events_are_there_to_be_read_again(family: Family) -> Result<()> {
    let lab = Lab::new(2)?;
    let (client, other) = (&lab.clients[0], &lab.clients[1]);
    let _server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 1, &[])?;
    assert_eq!(events(&limiter, &[])?, Vec::<Value>::new());
    let held = connect_served(&client.namespace, client.service(family), SOON)?;
    knock(client, family)?;
    limiter.output(["deny", &other.address(family).to_string()])?;
    knock(other, family)?;
    // Twice: to read them is not to take them away.
    for _ in 0..2 {
        let all = events(&limiter, &[])?;
        let of = |client: &Client| all.iter().find(|event| is_of(event, client, family)).context("it is there");
        let event = of(client)?;
        assert_eq!((&event["service"], &event["verdict"]), (&Value::from("default"), &Value::from("denied")));
        assert_eq!((&event["reason"], &event["stage"]), (&Value::from("source_limit"), &Value::from("syn")));
        assert_eq!(event["local"], client.service(family).to_string());
        assert_eq!(of(other)?["reason"], "rule");
        assert_eq!(events(&limiter, &["--tail", "1"])?.len(), 1);
        let filtered = events(&limiter, &["--source", &client.address(family).to_string()])?;
        assert!(!filtered.is_empty() && filtered.iter().all(|event| is_of(event, client, family)), "{filtered:?}");
    }
    let text = limiter.output(["events"])?;
    assert!(text.contains("default: denied source_limit at syn: "), "{text}");
    drop(held);
    limiter.wait_empty()
}

fn beside_a_daemon_every_follower_sees_every_event(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let limiter = Limiter::new(&lab.server)?;
    let (interface, port) = (client.server_interface(), PORT.to_string());
    let listen = std::net::SocketAddr::new(family.unspecified(), PORT).to_string();
    let mut daemon = limiter.run([
        "--interface",
        &interface,
        "--port",
        &port,
        "--listen",
        &listen,
        "--connections-per-source",
        "1",
        "--connection-rate",
        "0",
    ])?;
    let follow = || Process::start(&mut limiter.command(["events", "--follow", "--json"]));
    let followers = [follow()?, follow()?];
    // A gateway greets nobody.
    let held = client.namespace.enter(|| TcpStream::connect_timeout(&client.service(family), SOON))?;
    limiter.wait_held(client.address(family), 1)?;
    knock(client, family)?;
    for follower in &followers {
        eventually(SOON, "a follower sees it", || {
            Ok(parse(&follower.stdout())?.iter().any(|event| is_of(event, client, family)))
        })?;
    }
    eventually(SOON, "the daemon logs it all the same", || {
        let log = daemon.process().stderr();
        Ok(log.contains("refused") && log.contains("source_limit"))
    })?;
    drop(held);
    daemon.kill()?;

    // They go on without the daemon, and end when there is nothing to follow any more.
    limiter.detach()?;
    for follower in followers {
        let ended = follower.wait(SOON)?;
        assert_eq!(ended.status.code(), Some(3), "{}", ended.stderr);
        assert!(ended.stderr.contains("nothing is attached"), "{}", ended.stderr);
    }
    Ok(())
}

fn what_was_left_out_is_told(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let _server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 1, &[])?;
    let held = connect_served(&client.namespace, client.service(family), SOON)?;
    // Several in the second that one report stands for; the next one says how many were left out.
    eventually(SOON, "a later event tells of those before it", || {
        let _crowd = Crowd::connect(&client.namespace, client.service(family), 5, NO_ANSWER)?;
        Ok(events(&limiter, &[])?.iter().any(|event| event["unreported"].as_u64() > Some(0)))
    })?;
    let all = events(&limiter, &[])?;
    let told: u64 = all.iter().filter_map(|event| Some(1 + event["unreported"].as_u64()?)).sum();
    assert!(told <= limiter.counter("syn_source_limit")?, "{all:?}");
    drop(held);
    limiter.wait_empty()
}
