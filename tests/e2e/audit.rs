//! The ledger against the kernel's own sockets: what was open before, what got past XDP, what differs and is mended.

use std::{
    io::{ErrorKind, Write as _},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use limiter_common::{ConnectionKey, LedgerEntry};
use limiter_tests::{
    both_families,
    kernel::{Feature, lacks},
    lab::{Family, Lab, PORT},
    limiter::{Daemon, Limiter},
    monitor,
    state::State,
    tcp::{self, Crowd, PlainServer, connect_served},
    wait::{NO_ANSWER, SOON, eventually, eventually_equal},
};
use tempfile::NamedTempFile;

both_families!(
    connections_open_before_attach_count_and_give_their_slots_back,
    past_xdp_those_too_many_are_closed_at_once_and_the_others_stay,
    kick_closes_what_a_client_has_open_and_nothing_else,
);

/// A plain server at 8080, five connections per source, the gateway out of the way, and many audits a second.
fn config(more: &str) -> Result<NamedTempFile> {
    Limiter::config_file(&format!(
        "[kernel]\naudit_interval = \"100ms\"\n{more}\n[limits]\nconnections_per_source = 5\n\
         [[service]]\nname = \"plain\"\nport = {PORT}\n[[service]]\nname = \"chat\"\nport = 8081\n\
         [gateway]\nlisten = [\"127.0.0.1:8081\"]\n"
    ))
}

/// Starts a daemon that sees only the first client's interface.
fn run<'l>(limiter: &'l Limiter<'_>, config: &NamedTempFile) -> Result<Daemon<'l>> {
    limiter.run(["--interface", "client1", "--config", &config.path().display().to_string()])
}

fn assert_nothing_mended(limiter: &Limiter<'_>) -> Result<()> {
    let status = limiter.json("status")?;
    assert_eq!((&status["repairs"], &status["drift"]), (&0.into(), &0.into()), "{status}");
    Ok(())
}

/// Whether the server still holds a connection, as its client sees it.
fn is_open(stream: &TcpStream) -> bool {
    match stream.peek(&mut [0]) {
        Ok(bytes) => bytes > 0,
        Err(error) => error.kind() == ErrorKind::WouldBlock,
    }
}

fn count_open(streams: &[TcpStream]) -> usize {
    streams.iter().filter(|stream| is_open(stream)).count()
}

fn connections_open_before_attach_count_and_give_their_slots_back(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let (address, service) = (client.address(family), client.service(family));
    let server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    let mut crowd = Crowd::connect(&client.namespace, service, 7, SOON)?;
    assert_eq!(crowd.served.len(), 7);

    // No daemon: what gives the slots back is the kernel.
    let attach = ["attach", "--interface", "client1", "--port", "8080", "--connections-per-source", "5"];
    if lacks(Feature::Watch)? {
        let outcome = limiter.outcome(attach)?;
        assert!(outcome.stderr.contains("7 connections were open before and don't count"), "{}", outcome.stderr);
        assert_eq!(limiter.held_by(address)?, 0);
        return Ok(());
    }
    let said = limiter.output(attach)?;
    assert!(said.contains("adopted: 7 connections"), "{said}");
    assert_eq!(limiter.held_by(address)?, 7);
    assert_eq!(limiter.counter("opened_adopted")?, 7);
    let refused = Crowd::connect(&client.namespace, service, 1, NO_ANSWER)?;
    assert_eq!(refused.unanswered.len(), 1, "past the limit");
    drop(refused);

    // The second attach finds them in the ledger.
    limiter.protect(&lab, 5, &[])?;
    assert_eq!(limiter.held_by(address)?, 7);
    crowd.served.truncate(4);
    limiter.wait_held(address, 4)?;
    crowd.served.push(connect_served(&client.namespace, service, SOON)?);
    assert_eq!(count_open(&crowd.served), 5);
    assert_eq!(server.seen(address).open, 5, "nobody was cut");
    drop(crowd);
    limiter.wait_empty()?;
    assert_nothing_mended(&limiter)
}

fn past_xdp_those_too_many_are_closed_at_once_and_the_others_stay(family: Family) -> Result<()> {
    let lab = Lab::new(2)?;
    let [seen, unseen] = [&lab.clients[0], &lab.clients[1]];
    let server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    let config = config("")?;
    let _daemon = run(&limiter, &config)?;
    let state = State::open(&limiter)?;

    let mut within = Crowd::connect(&unseen.namespace, unseen.service(family), 5, SOON)?;
    assert_eq!(within.served.len(), 5);
    assert_eq!(limiter.counter("opened_unseen")?, 5, "no program is on this interface");
    let others = Crowd::connect(&seen.namespace, seen.service(family), 5, SOON)?;
    let past = Crowd::connect(&unseen.namespace, unseen.service(family), 20, SOON)?;
    let opened = Instant::now();
    // Some are closed before their client has read what the server sent.
    eventually_equal(SOON, "connections that are left of those too many", &0, || Ok(count_open(&past.served)))?;
    let took = opened.elapsed();
    assert!(took < Duration::from_secs(1), "it took {took:?}");
    limiter.wait_held(unseen.address(family), 5)?;
    assert_eq!(limiter.counter("cut_past_limit")?, 20);

    state.wait_audited()?;
    assert_eq!(count_open(&within.served), 5, "those within the limit stay");
    assert_eq!(count_open(&others.served), 5, "and nobody else is cut");
    assert_eq!(server.seen(unseen.address(family)).open, 5);
    assert_nothing_mended(&limiter)?;
    // There is room again.
    within.served.pop();
    limiter.wait_held(unseen.address(family), 4)?;
    let late = connect_served(&unseen.namespace, unseen.service(family), SOON)?;
    state.wait_audited()?;
    assert!(is_open(&late));
    assert_eq!(limiter.counter("cut_past_limit")?, 20);
    drop((within, others, late, past));
    limiter.wait_empty()
}

/// Clients of IPv4 at a listener of IPv6, and a listener that goes while its connections stay.
#[test]
fn a_dual_stack_listener_that_restarts_has_its_ipv4_clients_counted_and_cut_alike() -> Result<()> {
    let lab = Lab::new(2)?;
    let unseen = &lab.clients[1];
    let service = unseen.service(Family::V4);
    let address = unseen.address(Family::V4);
    let limiter = Limiter::new(&lab.server)?;
    let any = SocketAddr::new(Family::V6.unspecified(), PORT);
    let listener = tcp::listener(&lab.server, any, 64)?;
    let before = lab.clients[1].namespace.enter(|| TcpStream::connect(service))?;
    let (held, _) = listener.accept()?;
    drop(listener);

    let config = config("")?;
    let _daemon = run(&limiter, &config)?;
    let state = State::open(&limiter)?;
    assert_eq!(limiter.held_by(address)?, 1, "adopted, though nobody listens");
    let server = PlainServer::listen(&lab.server, any)?;
    let mut within = Crowd::connect(&unseen.namespace, service, 4, SOON)?;
    assert_eq!(within.served.len(), 4);
    let past = Crowd::connect(&unseen.namespace, service, 3, SOON)?;
    eventually_equal(SOON, "connections that are left of those too many", &0, || Ok(count_open(&past.served)))?;
    limiter.wait_held(address, 5)?;

    drop(server);
    limiter.wait_held(address, 1)?;
    let _server = PlainServer::listen(&lab.server, any)?;
    within = Crowd::connect(&unseen.namespace, service, 4, SOON)?;
    assert_eq!(within.served.len(), 4);
    state.wait_audited()?;
    assert_eq!(count_open(&within.served), 4);
    assert_nothing_mended(&limiter)?;
    drop((within, before, held));
    limiter.wait_empty()
}

#[test]
fn what_was_open_before_is_never_cut() -> Result<()> {
    let lab = Lab::new(2)?;
    let unseen = &lab.clients[1];
    let _server = PlainServer::start(&lab.server, Family::V4)?;
    let before = Crowd::connect(&unseen.namespace, unseen.service(Family::V4), 9, SOON)?;
    assert_eq!(before.served.len(), 9);
    let limiter = Limiter::new(&lab.server)?;
    let config = config("")?;
    let _daemon = run(&limiter, &config)?;
    let state = State::open(&limiter)?;
    assert_eq!(limiter.held_by(unseen.address(Family::V4))?, 9);

    let past = Crowd::connect(&unseen.namespace, unseen.service(Family::V4), 3, SOON)?;
    eventually_equal(SOON, "connections that are left of those too many", &0, || Ok(count_open(&past.served)))?;
    state.wait_audited()?;
    assert_eq!(count_open(&before.served), 9);
    // A limit that is lowered cuts nobody either.
    limiter.set_limit("connections_per_source", 1)?;
    state.wait_audited()?;
    assert_eq!(count_open(&before.served), 9);
    assert_eq!(limiter.counter("cut_past_limit")?, 3);
    assert_nothing_mended(&limiter)
}

#[test]
fn observing_cuts_nobody() -> Result<()> {
    let lab = Lab::new(2)?;
    let unseen = &lab.clients[1];
    let _server = PlainServer::start(&lab.server, Family::V4)?;
    let limiter = Limiter::new(&lab.server)?;
    let config = config("on_deny = \"observe\"")?;
    let _daemon = run(&limiter, &config)?;
    let crowd = Crowd::connect(&unseen.namespace, unseen.service(Family::V4), 12, SOON)?;
    limiter.wait_held(unseen.address(Family::V4), 12)?;
    State::open(&limiter)?.wait_audited()?;
    assert_eq!(count_open(&crowd.served), 12);
    assert_eq!(limiter.counter("cut_past_limit")?, 0);
    assert_nothing_mended(&limiter)
}

/// Connections come and go as fast as they can, seen by XDP and not, while the ledger is audited ten times a second.
#[test]
fn under_churn_the_audit_mends_nothing() -> Result<()> {
    const ROUNDS: usize = 30;
    let lab = Lab::new(2)?;
    let _server = PlainServer::start(&lab.server, Family::V6)?;
    let limiter = Limiter::new(&lab.server)?;
    let config = config("")?;
    let daemon = run(&limiter, &config)?;
    let state = State::open(&limiter)?;
    std::thread::scope(|scope| -> Result<()> {
        let churns: Vec<_> = lab
            .clients
            .iter()
            .flat_map(|client| [(client, Family::V4), (client, Family::V6)])
            .map(|(client, family)| {
                scope.spawn(move || -> Result<()> {
                    for round in 0..ROUNDS {
                        let crowd = Crowd::connect(&client.namespace, client.service(family), 5, NO_ANSWER)?;
                        for (place, stream) in crowd.served.iter().enumerate() {
                            // Some end by RST.
                            if (round + place) % 3 == 0 {
                                socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO))?;
                            }
                        }
                    }
                    Ok(())
                })
            })
            .collect();
        churns.into_iter().try_for_each(|churn| churn.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })?;
    state.wait_audited()?;
    assert_nothing_mended(&limiter)?;
    limiter.wait_empty()?;
    state.wait_audited()?;
    assert_nothing_mended(&limiter)?;
    let (_, metrics) = daemon.http_get("/metrics").context("metrics are there")?;
    for line in ["limiter_ledger_drift 0", "limiter_ledger_repairs_total{service=\"plain\",kind=\"removed\"} 0"] {
        assert!(metrics.lines().any(|found| found == line), "{line} is not in\n{metrics}");
    }
    Ok(())
}

