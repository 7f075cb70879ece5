//! `on_deny = "reset"`: a client past the limit is told so at once.

use std::{
    fs, io,
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use limiter_tests::{
    bare::{Answer, BareXdp},
    both_families,
    lab::{CLIENT_INTERFACE, Family, Lab, PORT},
    limiter::Limiter,
    netns::Namespace,
    raw::{RawClient, TagSocket},
    segment::flags,
    tcp::{Crowd, PlainServer, connect_served},
    tun::{TUN, TunLab},
    wait::{SOON, eventually_equal},
};

both_families!(
    a_refused_connect_fails_at_once,
    a_refused_connect_fails_at_once_in_generic_mode,
    a_refused_connect_fails_at_once_on_tc,
    a_refused_connect_fails_at_once_by_a_filter,
    a_refused_connect_fails_at_once_where_the_stack_computes_checksums,
    a_refused_connect_fails_at_once_on_a_tun,
    a_reset_has_the_tag_of_what_it_answers,
    what_a_refused_connect_gets_changes_at_once,
);

fn a_refused_connect_fails_at_once(family: Family) -> Result<()> {
    refused_connect_fails(family, "native")
}

fn a_refused_connect_fails_at_once_in_generic_mode(family: Family) -> Result<()> {
    refused_connect_fails(family, "generic")
}

fn a_refused_connect_fails_at_once_on_tc(family: Family) -> Result<()> {
    refused_connect_fails(family, "tc")
}

fn a_refused_connect_fails_at_once_by_a_filter(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    refused_connect_fails_in(&lab, &Limiter::new(&lab.server)?.without("tcx"), family, "tc")
}

/// A SYN over a veth has no checksum yet, and nor has what answers it: whoever computes it then has to find what it begins with.
fn a_refused_connect_fails_at_once_where_the_stack_computes_checksums(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    lab.server.set_checksum_offload(&lab.clients[0].server_interface(), false)?;
    refused_connect_fails_in(&lab, &Limiter::new(&lab.server)?, family, "tc")
}

fn a_refused_connect_fails_at_once_on_a_tun(family: Family) -> Result<()> {
    let lab = TunLab::new()?;
    let service = lab.service(family);
    let _server = PlainServer::start(&lab.server, family)?;
    for without in ["", "tcx"] {
        let limiter = Limiter::new(&lab.server)?.without(without);
        let arguments = ["--interface", TUN, "--port", "8080", "--connections-per-source", "1", "--on-deny", "reset"];
        limiter.attach(arguments)?;
        let _held = connect_served(&lab.client, service, SOON)?;
        eventually_equal(SOON, "it is held", &1, || Ok(limiter.ledger()?.len()))?;
        refused(&lab.client, service)?;
        assert_eq!((limiter.counter("reset_sent")?, limiter.counter("syn_source_limit")?), (1, 1), "{without}");
    }
    Ok(())
}

/// On TC, the outer tag of a frame is not in the frame.
fn a_reset_has_the_tag_of_what_it_answers(family: Family) -> Result<()> {
    const PRIORITY: u16 = 5 << 13;
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let _server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 2, &["--attach-mode", "tc", "--on-deny", "reset"])?;
    limiter.output(["deny", &Family::source(client.silent_address(family))])?;
    let mut raw = RawClient::new(client, family)?;
    let tags = TagSocket::new(client)?;
    let [syn] = &raw.syns(1)[..] else { panic!("one SYN") };
    let mut frame = raw.frame(syn);
    frame.splice(12..12, [[0x81, 0x00], PRIORITY.to_be_bytes()].concat());
    raw.send_frames(vec![frame])?;
    let reset = raw.receive(Instant::now() + SOON)?.context("an answer")?;
    assert_eq!((reset.flags, reset.acknowledgement), (flags::RST | flags::ACK, syn.sequence.wrapping_add(1)));
    assert_eq!(tags.tag_of(&reset)?, Some(PRIORITY));
    Ok(())
}

fn refused_connect_fails(family: Family, mode: &str) -> Result<()> {
    let lab = Lab::new(1)?;
    refused_connect_fails_in(&lab, &Limiter::new(&lab.server)?, family, mode)
}

