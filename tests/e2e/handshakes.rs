//! Handshakes and ends as TCP allows them and networks make them: sent again, twice, out of order, from both sides at once,
//! from the same port again. A slot is never counted twice, lost or exceeded.

use std::{
    io,
    net::{SocketAddr, TcpListener, TcpStream},
    time::Instant,
};

use anyhow::{Context as _, Result};
use limiter_tests::{
    both_families,
    lab::{Family, Lab, PORT},
    limiter::Limiter,
    raw::{RawClient, RawConnection},
    segment::{Segment, flags},
    state::State,
    tcp::{self, BACKLOG, PlainServer, Seen, connect_served},
    wait::{NO_ANSWER, SOON, eventually_equal},
};
use socket2::{Domain, Socket, Type};

const LIMIT: u32 = 5;

both_families!(
    sent_again_and_twice_and_out_of_order_is_counted_once,
    of_64_acks_in_one_batch_those_within_the_limit_count,
    a_forged_end_with_the_right_numbers_and_a_flaw_frees_no_slot,
    a_half_closed_connection_holds_its_slot,
    a_port_that_comes_back_at_once_is_counted_each_time,
    a_connection_that_both_sides_open_is_counted_and_released,
);

fn sent_again_and_twice_and_out_of_order_is_counted_once(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::protecting(&lab, LIMIT)?;
    let mut raw = RawClient::new(client, family)?;

    let syns = raw.syns(4);
    for _ in 0..3 {
        raw.send(&syns)?;
    }
    let connections = raw.answered(&syns, SOON)?;
    assert_eq!(connections.len(), 4);
    // The data before the ACK that it follows, each of them eight times, and the SYNs once more among them.
    let data = |connection: &RawConnection| Segment { payload: vec![b'?'; 3], ..connection.segment(flags::ACK) };
    let mut batch = Vec::new();
    for _ in 0..8 {
        batch.extend(connections.iter().map(data));
        batch.extend(connections.iter().rev().map(|connection| connection.segment(flags::ACK)));
        batch.extend(syns.iter().cloned());
    }
    raw.send(&batch)?;
    let behind = connect_served(&client.namespace, client.service(Family::V4), SOON)?;
    assert_eq!(server.seen(raw.address()), Seen { accepted: 4, open: 4, peak: 4 });
    limiter.wait_held(raw.address(), 4)?;

    // There is room for one more, and one only.
    let last = raw.half_open(2)?;
    raw.complete(&last)?;
    raw.complete(&last)?;
    limiter.wait_held(raw.address(), LIMIT.into())?;
    drop(behind);
    let sent: Vec<_> = connections.iter().map(|connection| after(*connection, 3)).collect();
    raw.reset(&sent)?;
    raw.reset(&sent)?;
    raw.reset(&last)?;
    limiter.wait_empty()?;
    let opened = limiter.counter("opened_reserved")? + limiter.counter("opened_unseen")?;
    assert_eq!(opened, u64::from(LIMIT) + 1, "and the one behind them");
    assert_eq!(limiter.counter("closed_socket")?, opened);
    Ok(())
}

fn of_64_acks_in_one_batch_those_within_the_limit_count(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::protecting(&lab, LIMIT)?;
    let mut raw = RawClient::new(client, family)?;
    for round in 1..=5 {
        let connections = raw.half_open(64)?;
        raw.complete(&connections)?;
        let behind = connect_served(&client.namespace, client.service(Family::V4), SOON)?;
        let seen = server.seen(raw.address());
        assert_eq!(seen, Seen { accepted: round * LIMIT, open: LIMIT, peak: LIMIT }, "round {round}");
        drop(behind);
        raw.reset(&connections)?;
        eventually_equal(SOON, "all are closed", &0, || Ok(server.seen(raw.address()).open))?;
        limiter.wait_held(raw.address(), 0)?;
    }
    limiter.wait_empty()
}

/// The attacker knows every number; what it sends has another flaw, for which the stack drops it.
fn a_forged_end_with_the_right_numbers_and_a_flaw_frees_no_slot(family: Family) -> Result<()> {
    let lab = Lab::new(2)?;
    let (home, elsewhere) = (&lab.clients[0], &lab.clients[1]);
    let server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::protecting(&lab, LIMIT)?;
    let mut victim = RawClient::new(home, family)?;
    let attacker = RawClient::with_address(elsewhere, victim.address(), family)?;
    let connections = victim.half_open(LIMIT.try_into()?)?;
    victim.complete(&connections)?;
    eventually_equal(SOON, "the victim is served", &LIMIT, || Ok(server.seen(victim.address()).open))?;

    let tcp = if family == Family::V4 { 34 } else { 54 };
    let mut frames = Vec::new();
    for connection in &connections {
        for kind in [flags::RST, flags::RST | flags::ACK, flags::FIN | flags::ACK] {
            let segment = connection.segment(kind);
            let frame = attacker.frame(&segment);
            let changed = |at: usize, change: fn(u8) -> u8| {
                let mut frame = frame.clone();
                frame[at] = change(frame[at]);
                frame
            };
            // A checksum that is wrong; a header that is too short, or longer than the packet.
            frames.push(changed(tcp + 16, |byte| byte ^ 0x55));
            frames.push(changed(tcp + 12, |_| 4 << 4));
            frames.push(changed(tcp + 12, |_| 15 << 4));
            // Cut off in the middle of the header.
            frames.push(frame[..tcp + 15].to_vec());
            // Far outside the window, with options that make no sense.
            let far =
                Segment { sequence: segment.sequence.wrapping_sub(1 << 20), options: vec![34, 255, 254, 0], ..segment };
            frames.push(attacker.frame(&far));
            // To the client, in the server's name; and from the server to itself.
            let back = Segment { source: far.destination, destination: far.source, ..far.clone() };
            frames.push(attacker.frame(&back));
            frames.push(attacker.frame(&Segment { source: far.destination, ..far }));
        }
    }
    attacker.send_frames(frames)?;
    drop(connect_served(&elsewhere.namespace, elsewhere.service(family), SOON)?);
    assert_eq!(server.seen(victim.address()), Seen { accepted: LIMIT, open: LIMIT, peak: LIMIT });
    assert_eq!(limiter.held_by(victim.address())?, u64::from(LIMIT));
    assert_eq!(victim.half_open_within(1, NO_ANSWER)?.len(), 0, "the source is still at its limit");
    victim.reset(&connections)?;
    limiter.wait_empty()
}

