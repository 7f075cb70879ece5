//! Every kind of listener that a server may have. Handshakes come in one batch, and nobody is there to cut what was one too
//! many: XDP holds the limit alone.

use std::{
    collections::HashSet,
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener},
};

use anyhow::{Context as _, Result};
use limiter_tests::{
    both_families,
    lab::{CLIENT_INTERFACE, Family, Lab, PORT},
    limiter::Limiter,
    raw::{RawClient, RawConnection},
    segment::{Segment, flags},
    tcp::{self, BACKLOG, Crowd, PlainServer, Seen, connect_served},
    wait::{NO_ANSWER, SOON, eventually, eventually_equal},
};
use socket2::Protocol;

const LIMIT: u32 = 5;
const HANDSHAKES: u16 = 20;

both_families!(
    of_mptcp,
    of_mptcp_with_cookies,
    that_defers,
    that_takes_fast_open,
    that_restarts_while_handshakes_are_under_way,
    on_several_addresses,
);

fn any(family: Family) -> SocketAddr {
    SocketAddr::new(family.unspecified(), PORT)
}

fn of_mptcp(family: Family) -> Result<()> {
    mptcp(family, "1")
}

fn of_mptcp_with_cookies(family: Family) -> Result<()> {
    mptcp(family, "2")
}

/// What Go's net/http listens with since 1.24.
fn mptcp(family: Family, syncookies: &str) -> Result<()> {
    let lab = Lab::new(1)?;
    lab.server.set_sysctl("net/ipv4/tcp_syncookies", syncookies)?;
    let listener = tcp::listener_of(&lab.server, any(family), BACKLOG, Some(Protocol::MPTCP), |_| Ok(()))?;
    a_batch_gets_the_limit(&lab, family, listener)
}

/// A batch of handshakes of one client at a listener.
fn a_batch_gets_the_limit(lab: &Lab, family: Family, listener: TcpListener) -> Result<()> {
    let server = PlainServer::of(listener)?;
    let client = &lab.clients[0];
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(lab, LIMIT, &[])?;
    let mut raw = RawClient::new(client, family)?;
    let connections = raw.half_open(HANDSHAKES)?;
    raw.complete(&connections)?;
    // Behind the batch, on the same link.
    let behind = connect_served(&client.namespace, client.service(Family::V4), SOON)?;
    assert_eq!(server.seen(raw.address()), Seen { accepted: LIMIT, open: LIMIT, peak: LIMIT });
    limiter.wait_held(raw.address(), LIMIT.into())?;
    assert_eq!(limiter.counter("opened_unseen")?, 0, "XDP has seen every handshake");
    assert_eq!(limiter.counter("handshake_unproven")?, 0);
    drop(behind);
    raw.reset(&connections)?;
    limiter.wait_empty()
}

/// The stack opens a connection when its client has spoken; until then its slot is only reserved.
fn that_defers(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let listener = tcp::listener(&lab.server, any(family), BACKLOG)?;
    tcp::set_tcp_option(&listener, libc::TCP_DEFER_ACCEPT, 30)?;
    let server = PlainServer::of(listener)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, LIMIT, &[])?;
    let mut raw = RawClient::new(client, family)?;
    let connections = raw.half_open(HANDSHAKES)?;
    raw.complete(&connections)?;
    limiter.wait_held(raw.address(), LIMIT.into())?;
    assert_eq!(server.seen(raw.address()), Seen::default(), "nobody has spoken");
    // All speak: those that were refused at their ACK, too.
    let data = |connection: &RawConnection| Segment { payload: vec![b'?'], ..connection.segment(flags::ACK) };
    raw.send(&connections.iter().map(data).collect::<Vec<_>>())?;
    eventually_equal(SOON, "those that were let in are open", &LIMIT, || Ok(server.seen(raw.address()).open))?;
    assert_eq!(server.seen(raw.address()), Seen { accepted: LIMIT, open: LIMIT, peak: LIMIT });
    raw.reset(&connections.iter().map(|connection| sent(*connection, 1)).collect::<Vec<_>>())?;
    limiter.wait_empty()
}

/// The same connection after so many bytes were sent on it.
fn sent(connection: RawConnection, bytes: u32) -> RawConnection {
    RawConnection { next_sequence: connection.next_sequence.wrapping_add(bytes), ..connection }
}

