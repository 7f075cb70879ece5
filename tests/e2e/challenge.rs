//! `challenge`: SYN cookies made in XDP while a service is flooded.

use std::{fs, time::Duration};

use anyhow::{Context, Result};
use limiter_tests::{
    bare::{Answer, Attachment, BareXdp},
    both_families,
    lab::{CLIENT_INTERFACE, Family, Lab},
    limiter::Limiter,
    netns::Namespace,
    raw::RawClient,
    tcp::{Crowd, PlainServer, connect_served},
    wait::{SOON, eventually},
};

both_families!(a_flood_is_answered_by_cookies_and_ends, cookies_keep_to_the_limits, cookies_work_in_generic_mode,);

const SYSCTL: &str = "net/ipv4/tcp_syncookies";

fn sysctl(namespace: &Namespace) -> Result<String> {
    Ok(namespace.enter(|| fs::read_to_string(format!("/proc/sys/{SYSCTL}")))?.trim().to_owned())
}

/// What XDP sends out of one end of a veth is only received if there is a program at the other end.
fn receivers(lab: &Lab) -> Result<Vec<Attachment>> {
    lab.clients.iter().map(|client| BareXdp::load(Answer::Pass)?.attach(&client.namespace, CLIENT_INTERFACE)).collect()
}

fn attach(lab: &Lab, limiter: &Limiter<'_>, kernel: &str) -> Result<()> {
    let config = Limiter::config_file(&format!("[kernel]\n{kernel}\n"))?;
    let path = config.path().display().to_string();
    limiter.protect(lab, 5, &["--config", &path])
}

fn challenging(limiter: &Limiter<'_>) -> Result<bool> {
    limiter.json("status")?["services"][0]["challenging"].as_bool().context("a service says whether it does")
}

/// Half-open connections that the stack of a namespace holds.
fn requests(namespace: &Namespace) -> Result<usize> {
    const SYN_RECV: &str = "03";
    let tables =
        namespace.enter(|| ["tcp", "tcp6"].map(|table| fs::read_to_string(format!("/proc/thread-self/net/{table}"))));
    let mut found = 0;
    for table in tables {
        found += table?.lines().skip(1).filter(|line| line.split_whitespace().nth(3) == Some(SYN_RECV)).count();
    }
    Ok(found)
}

fn a_flood_is_answered_by_cookies_and_ends(family: Family) -> Result<()> {
    let lab = Lab::new(2)?;
    let (home, elsewhere) = (&lab.clients[0], &lab.clients[1]);
    lab.server.set_sysctl(SYSCTL, "1")?;
    let _receivers = receivers(&lab)?;
    let server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    attach(&lab, &limiter, "challenge = \"auto\"\nchallenge_threshold = 100")?;
    assert_eq!(sysctl(&lab.server)?, "2");
    assert_eq!(limiter.json("status")?["syncookies_before"], 1);
    let before = connect_served(&home.namespace, home.service(family), SOON)?;
    assert_eq!((challenging(&limiter)?, limiter.counter("syn_challenged")?), (false, 0), "there is no flood yet");

    let mut flood = RawClient::new(elsewhere, family)?;
    eventually(SOON, "the flood is noticed", || {
        flood.send_syns(200)?;
        challenging(&limiter)
    })?;
    flood.send_syns(100)?;
    let during = connect_served(&home.namespace, home.service(family), SOON)?;
    assert!(limiter.counter("syn_challenged")? >= 100);
    assert_eq!(requests(&lab.server)?, 0);
    assert_eq!(server.seen(flood.address()).accepted, 0);
    limiter.wait_held(home.address(family), 2)?;

    // It ends by itself, without a daemon.
    eventually(Duration::from_mins(1), "the challenge has ended", || Ok(!challenging(&limiter)?))?;
    let challenged = limiter.counter("syn_challenged")?;
    let after = connect_served(&home.namespace, home.service(family), SOON)?;
    assert_eq!(limiter.counter("syn_challenged")?, challenged);
    drop((before, during, after));
    limiter.wait_empty()?;
    limiter.detach()?;
    assert_eq!(sysctl(&lab.server)?, "1");
    Ok(())
}

