//! The daemon comes and goes; the limits and the counts stay until `limiter detach`, which leaves nothing.

use std::{
    io::Write,
    net::SocketAddr,
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use limiter_tests::{
    both_families,
    bpf::{Kind, Object, objects_below},
    lab::{Family, Lab},
    limiter::Limiter,
    process::Process,
    tcp::{Crowd, PlainServer, Seen, connect_served},
    wait::{NO_ANSWER, SOON, eventually, eventually_equal},
    websocket,
};

both_families!(a_killed_daemon_leaves_limits_and_counts);

/// A plain server at 8080 that is not limiter's, and the gateway at 8081.
const TWO_SERVICES: &str = r#"
[limits]
connections_per_source = 5
[[service]]
name = "plain"
port = 8080
[[service]]
name = "chat"
port = 8081
[gateway]
listen = ["0.0.0.0:8081"]
upstream = "echo"
"#;

fn a_killed_daemon_leaves_limits_and_counts(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let (address, service) = (client.address(family), client.service(family));
    let gateway = SocketAddr::new(client.server_address(Family::V4), 8081);
    let server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    let config = Limiter::config_file(TWO_SERVICES)?;
    let arguments = || {
        let mut arguments = lab.interface_flags();
        arguments.extend(["--config".into(), config.path().display().to_string()]);
        arguments
    };
    let refused = || -> Result<()> {
        let crowd = Crowd::connect(&client.namespace, service, 1, NO_ANSWER)?;
        assert_eq!(crowd.unanswered.len(), 1, "past the limit");
        Ok(())
    };

    let daemon = limiter.run(arguments())?;
    assert_eq!(limiter.json("status")?["daemon"], daemon.id());
    let mut crowd = Crowd::connect(&client.namespace, service, 5, SOON)?;
    assert_eq!(crowd.served.len(), 5);
    let mut websocket = websocket::open(&client.namespace, gateway)?;
    websocket::echo(&mut websocket, "before")?;
    assert_eq!(limiter.ledger()?.len(), 6);
    let before = pinned_programs_and_maps(&limiter)?;

    daemon.kill()?;
    // The kernel closes what the daemon held; what it didn't hold stays.
    eventually_equal(SOON, "the gateway's connection is gone from the ledger", &5, || Ok(limiter.ledger()?.len()))?;
    assert_eq!(limiter.json("status")?["daemon"], serde_json::Value::Null);
    assert_eq!(limiter.held_by(address)?, 5);
    refused()?;
    drop(crowd.served.pop());
    limiter.wait_held(address, 4)?;
    crowd.served.push(connect_served(&client.namespace, service, SOON)?);
    refused()?;

    let daemon = limiter.run(arguments())?;
    assert_eq!(limiter.held_by(address)?, 5, "counts survive the restart");
    assert_eq!(limiter.ledger()?.len(), 5);
    for object in pinned_programs_and_maps(&limiter)?.into_iter().filter(|object| object.kind == Kind::Map) {
        assert!(before.contains(&object), "{object:?} is not one of the first daemon's maps");
    }
    refused()?;
    let mut websocket = websocket::open(&client.namespace, gateway)?;
    websocket::echo(&mut websocket, "after")?;
    assert_eq!(limiter.ledger()?.len(), 6, "each connection is counted once after the restart");
    drop(crowd.served.pop());
    limiter.wait_held(address, if family == Family::V4 { 5 } else { 4 })?;

    daemon.kill()?;
    drop((crowd, websocket));
    limiter.wait_empty()?;
    assert_eq!(server.seen(address), Seen { accepted: 6, open: 0, peak: 5 });
    detach_leaves_nothing(&lab, &limiter)
}

#[test]
fn detach_after_attach_leaves_nothing() -> Result<()> {
    let lab = Lab::new(2)?;
    let client = &lab.clients[0];
    let server = PlainServer::start(&lab.server, Family::V4)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 5, &[])?;
    let mut crowd = Crowd::connect(&client.namespace, client.service(Family::V4), 5, SOON)?;
    assert_eq!(crowd.served.len(), 5);

    detach_leaves_nothing(&lab, &limiter)?;
    assert_eq!(server.seen(client.address(Family::V4)).open, 5, "nobody is cut");
    crowd.served[0].write_all(b"still here")?;
    let more = Crowd::connect(&client.namespace, client.service(Family::V4), 20, SOON)?;
    assert_eq!(more.served.len(), 20, "there is no limit any more");

    let outcome = limiter.outcome(["status"])?;
    assert_eq!(outcome.status.code(), Some(3), "nothing is attached: {}", outcome.stderr);
    let outcome = limiter.outcome(["detach"])?;
    assert_eq!(outcome.status.code(), Some(3), "nothing is attached: {}", outcome.stderr);
    Ok(())
}

#[test]
fn attach_after_detach_starts_from_nothing() -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let _server = PlainServer::start(&lab.server, Family::V4)?;
    let limiter = Limiter::new(&lab.server)?;
    for limit in [5, 3] {
        limiter.protect(&lab, limit, &[])?;
        let crowd = Crowd::connect(&client.namespace, client.service(Family::V4), 10, Duration::from_millis(500))?;
        assert_eq!(crowd.served.len(), usize::try_from(limit)?);
        drop(crowd);
        limiter.wait_empty()?;
        limiter.detach()?;
    }
    Ok(())
}

#[test]
fn a_daemon_takes_over_what_attach_left() -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let (address, service) = (client.address(Family::V4), client.service(Family::V4));
    let _server = PlainServer::start(&lab.server, Family::V4)?;
    let limiter = Limiter::new(&lab.server)?;
    let config = Limiter::config_file(TWO_SERVICES)?;
    let mut arguments = lab.interface_flags();
    arguments.extend(["--config".into(), config.path().display().to_string()]);
    limiter.attach(&arguments)?;
    let crowd = Crowd::connect(&client.namespace, service, 5, SOON)?;
    assert_eq!(crowd.served.len(), 5);
    let _daemon = limiter.run(&arguments)?;
    assert_eq!(limiter.held_by(address)?, 5);
    drop(crowd);
    limiter.wait_empty()
}