fn refused_connect_fails_in(lab: &Lab, limiter: &Limiter<'_>, family: Family, mode: &str) -> Result<()> {
    let client = &lab.clients[0];
    // What XDP sends out of one end of a veth is only received if there is a program at the other end.
    let _peer = match mode {
        "native" => Some(BareXdp::load(Answer::Pass)?.attach(&client.namespace, CLIENT_INTERFACE)?),
        _ => None,
    };
    let _server = PlainServer::start(&lab.server, family)?;
    limiter.protect(lab, 2, &["--attach-mode", mode, "--on-deny", "reset"])?;
    let status = limiter.json("status")?;
    assert_eq!((&status["services"][0]["on_deny"], &status["interfaces"][0]["mode"]), (&"reset".into(), &mode.into()));

    let held = Crowd::connect(&client.namespace, client.service(family), 2, SOON)?;
    assert_eq!(held.served.len(), 2);
    limiter.wait_held(client.address(family), 2)?;
    refused(&client.namespace, client.service(family))?;
    assert_eq!(limiter.counter("reset_sent")?, 1);
    assert_eq!(limiter.counter("syn_source_limit")?, 1, "it was told at its first SYN, and did not try again");

    // A place that has become free is there for who tries again.
    drop(held);
    limiter.wait_empty()?;
    let _again = connect_served(&client.namespace, client.service(family), SOON)?;
    Ok(())
}

/// That `connect` is answered by `ECONNREFUSED`. A stack that gets no answer sends its SYN again for much longer.
fn refused(client: &Namespace, service: SocketAddr) -> Result<()> {
    let outcome = client.enter(|| TcpStream::connect_timeout(&service, Duration::from_secs(30)));
    let error = outcome.err().context("it is connected")?;
    ensure!(error.kind() == io::ErrorKind::ConnectionRefused, "{error}");
    Ok(())
}

/// `limiter limit set on_deny=…`: with the programs and the connections as they are, and in the file too.
fn what_a_refused_connect_gets_changes_at_once(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let _peer = BareXdp::load(Answer::Pass)?.attach(&client.namespace, CLIENT_INTERFACE)?;
    let _server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    let text = format!(
        "[kernel]\ninterfaces = [\"{}\"]\non_deny = \"drop\" # for all\n[limits]\nconnections_per_source = 1\n\
         [[service]]\nname = \"chat\"\nport = {PORT}\n[[service]]\nname = \"other\"\nport = 1\n",
        client.server_interface()
    );
    let file = Limiter::config_file(&text)?;
    let path = file.path().display().to_string();
    limiter.attach(["--config", &path])?;
    let held = connect_served(&client.namespace, client.service(family), SOON)?;
    limiter.wait_held(client.address(family), 1)?;
    let set = |arguments: &[&str]| limiter.output(["limit", "set"].iter().chain(arguments));

    let dropped = Crowd::connect(&client.namespace, client.service(family), 1, Duration::from_millis(300))?;
    assert_eq!(dropped.unanswered.len(), 1);
    drop(dropped);
    let said = set(&["on_deny=reset", "--service", "chat", "--config", &path, "--save"])?;
    assert_eq!(said, "chat: on_deny drop → reset\n");
    refused(&client.namespace, client.service(family))?;
    assert!(limiter.counter("reset_sent")? >= 1);
    let saved = fs::read_to_string(&path)?;
    assert_eq!(saved, text.replace("port = 8080\n", "port = 8080\non_deny = \"reset\"\n"));

    let said = set(&["on_deny=observe", "connections_total=7", "--config", &path, "--save"])?;
    assert_eq!(
        said,
        "chat: on_deny reset → observe\nchat: connections_total 10000 → 7\n\
         other: on_deny drop → observe\nother: connections_total 10000 → 7\n"
    );
    let past = connect_served(&client.namespace, client.service(family), SOON).context("it is only observed")?;
    let show = limiter.output(["limit", "show", "--json"])?;
    let show: serde_json::Value = serde_json::from_str(&show)?;
    for row in show["limits"].as_array().context("a list")? {
        assert_eq!((&row["on_deny"], &row["connections_total"]), (&"observe".into(), &7.into()), "{row}");
    }
    let saved = fs::read_to_string(&path)?;
    assert!(saved.contains("on_deny = \"observe\" # for all\n"), "{saved}");
    // The file says what is in force: to attach by it changes nothing.
    limiter.attach(["--config", &path])?;
    let again: serde_json::Value = serde_json::from_str(&limiter.output(["limit", "show", "--json"])?)?;
    assert_eq!(again, show);
    drop((held, past));
    limiter.wait_empty()
}

#[test]
fn a_refused_connect_on_loopback_fails_at_once() -> Result<()> {
    for mode in ["auto", "tc"] {
        let host = Namespace::new()?;
        let service = "127.0.0.1:8080".parse()?;
        let _server = PlainServer::start(&host, Family::V4)?;
        let limiter = Limiter::new(&host)?;
        let arguments = ["--interface", "lo", "--port", "8080", "--connections-per-source", "1", "--on-deny", "reset"];
        limiter.attach(arguments.into_iter().chain(["--attach-mode", mode]))?;
        let _held = connect_served(&host, service, SOON)?;
        limiter.wait_held(service.ip(), 1)?;
        refused(&host, service).context(mode)?;
    }
    Ok(())
}