fn cookies_keep_to_the_limits(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let _receivers = receivers(&lab)?;
    let server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    attach(&lab, &limiter, "challenge = \"always\"")?;
    let crowd = Crowd::connect(&client.namespace, client.service(family), 50, Duration::from_millis(2500))?;
    assert_eq!(crowd.served.len(), 5);
    assert_eq!(server.seen(client.address(family)).peak, 5);
    limiter.wait_held(client.address(family), 5)?;
    assert_eq!(limiter.counter("syn_admitted")?, 0, "the stack has seen none of the SYNs");

    // Who is at the limit gets no cookie.
    let challenged = limiter.counter("syn_challenged")?;
    let late = Crowd::connect(&client.namespace, client.service(family), 3, Duration::from_millis(300))?;
    assert_eq!(late.unanswered.len(), 3);
    assert_eq!(limiter.counter("syn_challenged")?, challenged);
    assert!(limiter.counter("syn_source_limit")? >= 3);
    drop((crowd, late));
    limiter.wait_empty()
}

fn cookies_work_in_generic_mode(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let _server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    attach(&lab, &limiter, "challenge = \"always\"\nattach_mode = \"generic\"")?;
    let _connection = connect_served(&client.namespace, client.service(family), SOON)?;
    assert_eq!((limiter.counter("syn_challenged")?, limiter.counter("syn_admitted")?), (1, 0));
    Ok(())
}

#[test]
fn the_setting_is_put_back_whatever_became_of_the_process() -> Result<()> {
    let lab = Lab::new(1)?;
    lab.server.set_sysctl(SYSCTL, "0")?;
    let limiter = Limiter::new(&lab.server)?;
    let with = Limiter::config_file("[kernel]\nchallenge = \"auto\"\n[[service]]\nname = \"x\"\nport = 8080\n")?;
    let without = Limiter::config_file("[[service]]\nname = \"x\"\nport = 8080\n")?;
    let arguments = |config: &tempfile::NamedTempFile| {
        let mut arguments = lab.interface_flags();
        arguments.extend(["--config".into(), config.path().display().to_string()]);
        arguments
    };
    let daemon = limiter.run(arguments(&with))?;
    assert_eq!(sysctl(&lab.server)?, "2");
    daemon.kill()?;
    assert_eq!(sysctl(&lab.server)?, "2", "the programs still make cookies");
    // Another process takes over, and remembers what the first one found.
    limiter.attach(arguments(&with))?;
    limiter.detach()?;
    assert_eq!(sysctl(&lab.server)?, "0");

    // Switched off, without detaching.
    limiter.attach(arguments(&with))?;
    limiter.attach(arguments(&without))?;
    assert_eq!(sysctl(&lab.server)?, "0");
    assert_eq!(limiter.json("status")?["syncookies_before"], serde_json::Value::Null);

    // What somebody else has changed meanwhile is theirs.
    limiter.attach(arguments(&with))?;
    lab.server.set_sysctl(SYSCTL, "1")?;
    limiter.detach()?;
    assert_eq!(sysctl(&lab.server)?, "1");
    Ok(())
}

/// Where an attach fails after all, the host is as it was.
#[test]
fn an_attach_that_fails_leaves_the_setting() -> Result<()> {
    let lab = Lab::new(1)?;
    lab.server.set_sysctl(SYSCTL, "1")?;
    let limiter = Limiter::new(&lab.server)?;
    let _taken = BareXdp::load(Answer::Pass)?.attach(&lab.server, &lab.clients[0].server_interface())?;
    assert!(attach(&lab, &limiter, "challenge = \"always\"\nattach_mode = \"native\"").is_err());
    assert_eq!(sysctl(&lab.server)?, "1");
    Ok(())
}