#[test]
fn a_daemon_that_ends_well_keeps_the_kernel_limits() -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let _server = PlainServer::start(&lab.server, Family::V4)?;
    let limiter = Limiter::new(&lab.server)?;
    let config = Limiter::config_file(TWO_SERVICES)?;
    let mut arguments = lab.interface_flags();
    arguments.extend(["--config".into(), config.path().display().to_string()]);
    let daemon = limiter.run(&arguments)?;
    daemon.begin_shutdown()?;
    let ended = daemon.wait()?;
    assert!(ended.status.success(), "{}", ended.status);
    let crowd = Crowd::connect(&client.namespace, client.service(Family::V4), 10, NO_ANSWER)?;
    assert_eq!(crowd.served.len(), 5, "limits hold until `limiter detach`");
    drop(crowd);
    detach_leaves_nothing(&lab, &limiter)
}

/// Wherever an attach is cut off, the next one works, and a detach removes what there is.
#[test]
fn an_attach_that_is_killed_half_way_is_made_good() -> Result<()> {
    const STEPS: u32 = 12;
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let _server = PlainServer::start(&lab.server, Family::V4)?;
    let limiter = Limiter::new(&lab.server)?;
    let arguments = ["attach", "--interface", "client1", "--port", "8080", "--connections-per-source", "5"];
    let begun = Instant::now();
    limiter.output(arguments)?;
    let whole = begun.elapsed();
    limiter.detach()?;

    for step in 0..STEPS {
        let process = Process::start(&mut limiter.command(arguments))?;
        // The point is to cut it off at every stage, so here it is the time that counts.
        thread::sleep(whole * step / STEPS);
        process.kill()?;
        if step % 2 == 0 {
            limiter.output(arguments)?;
            let crowd = Crowd::connect(&client.namespace, client.service(Family::V4), 8, NO_ANSWER)?;
            assert_eq!(crowd.served.len(), 5, "after step {step}");
            drop(crowd);
            limiter.wait_empty()?;
            detach_leaves_nothing(&lab, &limiter)?;
        } else {
            let outcome = limiter.outcome(["detach"])?;
            assert!(matches!(outcome.status.code(), Some(0 | 3)), "step {step}: {}", outcome.stderr);
            assert!(!limiter.pin_path().exists(), "step {step}");
            lab.server.wait_xdp_free("client1")?;
        }
    }
    Ok(())
}

#[test]
fn an_interface_that_was_gone_is_attached_again() -> Result<()> {
    let lab = Lab::new(2)?;
    let client = &lab.clients[0];
    let _server = PlainServer::start(&lab.server, Family::V4)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 5, &[])?;
    lab.server.ip("link del client2")?;
    let status = limiter.json("status")?;
    assert_eq!(status["interfaces"].as_array().map(Vec::len), Some(2), "what is pinned is shown: {status}");
    lab.server.ip("link add client2 type veth peer name other2\nlink set client2 up\nlink set other2 up\n")?;
    let crowd = Crowd::connect(&client.namespace, client.service(Family::V4), 5, SOON)?;
    assert_eq!(crowd.served.len(), 5);

    limiter.protect(&lab, 5, &[])?;
    let status = limiter.json("status")?;
    let mut names: Vec<_> = status["interfaces"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|interface| interface["name"].as_str())
        .collect();
    names.sort_unstable();
    assert_eq!(names, ["client1", "client2"], "{status}");
    assert!(lab.server.link("client2")?.get("xdp").is_some(), "it is attached");
    assert_eq!(limiter.held_by(client.address(Family::V4))?, 5, "the other one's counts are as they were");
    drop(crowd);
    limiter.wait_empty()?;
    detach_leaves_nothing(&lab, &limiter)
}

#[test]
fn an_interface_that_is_no_longer_named_is_let_go() -> Result<()> {
    let lab = Lab::new(2)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 5, &[])?;
    limiter.attach(["--interface", "client1", "--port", "8080"])?;
    assert!(lab.server.link("client1")?.get("xdp").is_some());
    assert!(lab.server.link("client2")?.get("xdp").is_none(), "detached when the command returns");
    detach_leaves_nothing(&lab, &limiter)
}

/// Runs `limiter detach`, and looks for whatever it may have forgotten.
fn detach_leaves_nothing(lab: &Lab, limiter: &Limiter<'_>) -> Result<()> {
    let objects = objects_below(limiter.pin_path())?;
    for kind in [Kind::Link, Kind::Map, Kind::Program] {
        assert!(objects.iter().any(|object| object.kind == kind), "no {kind:?} is pinned: {objects:?}");
    }
    limiter.detach()?;
    assert!(!limiter.pin_path().exists(), "{} is still there", limiter.pin_path().display());
    for client in &lab.clients {
        let interface = client.server_interface();
        assert!(lab.server.link(&interface)?.get("xdp").is_none(), "{interface} is free when the command returns");
    }
    // The kernel frees them a moment after their last user is gone. This includes the sock_ops program and its link.
    for object in objects {
        eventually(SOON, &format!("{object:?} is gone"), || Ok(!object.exists()?))?;
    }
    Ok(())
}

fn pinned_programs_and_maps(limiter: &Limiter<'_>) -> Result<Vec<Object>> {
    let mut objects = objects_below(limiter.pin_path())?;
    objects.retain(|object| object.kind != Kind::Link);
    Ok(objects)
}
