//! Services whose sockets are in other network namespaces, or at another port than their clients connect to.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result};
use limiter_tests::{
    container::{Container, nft},
    kernel::{Feature, lacks},
    lab::{Family, Lab, PORT},
    limiter::Limiter,
    raw::RawClient,
    segment::flags,
    state::State,
    tcp::{Crowd, PlainServer},
    wait::{NO_ANSWER, SOON, eventually, eventually_equal},
};
use socket2::SockRef;
use tempfile::NamedTempFile;

/// The port that clients connect to. That of the sockets behind it is each test's own: every limiter here counts the sockets of
/// every namespace of this machine, and all the labs have the same addresses.
const PUBLISHED: u16 = PORT;
const ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::new(172, 17, 0, 2));
const ADDRESS_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2));

/// Five connections per source at the published port, the host's own server at 8443, and the gateway out of the way.
fn config(service: &str) -> Result<NamedTempFile> {
    config_at(PUBLISHED, service)
}

fn config_at(port: u16, service: &str) -> Result<NamedTempFile> {
    Limiter::config_file(&format!(
        "[kernel]\naudit_interval = \"100ms\"\n[limits]\nconnections_per_source = 5\nconnection_rate = 0\n\
         [[service]]\nname = \"web\"\nport = {port}\n{service}\n\
         [[service]]\nname = \"gateway\"\nport = 8081\n[gateway]\nlisten = [\"127.0.0.1:8081\"]\n"
    ))
}

fn in_containers(inside: u16) -> String {
    format!("socket_port = {inside}\nnamespaces = \"others\"")
}

fn published(lab: &Lab, client: usize) -> SocketAddr {
    SocketAddr::new(lab.clients[client].server_address(Family::V4), PUBLISHED)
}

fn inside(port: u16) -> SocketAddr {
    SocketAddr::new(ADDRESS, port)
}

fn any(port: u16) -> SocketAddr {
    SocketAddr::new(Family::V4.unspecified(), port)
}

fn assert_nothing_mended(limiter: &Limiter<'_>) -> Result<()> {
    let status = limiter.json("status")?;
    assert_eq!((&status["repairs"], &status["drift"]), (&0.into(), &0.into()), "{status}");
    Ok(())
}

fn is_open(stream: &TcpStream) -> bool {
    match stream.peek(&mut [0]) {
        Ok(bytes) => bytes > 0,
        Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
    }
}

fn rows(limiter: &Limiter<'_>) -> Result<Vec<serde_json::Value>> {
    let report = limiter.json("connections")?;
    Ok(report["connections"].as_array().context("connections are a list")?.clone())
}

/// What is so where the kernel can't see a handshake end elsewhere; how limits hold then, the test without this feature shows.
fn counts_when_open() -> Result<()> {
    let lab = Lab::new(1)?;
    let limiter = Limiter::new(&lab.server)?;
    let config = config(&in_containers(8443))?;
    let mut daemon = limiter.run_on(&lab, &config)?;
    assert_eq!(limiter.json("status")?["counts_on_delivery"], false);
    let said = daemon.process().stderr();
    assert!(said.contains("it must be 6.17"), "{said}");
    Ok(())
}

