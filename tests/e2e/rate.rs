//! How fast a source may open connections: a burst at once, then one by one; and nobody else pays for it.

use std::time::{Duration, Instant};

use anyhow::Result;
use limiter_tests::{
    both_families,
    lab::{Family, Lab},
    limiter::Limiter,
    raw::RawClient,
    tcp::{Crowd, PlainServer, connect_served},
    wait::{SOON, eventually_equal},
};

both_families!(
    a_burst_passes_and_the_rest_is_paced,
    a_batch_of_acks_gets_the_burst,
    spoofed_syns_do_not_spend_the_victims_tokens,
    a_new_rate_holds_at_once,
);

/// How long a client that should get no answer waits for one; shorter than any token takes here.
const NO_ANSWER: Duration = Duration::from_millis(300);

fn a_burst_passes_and_the_rest_is_paced(family: Family) -> Result<()> {
    let lab = Lab::new(2)?;
    let (client, other) = (&lab.clients[0], &lab.clients[1]);
    let server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 100, &["--connection-rate", "1"])?;
    limiter.set_limit("connection_burst", 5)?;

    let begin = Instant::now();
    let crowd = Crowd::connect(&client.namespace, client.service(family), 30, NO_ANSWER)?;
    assert_eq!(crowd.served.len(), 5, "of 30 connects at once");
    let elsewhere = Crowd::connect(&other.namespace, other.service(family), 3, SOON)?;
    assert_eq!(elsewhere.served.len(), 3, "of another source, meanwhile");
    // The clients' own stacks try again, and one a second gets in.
    let patience = Duration::from_secs(6);
    let later = Crowd::connect(&client.namespace, client.service(family), 20, patience)?;
    let accepted = server.seen(client.address(family)).accepted;
    let seconds = u32::try_from(begin.elapsed().as_secs())?;
    assert!(accepted <= 5 + seconds, "{accepted} in {seconds} s");
    assert!(accepted > 5, "whoever was refused gets in after waiting");
    assert!(limiter.counter("syn_rate_limit")? > 0);
    assert_eq!(limiter.counter("syn_source_limit")?, 0);

    drop((crowd, elsewhere, later));
    limiter.wait_empty()
}

fn a_batch_of_acks_gets_the_burst(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 0, &["--connection-rate", "1"])?;
    limiter.set_limit("connection_burst", 7)?;

    // All of them ask while there are tokens, so it is decided where they prove themselves.
    let mut raw = RawClient::new(client, family)?;
    let mut connections = raw.half_open(50)?;
    let begin = Instant::now();
    raw.complete(&connections)?;
    eventually_equal(SOON, "every ACK is decided on", &50, || {
        Ok(limiter.counter("opened_reserved")? + limiter.counter("handshake_rate_limit")?)
    })?;
    let opened = limiter.counter("opened_reserved")?;
    let returned = begin.elapsed().as_secs();
    assert!((7..=7 + returned).contains(&opened), "{opened} of a burst of 7");
    limiter.wait_held(raw.address(), opened)?;
    eventually_equal(SOON, "the server has accepted them", &opened, || {
        Ok(u64::from(server.seen(raw.address()).accepted))
    })?;
    let refused = 50 - usize::try_from(opened)?;
    assert_eq!(raw.reset_when_sending(&mut connections, refused)?, refused, "told that they are not connected");
    raw.reset(&connections)?;
    limiter.wait_empty()
}

fn spoofed_syns_do_not_spend_the_victims_tokens(family: Family) -> Result<()> {
    let lab = Lab::new(2)?;
    let (home, elsewhere) = (&lab.clients[0], &lab.clients[1]);
    let server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 20, &["--connection-rate", "1"])?;
    limiter.set_limit("connection_burst", 5)?;

    let mut victim = RawClient::new(home, family)?;
    let mut attacker = RawClient::with_address(elsewhere, victim.address(), family)?;
    attacker.send_syns(500)?;
    eventually_equal(SOON, "the SYNs were admitted, as nobody has proved anything", &500, || {
        limiter.counter("syn_admitted")
    })?;
    let connections = victim.half_open(5)?;
    victim.complete(&connections)?;
    eventually_equal(SOON, "the victim has its whole burst", &5, || Ok(server.seen(victim.address()).accepted))?;
    assert_eq!(limiter.counter("handshake_rate_limit")?, 0);
    victim.reset(&connections)?;
    limiter.wait_empty()
}

fn a_new_rate_holds_at_once(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let _server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 100, &["--connection-rate", "1"])?;
    limiter.set_limit("connection_burst", 2)?;
    let burst = Crowd::connect(&client.namespace, client.service(family), 10, NO_ANSWER)?;
    assert_eq!(burst.served.len(), 2);

    limiter.output(["limit", "set", "connection_rate=1000", "connection_burst=50"])?;
    let next = Crowd::connect(&client.namespace, client.service(family), 20, SOON)?;
    assert_eq!(next.served.len(), 20, "after the rate was raised");
    limiter.set_limit("connection_rate", 0)?;
    let all = Crowd::connect(&client.namespace, client.service(family), 60, SOON)?;
    assert_eq!(all.served.len(), 60, "without a rate");
    assert_eq!(limiter.json("status")?["services"][0]["connection_burst"], 50);
    connect_served(&client.namespace, client.service(family), SOON)?;
    drop((burst, next, all));
    limiter.wait_empty()
}
