//! Maps that are full: what `on_full` says happens, and it is counted and shown.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, Result};
use limiter_common::{
    LedgerEntry, abi,
    ledger::reservation_owner,
    rule::{RuleAction, RuleEntry},
};
use limiter_tests::{
    both_families,
    lab::{Family, Lab, PORT},
    limiter::Limiter,
    program::now_ns,
    raw::RawClient,
    state::State,
    tcp::{Crowd, PlainServer, connect_served},
    wait::{SOON, eventually_equal},
};

both_families!(a_full_ledger_that_is_open_lets_pass_uncounted, a_full_ledger_that_is_closed_refuses);

/// What the ledger has room for.
const ROOM: usize = 16;

/// How long an answer that should not come is waited for.
const NO_ANSWER: Duration = Duration::from_millis(300);

fn arguments(lab: &Lab, on_full: &str) -> Result<(tempfile::NamedTempFile, Vec<String>)> {
    let config = Limiter::config_file(&format!(
        "[kernel]\non_full = \"{on_full}\"\nmax_connections = {ROOM}\naudit_interval = \"100ms\"\n\
         [limits]\nconnections_per_source = 12\nconnections_total = 0\nconnection_rate = 0\n\
         [[service]]\nname = \"plain\"\nport = {PORT}\n[[service]]\nname = \"chat\"\nport = 8081\n\
         [gateway]\nlisten = [\"127.0.0.1:8081\"]\n"
    ))?;
    let mut arguments = lab.interface_flags();
    arguments.extend(["--config".into(), config.path().display().to_string()]);
    Ok((config, arguments))
}

fn a_full_ledger_that_is_open_lets_pass_uncounted(family: Family) -> Result<()> {
    let lab = Lab::new(3)?;
    let server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    let (_config, arguments) = arguments(&lab, "open")?;
    let _daemon = limiter.run(arguments)?;
    let [first, second, third] = [&lab.clients[0], &lab.clients[1], &lab.clients[2]];
    let held = Crowd::connect(&first.namespace, first.service(family), 12, SOON)?;
    let some = Crowd::connect(&second.namespace, second.service(family), 4, SOON)?;
    assert_eq!((held.served.len(), some.served.len()), (12, 4));
    assert_eq!(limiter.ledger()?.len(), ROOM);

    // Of a source that has an entry, and of one that finds no room for one.
    let more = Crowd::connect(&second.namespace, second.service(family), 3, SOON)?;
    let others = Crowd::connect(&third.namespace, third.service(family), 5, SOON)?;
    assert_eq!((more.served.len(), others.served.len()), (3, 5), "they pass");
    assert_eq!(server.seen(third.address(family)).open, 5);
    // However often the audit finds that there is no room for them.
    let state = State::open(&limiter)?;
    state.wait_audited()?;
    state.wait_audited()?;
    assert_eq!(limiter.counter("ledger_full")?, 8, "each is counted once");
    let said = limiter.output(["status"])?;
    assert!(said.contains("The ledger was full: 8 connections passed uncounted"), "{said}");
    assert_eq!(limiter.ledger()?.len(), ROOM);
    assert_eq!(limiter.held_by(second.address(family))?, 4);

    // Where there is room again, what is open is entered by the audit.
    drop(held);
    eventually_equal(SOON, "the uncounted are counted", &(4 + 3 + 5), || Ok(limiter.ledger()?.len()))?;
    drop((some, more, others));
    limiter.wait_empty()
}

fn a_full_ledger_that_is_closed_refuses(family: Family) -> Result<()> {
    let lab = Lab::new(3)?;
    let server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    let (_config, arguments) = arguments(&lab, "closed")?;
    let _daemon = limiter.run(arguments)?;
    let [first, second, third] = [&lab.clients[0], &lab.clients[1], &lab.clients[2]];
    let held = Crowd::connect(&first.namespace, first.service(family), 12, SOON)?;
    let some = Crowd::connect(&second.namespace, second.service(family), 4, SOON)?;
    assert_eq!((held.served.len(), some.served.len()), (12, 4));

    let mut raw = RawClient::new(third, family)?;
    let mut connections = raw.half_open(5)?;
    raw.complete(&connections)?;
    assert_eq!(raw.reset_when_sending(&mut connections, 5)?, 5, "told that they are not connected");
    assert_eq!(server.seen(raw.address()).accepted, 0);
    assert_eq!(limiter.counter("handshake_ledger_full")?, 5);
    assert_eq!(limiter.counter("ledger_full")?, 0);
    let said = limiter.output(["status"])?;
    assert!(said.contains("ledger_full"), "{said}");
    assert_eq!(limiter.ledger()?.len(), ROOM);

    drop(some);
    limiter.wait_held(second.address(family), 0)?;
    drop(connect_served(&third.namespace, third.service(family), SOON)?);
    drop(held);
    limiter.wait_empty()
}

/// The queue of reservations has room for 65,536. One that was pushed out of it, and that the stack never confirms, would hold
/// its slot for ever.
#[test]
fn a_reservation_that_is_in_no_queue_is_given_back() -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let address = client.address(Family::V4);
    let _server = PlainServer::start(&lab.server, Family::V4)?;
    let limiter = Limiter::new(&lab.server)?;
    let (_config, arguments) = arguments(&lab, "open")?;
    let _daemon = limiter.run(arguments)?;
    let held = connect_served(&client.namespace, client.service(Family::V4), SOON)?;
    limiter.wait_held(address, 1)?;
    let mut state = State::open(&limiter)?;
    let (_, entry) = state.entries()?.pop().context("there is an entry")?;
    // Made before it is forgotten, and so long ago that it is.
    let long_ago_ns = now_ns() - 60_000_000_000;
    let young = LedgerEntry { owner: reservation_owner(now_ns()), opened_ns: now_ns(), ..entry };
    let old = LedgerEntry { owner: reservation_owner(long_ago_ns), opened_ns: long_ago_ns, ..entry };
    state.enter(&young, 1, PORT)?;
    state.enter(&old, 2, PORT)?;
    limiter.wait_held(address, 2)?;
    assert_eq!(limiter.counter("closed_expired")?, 1);
    state.wait_audited()?;
    let ports: Vec<u16> = limiter.ledger()?.iter().map(SocketAddr::port).collect();
    assert!(ports.contains(&1) && !ports.contains(&2), "{ports:?}");
    assert_eq!(limiter.json("status")?["repairs"], 0);
    drop(held);
    limiter.wait_held_within(Duration::from_secs(30), address, 0)
}

/// A million rules, and one more.
#[test]
fn a_full_map_of_rules_takes_no_more_and_keeps_those_that_it_has() -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let _server = PlainServer::start(&lab.server, Family::V4)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 5, &[])?;
    let address = client.address(Family::V4);
    limiter.output(["deny", &address.to_string()])?;
    let state = State::open(&limiter)?;
    state.fill_rules(
        (1..abi::MAX_RULES).map(|number| Ipv4Addr::from_bits(10 << 24 | number).into()),
        RuleEntry { action: RuleAction::Allow as u8, ..RuleEntry::default() },
    )?;
    let outcome = limiter.outcome(["deny", "192.0.2.7"])?;
    assert_eq!(outcome.status.code(), Some(1), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("1048576"), "it says how many there may be: {}", outcome.stderr);
    // Those that there are hold.
    let refused = Crowd::connect(&client.namespace, client.service(Family::V4), 1, NO_ANSWER)?;
    assert_eq!(refused.served.len(), 0, "denied");
    Ok(())
}