/// TCP option 34 (RFC 7413), padded to whole words.
fn fast_open(cookie: &[u8]) -> Vec<u8> {
    let length = u8::try_from(2 + cookie.len()).expect("a cookie is short");
    let mut option = [&[34, length][..], cookie].concat();
    option.resize(option.len().next_multiple_of(4), 1);
    option
}

/// The cookie that the server gives this client, if it gives one.
fn fast_open_cookie(raw: &mut RawClient) -> Result<Option<Vec<u8>>> {
    let syn = Segment { options: fast_open(&[]), ..raw.syns(1).remove(0) };
    raw.send(std::slice::from_ref(&syn))?;
    let deadline = std::time::Instant::now() + SOON;
    loop {
        let answer = raw.receive(deadline)?.context("a SYN is answered")?;
        if answer.destination != syn.source {
            continue;
        }
        let mut options = &answer.options[..];
        while let [kind, rest @ ..] = options {
            match (kind, rest) {
                (0, _) => break,
                (1, _) => options = rest,
                (34, [length, ..]) => return Ok(Some(options[2..usize::from(*length)].to_vec())),
                (_, [length, ..]) => options = &options[usize::from(*length)..],
                _ => break,
            }
        }
        return Ok(None);
    }
}

/// Fast Open has the stack open connections at the SYN, before anybody can count them: 64 SYNs of one batch would all be
/// open. Behind limiter they are full handshakes.
fn that_takes_fast_open(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    // The server's side, too.
    lab.server.set_sysctl("net/ipv4/tcp_fastopen", "3")?;
    let listener = tcp::listener(&lab.server, any(family), BACKLOG)?;
    tcp::set_tcp_option(&listener, libc::TCP_FASTOPEN, 1000)?;
    let server = PlainServer::of(listener)?;
    let mut raw = RawClient::new(client, family)?;
    let cookie = fast_open_cookie(&mut raw)?.context("without limiter there is a cookie")?;
    // Without limiter it opens connections at once.
    let syns = with_cookie(&raw.syns(1), &cookie);
    raw.send(&syns)?;
    eventually_equal(SOON, "opened by its SYN", &1, || Ok(server.seen(raw.address()).open))?;
    let taken = syns[0].sequence.wrapping_add(1 + u32::try_from(syns[0].payload.len())?);
    raw.send(&[Segment {
        sequence: taken,
        flags: flags::RST,
        options: Vec::new(),
        payload: Vec::new(),
        ..syns[0].clone()
    }])?;
    eventually_equal(SOON, "and reset", &0, || Ok(server.seen(raw.address()).open))?;

    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, LIMIT, &[])?;
    let before = server.seen(raw.address());
    let syns = with_cookie(&raw.syns(64), &cookie);
    raw.send(&syns)?;
    let connections = raw.answered(&syns, SOON)?;
    assert_eq!(connections.len(), 64, "each is answered");
    assert_eq!(server.seen(raw.address()), before, "and none is open by its SYN");
    raw.complete(&connections)?;
    drop(connect_served(&client.namespace, client.service(Family::V4), SOON)?);
    limiter.wait_held(raw.address(), LIMIT.into())?;
    assert!(server.seen(raw.address()).open <= LIMIT);
    assert_eq!(limiter.counter("opened_unseen")?, 0);
    // Nobody is given a new one.
    raw.reset(&connections)?;
    limiter.wait_held(raw.address(), 0)?;
    assert_eq!(fast_open_cookie(&mut raw)?, None);
    Ok(())
}

fn with_cookie(syns: &[Segment], cookie: &[u8]) -> Vec<Segment> {
    syns.iter().map(|syn| Segment { options: fast_open(cookie), payload: b"early".to_vec(), ..syn.clone() }).collect()
}