#[test]
fn a_published_port_holds_the_limit_exactly_and_slots_come_back() -> Result<()> {
    const INSIDE: u16 = 8444;
    if lacks(Feature::Delivery)? {
        return counts_when_open();
    }
    let lab = Lab::new(2)?;
    let [first, second] = [&lab.clients[0], &lab.clients[1]];
    let address = first.address(Family::V4);
    let container = Container::new(&lab.server, 1, ADDRESS)?;
    nft_publish(&lab, &container, &[0, 1], INSIDE)?;
    let server = PlainServer::listen(&container.namespace, any(INSIDE))?;
    // One of the host's own at the same port, which is nobody's service.
    let own = PlainServer::listen(&lab.server, any(INSIDE))?;
    let limiter = Limiter::new(&lab.server)?;
    let config = config(&in_containers(INSIDE))?;
    let daemon = limiter.run_on(&lab, &config)?;
    let state = State::open(&limiter)?;
    assert_eq!(limiter.json("status")?["counts_on_delivery"], true);

    // The links have found each other when the one is served.
    drop(Crowd::connect(&first.namespace, published(&lab, 0), 1, SOON)?);
    limiter.wait_empty()?;
    // All at once: every SYN is there before the first connection is.
    let mut crowd = Crowd::connect(&first.namespace, published(&lab, 0), 40, NO_ANSWER)?;
    assert_eq!(crowd.served.len(), 5);
    assert_eq!(server.seen(address).peak, 5, "never more, not for a moment");
    limiter.wait_held(address, 5)?;
    assert_eq!(limiter.counter("opened_reserved")?, 6);
    assert_eq!(limiter.counter("opened_unseen")?, 0);
    assert_eq!(limiter.counter("cut_past_limit")?, 0);
    // At its limit, its SYNs end at the host's interface.
    let refused = Crowd::connect(&first.namespace, published(&lab, 0), 3, NO_ANSWER)?;
    assert_eq!(refused.unanswered.len(), 3);
    let others = Crowd::connect(&second.namespace, published(&lab, 1), 4, SOON)?;
    assert_eq!(others.served.len(), 4, "another source");

    // The host's own server at the same port is not of the service.
    let direct = SocketAddr::new(first.server_address(Family::V4), INSIDE);
    let host = Crowd::connect(&first.namespace, direct, 8, SOON)?;
    assert_eq!((host.served.len(), own.seen(address).open), (8, 8));
    limiter.wait_held(address, 5)?;
    let text = limiter.output(["connections"])?;
    assert!(text.contains(&format!("{} in net:[", inside(INSIDE))), "{text}");
    state.wait_audited()?;
    assert_nothing_mended(&limiter)?;

    drop(refused);
    // By RST, which ends the handshakes that wait in the container: a FIN would complete them when a slot comes free.
    reset(&crowd.unserved)?;
    drop(crowd.unserved);
    crowd.served.truncate(3);
    limiter.wait_held(address, 3)?;
    assert!(crowd.served.iter().all(is_open));
    drop((crowd.served, others, host));
    limiter.wait_empty()?;
    state.wait_audited()?;
    assert_nothing_mended(&limiter)?;
    drop(daemon);
    Ok(())
}

/// Has the host lead these clients to a container.
fn nft_publish(lab: &Lab, container: &Container, clients: &[usize], port: u16) -> Result<()> {
    let interfaces: Vec<String> = clients.iter().map(|&client| lab.clients[client].server_interface()).collect();
    container.publish(&lab.server, &interfaces, PUBLISHED, inside(port))
}

/// Both have the same address and port, and their clients too: what is a connection of the one is none of the other.
#[test]
fn two_containers_with_the_same_address_and_the_host_are_kept_apart() -> Result<()> {
    const INSIDE: u16 = 8445;
    if lacks(Feature::Delivery)? {
        return counts_when_open();
    }
    let lab = Lab::new(2)?;
    let limiter = Limiter::new(&lab.server)?;
    // Nothing but the interface that a packet comes by says which of the two it is for.
    let containers = [Container::new(&lab.server, 1, ADDRESS)?, Container::new(&lab.server, 2, ADDRESS)?];
    let mut servers = Vec::new();
    for (place, container) in containers.iter().enumerate() {
        nft_publish(&lab, container, &[place], INSIDE)?;
        servers.push(PlainServer::listen(&container.namespace, any(INSIDE))?);
    }
    let config = config(&format!("socket_port = {INSIDE}\nnamespaces = \"all\""))?;
    let daemon = limiter.run_on(&lab, &config)?;
    let state = State::open(&limiter)?;
    let mut crowds = Vec::new();
    for (place, client) in lab.clients.iter().enumerate() {
        let crowd = Crowd::connect(&client.namespace, published(&lab, place), 9, NO_ANSWER)?;
        assert_eq!(crowd.served.len(), 5);
        crowds.push(crowd);
    }
    // From inside each container, and on the host, with one four-tuple.
    let same = SocketAddr::new(IpAddr::from([127, 0, 0, 1]), 40_000);
    let local = SocketAddr::new(IpAddr::from([127, 0, 0, 1]), INSIDE);
    let _own = PlainServer::listen(&lab.server, any(INSIDE))?;
    let mut tuples = Vec::new();
    for namespace in [&lab.server, &containers[0].namespace, &containers[1].namespace] {
        let mut one = Crowd::connect_from_port(namespace, same, local, SOON)?;
        tuples.push(one.served.pop().context("it is served")?);
    }
    limiter.wait_held(same.ip(), 3)?;
    let found = rows(&limiter)?;
    let mut namespaces: Vec<String> = found
        .iter()
        .filter(|row| row["remote"] == same.to_string())
        .map(|row| row["namespace"].as_str().unwrap_or("host").to_owned())
        .collect();
    namespaces.sort();
    namespaces.dedup();
    assert_eq!(namespaces.len(), 3, "{found:?}");
    // One ends, and the others stay.
    tuples.swap_remove(1);
    limiter.wait_held(same.ip(), 2)?;
    state.wait_audited()?;
    assert!(tuples.iter().all(is_open));
    assert_nothing_mended(&limiter)?;
    drop((tuples, crowds));
    limiter.wait_empty()?;
    drop(daemon);
    Ok(())
}

