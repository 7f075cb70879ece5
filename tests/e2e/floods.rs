//! Floods of SYNs: under a victim's address, from one source at its limit, from everywhere. Whoever is not the attacker
//! connects as if nothing were.

use std::{
    net::TcpStream,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use limiter_tests::{
    both_families,
    flood::{Flood, From, random_sources},
    kernel::{Feature, lacks},
    lab::{CLIENT_INTERFACE, Client, Family, Lab},
    limiter::Limiter,
    raw::{RawClient, RawConnection},
    scaled,
    tcp::{Crowd, PlainServer},
    wait::{SOON, eventually, eventually_equal},
};

const LIMIT: u32 = 5;

/// Of a flood: in all, and at a time.
fn syns() -> u32 {
    scaled(200_000, 2_000_000)
}
const BURST: u32 = 10_000;

/// Longer than a client takes to send its SYN again three times.
const PATIENCE: Duration = Duration::from_secs(15);

both_families!(
    a_victim_that_resets_opens_all_it_may_under_a_flood_in_its_name,
    a_victim_that_is_silent_opens_all_it_may_under_a_flood_in_its_name,
    others_connect_while_a_source_at_its_limit_floods,
    others_connect_while_random_sources_flood,
);

/// A flood on another thread for as long as `meanwhile` takes and until it has sent what it was to: bursts with pauses
/// between, so that others have the CPU, too. Returns how many were sent.
fn during<T: Send>(
    flood: &Flood<'_>,
    count: u32,
    burst: u32,
    meanwhile: impl FnOnce() -> Result<T> + Send,
) -> Result<(T, u32)> {
    const PAUSE: Duration = Duration::from_millis(20);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let attack = scope.spawn(|| -> Result<u32> {
            let mut sent = 0;
            while sent < count || !done.load(Ordering::Relaxed) {
                flood.send(burst)?;
                sent += burst;
                thread::sleep(PAUSE);
            }
            Ok(sent)
        });
        let outcome = meanwhile();
        done.store(true, Ordering::Relaxed);
        let sent = attack.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok((outcome?, sent))
    })
}

/// The victim's kernel answers each SYN-ACK that it did not ask for by a RST.
fn a_victim_that_resets_opens_all_it_may_under_a_flood_in_its_name(family: Family) -> Result<()> {
    if lacks(Feature::LiveFrames)? {
        return Ok(());
    }
    let lab = Lab::new(2)?;
    let (home, elsewhere) = (&lab.clients[0], &lab.clients[1]);
    let server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, LIMIT, &[])?;
    let victim = home.address(family);
    let open_all = || -> Result<Crowd> {
        let crowd = Crowd::connect(&home.namespace, home.service(family), LIMIT.try_into()?, PATIENCE)?;
        ensure!(crowd.served.len() == usize::try_from(LIMIT)?, "{crowd:?}");
        Ok(crowd)
    };
    let flood = Flood::new(elsewhere, family, From::One(victim))?;
    // 50,000 a second, where the machine takes as many.
    let (crowd, _) = during(&flood, syns() / 4, 1000, || {
        eventually(SOON, "the flood is on", || Ok(limiter.counter("syn_admitted")? > 10_000))?;
        assert_eq!(limiter.held_by(victim)?, 0, "the flood counts for nothing");
        for _ in 0..3 {
            open_all()?.reset()?;
            limiter.wait_held(victim, 0)?;
        }
        open_all()
    })?;
    assert_eq!(limiter.held_by(victim)?, u64::from(LIMIT));
    crowd.reset()?;
    limiter.wait_held(victim, 0)?;
    open_all()?.reset()?;
    limiter.wait_empty()?;
    assert_eq!(server.seen(victim).peak, LIMIT);
    Ok(())
}

/// Nobody answers what the flood brings upon the victim, so the server's queue of half-open connections stays full.
fn a_victim_that_is_silent_opens_all_it_may_under_a_flood_in_its_name(family: Family) -> Result<()> {
    if lacks(Feature::LiveFrames)? {
        return Ok(());
    }
    let lab = Lab::new(2)?;
    let (home, elsewhere) = (&lab.clients[0], &lab.clients[1]);
    let server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, LIMIT, &[])?;
    let mut victim = RawClient::new(home, family)?;
    let address = victim.address();
    let flood = Flood::new(elsewhere, family, From::One(address))?;
    let (connections, _) = during(&flood, syns() / 4, 1000, || {
        eventually(SOON, "the flood is on", || Ok(limiter.counter("syn_admitted")? > 10_000))?;
        assert_eq!(limiter.held_by(address)?, 0, "the flood counts for nothing");
        open(&mut victim, &server, LIMIT)
    })?;
    assert_eq!(limiter.held_by(address)?, u64::from(LIMIT));
    victim.reset(&connections)?;
    limiter.wait_empty()?;
    let connections = open(&mut victim, &server, LIMIT)?;
    victim.reset(&connections)?;
    limiter.wait_empty()
}