fn that_restarts_while_handshakes_are_under_way(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, LIMIT, &[])?;
    let mut raw = RawClient::new(client, family)?;
    for _ in 0..3 {
        let first = tcp::listener(&lab.server, any(family), BACKLOG)?;
        let connections = raw.half_open(HANDSHAKES)?;
        drop(first);
        let server = PlainServer::start(&lab.server, family)?;
        // Their half-open connections went with the first listener.
        raw.complete(&connections)?;
        let behind = connect_served(&client.namespace, client.service(Family::V4), SOON)?;
        assert_eq!(server.seen(raw.address()), Seen::default());
        drop(behind);
        // XDP can't know that these lead nowhere: they hold their slots until they expire, for which there has to be traffic,
        // and no daemon.
        let mut again = Vec::new();
        eventually(SOON, "the client is answered again", || {
            again = raw.half_open_within(1, NO_ANSWER)?;
            Ok(!again.is_empty())
        })?;
        raw.complete(&again)?;
        eventually_equal(SOON, "the client is served again", &1, || Ok(server.seen(raw.address()).open))?;
        raw.reset(&again)?;
        limiter.wait_held(raw.address(), 0)?;
        drop(server);
        limiter.wait_empty()?;
        // In the queue of a listener that goes, connections are open and then reset.
        let queue = tcp::listener(&lab.server, any(family), BACKLOG)?;
        let connections = raw.half_open(HANDSHAKES)?;
        raw.complete(&connections)?;
        limiter.wait_held(raw.address(), LIMIT.into())?;
        drop(queue);
        limiter.wait_empty()?;
    }
    Ok(())
}

/// The same client and the same port to several addresses of the server's are connections of their own, and one source's.
fn on_several_addresses(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let interface = client.server_interface();
    let addresses: Vec<IpAddr> = (10..18)
        .map(|host| match client.server_address(family) {
            IpAddr::V4(address) => {
                let [a, b, c, _] = address.octets();
                IpAddr::from([a, b, c, host])
            }
            IpAddr::V6(address) => {
                let mut segments = address.segments();
                segments[7] = host.into();
                Ipv6Addr::from(segments).into()
            }
        })
        .collect();
    let (length, mac) = (if family == Family::V4 { 24 } else { 64 }, client.server_mac());
    let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
    for address in &addresses {
        lab.server.ip(&format!("addr add {address}/{length} dev {interface} nodad"))?;
        client.namespace.ip(&format!("neigh add {address} lladdr {mac} dev {CLIENT_INTERFACE}"))?;
    }
    let server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, LIMIT, &[])?;

    // From one port of the client's to each.
    let from = SocketAddr::new(client.address(family), 40_000);
    let mut open = Vec::new();
    for address in &addresses {
        let to = SocketAddr::new(*address, PORT);
        open.extend(
            Crowd::connect_from_port(&client.namespace, from, to, if open.len() < 5 { SOON } else { NO_ANSWER })?
                .served,
        );
    }
    assert_eq!(open.len(), usize::try_from(LIMIT)?, "of {} addresses", addresses.len());
    assert_eq!(server.seen(from.ip()).open, LIMIT);
    let remotes: HashSet<SocketAddr> = limiter.ledger()?.into_iter().collect();
    assert_eq!((limiter.ledger()?.len(), remotes), (open.len(), HashSet::from([from])));
    // Each gives back its own slot.
    while open.pop().is_some() {
        limiter.wait_held(from.ip(), open.len() as u64)?;
    }
    limiter.wait_empty()
}

/// A listener of IPv6 that takes IPv4 has both in one queue; they are two sources.
#[test]
fn of_both_families() -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let server = PlainServer::start(&lab.server, Family::V6)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, LIMIT, &[])?;
    let mut clients = [RawClient::new(client, Family::V4)?, RawClient::new(client, Family::V6)?];
    let mut half_open = Vec::new();
    for raw in &mut clients {
        half_open.push(raw.half_open(HANDSHAKES)?);
    }
    for (raw, connections) in clients.iter().zip(&half_open) {
        raw.complete(connections)?;
    }
    for raw in &clients {
        limiter.wait_held(raw.address(), LIMIT.into())?;
        eventually(SOON, "those within the limit are served", || Ok(server.seen(raw.address()).open == LIMIT))?;
    }
    assert_eq!(limiter.ledger()?.len(), 2 * usize::try_from(LIMIT)?);
    for (raw, connections) in clients.iter().zip(&half_open) {
        assert_eq!(server.seen(raw.address()), Seen { accepted: LIMIT, open: LIMIT, peak: LIMIT });
        raw.reset(connections)?;
    }
    limiter.wait_empty()
}
