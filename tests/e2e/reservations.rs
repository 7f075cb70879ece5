//! Slots that the stack never confirms, without a daemon and without anybody's packets: they keep nobody out and show nowhere
//! once their time is up. And what ends a handshake, sent again when its connection is over.

use std::net::{SocketAddr, TcpListener};

use anyhow::{Context as _, Result, ensure};
use limiter_common::ledger::{RESERVATION_NS, is_reservation};
use limiter_tests::{
    both_families,
    lab::{Family, Lab, PORT},
    limiter::Limiter,
    program::now_ns,
    raw::{RawClient, RawConnection},
    segment::{Segment, flags},
    state::State,
    tcp::{self, PlainServer, Seen, connect_served},
    wait::{SOON, eventually, eventually_equal},
};

both_families!(
    a_source_that_holds_nothing_but_what_is_overdue_is_admitted_at_its_first_syn,
    no_command_shows_what_is_overdue,
    an_ack_that_is_sent_again_after_the_end_is_counted_anew_and_within_the_limit,
    an_ack_that_is_sent_again_after_the_end_reserves_nothing_without_cookies,
    the_last_ack_of_a_close_that_comes_twice_leaves_the_counts_right,
);

const LIMIT: u32 = 5;

/// A listener whose queue is full: it has room for one connection, and nobody accepts. The stack has answered SYNs by cookies, and
/// forgets what it has no room for when the ACK comes.
struct Full<'lab> {
    listener: TcpListener,
    client: RawClient,
    limiter: Limiter<'lab>,
}

impl<'lab> Full<'lab> {
    /// Has the client reserve as many slots as there are for it, and waits until their time is up. Nothing is sent meanwhile, and no
    /// command is run.
    fn with_overdue(lab: &'lab Lab, family: Family, more: &[&str]) -> Result<Self> {
        lab.server.set_sysctl("net/ipv4/tcp_syncookies", "2")?;
        let listener = tcp::listener(&lab.server, SocketAddr::new(family.unspecified(), PORT), 0)?;
        let limiter = Limiter::new(&lab.server)?;
        limiter.protect(lab, LIMIT, more)?;
        let [mut client, mut other] =
            [RawClient::new(&lab.clients[0], family)?, RawClient::new(&lab.clients[1], family)?];
        let connections = client.half_open(LIMIT.try_into()?)?;
        let waiting = other.half_open(1)?;
        other.complete(&waiting)?;
        limiter.wait_held(other.address(), 1)?;
        client.complete(&connections)?;

        let state = State::open(&limiter)?;
        let reserved = || -> Result<Vec<u64>> {
            let entries = state.entries()?.into_iter();
            Ok(entries.filter(|(_, entry)| is_reservation(entry.owner)).map(|(_, entry)| entry.opened_ns).collect())
        };
        eventually_equal(SOON, "as many slots as there are are reserved", &(LIMIT as usize), || Ok(reserved()?.len()))?;
        let youngest = reserved()?.into_iter().max().context("there are some")?;
        eventually(SOON, "their time is up", || Ok(now_ns() > youngest + RESERVATION_NS))?;
        ensure!(reserved()?.len() == LIMIT as usize, "something has ended them");
        Ok(Self { listener, client, limiter })
    }
}

fn a_source_that_holds_nothing_but_what_is_overdue_is_admitted_at_its_first_syn(family: Family) -> Result<()> {
    for on_deny in ["drop", "reset"] {
        let lab = Lab::new(2)?;
        let mut full = Full::with_overdue(&lab, family, &["--on-deny", on_deny])?;
        // Now there is room.
        full.listener.accept()?;
        let admitted = full.client.half_open(1).with_context(|| format!("on_deny = {on_deny}"))?;
        full.client.complete(&admitted)?;
        assert_eq!(full.listener.accept()?.1.ip(), full.client.address());
        full.limiter.wait_held(full.client.address(), 1)?;
    }
    Ok(())
}

