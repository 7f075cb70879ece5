//! Packets under somebody else's address: they cost nobody a slot, and free none.

use std::{
    net::{IpAddr, SocketAddr},
    thread,
    time::Duration,
};

use anyhow::Result;
use limiter_tests::{
    both_families,
    lab::{Client, Family, Lab, PORT},
    limiter::Limiter,
    raw::RawClient,
    segment::{Segment, flags},
    tcp::{Crowd, PlainServer, Seen, connect_served},
    wait::{SOON, eventually_equal},
};

both_families!(
    spoofed_syns_cost_the_victim_nothing,
    spoofed_syns_cost_the_victim_nothing_with_cookies,
    an_ack_that_proves_nothing_takes_no_slot,
    a_forged_end_frees_no_slot,
);

fn spoofed_syns_cost_the_victim_nothing(family: Family) -> Result<()> {
    spoofed_syns(family, "1")
}

fn spoofed_syns_cost_the_victim_nothing_with_cookies(family: Family) -> Result<()> {
    spoofed_syns(family, "2")
}

/// Fifty SYNs a second for two seconds, all with the address of a victim that stays silent to what they bring it.
fn spoofed_syns(family: Family, syncookies: &str) -> Result<()> {
    const SYNS: u16 = 100;
    const PACE: Duration = Duration::from_millis(20);
    let lab = Lab::new(2)?;
    lab.server.set_sysctl("net/ipv4/tcp_syncookies", syncookies)?;
    let (home, elsewhere) = (&lab.clients[0], &lab.clients[1]);
    let server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 5, &[])?;

    let mut victim = RawClient::new(home, family)?;
    let mut attacker = RawClient::with_address(elsewhere, victim.address(), family)?;
    let connections = thread::scope(|scope| -> Result<_> {
        let attack = scope.spawn(move || -> Result<()> {
            for _ in 0..SYNS {
                attacker.send_syns(1)?;
                thread::sleep(PACE);
            }
            Ok(())
        });
        // More spoofed half-open connections than the victim has slots.
        let opened = eventually_equal(SOON, "the attack is under way", &true, || {
            Ok(limiter.counter("syn_admitted")? >= u64::from(SYNS) / 4)
        });
        assert_eq!(limiter.held_by(victim.address())?, 0);
        let mut connections = Vec::new();
        for held in 1..=5 {
            connections.extend(victim.half_open(1)?);
            victim.complete(&connections[connections.len() - 1..])?;
            eventually_equal(SOON, "the victim is served", &held, || Ok(server.seen(victim.address()).open))?;
        }
        attack.join().expect("the attacker does not panic")?;
        opened.map(|()| connections)
    })?;

    assert_eq!(server.seen(victim.address()), Seen { accepted: 5, open: 5, peak: 5 });
    assert_eq!(limiter.held_by(victim.address())?, 5);
    assert_eq!(limiter.ledger()?.len(), 5);
    victim.reset(&connections)?;
    limiter.wait_empty()
}

/// ACKs to half-open connections from somebody who has not seen the SYN-ACK.
fn an_ack_that_proves_nothing_takes_no_slot(family: Family) -> Result<()> {
    let lab = Lab::new(2)?;
    let (home, elsewhere) = (&lab.clients[0], &lab.clients[1]);
    let server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 5, &[])?;

    let mut victim = RawClient::new(home, family)?;
    let attacker = RawClient::with_address(elsewhere, victim.address(), family)?;
    let half_open = victim.half_open(10)?;
    let forged: Vec<_> = half_open
        .iter()
        .enumerate()
        .map(|(place, connection)| {
            let mut ack = connection.segment(flags::ACK);
            // Beside the right number by one, by two, by four, …
            ack.acknowledgement = ack.acknowledgement.wrapping_add(1 << place);
            ack
        })
        .collect();
    attacker.send(&forged)?;
    connect_served(&elsewhere.namespace, elsewhere.service(family), SOON)?;
    assert_eq!(server.seen(victim.address()), Seen::default());
    assert_eq!(limiter.held_by(victim.address())?, 0);
    assert_eq!(limiter.counter("handshake_unproven")?, 10);
    Ok(())
}

/// Segments that would end a connection if their sequence numbers were right.
fn a_forged_end_frees_no_slot(family: Family) -> Result<()> {
    let lab = Lab::new(2)?;
    let (home, elsewhere) = (&lab.clients[0], &lab.clients[1]);
    let server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 5, &[])?;
    let victim = home.address(family);
    let crowd = Crowd::connect(&home.namespace, home.service(family), 5, SOON)?;
    assert_eq!(crowd.served.len(), 5);

    let mut segments = Vec::new();
    for stream in &crowd.served {
        for kind in [flags::RST, flags::RST | flags::ACK, flags::FIN | flags::ACK, flags::FIN, flags::SYN] {
            // Whatever the right numbers are, at most one of these is near them, and it is far outside any window.
            for guess in [1 << 28, 5 << 28, 9 << 28, 13 << 28] {
                segments.push(guessed(stream.local_addr()?, home, family, kind, guess));
            }
        }
    }
    // Guesses that the kernel would take as right by chance: 2^16 of window in 2^32, times a hundred; they would show as
    // a closed connection below.
    let attacker = RawClient::with_address(elsewhere, victim, family)?;
    attacker.send(&segments)?;
    connect_served(&elsewhere.namespace, elsewhere.service(family), SOON)?;

    assert_eq!(server.seen(victim), Seen { accepted: 5, open: 5, peak: 5 });
    assert_eq!(limiter.held_by(victim)?, 5);
    let refused = Crowd::connect(&home.namespace, home.service(family), 1, Duration::from_millis(300))?;
    assert_eq!(refused.unanswered.len(), 1, "the source is still at its limit");
    drop((crowd, refused));
    limiter.wait_empty()
}

fn guessed(client: SocketAddr, home: &Client, family: Family, kind: u8, sequence: u32) -> Segment {
    let server: IpAddr = home.server_address(family);
    Segment {
        source: client,
        destination: SocketAddr::new(server, PORT),
        sequence,
        acknowledgement: if kind & flags::ACK == 0 { 0 } else { !sequence },
        flags: kind,
        options: Vec::new(),
        payload: Vec::new(),
    }
}
