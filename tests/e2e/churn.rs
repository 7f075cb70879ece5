//! Many sources, many connections, and a daemon that dies and comes back with other limits all the while: at the end every
//! count is zero, the ledger is empty, and the audit had nothing to mend.

use std::{
    io::ErrorKind,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use limiter_tests::{
    lab::{CLIENT_INTERFACE, Family, Lab, PORT},
    limiter::{Daemon, Limiter},
    raw::RawClient,
    scaled,
    state::State,
    tcp::{self, Crowd, PlainServer},
    wait::{SOON, eventually_equal},
};
use socket2::SockRef;
use tempfile::NamedTempFile;

/// Long enough for the kernel to close a hundred thousand sockets, and for this crate to read as many rows, on a busy host.
const PATIENCE: Duration = Duration::from_mins(2);

/// Connections at once, of each of the four sources of the churn.
const TOGETHER: usize = 8;

/// A plain server at 8080, the gateway out of the way.
fn config(limit: u32) -> Result<NamedTempFile> {
    Limiter::config_file(&format!(
        "[kernel]\naudit_interval = \"100ms\"\n\
         [limits]\nconnections_per_source = {limit}\nconnections_total = 0\nconnection_rate = 0\n\
         [[service]]\nname = \"plain\"\nport = {PORT}\n[[service]]\nname = \"chat\"\nport = 8081\n\
         [gateway]\nlisten = [\"127.0.0.1:8081\"]\n"
    ))
}

fn run<'l>(limiter: &'l Limiter<'_>, lab: &Lab, config: &NamedTempFile) -> Result<Daemon<'l>> {
    let mut arguments = lab.interface_flags();
    arguments.extend(["--config".into(), config.path().display().to_string()]);
    limiter.run(arguments)
}

/// Nothing was mended, the counts are what the ledger says, and nobody who has gone is remembered. To be called when all have gone.
fn assert_nothing_mended(limiter: &Limiter<'_>) -> Result<()> {
    assert_eq!(State::open(limiter)?.known_flows()?, 0, "connections that are known, and closed");
    let status = limiter.json("status")?;
    assert_eq!((&status["repairs"], &status["drift"]), (&0.into(), &0.into()), "{status}");
    for counter in ["opened_audit", "closed_audit", "ledger_full", "cut_past_limit"] {
        assert_eq!(limiter.counter(counter)?, 0, "{counter}");
    }
    Ok(())
}

#[test]
fn a_hundred_thousand_sources_come_and_go() -> Result<()> {
    let sources = scaled(5_000, 100_000_u32);
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    // The queue of a listener that nobody accepts from: open connections that take no descriptors.
    lab.server.set_sysctl("net/core/somaxconn", "65535")?;
    lab.server.set_sysctl("net/ipv4/tcp_max_syn_backlog", "65535")?;
    let (network, via) = ("2001:db8:7700::/40", client.address(Family::V6));
    lab.server.ip(&format!("route add {network} via {via} dev {}", client.server_interface()))?;
    let mut listeners = Vec::new();
    let limiter = Limiter::new(&lab.server)?;
    let config = config(3)?;
    let mut daemon = run(&limiter, &lab, &config)?;
    let state = State::open(&limiter)?;

    // No queue is longer than 65,535. The kernel spreads connections over those that share a port, from the first one on.
    for _ in (0..sources).step_by(40_000) {
        let address = SocketAddr::new(Family::V6.unspecified(), PORT);
        let listener = tcp::listener_of(&lab.server, address, u16::MAX, None, |socket| socket.set_reuse_port(true))?;
        listeners.push(listener);
    }
    let addresses: Vec<IpAddr> = (0..sources).map(source).collect();
    RawClient::new(client, Family::V6)?.open_from(&addresses)?;
    let held = || -> Result<(u64, u64)> {
        let status = limiter.json("status")?;
        let number = |name: &str| status[name].as_u64().with_context(|| format!("no {name}"));
        Ok((number("ledger_entries")?, number("sources")?))
    };
    let all = (u64::from(sources), u64::from(sources));
    eventually_equal(PATIENCE, "(connections, sources) are all there", &all, held)?;
    state.wait_audited()?;
    daemon.kill()?;
    daemon = run(&limiter, &lab, &config)?;
    assert_eq!(held()?, all, "after the daemon was killed and started again");

    // The kernel resets what is in the queue.
    drop(listeners);
    eventually_equal(PATIENCE, "(connections, sources) are gone", &(0, 0), held)?;
    limiter.wait_empty()?;
    state.wait_audited()?;
    assert_nothing_mended(&limiter)?;
    assert_eq!(limiter.counter("closed_socket")?, u64::from(sources));
    drop(daemon);
    Ok(())
}

/// A /64 of its own for each number.
fn source(number: u32) -> IpAddr {
    let [_, a, b, c] = number.to_be_bytes();
    Ipv6Addr::new(0x2001, 0xdb8, 0x7700 | u16::from(a), u16::from_be_bytes([b, c]), 0, 0, 0, 1).into()
}

#[test]
fn a_million_connections_while_the_daemon_is_killed_and_limits_change() -> Result<()> {
    let connections = scaled(10_000, 1_000_000_u64);
    let lab = Lab::new(2)?;
    for client in &lab.clients {
        client.namespace.set_sysctl("net/ipv4/ip_local_port_range", "1024 65535")?;
        client.namespace.set_sysctl("net/ipv4/tcp_tw_reuse", "1")?;
        client.namespace.wait_link_up(CLIENT_INTERFACE)?;
    }
    let _server = PlainServer::start(&lab.server, Family::V6)?;
    let limiter = Limiter::new(&lab.server)?;
    // More than are open at any time: the server looks after those that ended when nobody else wants to connect.
    let configs = [config(3_000)?, config(5_000)?];
    let first = run(&limiter, &lab, &configs[0])?;
    let (opened, failed) = (AtomicU64::new(0), AtomicBool::new(false));
    let mut restarts = 0;
    let last = thread::scope(|scope| -> Result<Daemon<'_>> {
        let mut daemon = first;
        let churns: Vec<_> = lab
            .clients
            .iter()
            .flat_map(|client| [(client, Family::V4), (client, Family::V6)])
            .map(|(client, family)| {
                let (opened, failed) = (&opened, &failed);
                scope.spawn(move || {
                    let outcome = churn(opened, connections, || {
                        Crowd::connect(&client.namespace, client.service(family), TOGETHER, SOON)
                    });
                    failed.fetch_or(outcome.is_err(), Ordering::Relaxed);
                    outcome
                })
            })
            .collect();
        while opened.load(Ordering::Relaxed) < connections && !failed.load(Ordering::Relaxed) {
            daemon.kill()?;
            limiter.set_limit("connections_per_source", 4_000 + restarts)?;
            restarts += 1;
            daemon = run(&limiter, &lab, &configs[restarts as usize % 2])?;
        }
        for churn in churns {
            let outcome = churn.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            // What the limiter has counted tells a refusal from a loss.
            outcome.with_context(|| format!("{}", limiter.json("status").unwrap_or_default()["services"]))?;
        }
        Ok(daemon)
    })?;
    println!("{} connections, the daemon killed {restarts} times", opened.load(Ordering::Relaxed));
    assert!(restarts > 0);
    eventually_equal(PATIENCE, "entries in the ledger", &Some(0), || {
        Ok(limiter.json("status")?["ledger_entries"].as_u64())
    })?;
    limiter.wait_empty()?;
    State::open(&limiter)?.wait_audited()?;
    assert_nothing_mended(&limiter)?;
    drop(last);
    Ok(())
}

/// Opens and closes until there were so many. Some end by RST, some by FIN.
fn churn(opened: &AtomicU64, connections: u64, connect: impl Fn() -> Result<Crowd>) -> Result<()> {
    while opened.load(Ordering::Relaxed) < connections {
        let crowd = connect()?;
        ensure!(crowd.unserved.is_empty() && crowd.refused == 0 && crowd.unanswered.is_empty(), "{crowd:?}");
        for (place, stream) in crowd.served.iter().enumerate() {
            if place % 4 != 0 {
                match SockRef::from(stream).set_linger(Some(Duration::ZERO)) {
                    Err(error) if error.kind() != ErrorKind::NotConnected => return Err(error.into()),
                    _ => {}
                }
            }
        }
        opened.fetch_add(crowd.served.len() as u64, Ordering::Relaxed);
    }
    Ok(())
}