/// Opens connections one after the other, sending again what may have been lost in the flood.
fn open(raw: &mut RawClient, server: &PlainServer, count: u32) -> Result<Vec<RawConnection>> {
    let mut connections = Vec::new();
    for number in 1..=count {
        let mut last = None;
        eventually(PATIENCE, "a SYN is answered", || {
            last = raw.half_open_within(1, Duration::from_secs(1))?.pop();
            Ok(last.is_some())
        })?;
        let connection = last.context("there is an answer")?;
        eventually(PATIENCE, "the handshake is complete", || {
            raw.complete(&[connection])?;
            Ok(eventually_equal(Duration::from_secs(1), "open", &number, || Ok(server.seen(raw.address()).open))
                .is_ok())
        })?;
        connections.push(connection);
    }
    Ok(connections)
}

fn others_connect_while_a_source_at_its_limit_floods(family: Family) -> Result<()> {
    if lacks(Feature::LiveFrames)? {
        return Ok(());
    }
    let lab = Lab::new(2)?;
    let (attacker, other) = (&lab.clients[0], &lab.clients[1]);
    let _server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, LIMIT, &[])?;
    let held = Crowd::connect(&attacker.namespace, attacker.service(family), LIMIT.try_into()?, SOON)?;
    assert_eq!(held.served.len(), usize::try_from(LIMIT)?);
    let flood = Flood::new(attacker, family, From::One(attacker.address(family)))?;
    let (connects, sent) = during(&flood, syns(), BURST, || connect_20_times_a_second(other, family))?;
    let refused = limiter.counter("syn_source_limit")?;
    println!("{refused} of {sent} SYNs refused, {connects} connects meanwhile");
    assert!(refused > u64::from(sent) / 2, "{refused} of {sent} SYNs were refused");
    assert_eq!(limiter.held_by(attacker.address(family))?, u64::from(LIMIT));
    drop(held);
    limiter.wait_empty()
}

fn others_connect_while_random_sources_flood(family: Family) -> Result<()> {
    if lacks(Feature::LiveFrames)? {
        return Ok(());
    }
    let lab = Lab::new(2)?;
    let (attacker, other) = (&lab.clients[0], &lab.clients[1]);
    let _server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, LIMIT, &[])?;
    // The answers go back the way that the SYNs came, and find nobody.
    let (sources, via) = (random_sources(family), attacker.address(family));
    lab.server.ip(&format!("route add {sources} via {via} dev {}", attacker.server_interface()))?;
    let flood = Flood::new(attacker, family, From::Random)?;
    let (connects, sent) = during(&flood, syns(), BURST / 10, || connect_20_times_a_second(other, family))?;
    let admitted = limiter.counter("syn_admitted")?;
    println!("{admitted} of {sent} SYNs admitted, {connects} connects meanwhile");
    assert!(admitted > u64::from(sent) / 2, "{admitted} of {sent} SYNs were seen");
    limiter.wait_empty()?;
    // The stack has taken them for right ones, and answered.
    let received = attacker.namespace.received_packets(CLIENT_INTERFACE)?;
    assert!(received > 1000, "{received} answers");
    Ok(())
}

/// For three seconds; returns how many. Each one has to be served.
fn connect_20_times_a_second(client: &Client, family: Family) -> Result<usize> {
    const PACE: Duration = Duration::from_millis(50);
    const COUNT: usize = 60;
    let mut open: Vec<TcpStream> = Vec::new();
    let begun = Instant::now();
    for number in 0..COUNT {
        let mut crowd = Crowd::connect(&client.namespace, client.service(family), 1, PATIENCE)?;
        open.push(
            crowd.served.pop().with_context(|| format!("connect {number} after {:?}: {crowd:?}", begun.elapsed()))?,
        );
        if open.len() == 3 {
            open.remove(0);
        }
        thread::sleep(PACE.saturating_sub(begun.elapsed().saturating_sub(PACE * u32::try_from(number)?)));
    }
    Ok(COUNT)
}
