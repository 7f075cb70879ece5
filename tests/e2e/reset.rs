//! `on_deny = "reset"`: a client past the limit is told so at once.

use std::{io, net::TcpStream, time::Duration};

use anyhow::{Context, Result, ensure};
use limiter_tests::{
    bare::{Answer, BareXdp},
    both_families,
    lab::{CLIENT_INTERFACE, Client, Family, Lab},
    limiter::Limiter,
    netns::Namespace,
    tcp::{Crowd, PlainServer, connect_served},
    wait::SOON,
};

both_families!(a_refused_connect_fails_at_once, a_refused_connect_fails_at_once_in_generic_mode,);

fn a_refused_connect_fails_at_once(family: Family) -> Result<()> {
    refused_connect_fails(family, "native")
}

fn a_refused_connect_fails_at_once_in_generic_mode(family: Family) -> Result<()> {
    refused_connect_fails(family, "generic")
}

fn refused_connect_fails(family: Family, mode: &str) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    // What XDP sends out of one end of a veth is only received if there is a program at the other end.
    let _peer = match mode {
        "native" => Some(BareXdp::load(Answer::Pass)?.attach(&client.namespace, CLIENT_INTERFACE)?),
        _ => None,
    };
    let _server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 2, &["--attach-mode", mode, "--on-deny", "reset"])?;
    let status = limiter.json("status")?;
    assert_eq!((&status["services"][0]["on_deny"], &status["interfaces"][0]["mode"]), (&"reset".into(), &mode.into()));

    let held = Crowd::connect(&client.namespace, client.service(family), 2, SOON)?;
    assert_eq!(held.served.len(), 2);
    limiter.wait_held(client.address(family), 2)?;
    refused(client, family)?;
    assert_eq!(limiter.counter("reset_sent")?, 1);
    assert_eq!(limiter.counter("syn_source_limit")?, 1, "it was told at its first SYN, and did not try again");

    // A place that has become free is there for who tries again.
    drop(held);
    limiter.wait_empty()?;
    let _again = connect_served(&client.namespace, client.service(family), SOON)?;
    Ok(())
}

/// That `connect` is answered by `ECONNREFUSED`. A stack that gets no answer sends its SYN again for much longer.
fn refused(client: &Client, family: Family) -> Result<()> {
    let outcome =
        client.namespace.enter(|| TcpStream::connect_timeout(&client.service(family), Duration::from_secs(30)));
    let error = outcome.err().context("it is connected")?;
    ensure!(error.kind() == io::ErrorKind::ConnectionRefused, "{error}");
    Ok(())
}

#[test]
fn a_refused_connect_on_loopback_fails_at_once() -> Result<()> {
    let host = Namespace::new()?;
    let service = "127.0.0.1:8080".parse()?;
    let _server = PlainServer::start(&host, Family::V4)?;
    let limiter = Limiter::new(&host)?;
    limiter.attach(["--interface", "lo", "--port", "8080", "--connections-per-source", "1", "--on-deny", "reset"])?;
    let _held = connect_served(&host, service, SOON)?;
    limiter.wait_held(service.ip(), 1)?;
    let error = host.enter(|| TcpStream::connect_timeout(&service, Duration::from_secs(30)));
    assert_eq!(error.map_err(|error| error.kind()).err(), Some(io::ErrorKind::ConnectionRefused));
    Ok(())
}
