//! The ways in which `limiter attach` can be asked to limit, and what it shows of it.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context, Result};
use limiter_tests::{
    both_families,
    lab::{Family, Lab, PORT},
    limiter::Limiter,
    monitor,
    netns::Namespace,
    raw::RawClient,
    state::State,
    tcp::{self, Crowd, PlainServer, connect_served},
    wait::{SOON, eventually_equal},
};
use serde_json::{Value, json};

both_families!(observing_refuses_nobody, a_reservation_that_the_stack_never_confirms_expires, it_works_on_loopback,);

/// Longer than a client waits before it sends its SYN again (1 s), so that retries are part of what is seen.
const PAST_RETRIES: Duration = Duration::from_millis(2500);

fn observing_refuses_nobody(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let _server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 5, &["--on-deny", "observe"])?;
    let crowd = Crowd::connect(&client.namespace, client.service(family), 20, SOON)?;
    assert_eq!(crowd.served.len(), 20);
    limiter.wait_held(client.address(family), 20)?;
    let late = connect_served(&client.namespace, client.service(family), SOON)?;
    assert_eq!(limiter.counter("handshake_observed_source_limit")?, 16, "the twenty and the late one, but for five");
    assert!(limiter.counter("syn_observed_source_limit")? >= 1, "the late one at least");
    assert_eq!(limiter.counter("syn_source_limit")? + limiter.counter("handshake_source_limit")?, 0);
    drop((crowd, late));
    limiter.wait_empty()
}

/// The server is too slow to accept: the handshake is complete, the slot is reserved, and the stack drops the ACK.
fn a_reservation_that_the_stack_never_confirms_expires(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let _listener = tcp::listener(&lab.server, SocketAddr::new(family.unspecified(), PORT), 2)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 5, &[])?;
    let mut raw = RawClient::new(&lab.clients[0], family)?;
    let connections = raw.half_open(5)?;
    raw.complete(&connections)?;
    limiter.wait_held(raw.address(), 5)?;
    let established = monitor::established(&lab.server, PORT)?.get(&raw.address()).copied();
    assert_eq!(established, Some(3), "the backlog and one");
    // No daemon runs, and no command is: what expires them are the packets themselves, and a refused SYN is enough.
    let state = State::open(&limiter)?;
    eventually_equal(SOON, "the two that were never confirmed are gone", &3, || {
        raw.send_syns(1)?;
        Ok(state.entries()?.len())
    })?;
    assert_eq!(limiter.counter("closed_expired")?, 2);
    raw.reset(&connections)?;
    limiter.wait_empty()
}

fn it_works_on_loopback(family: Family) -> Result<()> {
    let host = Namespace::new()?;
    let (server_address, sources) = match family {
        Family::V4 => ("127.0.0.1", ["127.0.0.2", "127.0.0.3"]),
        Family::V6 => ("::1", ["2001:db8:1::1", "2001:db8:2::1"]),
    };
    if family == Family::V6 {
        for source in sources {
            host.ip(&format!("addr add {source}/128 dev lo nodad"))?;
        }
    }
    let service = SocketAddr::new(server_address.parse()?, PORT);
    let [source, other] = [sources[0].parse()?, sources[1].parse()?];
    let server = PlainServer::start(&host, family)?;
    let limiter = Limiter::new(&host)?;
    limiter.attach(["--interface", "lo", "--port", "8080", "--connections-per-source", "5"])?;
    assert_eq!(limiter.json("status")?["interfaces"][0]["mode"], "generic", "lo has no native XDP");

    let crowd = Crowd::connect_from(&host, Some(source), service, 50, PAST_RETRIES)?;
    assert_eq!(crowd.served.len(), 5);
    let others = Crowd::connect_from(&host, Some(other), service, 5, SOON)?;
    assert_eq!(others.served.len(), 5);
    assert_eq!(server.seen(source).accepted, 5);
    limiter.wait_held(source, 5)?;
    drop((crowd, others));
    limiter.wait_empty()
}