#[test]
fn a_container_that_is_killed_leaves_no_count_and_the_daemon_may_die_meanwhile() -> Result<()> {
    const INSIDE: u16 = 8446;
    if lacks(Feature::Delivery)? {
        return counts_when_open();
    }
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let address = client.address(Family::V4);
    let container = Container::new(&lab.server, 1, ADDRESS)?;
    nft_publish(&lab, &container, &[0], INSIDE)?;
    let server = PlainServer::listen(&container.namespace, any(INSIDE))?;
    // Two that are open before anybody counts.
    let before = Crowd::connect(&client.namespace, published(&lab, 0), 2, SOON)?;
    let limiter = Limiter::new(&lab.server)?;
    let config = config(&in_containers(INSIDE))?;
    let daemon = limiter.run_on(&lab, &config)?;
    assert_eq!(limiter.held_by(address)?, 2, "those that were open before count");
    assert_eq!(limiter.counter("opened_adopted")?, 2);
    let crowd = Crowd::connect(&client.namespace, published(&lab, 0), 9, NO_ANSWER)?;
    assert_eq!(crowd.served.len(), 3);
    daemon.kill()?;
    let refused = Crowd::connect(&client.namespace, published(&lab, 0), 2, NO_ANSWER)?;
    assert_eq!(refused.unanswered.len(), 2, "the limit holds without a daemon");

    // What the server had open is closed with it.
    drop(server);
    limiter.wait_empty()?;
    container.kill(&lab.server)?;
    let _daemon = limiter.run_on(&lab, &config)?;
    State::open(&limiter)?.wait_audited()?;
    limiter.wait_empty()?;
    assert_nothing_mended(&limiter)?;
    drop((before, crowd, refused));
    Ok(())
}

/// SYNs with somebody else's address, through to a container that answers them.
#[test]
fn spoofed_syns_to_a_published_port_cost_their_victim_nothing() -> Result<()> {
    const INSIDE: u16 = 8447;
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let victim = client.silent_address(Family::V4);
    let container = Container::new(&lab.server, 1, ADDRESS)?;
    nft_publish(&lab, &container, &[0], INSIDE)?;
    let _server = PlainServer::listen(&container.namespace, any(INSIDE))?;
    let limiter = Limiter::new(&lab.server)?;
    let config = config(&in_containers(INSIDE))?;
    let _daemon = limiter.run_on(&lab, &config)?;
    // What the host's connection tracking would drop by itself is to get as far as the container.
    lab.server.set_sysctl("net/netfilter/nf_conntrack_tcp_be_liberal", "1")?;
    let mut raw = RawClient::new(client, Family::V4)?;
    let half_open = raw.half_open(20)?;
    let forged: Vec<_> = half_open
        .iter()
        .map(|connection| {
            let mut ack = connection.segment(flags::ACK);
            ack.acknowledgement = ack.acknowledgement.wrapping_add(1);
            ack
        })
        .collect();
    raw.send(&forged)?;
    // The stack hands over twice what belongs to a request and acknowledges the wrong number.
    eventually(SOON, "ACKs that prove nothing are counted", || Ok(limiter.counter("handshake_unproven")? >= 20))?;
    let crowd = Crowd::connect(&client.namespace, published(&lab, 0), 5, SOON)?;
    assert_eq!(crowd.served.len(), 5);
    assert_eq!(limiter.held_by(victim)?, 0);
    assert_eq!(limiter.json("status")?["ledger_entries"], 5);
    Ok(())
}

