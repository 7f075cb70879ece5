//! Kernels that lack something: limiter goes on without it, says so, and doesn't count wrongly for it.

use anyhow::Result;
use limiter_tests::{
    kernel::{Feature, lacks},
    lab::{Family, Lab},
    limiter::Limiter,
    tcp::{Crowd, PlainServer, Seen, connect_served},
    wait::{NO_ANSWER, SOON},
};

/// On one that is old enough, `cargo xtask test --kernel 5.10` shows what is said.
#[test]
fn a_kernel_that_is_too_old_is_refused_and_nothing_is_left() -> Result<()> {
    let lab = Lab::new(1)?;
    let limiter = Limiter::new(&lab.server)?;
    let outcome = limiter.outcome(["attach", "--interface", "client1", "--port", "8080"])?;
    let is_too_old = lacks(Feature::Everything)?;
    assert_eq!(outcome.status.success(), !is_too_old, "{}", outcome.stderr);
    if is_too_old {
        assert!(outcome.stderr.contains("needs Linux 5.15 or later"), "{}", outcome.stderr);
        assert!(!limiter.pin_path().exists());
    }
    Ok(())
}

#[test]
fn without_btf_connections_are_counted_when_they_are_open() -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let server = PlainServer::start(&lab.server, Family::V4)?;
    let limiter = Limiter::new(&lab.server)?.without("btf");
    let outcome =
        limiter.outcome(["attach", "--interface", "client1", "--port", "8080", "--connections-per-source", "5"])?;
    assert!(outcome.status.success(), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("no BTF"), "{}", outcome.stderr);
    // One after the other: a burst may pass the limit by a few.
    let mut held = Vec::new();
    for count in 1..=5 {
        held.push(connect_served(&client.namespace, client.service(Family::V4), SOON)?);
        limiter.wait_held(client.address(Family::V4), count)?;
    }
    let more = Crowd::connect(&client.namespace, client.service(Family::V4), 5, NO_ANSWER)?;
    assert_eq!(more.served.len(), 0);
    assert_eq!(server.seen(client.address(Family::V4)), Seen { accepted: 5, open: 5, peak: 5 });
    assert_eq!(limiter.counter("opened_unseen")?, 5);
    drop((held, more));
    limiter.wait_empty()
}

#[test]
fn without_btf_tc_counts_the_same_way() -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let _server = PlainServer::start(&lab.server, Family::V4)?;
    let limiter = Limiter::new(&lab.server)?.without("btf,tcx");
    limiter.protect(&lab, 2, &["--attach-mode", "tc"])?;
    let _held = [
        connect_served(&client.namespace, client.service(Family::V4), SOON)?,
        connect_served(&client.namespace, client.service(Family::V4), SOON)?,
    ];
    limiter.wait_held(client.address(Family::V4), 2)?;
    let more = Crowd::connect(&client.namespace, client.service(Family::V4), 5, NO_ANSWER)?;
    assert_eq!(more.served.len(), 0);
    Ok(())
}

/// Before 6.12, the stack can't be asked to tell of the end of what was open before.
#[test]
fn without_watch_only_a_daemon_counts_what_was_open_before() -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let _server = PlainServer::start(&lab.server, Family::V4)?;
    let before = Crowd::connect(&client.namespace, client.service(Family::V4), 3, SOON)?;
    assert_eq!(before.served.len(), 3);
    let limiter = Limiter::new(&lab.server)?.without("watch");
    let arguments = ["--interface", "client1", "--port", "8080", "--connections-per-source", "5"];
    let outcome = limiter.outcome(["attach"].into_iter().chain(arguments))?;
    assert!(outcome.status.success(), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("3 connections were open before and don't count"), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("6.12"), "{}", outcome.stderr);
    assert_eq!(limiter.held_by(client.address(Family::V4))?, 0);

    let config = Limiter::config_file(
        "[kernel]\naudit_interval = \"200ms\"\n[limits]\nconnections_per_source = 5\n\
         [[service]]\nname = \"default\"\nport = 8080\n[[service]]\nname = \"chat\"\nport = 8081\n\
         [gateway]\nlisten = [\"0.0.0.0:8081\"]\n",
    )?;
    let config = config.path().display().to_string();
    let _daemon = limiter.run(["--interface", "client1", "--config", &config])?;
    limiter.wait_held(client.address(Family::V4), 3)?;
    drop(before);
    limiter.wait_empty()
}

#[test]
fn without_destroy_kick_says_what_the_kernel_lacks() -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let server = PlainServer::start(&lab.server, Family::V4)?;
    let limiter = Limiter::new(&lab.server)?.without("destroy");
    limiter.protect(&lab, 5, &[])?;
    let _held = connect_served(&client.namespace, client.service(Family::V4), SOON)?;
    limiter.wait_held(client.address(Family::V4), 1)?;
    let outcome = limiter.outcome(["kick", &client.address(Family::V4).to_string()])?;
    assert_eq!(outcome.status.code(), Some(1), "{}", outcome.stdout);
    assert!(outcome.stderr.contains("CONFIG_INET_DIAG_DESTROY"), "{}", outcome.stderr);
    assert_eq!(server.seen(client.address(Family::V4)).open, 1);
    Ok(())
}