#[test]
fn an_ipv6_source_is_a_whole_64() -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let server = PlainServer::start(&lab.server, Family::V6)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 5, &[])?;
    client.namespace.ip("addr add 2001:db8:0:1:ffff::1/64 dev eth0 nodad")?;

    let second = "2001:db8:0:1:ffff::1".parse()?;
    let connect = |from, count, patience| {
        Crowd::connect_from(&client.namespace, Some(from), client.service(Family::V6), count, patience)
    };
    let crowd = connect(client.address(Family::V6), 3, SOON)?;
    assert_eq!(crowd.served.len(), 3);
    let more = connect(second, 10, PAST_RETRIES)?;
    assert_eq!(more.served.len(), 2, "what the other address has left");
    assert_eq!(server.seen(second).accepted, 2);
    limiter.wait_held(second, 5)
}

#[test]
fn a_limit_of_zero_is_none() -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let _server = PlainServer::start(&lab.server, Family::V4)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 0, &[])?;
    let crowd = Crowd::connect(&client.namespace, client.service(Family::V4), 100, SOON)?;
    assert_eq!(crowd.served.len(), 100);
    limiter.wait_held(client.address(Family::V4), 100)
}

#[test]
fn the_counts_are_shown_as_documented() -> Result<()> {
    let lab = Lab::new(2)?;
    let [first, second] = [&lab.clients[0], &lab.clients[1]];
    let _server = PlainServer::start(&lab.server, Family::V6)?;
    let limiter = Limiter::new(&lab.server)?;
    let config =
        Limiter::config_file("[limits]\nconnections_per_source = 5\n[[service]]\nname = \"chat\"\nport = 8080\n")?;
    let mut arguments = lab.interface_flags();
    arguments.extend(["--config".into(), config.path().display().to_string()]);
    limiter.attach(arguments)?;
    let _two = Crowd::connect(&first.namespace, first.service(Family::V4), 2, SOON)?;
    let three = Crowd::connect(&second.namespace, second.service(Family::V6), 3, SOON)?;
    limiter.wait_held(second.address(Family::V6), 3)?;

    let rows = [
        json!({"service": "chat", "source": "2001:db8:0:2::/64", "tier": "narrow", "connections": 3, "limit": 5}),
        json!({"service": "chat", "source": "198.18.1.2/32", "tier": "narrow", "connections": 2, "limit": 5}),
    ];
    assert_eq!(limiter.json("sources")?, json!({"sources": rows}));
    let top: Value = serde_json::from_str(&limiter.output(["sources", "--top", "1", "--json"])?)?;
    assert_eq!(top, json!({"sources": rows[..1]}));
    let of_second = limiter.output(["connections", "--source", "2001:db8::/32", "--json"])?;
    let of_second: Value = serde_json::from_str(&of_second)?;
    let mut remotes: Vec<_> = of_second["connections"]
        .as_array()
        .context("a list")?
        .iter()
        .filter_map(|row| row["remote"].as_str()?.parse::<SocketAddr>().ok())
        .collect();
    let mut clients = three.served.iter().map(std::net::TcpStream::local_addr).collect::<Result<Vec<_>, _>>()?;
    remotes.sort();
    clients.sort();
    assert_eq!(remotes, clients);
    let status = limiter.json("status")?;
    let service = &status["services"][0];
    assert_eq!((&service["name"], &service["connections"]), (&json!("chat"), &json!(5)));
    assert_eq!((&status["ledger_entries"], &status["sources"]), (&json!(5), &json!(2)));
    let table = limiter.output(["sources"])?;
    for cell in ["198.18.1.2/32", "2001:db8:0:2::/64", "chat"] {
        assert!(table.contains(cell), "{table}");
    }
    Ok(())
}

#[test]
fn a_port_that_is_no_service_is_left_alone() -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let free = SocketAddr::new(client.server_address(Family::V4), 9000);
    let _server = PlainServer::listen(&lab.server, free)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 5, &[])?;
    let crowd = Crowd::connect(&client.namespace, free, 50, SOON)?;
    assert_eq!(crowd.served.len(), 50);
    assert_eq!(limiter.ledger()?, []);
    Ok(())
}