/// Where the kernel can't see a handshake end in the container, what is past the limit is cut there.
#[test]
fn without_delivery_those_past_the_limit_are_cut_in_their_namespace() -> Result<()> {
    const INSIDE: u16 = 8448;
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let address = client.address(Family::V4);
    let container = Container::new(&lab.server, 1, ADDRESS)?;
    nft_publish(&lab, &container, &[0], INSIDE)?;
    let server = PlainServer::listen(&container.namespace, any(INSIDE))?;
    let limiter = Limiter::new(&lab.server)?.without("delivery");
    let config = config(&in_containers(INSIDE))?;
    let _daemon = limiter.run_on(&lab, &config)?;
    assert_eq!(limiter.json("status")?["counts_on_delivery"], false);
    let crowd = Crowd::connect(&client.namespace, published(&lab, 0), 20, NO_ANSWER)?;
    eventually_equal(SOON, "connections that the server has left", &5, || Ok(server.seen(address).open))?;
    limiter.wait_held(address, 5)?;
    assert!(limiter.counter("opened_unseen")? >= 5);
    State::open(&limiter)?.wait_audited()?;
    assert_nothing_mended(&limiter)?;
    drop(crowd);
    limiter.wait_empty()
}

#[test]
fn a_redirect_on_the_host_itself_is_counted_exactly() -> Result<()> {
    const INSIDE: u16 = 8449;
    if lacks(Feature::Delivery)? {
        return counts_when_open();
    }
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let address = client.address(Family::V4);
    nft(
        &lab.server,
        &format!(
            "table ip redirected {{ chain lead {{ type nat hook prerouting priority dstnat\n\
             tcp dport {PUBLISHED} redirect to :{INSIDE}\n}}\n}}\n"
        ),
    )?;
    let server = PlainServer::listen(&lab.server, any(INSIDE))?;
    let limiter = Limiter::new(&lab.server)?;
    let config = config(&format!("socket_port = {INSIDE}"))?;
    let _daemon = limiter.run_on(&lab, &config)?;
    let crowd = Crowd::connect(&client.namespace, published(&lab, 0), 40, NO_ANSWER)?;
    assert_eq!((crowd.served.len(), server.seen(address).peak), (5, 5));
    assert_eq!((limiter.counter("opened_reserved")?, limiter.counter("opened_unseen")?), (5, 0));
    limiter.wait_held(address, 5)?;
    State::open(&limiter)?.wait_audited()?;
    assert_nothing_mended(&limiter)?;
    drop(crowd);
    limiter.wait_empty()
}

/// Five of forty connections to that address are served and no more, not for a moment; each slot comes back.
fn holds_the_limit(lab: &Lab, server: &PlainServer, address: SocketAddr, family: Family, service: &str) -> Result<()> {
    let client = &lab.clients[0];
    let limiter = Limiter::new(&lab.server)?;
    let config = config_at(address.port(), service)?;
    let _daemon = limiter.run_on(lab, &config)?;
    // The links have found each other when the one is served.
    drop(Crowd::connect(&client.namespace, address, 1, SOON)?);
    limiter.wait_empty()?;
    let seen = || server.seen(client.address(family));
    let crowd = Crowd::connect(&client.namespace, address, 40, NO_ANSWER)?;
    eventually_equal(SOON, "connections that the server has", &5, || Ok(seen().open))?;
    assert_eq!(seen().peak, 5, "never more, not for a moment");
    limiter.wait_held(client.address(family), 5)?;
    assert_eq!((limiter.counter("opened_reserved")?, limiter.counter("opened_unseen")?), (6, 0));
    reset(&crowd.unserved)?;
    drop(crowd);
    limiter.wait_empty()?;
    State::open(&limiter)?.wait_audited()?;
    assert_nothing_mended(&limiter)
}

/// Has each end by a RST once it is dropped.
fn reset(streams: &[TcpStream]) -> Result<()> {
    streams.iter().try_for_each(|stream| Ok(SockRef::from(stream).set_linger(Some(Duration::ZERO))?))
}

/// By IPv6: the limit is of a /64, and connections between two namespaces of one four-tuple are told apart by their tag.
#[test]
fn a_published_port_holds_the_limit_by_ipv6() -> Result<()> {
    const INSIDE: u16 = 8450;
    if lacks(Feature::Delivery)? {
        return counts_when_open();
    }
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let container = Container::new(&lab.server, 1, ADDRESS_V6)?;
    container.publish(&lab.server, &[client.server_interface()], PUBLISHED, SocketAddr::new(ADDRESS_V6, INSIDE))?;
    let server = PlainServer::listen(&container.namespace, SocketAddr::new(Family::V6.unspecified(), INSIDE))?;
    let published = client.service(Family::V6);
    holds_the_limit(&lab, &server, published, Family::V6, &in_containers(INSIDE))
}

