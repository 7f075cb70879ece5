//! The harness itself, against the kernel alone: without limiter everything gets through. A scenario that finds exactly
//! five connections proves something only if the same clients get fifty without limiter.

use std::time::Duration;

use anyhow::Result;
use limiter_tests::{
    bare::{Answer, BareXdp},
    both_families,
    lab::{Family, Lab, PORT},
    monitor::{self, Monitor},
    process::Process,
    raw::RawClient,
    segment::flags,
    tcp::{Crowd, PlainServer, Seen, connect_served},
    wait::{SOON, eventually, eventually_equal},
};

both_families!(
    a_crowd_is_served_whole,
    raw_handshakes_complete_in_one_batch,
    raw_handshakes_complete_with_cookies,
    spoofed_syns_stay_half_open,
    a_killed_process_closes_its_connections,
    a_forged_reset_is_ignored_and_a_right_one_is_not,
);

fn a_crowd_is_served_whole(family: Family) -> Result<()> {
    let lab = Lab::new(2)?;
    let server = PlainServer::start(&lab.server, family)?;
    let monitor = Monitor::start(&lab.server, PORT)?;
    let client = &lab.clients[1];
    let crowd = Crowd::connect(&client.namespace, client.service(family), 200, SOON)?;
    assert_eq!((crowd.served.len(), crowd.refused), (200, 0));
    assert_eq!(server.seen(client.address(family)), Seen { accepted: 200, open: 200, peak: 200 });
    eventually_equal(SOON, "all are in the kernel's list", &Some(200), || {
        Ok(monitor::established(&lab.server, PORT)?.get(&client.address(family)).copied())
    })?;
    let peaks = monitor.finish()?;
    assert_eq!(peaks.of(client.address(family)), 200, "{} samples", peaks.samples);
    assert_eq!(peaks.of(lab.clients[0].address(family)), 0);
    drop(crowd);
    eventually(SOON, "all are closed", || Ok(server.seen(client.address(family)).open == 0))?;
    Ok(())
}

fn raw_handshakes_complete_in_one_batch(family: Family) -> Result<()> {
    raw_handshakes(family, "1")
}

fn raw_handshakes_complete_with_cookies(family: Family) -> Result<()> {
    raw_handshakes(family, "2")
}

fn raw_handshakes(family: Family, syncookies: &str) -> Result<()> {
    let lab = Lab::new(1)?;
    lab.server.set_sysctl("net/ipv4/tcp_syncookies", syncookies)?;
    let server = PlainServer::start(&lab.server, family)?;
    let mut raw = RawClient::new(&lab.clients[0], family)?;
    let connections = raw.half_open(50)?;
    assert_eq!(server.seen(raw.address()), Seen::default());
    raw.complete(&connections)?;
    eventually_equal(SOON, "all are accepted", &50, || Ok(server.seen(raw.address()).open))
}

fn spoofed_syns_stay_half_open(family: Family) -> Result<()> {
    let lab = Lab::new(2)?;
    let server = PlainServer::start(&lab.server, family)?;
    let mut victim = RawClient::new(&lab.clients[0], family)?;
    let mut attacker = RawClient::with_address(&lab.clients[1], victim.address(), family)?;
    attacker.send_syns(50)?;
    // Served after the attacker's packets, on the same link.
    connect_served(&lab.clients[1].namespace, lab.clients[1].service(family), SOON)?;
    assert_eq!(server.seen(victim.address()), Seen::default());
    let connections = victim.half_open(5)?;
    victim.complete(&connections)?;
    eventually_equal(SOON, "the victim is served", &5, || Ok(server.seen(victim.address()).open))
}

fn a_killed_process_closes_its_connections(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let server = PlainServer::start(&lab.server, family)?;
    let client = &lab.clients[0];
    let mut command = client.namespace.command(env!("CARGO_BIN_EXE_limiter-test-hold"));
    let process = Process::start(command.args([client.service(family).to_string(), "5".into()]))?;
    eventually(SOON, "the process holds its connections", || Ok(process.stdout() == "holding\n"))?;
    assert_eq!(server.seen(client.address(family)), Seen { accepted: 5, open: 5, peak: 5 });
    process.kill()?;
    eventually_equal(SOON, "its connections are closed", &0, || Ok(server.seen(client.address(family)).open))
}

fn a_forged_reset_is_ignored_and_a_right_one_is_not(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let server = PlainServer::start(&lab.server, family)?;
    let mut raw = RawClient::new(&lab.clients[0], family)?;
    let connections = raw.half_open(2)?;
    raw.complete(&connections)?;
    eventually_equal(SOON, "both are accepted", &2, || Ok(server.seen(raw.address()).open))?;
    let mut forged = connections[0].segment(flags::RST);
    forged.sequence = forged.sequence.wrapping_add(1 << 30);
    // The second is right, and on the same link behind the first.
    raw.send(&[forged, connections[1].segment(flags::RST)])?;
    eventually_equal(SOON, "one is closed", &1, || Ok(server.seen(raw.address()).open))
}

#[test]
fn a_listener_sees_no_more_than_its_port() -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let crowd = Crowd::connect(&client.namespace, client.service(Family::V4), 3, Duration::from_millis(200))?;
    assert_eq!((crowd.refused, crowd.served.len()), (3, 0), "nobody listens");
    Ok(())
}

#[test]
fn a_foreign_xdp_program_shows_and_goes() -> Result<()> {
    let lab = Lab::new(1)?;
    let interface = lab.clients[0].server_interface();
    assert!(lab.server.link(&interface)?.get("xdp").is_none());
    let program = BareXdp::load(Answer::Pass)?.attach(&lab.server, &interface)?;
    assert!(lab.server.link(&interface)?.get("xdp").is_some());
    drop(program);
    lab.server.wait_xdp_free(&interface)
}