#[test]
fn what_differs_is_mended_and_a_count_that_is_off_is_shown() -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let address = client.address(Family::V4);
    let _server = PlainServer::start(&lab.server, Family::V4)?;
    let limiter = Limiter::new(&lab.server)?;
    let config = config("")?;
    let daemon = run(&limiter, &config)?;
    let mut state = State::open(&limiter)?;
    let mut crowd = Crowd::connect(&client.namespace, client.service(Family::V4), 3, SOON)?;
    assert_eq!(crowd.served.len(), 3);
    limiter.wait_held(address, 3)?;
    state.wait_audited()?;
    assert_nothing_mended(&limiter)?;

    // An entry whose socket is gone.
    let entries = state.entries()?;
    let (key, entry) = entries[0];
    state.enter(&LedgerEntry { owner: entry.owner + (1 << 40), ..entry }, 1, key.local_port())?;
    assert_eq!(limiter.held_by(address)?, 4);
    limiter.wait_held(address, 3)?;
    assert_eq!(limiter.counter("closed_audit")?, 1);

    // A socket that has no entry. Its end is seen like any other's.
    state.remove(&key, &entry)?;
    limiter.wait_held(address, 3)?;
    eventually_equal(SOON, "entries that the audit made", &1, || limiter.counter("opened_audit"))?;
    assert_eq!(count_open(&crowd.served), 3);
    assert_eq!(limiter.json("status")?["repairs"], 2);
    let mended = crowd
        .served
        .iter()
        .position(|stream| stream.local_addr().is_ok_and(|address| address.port() == key.remote_port()))
        .context("the entry is that of a client")?;
    drop(crowd.served.swap_remove(mended));
    limiter.wait_held(address, 2)?;

    // A count that no entry explains is not mended, but said.
    state.miscount(&entry.source, 2)?;
    eventually_equal(
        SOON,
        "the drift in `limiter status`",
        &2.into(),
        || Ok(limiter.json("status")?["drift"].clone()),
    )?;
    let (_, metrics) = daemon.http_get("/metrics").context("metrics are there")?;
    assert!(metrics.lines().any(|line| line == "limiter_ledger_drift 2"), "{metrics}");
    assert!(limiter.output(["status"])?.contains("drift 2, 2 repairs"));
    state.miscount(&entry.source, -2)?;
    eventually_equal(
        SOON,
        "the drift in `limiter status`",
        &0.into(),
        || Ok(limiter.json("status")?["drift"].clone()),
    )?;
    assert_eq!(limiter.json("status")?["repairs"], 2);
    assert_eq!(limiter.counter("closed_audit")?, 1, "what the socket's end released, the audit has not");
    drop(crowd);
    limiter.wait_empty()
}