fn a_half_closed_connection_holds_its_slot(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let listener = listen(&lab, family)?;
    let limiter = Limiter::protecting(&lab, LIMIT)?;
    let connect = || client.namespace.enter(|| TcpStream::connect(client.service(family)));
    let (by_client, by_server) = (connect()?, connect()?);
    let (first, _) = listener.accept()?;
    let (second, _) = listener.accept()?;
    by_client.shutdown(std::net::Shutdown::Write)?;
    second.shutdown(std::net::Shutdown::Write)?;
    let mut byte = [0];
    assert_eq!(io::Read::read(&mut &first, &mut byte)?, 0, "the server sees the client's end");
    assert_eq!(limiter.held_by(client.address(family))?, 2);
    // Data still goes the other way.
    io::Write::write_all(&mut &first, b"!")?;
    io::Read::read_exact(&mut &by_client, &mut byte)?;
    drop(first);
    limiter.wait_held(client.address(family), 1)?;
    drop(by_server);
    drop(second);
    limiter.wait_empty()?;
    drop(by_client);
    Ok(())
}

/// The server ends first, so the pair of ports is in TIME-WAIT there when the client uses it again.
fn a_port_that_comes_back_at_once_is_counted_each_time(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let listener = listen(&lab, family)?;
    let limiter = Limiter::protecting(&lab, LIMIT)?;
    let mut raw = RawClient::new(client, family)?;
    let mut syn = raw.syns(1).remove(0);
    for round in 0..6 {
        raw.send(&[syn.clone()])?;
        let connection =
            raw.answered(&[syn.clone()], SOON)?.pop().with_context(|| format!("no answer, round {round}"))?;
        raw.complete(&[connection])?;
        drop(listener.accept()?);
        let fin = receive(&raw, |segment| segment.flags & flags::FIN != 0)?;
        let closing = RawConnection { expected: fin.sequence.wrapping_add(1), ..connection };
        raw.send(&[closing.segment(flags::FIN | flags::ACK)])?;
        limiter.wait_held(raw.address(), 0)?;
        // Beyond what was sent, as the stack wants it for a port in TIME-WAIT (RFC 9293 section 3.6.1).
        syn.sequence = syn.sequence.wrapping_add(1 << 16);
    }
    assert_eq!(limiter.counters(["opened_reserved", "opened_unseen", "closed_socket"])?, [6, 0, 6]);
    assert_eq!(State::open(&limiter)?.known_flows()?, 0, "connections that are known, and closed");
    limiter.wait_empty()
}

/// The server's side connects from the service's port while the client connects to it (RFC 9293 section 3.5).
fn a_connection_that_both_sides_open_is_counted_and_released(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let limiter = Limiter::protecting(&lab, LIMIT)?;
    let raw = RawClient::new(client, family)?;
    let local = SocketAddr::new(raw.address(), 30_000);
    let active = lab.server.enter(|| -> io::Result<Socket> {
        let socket = Socket::new(Domain::for_address(local), Type::STREAM, None)?;
        socket.bind(&SocketAddr::new(family.unspecified(), PORT).into())?;
        socket.set_nonblocking(true)?;
        match socket.connect(&local.into()) {
            Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
            _ => Ok(socket),
        }
    })?;
    let theirs = receive(&raw, |segment| segment.flags & (flags::SYN | flags::ACK) == flags::SYN)?;
    let connection = RawConnection {
        local,
        server: theirs.source,
        next_sequence: 70_000,
        expected: theirs.sequence.wrapping_add(1),
    };
    raw.send(&[connection.segment(flags::SYN)])?;
    let connection = after(connection, 1);
    receive(&raw, |segment| segment.acknowledgement == connection.next_sequence)?;
    raw.send(&[connection.segment(flags::ACK), connection.segment(flags::ACK)])?;
    limiter.wait_held(raw.address(), 1)?;
    assert!(TcpStream::from(active).peer_addr().is_ok(), "it is open");
    raw.reset(&[connection])?;
    limiter.wait_empty()
}

fn listen(lab: &Lab, family: Family) -> Result<TcpListener> {
    tcp::listener(&lab.server, SocketAddr::new(family.unspecified(), PORT), BACKLOG)
}

/// The next segment from the service of which that holds.
fn receive(raw: &RawClient, wanted: impl Fn(&Segment) -> bool) -> Result<Segment> {
    let deadline = Instant::now() + SOON;
    loop {
        let segment = raw.receive(deadline)?.context("the server sends what is waited for")?;
        if wanted(&segment) {
            return Ok(segment);
        }
    }
}

/// The same connection after so many bytes were sent on it.
fn after(connection: RawConnection, bytes: u32) -> RawConnection {
    RawConnection { next_sequence: connection.next_sequence.wrapping_add(bytes), ..connection }
}