fn no_command_shows_what_is_overdue(family: Family) -> Result<()> {
    type Shown = fn(&Limiter<'_>, &RawClient) -> Result<u64>;
    let commands: [(&str, Shown); 4] = [
        ("sources", |limiter, client| limiter.held_by(client.address())),
        ("connections", |limiter, _| Ok(limiter.ledger()?.len() as u64 - 1)),
        ("status", |limiter, _| {
            limiter.json("status")?["ledger_entries"].as_u64().context("a number").map(|all| all - 1)
        }),
        ("explain", |limiter, client| {
            let output = limiter.output(["explain", &client.address().to_string(), "--json"])?;
            let explained: serde_json::Value = serde_json::from_str(&output)?;
            let service = &explained["services"][0];
            assert_eq!(service["next_syn"]["verdict"], "admitted", "{service}");
            service["connections"].as_u64().context("a number")
        }),
    ];
    for (command, shown) in commands {
        let lab = Lab::new(2)?;
        let full = Full::with_overdue(&lab, family, &[])?;
        assert_eq!(shown(&full.limiter, &full.client)?, 0, "{command}");
        assert_eq!(full.limiter.counter("closed_expired")?, u64::from(LIMIT), "{command}");
        drop(full.listener);
        full.limiter.wait_empty()?;
    }
    Ok(())
}

/// To the stack, an ACK with a cookie that it made is a new connection, whatever there was before; and so it is to the ledger.
fn an_ack_that_is_sent_again_after_the_end_is_counted_anew_and_within_the_limit(family: Family) -> Result<()> {
    let lab = Lab::new(2)?;
    lab.server.set_sysctl("net/ipv4/tcp_syncookies", "2")?;
    let server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::protecting(&lab, LIMIT)?;
    let other = &lab.clients[1];
    let mut raw = RawClient::new(&lab.clients[0], family)?;
    let connections = raw.half_open(2 * u16::try_from(LIMIT)?)?;
    let (first, rest) = connections.split_at(LIMIT as usize);
    raw.complete(first)?;
    limiter.wait_held(raw.address(), LIMIT.into())?;
    for round in 1..=3 {
        raw.reset(first)?;
        raw.reset(rest)?;
        limiter.wait_held(raw.address(), 0)?;
        eventually_equal(SOON, "none is open", &0, || Ok(server.seen(raw.address()).open))?;
        let again: Vec<_> =
            (0..8).flat_map(|_| &connections).map(|connection| connection.segment(flags::ACK)).collect();
        raw.send(&again)?;
        eventually_equal(SOON, "as many as may be", &LIMIT, || Ok(server.seen(raw.address()).open))?;
        // Another source doesn't notice.
        drop(connect_served(&other.namespace, other.service(family), SOON)?);
        let seen = server.seen(raw.address());
        assert_eq!(seen, Seen { accepted: (1 + round) * LIMIT, open: LIMIT, peak: LIMIT }, "round {round}");
        limiter.wait_held(raw.address(), LIMIT.into())?;
    }
    raw.reset(&connections)?;
    limiter.wait_empty()
}

fn an_ack_that_is_sent_again_after_the_end_reserves_nothing_without_cookies(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::protecting(&lab, LIMIT)?;
    let mut raw = RawClient::new(client, family)?;
    let connections = raw.half_open(LIMIT.try_into()?)?;
    raw.complete(&connections)?;
    limiter.wait_held(raw.address(), LIMIT.into())?;
    raw.reset(&connections)?;
    limiter.wait_held(raw.address(), 0)?;
    for _ in 0..8 {
        raw.complete(&connections)?;
    }
    // Behind them on the same link.
    drop(connect_served(&client.namespace, client.service(family), SOON)?);
    assert_eq!(server.seen(raw.address()).accepted, LIMIT);
    assert_eq!(limiter.counter("opened_reserved")?, u64::from(LIMIT) + 1);
    limiter.wait_empty()
}

/// What a client sends last is a cookie again where both sides have sent nearly as much: the stack finds the segment's size in the
/// difference, and has one more of them to choose from for IPv6. Whatever it makes of the second copy, the ledger says the same.
fn the_last_ack_of_a_close_that_comes_twice_leaves_the_counts_right(family: Family) -> Result<()> {
    let lab = Lab::new(2)?;
    lab.server.set_sysctl("net/ipv4/tcp_syncookies", "2")?;
    let server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::protecting(&lab, LIMIT)?;
    let other = &lab.clients[1];
    let mut raw = RawClient::new(&lab.clients[0], family)?;
    let connections = raw.half_open(LIMIT.try_into()?)?;
    raw.complete(&connections)?;
    eventually_equal(SOON, "all are open", &LIMIT, || Ok(server.seen(raw.address()).open))?;
    // The server's greeting, and its FIN in answer to the client's.
    let closing: Vec<_> = connections.iter().map(|&connection| after(connection, 0, 1)).collect();
    raw.send(&closing.iter().map(|connection| connection.segment(flags::FIN | flags::ACK)).collect::<Vec<_>>())?;
    eventually_equal(SOON, "all are closed", &0, || Ok(server.seen(raw.address()).open))?;
    let closed: Vec<_> = closing.iter().map(|&connection| after(connection, 1, 1)).collect();
    let last: Vec<Segment> = closed.iter().map(|connection| connection.segment(flags::ACK)).collect();
    raw.send(&last)?;
    limiter.wait_held(raw.address(), 0)?;
    raw.send(&last)?;
    drop(connect_served(&other.namespace, other.service(family), SOON)?);
    let opened = server.seen(raw.address()).open;
    limiter.wait_held(raw.address(), opened.into())?;
    raw.reset(&closed)?;
    limiter.wait_empty()
}

/// The same connection after the client has sent so many bytes more, and received as many.
fn after(connection: RawConnection, sent: u32, received: u32) -> RawConnection {
    RawConnection {
        next_sequence: connection.next_sequence.wrapping_add(sent),
        expected: connection.expected.wrapping_add(received),
        ..connection
    }
}
