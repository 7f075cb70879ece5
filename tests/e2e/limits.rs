//! `limiter attach` in front of a TCP server that knows nothing of it: a source gets its limit, exactly, and no other
//! source notices.

use std::{
    io::{Read, Write},
    net::SocketAddr,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use limiter_tests::{
    both_families,
    lab::{Family, Lab, PORT},
    limiter::Limiter,
    monitor::{self, Monitor},
    netns::Namespace,
    process::Process,
    raw::RawClient,
    tcp::{Crowd, PlainServer, Seen, connect_served},
    wait::{NO_ANSWER, SOON, eventually, eventually_equal},
};

both_families!(
    a_crowd_gets_the_limit,
    a_crowd_gets_the_limit_with_cookies,
    a_crowd_gets_the_limit_in_generic_mode,
    a_crowd_gets_the_limit_in_tc_mode,
    a_crowd_gets_the_limit_in_tc_mode_with_cookies,
    a_batch_of_acks_gets_the_limit,
    a_batch_of_acks_gets_the_limit_with_cookies,
    a_batch_of_acks_gets_the_limit_in_generic_mode,
    a_batch_of_acks_gets_the_limit_in_tc_mode,
    a_batch_of_acks_gets_the_limit_in_tc_mode_with_cookies,
    a_closed_connection_makes_room_for_one,
    a_killed_process_gives_its_slots_back,
    a_new_limit_holds_at_once_and_cuts_nobody,
    the_service_has_a_limit_of_its_own,
);

/// Longer than a client waits before it sends its SYN again (1 s), so that retries are part of what is seen.
const PAST_RETRIES: Duration = Duration::from_millis(2500);

fn a_crowd_gets_the_limit(family: Family) -> Result<()> {
    crowd_gets_the_limit(family, "1", "native")
}

fn a_crowd_gets_the_limit_with_cookies(family: Family) -> Result<()> {
    crowd_gets_the_limit(family, "2", "native")
}

fn a_crowd_gets_the_limit_in_generic_mode(family: Family) -> Result<()> {
    crowd_gets_the_limit(family, "1", "generic")
}

fn a_crowd_gets_the_limit_in_tc_mode(family: Family) -> Result<()> {
    crowd_gets_the_limit(family, "1", "tc")
}

fn a_crowd_gets_the_limit_in_tc_mode_with_cookies(family: Family) -> Result<()> {
    crowd_gets_the_limit(family, "2", "tc")
}

fn crowd_gets_the_limit(family: Family, syncookies: &str, mode: &str) -> Result<()> {
    let lab = Lab::new(2)?;
    lab.server.set_sysctl("net/ipv4/tcp_syncookies", syncookies)?;
    let (client, other) = (&lab.clients[0], &lab.clients[1]);
    let server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 5, &["--attach-mode", mode])?;
    for interface in limiter.json("status")?["interfaces"].as_array().context("status lists interfaces")? {
        assert_eq!(interface["mode"], mode, "{interface}");
    }

    let monitor = Monitor::start(&lab.server, PORT)?;
    let before = Crowd::connect(&other.namespace, other.service(family), 3, SOON)?;
    assert_eq!(before.served.len(), 3);
    let crowd = Crowd::connect(&client.namespace, client.service(family), 200, PAST_RETRIES)?;
    assert_eq!(crowd.served.len(), 5, "of 200 connects from one source");
    let meanwhile = Crowd::connect(&other.namespace, other.service(family), 2, SOON)?;
    assert_eq!(meanwhile.served.len(), 2, "of another source, while the first is at its limit");

    // Whatever was established, however briefly, was accepted: five in all means that there were never more.
    assert_eq!(server.seen(client.address(family)), Seen { accepted: 5, open: 5, peak: 5 });
    assert_eq!(server.seen(other.address(family)), Seen { accepted: 5, open: 5, peak: 5 });
    let peaks = monitor.finish()?;
    assert_eq!(peaks.of(client.address(family)), 5, "most at any one time, {} samples", peaks.samples);
    limiter.wait_held(client.address(family), 5)?;
    limiter.wait_held(other.address(family), 5)?;
    assert_eq!(limiter.ledger()?.len(), 10);

    for crowd in [crowd, before, meanwhile] {
        crowd.reset()?;
    }
    limiter.wait_empty()
}

fn a_batch_of_acks_gets_the_limit(family: Family) -> Result<()> {
    batch_of_acks_gets_the_limit(family, "1", "native")
}

fn a_batch_of_acks_gets_the_limit_with_cookies(family: Family) -> Result<()> {
    batch_of_acks_gets_the_limit(family, "2", "native")
}