/// Without any translation: the packets that XDP sees have the addresses of the container's sockets, which it can't look up all the same.
#[test]
fn a_container_with_an_address_of_its_own_holds_the_limit() -> Result<()> {
    if lacks(Feature::Delivery)? {
        return counts_when_open();
    }
    let lab = Lab::new(1)?;
    for (number, family, address, inside) in [(1, Family::V4, ADDRESS, 8451), (2, Family::V6, ADDRESS_V6, 8452)] {
        let container = Container::new(&lab.server, number, address)?;
        container.route(&lab.server, &lab.clients[0])?;
        let server = PlainServer::listen(&container.namespace, SocketAddr::new(family.unspecified(), inside))?;
        holds_the_limit(&lab, &server, SocketAddr::new(address, inside), family, "namespaces = \"others\"")?;
    }
    Ok(())
}

/// Fifty handshakes that end in one batch, so that XDP has let every SYN pass before the first connection is.
#[test]
fn a_batch_of_handshakes_in_a_container_fills_the_limit_exactly() -> Result<()> {
    const INSIDE: u16 = 8453;
    if lacks(Feature::Delivery)? {
        return counts_when_open();
    }
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let container = Container::new(&lab.server, 1, ADDRESS)?;
    nft_publish(&lab, &container, &[0], INSIDE)?;
    let server = PlainServer::listen(&container.namespace, any(INSIDE))?;
    let limiter = Limiter::new(&lab.server)?;
    let config = config(&in_containers(INSIDE))?;
    let _daemon = limiter.run_on(&lab, &config)?;
    // The links have found each other when the one is served.
    drop(Crowd::connect(&client.namespace, published(&lab, 0), 1, SOON)?);
    limiter.wait_empty()?;
    let mut raw = RawClient::new(client, Family::V4)?;
    let connections = raw.half_open(50)?;
    assert_eq!(limiter.ledger()?, [], "half-open connections hold no slot");
    raw.complete(&connections)?;
    eventually_equal(SOON, "refused handshakes", &45, || limiter.counter("handshake_source_limit"))?;
    eventually_equal(SOON, "connections that the server has", &5, || Ok(server.seen(raw.address()).open))?;
    assert_eq!(server.seen(raw.address()).peak, 5);
    limiter.wait_held(raw.address(), 5)?;
    let text = limiter.output(["events"])?;
    assert!(text.contains(&format!("denied source_limit at handshake: {}:", raw.address())), "{text}");
    assert!(text.contains(&format!("-> {} in net:[", inside(INSIDE))), "{text}");
    let text = limiter.output(["explain", &raw.address().to_string()])?;
    assert!(text.contains(&format!("sockets at {INSIDE} in other namespaces")), "{text}");
    raw.reset(&connections)?;
    limiter.wait_empty()?;
    State::open(&limiter)?.wait_audited()?;
    assert_nothing_mended(&limiter)
}

/// From an interface that is not configured, nothing but the delivery refuses. Who is refused believes to be connected, and gives up by a
/// FIN, which is one more try to end the handshake: whatever comes of each, in the end nobody is counted.
#[test]
fn refused_clients_that_give_up_hold_no_slot_in_the_end() -> Result<()> {
    const INSIDE: u16 = 8454;
    if lacks(Feature::Delivery)? {
        return counts_when_open();
    }
    let lab = Lab::new(2)?;
    let client = &lab.clients[0];
    let container = Container::new(&lab.server, 1, ADDRESS)?;
    nft_publish(&lab, &container, &[0], INSIDE)?;
    let server = PlainServer::listen(&container.namespace, any(INSIDE))?;
    let limiter = Limiter::new(&lab.server)?;
    let config = config(&in_containers(INSIDE))?;
    let other = lab.clients[1].server_interface();
    let _daemon = limiter.run(["--interface", &other, "--config", &config.path().display().to_string()])?;
    drop(Crowd::connect(&client.namespace, published(&lab, 0), 1, SOON)?);
    limiter.wait_empty()?;
    let crowd = Crowd::connect(&client.namespace, published(&lab, 0), 20, NO_ANSWER)?;
    eventually_equal(SOON, "connections that the server has", &5, || Ok(server.seen(client.address(Family::V4)).open))?;
    assert_eq!(server.seen(client.address(Family::V4)).peak, 5);
    assert!(crowd.unserved.len() >= 10, "{crowd:?}");
    drop(crowd);
    limiter.wait_empty()?;
    State::open(&limiter)?.wait_audited()?;
    assert_nothing_mended(&limiter)
}