/// What the server has given up is not adopted, however long its client keeps the kernel waiting.
#[test]
fn what_the_server_has_given_up_is_not_adopted() -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let listener = tcp::listener(&lab.server, SocketAddr::new(Family::V4.unspecified(), PORT), 64)?;
    let connect = || client.namespace.enter(|| TcpStream::connect(client.service(Family::V4)));
    let (given_up, half_closed) = (connect()?, connect()?);
    drop(listener.accept()?.0);
    let (held, _) = listener.accept()?;
    half_closed.shutdown(std::net::Shutdown::Write)?;

    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 5, &[])?;
    assert_eq!(limiter.ledger()?, [half_closed.local_addr()?], "one is in FIN-WAIT-2, one in CLOSE-WAIT");
    drop((given_up, half_closed, held));
    limiter.wait_empty()
}

/// Two that the accept queue has room for, and more than the stack opens; then clients that a listener waits for to speak.
#[test]
fn a_full_accept_queue_and_a_listener_that_defers_are_counted_right() -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let (address, service) = (client.address(Family::V4), client.service(Family::V4));
    let limiter = Limiter::new(&lab.server)?;
    let config = config("")?;
    let _daemon = run(&limiter, &config)?;
    let state = State::open(&limiter)?;

    let any = SocketAddr::new(Family::V4.unspecified(), PORT);
    let listener = tcp::listener(&lab.server, any, 1)?;
    let crowd = Crowd::connect(&client.namespace, service, 4, NO_ANSWER)?;
    let established = || Ok(monitor::established(&lab.server, PORT)?.get(&address).copied().unwrap_or(0));
    eventually_equal(SOON, "connections that the stack has opened", &2, established)?;
    // Those that the stack has no room for hold a slot for three seconds at a time, and no entry is taken for stale.
    state.wait_audited()?;
    assert_nothing_mended(&limiter)?;
    assert!((2..=4).contains(&limiter.held_by(address)?));
    drop((crowd, listener));
    limiter.wait_empty()?;

    let listener = tcp::listener(&lab.server, any, 64)?;
    // The kernel opens a connection only when its client has sent something.
    tcp::set_tcp_option(&listener, libc::TCP_DEFER_ACCEPT, 30)?;
    let connect = || client.namespace.enter(|| TcpStream::connect(service));
    let (mut speaks, silent) = (connect()?, connect()?);
    speaks.write_all(b"first")?;
    let (held, _) = listener.accept()?;
    eventually(SOON, "the one that speaks is in the ledger as open", || {
        let key = |entry: &(ConnectionKey, LedgerEntry)| entry.0.remote_port();
        let open = state.entries()?.into_iter().filter(|(_, entry)| entry.owner >> 63 == 0);
        Ok(open.map(|entry| key(&entry)).eq([speaks.local_addr()?.port()]))
    })?;
    state.wait_audited()?;
    assert_nothing_mended(&limiter)?;
    drop((speaks, silent, held, listener));
    limiter.wait_empty()
}