fn a_batch_of_acks_gets_the_limit_in_generic_mode(family: Family) -> Result<()> {
    batch_of_acks_gets_the_limit(family, "1", "generic")
}

fn a_batch_of_acks_gets_the_limit_in_tc_mode(family: Family) -> Result<()> {
    batch_of_acks_gets_the_limit(family, "1", "tc")
}

fn a_batch_of_acks_gets_the_limit_in_tc_mode_with_cookies(family: Family) -> Result<()> {
    batch_of_acks_gets_the_limit(family, "2", "tc")
}

fn batch_of_acks_gets_the_limit(family: Family, syncookies: &str, mode: &str) -> Result<()> {
    let lab = Lab::new(1)?;
    lab.server.set_sysctl("net/ipv4/tcp_syncookies", syncookies)?;
    let client = &lab.clients[0];
    // For IPv6 it listens on both families.
    let server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 5, &["--attach-mode", mode])?;

    let mut raw = RawClient::new(client, family)?;
    let mut connections = raw.half_open(50)?;
    assert_eq!(limiter.ledger()?, [], "half-open connections hold no slot");
    raw.complete(&connections)?;
    // A source of its own in both families, and behind the batch on the same link: once it is served, the batch is through.
    let behind = connect_served(&client.namespace, client.service(Family::V4), SOON)?;

    assert_eq!(server.seen(raw.address()), Seen { accepted: 5, open: 5, peak: 5 });
    limiter.wait_held(raw.address(), 5)?;
    assert_eq!(limiter.counter("handshake_source_limit")?, 45);
    // Who believes to be connected, and isn't, learns it as soon as it sends.
    assert_eq!(raw.reset_when_sending(&mut connections, 45)?, 45, "told that they are not connected");
    assert_eq!(limiter.ledger()?.len(), 6);
    assert_eq!(raw.half_open_within(1, NO_ANSWER)?.len(), 0, "a SYN past the limit is not answered");
    drop(behind);

    // All of them, as it doesn't matter which five were let in.
    raw.reset(&connections)?;
    limiter.wait_empty()
}

fn a_closed_connection_makes_room_for_one(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 5, &[])?;

    let mut crowd = Crowd::connect(&client.namespace, client.service(family), 5, SOON)?;
    assert_eq!(crowd.served.len(), 5);
    for round in 0..3 {
        assert_refused(&client.namespace, client.service(family))?;
        drop(crowd.served.swap_remove(0));
        limiter.wait_held(client.address(family), 4)?;
        let next = connect_served(&client.namespace, client.service(family), SOON);
        crowd.served.push(next.with_context(|| format!("round {round}"))?);
    }
    assert_eq!(server.seen(client.address(family)), Seen { accepted: 8, open: 5, peak: 5 });
    drop(crowd);
    limiter.wait_empty()
}

fn a_killed_process_gives_its_slots_back(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let _server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 5, &[])?;

    let mut command = client.namespace.command(env!("CARGO_BIN_EXE_limiter-test-hold"));
    let process = Process::start(command.args([client.service(family).to_string(), "5".into()]))?;
    eventually(SOON, "the process holds its connections", || Ok(process.stdout() == "holding\n"))?;
    assert_refused(&client.namespace, client.service(family))?;
    process.kill()?;
    limiter.wait_held(client.address(family), 0)?;
    let crowd = Crowd::connect(&client.namespace, client.service(family), 5, SOON)?;
    assert_eq!(crowd.served.len(), 5);
    drop(crowd);
    limiter.wait_empty()
}

fn a_new_limit_holds_at_once_and_cuts_nobody(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 5, &[])?;
    let connect = |count, patience| Crowd::connect(&client.namespace, client.service(family), count, patience);

    let mut held = connect(5, SOON)?.served;
    assert_eq!(held.len(), 5);
    assert_refused(&client.namespace, client.service(family))?;

    limiter.set_limit("connections_per_source", 8)?;
    held.extend(connect(3, SOON)?.served);
    assert_eq!(held.len(), 8, "after the limit was raised to 8");
    assert_refused(&client.namespace, client.service(family))?;

    limiter.set_limit("connections_per_source", 2)?;
    assert_refused(&client.namespace, client.service(family))?;
    assert_eq!(server.seen(client.address(family)), Seen { accepted: 8, open: 8, peak: 8 });
    for stream in &mut held {
        // Nothing comes: neither data, nor the end, nor a reset.
        stream.write_all(b"still here")?;
        let outcome = stream.read(&mut [0]).expect_err("the server says nothing");
        assert_eq!(outcome.kind(), std::io::ErrorKind::WouldBlock);
    }

    held.truncate(2);
    limiter.wait_held(client.address(family), 2)?;
    assert_refused(&client.namespace, client.service(family))?;
    held.truncate(1);
    limiter.wait_held(client.address(family), 1)?;
    held.push(connect_served(&client.namespace, client.service(family), SOON)?);
    assert_refused(&client.namespace, client.service(family))?;
    drop(held);
    limiter.wait_empty()
}

