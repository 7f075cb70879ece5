//! Maps that are full: what `on_full` says happens, and it is counted and shown.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, Result};
use limiter_common::{
    LedgerEntry, SourceKey, abi,
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
    wait::{NO_ANSWER, SOON, eventually_equal},
};

both_families!(
    a_full_ledger_that_is_open_lets_pass_uncounted,
    a_full_ledger_that_is_closed_refuses,
    a_full_map_of_sources_that_is_open_lets_pass_uncounted,
    a_full_map_of_sources_that_is_closed_refuses,
);

/// What the ledger has room for.
const ROOM: usize = 16;

fn config(on_full: &str) -> Result<tempfile::NamedTempFile> {
    Limiter::config_file(&format!(
        "[kernel]\non_full = \"{on_full}\"\nmax_connections = {ROOM}\naudit_interval = \"100ms\"\n\
         [limits]\nconnections_per_source = 12\nconnections_total = 0\nconnection_rate = 0\n\
         [[service]]\nname = \"plain\"\nport = {PORT}\n[[service]]\nname = \"chat\"\nport = 8081\n\
         [gateway]\nlisten = [\"127.0.0.1:8081\"]\n"
    ))
}

fn a_full_ledger_that_is_open_lets_pass_uncounted(family: Family) -> Result<()> {
    let lab = Lab::new(3)?;
    let server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    let config = config("open")?;
    let _daemon = limiter.run_on(&lab, &config)?;
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
    let config = config("closed")?;
    let _daemon = limiter.run_on(&lab, &config)?;
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

/// With room in the ledger, and none for one more source: it takes a wider tier that was configured after the map was made.
fn a_full_map_of_sources_that_is_open_lets_pass_uncounted(family: Family) -> Result<()> {
    let lab = Lab::new(2)?;
    let server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    let config = config("open")?;
    let _daemon = limiter.run_on(&lab, &config)?;
    let [known, new] = [&lab.clients[0], &lab.clients[1]];
    let some = Crowd::connect(&known.namespace, known.service(family), 2, SOON)?;
    limiter.wait_held(known.address(family), 2)?;
    let mut state = State::open(&limiter)?;
    let others = state.fill_sources()?;
    assert_eq!(others.len(), ROOM - 1);

    let uncounted = Crowd::connect(&new.namespace, new.service(family), 3, SOON)?;
    let counted = Crowd::connect(&known.namespace, known.service(family), 1, SOON)?;
    assert_eq!((uncounted.served.len(), counted.served.len()), (3, 1), "they pass");
    assert_eq!(server.seen(new.address(family)).open, 3);
    state.wait_audited()?;
    assert_eq!(limiter.counter("ledger_full")?, 3, "each is counted once");
    let said = limiter.output(["status"])?;
    assert!(said.contains("The ledger was full: 3 connections passed uncounted"), "{said}");
    assert_eq!((limiter.ledger()?.len(), limiter.held_by(known.address(family))?), (3, 3), "who has a source counts");

    state.remove_sources(&others)?;
    eventually_equal(SOON, "the uncounted are counted", &6, || Ok(limiter.ledger()?.len()))?;
    limiter.wait_held(new.address(family), 3)?;
    drop((some, uncounted, counted));
    limiter.wait_empty()
}

fn a_full_map_of_sources_that_is_closed_refuses(family: Family) -> Result<()> {
    let lab = Lab::new(2)?;
    let server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    let config = config("closed")?;
    let _daemon = limiter.run_on(&lab, &config)?;
    let [known, new] = [&lab.clients[0], &lab.clients[1]];
    let some = Crowd::connect(&known.namespace, known.service(family), 2, SOON)?;
    limiter.wait_held(known.address(family), 2)?;
    let mut state = State::open(&limiter)?;
    let others = state.fill_sources()?;

    let mut raw = RawClient::new(new, family)?;
    let mut connections = raw.half_open(3)?;
    raw.complete(&connections)?;
    assert_eq!(raw.reset_when_sending(&mut connections, 3)?, 3, "told that they are not connected");
    assert_eq!(server.seen(raw.address()).accepted, 0);
    assert_eq!((limiter.counter("handshake_ledger_full")?, limiter.counter("ledger_full")?), (3, 0));
    let said = limiter.output(["status"])?;
    assert!(said.contains("ledger_full"), "{said}");
    let counted = connect_served(&known.namespace, known.service(family), SOON)?;
    limiter.wait_held(known.address(family), 3)?;

    state.remove_sources(&others)?;
    drop(connect_served(&new.namespace, new.service(family), SOON)?);
    drop((some, counted));
    limiter.wait_empty()
}

/// What other CPUs are in the way of is no reason to raise `max_connections`.
#[test]
fn who_finds_its_source_busy_passes_and_is_counted_by_the_audit() -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let address = client.address(Family::V4);
    let _server = PlainServer::start(&lab.server, Family::V4)?;
    let limiter = Limiter::new(&lab.server)?;
    // Closed only for those that there is no room for.
    let config = config("closed")?;
    let _daemon = limiter.run_on(&lab, &config)?;
    let mut state = State::open(&limiter)?;
    let source = SourceKey::new(0, &address.into(), 32, 64);
    state.keep_busy(source)?;
    let crowd = Crowd::connect(&client.namespace, client.service(Family::V4), 3, SOON)?;
    assert_eq!(crowd.served.len(), 3, "they pass");
    let names = ["ledger_busy", "ledger_full", "handshake_ledger_full", "opened_unseen"];
    assert_eq!(limiter.counters(names)?, [3, 0, 0, 0]);
    state.remove_sources(&[source])?;
    limiter.wait_held(address, 3)?;
    assert_eq!(limiter.counters(["opened_audit", "ledger_busy"])?, [3, 3]);
    drop(crowd);
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
    let config = config("open")?;
    let _daemon = limiter.run_on(&lab, &config)?;
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
        (1..abi::DEFAULT_MAX_RULES).map(|number| Ipv4Addr::from_bits(10 << 24 | number).into()),
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

/// What is too much, by a command or a file, changes nothing, and is counted and shown.
#[test]
fn a_change_of_the_rules_that_finds_no_room_is_refused_whole_and_counted() -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let _server = PlainServer::start(&lab.server, Family::V4)?;
    let limiter = Limiter::new(&lab.server)?;
    let own = client.address(Family::V4).to_string();
    let file = |rules: &[&str]| {
        let rule = |cidr: &&str| format!("[[rule]]\ncidr = \"{cidr}\"\naction = \"deny\"\n");
        let rules = rules.iter().map(rule).collect::<Vec<_>>().concat();
        Limiter::config_file(&format!(
            "[kernel]\ninterfaces = [\"{}\"]\nmax_rules = 3\n[limits]\nconnection_rate = 0\n[[service]]\nname = \"chat\"\nport = \
             {PORT}\n{rules}",
            client.server_interface()
        ))
    };
    let attach = |rules: &[&str]| {
        let file = file(rules)?;
        limiter.outcome(["attach".as_ref(), "--config".as_ref(), file.path().as_os_str()])
    };
    let shown = || -> Result<Vec<Option<u64>>> {
        let status = limiter.json("status")?;
        Ok(["rules", "rules_size", "rules_full"].iter().map(|key| status[key].as_u64()).collect())
    };
    let cidrs = || -> Result<Vec<String>> {
        let rules = limiter.json("rules")?;
        let rules = rules["rules"].as_array().context("a list")?;
        Ok(rules.iter().filter_map(|rule| rule["cidr"].as_str().map(str::to_owned)).collect())
    };
    let first = attach(&[&own, "203.0.113.0/24"])?;
    assert!(first.status.success(), "{}", first.stderr);
    assert_eq!(shown()?, [Some(2), Some(3), Some(0)]);

    limiter.output(["deny", "198.51.100.1", "--for", "1s"])?;
    eventually_equal(SOON, "it has ended", &2, || Ok(cidrs()?.len()))?;
    limiter.output(["deny", "198.51.100.2"])?;
    let held = cidrs()?;
    assert!(held.contains(&"198.51.100.2/32".to_owned()), "what has ended makes room: {held:?}");
    let outcome = limiter.outcome(["deny", "198.51.100.3"])?;
    assert_eq!(outcome.status.code(), Some(1), "{}", outcome.stderr);
    assert!(
        outcome.stderr.contains("there is room for 3; nothing was changed")
            && outcome.stderr.contains("kernel.max_rules"),
        "{}",
        outcome.stderr
    );
    assert_eq!(shown()?, [Some(3), Some(3), Some(1)]);
    limiter.output(["allow", "198.51.100.2"])?;
    limiter.output(["deny", "198.51.100.2"])?;

    // A file whose rules and those of commands are too many together.
    let outcome = attach(&["203.0.113.0/24", "192.0.2.1", "192.0.2.2"])?;
    assert_eq!(outcome.status.code(), Some(1), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("4 rules are too many: there is room for 3"), "{}", outcome.stderr);
    assert_eq!(cidrs()?, held, "nothing of it is in force");
    let refused = Crowd::connect(&client.namespace, client.service(Family::V4), 1, NO_ANSWER)?;
    assert_eq!(refused.served.len(), 0, "the old rules hold");
    assert_eq!(shown()?, [Some(3), Some(3), Some(2)]);
    let said = limiter.output(["status"])?;
    assert!(said.contains("Rules       3 of 3") && said.contains("The rules were full: 2 changes"), "{said}");

    limiter.output(["forget", "198.51.100.2"])?;
    let outcome = attach(&["203.0.113.0/24", "192.0.2.1", "192.0.2.2"])?;
    assert!(outcome.status.success(), "{}", outcome.stderr);
    drop(refused);
    drop(connect_served(&client.namespace, client.service(Family::V4), SOON)?);
    limiter.wait_empty()
}