/// A rule holds past XDP as it does in it.
#[test]
fn past_xdp_rules_hold_too() -> Result<()> {
    let lab = Lab::new(2)?;
    let unseen = &lab.clients[1];
    let address = unseen.address(Family::V4);
    let _server = PlainServer::start(&lab.server, Family::V4)?;
    let limiter = Limiter::new(&lab.server)?;
    let config = config("")?;
    let _daemon = run(&limiter, &config)?;
    let state = State::open(&limiter)?;
    limiter.output(["allow", &address.to_string()])?;
    let allowed = Crowd::connect(&unseen.namespace, unseen.service(Family::V4), 9, SOON)?;
    limiter.wait_held(address, 9)?;
    state.wait_audited()?;
    assert_eq!(count_open(&allowed.served), 9);
    limiter.output(["deny", &address.to_string()])?;
    let denied = Crowd::connect(&unseen.namespace, unseen.service(Family::V4), 3, SOON)?;
    eventually_equal(SOON, "connections that are left of those denied", &0, || Ok(count_open(&denied.served)))?;
    limiter.wait_held(address, 9)?;
    state.wait_audited()?;
    assert_eq!(count_open(&allowed.served), 9, "what is open stays open");
    assert_nothing_mended(&limiter)
}

fn kick_closes_what_a_client_has_open_and_nothing_else(family: Family) -> Result<()> {
    let lab = Lab::new(2)?;
    let [kicked, other] = [&lab.clients[0], &lab.clients[1]];
    let _server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 5, &[])?;
    let crowd = Crowd::connect(&kicked.namespace, kicked.service(family), 3, SOON)?;
    let others = Crowd::connect(&other.namespace, other.service(family), 3, SOON)?;
    let address = kicked.address(family);
    limiter.wait_held(address, 3)?;
    limiter.wait_held(other.address(family), 3)?;

    let said: serde_json::Value = serde_json::from_str(&limiter.output(["kick", &address.to_string(), "--json"])?)?;
    let mut closed: Vec<SocketAddr> = serde_json::from_value(said["kicked"].clone())?;
    let mut clients = crowd.served.iter().map(TcpStream::local_addr).collect::<Result<Vec<_>, _>>()?;
    closed.sort();
    clients.sort();
    assert_eq!(closed, clients);
    eventually_equal(SOON, "connections that are left of the client", &0, || Ok(count_open(&crowd.served)))?;
    limiter.wait_held(address, 0)?;
    assert_eq!(count_open(&others.served), 3);
    assert!(limiter.output(["kick", &address.to_string()])?.contains("nothing is open"));
    let again = connect_served(&kicked.namespace, kicked.service(family), SOON)?;
    drop((again, others));
    limiter.wait_empty()
}