fn the_service_has_a_limit_of_its_own(family: Family) -> Result<()> {
    let lab = Lab::new(2)?;
    let server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 5, &["--connections-total", "7"])?;

    let [first, second] = [&lab.clients[0], &lab.clients[1]];
    let five = Crowd::connect(&first.namespace, first.service(family), 5, SOON)?;
    assert_eq!(five.served.len(), 5);
    let rest = Crowd::connect(&second.namespace, second.service(family), 20, PAST_RETRIES)?;
    assert_eq!(rest.served.len(), 2, "what the service has left");
    assert_eq!(server.seen(second.address(family)).accepted, 2);
    drop(five);
    limiter.wait_held(first.address(family), 0)?;
    connect_served(&second.namespace, second.service(family), SOON)?;
    drop(rest);
    limiter.wait_empty()
}

/// Clients of three sources that come and go all at once, each as fast as it can: whatever meets on two CPUs meets here.
#[test]
fn counts_stay_right_under_churn() -> Result<()> {
    const LIMIT: u32 = 3;
    const CHURN: Duration = Duration::from_secs(3);
    let lab = Lab::new(3)?;
    let server = PlainServer::start(&lab.server, Family::V6)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, LIMIT, &[])?;

    let end = Instant::now() + CHURN;
    let served = thread::scope(|scope| -> Result<Vec<usize>> {
        let workers: Vec<_> = lab
            .clients
            .iter()
            .zip([Family::V4, Family::V6, Family::V4])
            .flat_map(|client| [client; 4])
            .map(|(client, family)| {
                scope.spawn(move || -> Result<usize> {
                    let mut served = 0;
                    while Instant::now() < end {
                        // Past the limit there is no answer; then it gives up and comes again.
                        let patience = Duration::from_millis(30);
                        let crowd = Crowd::connect(&client.namespace, client.service(family), 2, patience)?;
                        served += crowd.served.len();
                    }
                    Ok(served)
                })
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().expect("a client does not panic")).collect()
    })?;

    for (client, family) in lab.clients.iter().zip([Family::V4, Family::V6, Family::V4]) {
        let seen = server.seen(client.address(family));
        assert_eq!(seen.peak, LIMIT, "the most at any one time, of {seen:?}");
    }
    assert!(served.iter().sum::<usize>() > 100, "too little happened to prove anything: {served:?}");
    limiter.wait_empty()?;
    // What a client sends again that gave up may complete a handshake late; its connection ends at once. So these are read
    // together, and until they agree.
    let mut unseen = 0;
    eventually_equal(SOON, "what was opened, less what was closed", &0, || {
        let [reserved, past, closed, expired] =
            limiter.counters(["opened_reserved", "opened_unseen", "closed_socket", "closed_expired"])?;
        unseen = past;
        Ok((reserved + past).cast_signed() - (closed + expired).cast_signed())
    })?;
    // XDP leaves a handshake to the stack where another CPU is just taking the entry of its source away, for too long.
    assert!(unseen * 100 <= served.iter().sum::<usize>() as u64, "{unseen} handshakes were not reserved by XDP");
    Ok(())
}

#[test]
fn reset_connections_are_forgotten_by_the_thousand() -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let server = PlainServer::start(&lab.server, Family::V4)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 50, &[])?;
    let mut raw = RawClient::new(client, Family::V4)?;
    for round in 1..=20 {
        let connections = raw.half_open(50)?;
        raw.complete(&connections)?;
        eventually_equal(SOON, "a whole round is accepted", &(round * 50), || Ok(server.seen(raw.address()).accepted))?;
        raw.reset(&connections)?;
        eventually_equal(SOON, "nothing is established", &None, || {
            Ok(monitor::established(&lab.server, PORT)?.get(&raw.address()).copied())
        })?;
        // Every slot of the last round is free again, or the next round stays short.
    }
    limiter.wait_empty()
}

/// A connect that gets no answer.
fn assert_refused(client: &Namespace, server: SocketAddr) -> Result<()> {
    let crowd = Crowd::connect(client, server, 1, NO_ANSWER)?;
    assert_eq!((crowd.served.len(), crowd.unserved.len(), crowd.unanswered.len()), (0, 0, 1), "past the limit");
    Ok(())
}
