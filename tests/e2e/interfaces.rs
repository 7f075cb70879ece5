//! Every kind of interface keeps the limit, and is attached again when it comes back.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::{Context, Result};
use limiter_tests::{
    bare::{Answer, BareXdp},
    both_families,
    lab::{Family, Lab, PORT},
    limiter::{Daemon, Limiter},
    netns::Namespace,
    tcp::{Crowd, PlainServer, connect_served},
    tun::TunLink,
    wait::{SOON, eventually, eventually_equal},
};
use serde_json::Value;

both_families!(
    a_bridge_keeps_the_limit,
    a_macvlan_keeps_the_limit,
    a_tun_keeps_the_limit,
    a_veth_with_large_frames_keeps_the_limit,
    the_loopback_device_keeps_the_limit,
);

/// Longer than a client waits before it sends its SYN again (1 s), so that retries are part of what is seen.
const PAST_RETRIES: Duration = Duration::from_millis(1500);

/// The server's address and the client's, where they are not the lab's.
fn addresses(family: Family) -> [IpAddr; 2] {
    let [server, client] = match family {
        Family::V4 => ["198.19.0.1", "198.19.0.2"],
        Family::V6 => ["2001:db8:19::1", "2001:db8:19::2"],
    };
    [server, client].map(|address| address.parse().expect("an address"))
}

fn length(family: Family) -> u8 {
    if family == Family::V4 { 24 } else { 64 }
}

/// A server and a client, and the interface between them that is attached.
struct Place<'a> {
    server: &'a Namespace,
    client: &'a Namespace,
    interface: &'a str,
    addresses: [IpAddr; 2],
}

/// In the mode that is chosen by itself, which is `chosen`, and on TC: of a crowd, five get in.
fn keeps_the_limit(place: &Place<'_>, family: Family, chosen: &str, why: Option<&str>) -> Result<()> {
    let [server_address, client_address] = place.addresses;
    let server = PlainServer::start(place.server, family)?;
    let service = SocketAddr::new(server_address, PORT);
    let limiter = Limiter::new(place.server)?;
    for (round, (wanted, mode)) in (1..).zip([("auto", chosen), ("tc", "tc")]) {
        let arguments = ["--interface", place.interface, "--port", "8080", "--connections-per-source", "5"];
        limiter.attach(arguments.into_iter().chain(["--connection-rate", "0", "--attach-mode", wanted]))?;
        let status = limiter.json("status")?;
        assert_eq!(status["interfaces"][0]["mode"], mode, "{status}");
        if let (Some(why), "auto") = (why, wanted) {
            let said = status["interfaces"][0]["why"].as_str().unwrap_or_default().to_owned();
            assert!(said.contains(why), "{status}");
        }
        let crowd = Crowd::connect_from(place.client, Some(client_address), service, 30, PAST_RETRIES)?;
        assert_eq!(crowd.served.len(), 5, "{wanted}: {}", limiter.output(["status"])?);
        assert_eq!(server.seen(client_address).accepted, 5 * round);
        limiter.wait_held(client_address, 5)?;
        assert_eq!(limiter.counter("opened_unseen")?, 0, "each of them was seen by {wanted}");
        drop(crowd);
        limiter.wait_empty()?;
        limiter.detach()?;
    }
    Ok(())
}

fn a_bridge_keeps_the_limit(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let (client, [server_address, client_address]) = (&lab.clients[0].namespace, addresses(family));
    lab.server.ip(&format!(
        "link add br0 type bridge\nlink set client1 master br0\nlink set br0 up\n\
         addr add {server_address}/{} dev br0{}\n",
        length(family),
        nodad(family)
    ))?;
    client.ip(&format!("addr add {client_address}/{} dev eth0{}\n", length(family), nodad(family)))?;
    lab.server.wait_link_up("br0")?;
    let place = Place { server: &lab.server, client, interface: "br0", addresses: [server_address, client_address] };
    keeps_the_limit(&place, family, "generic", Some("refuses XDP"))
}

fn a_macvlan_keeps_the_limit(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let (client, [server_address, client_address]) = (&lab.clients[0].namespace, addresses(family));
    // Only the interface that has an address answers for it.
    lab.server.set_sysctl("net/ipv4/conf/all/arp_ignore", "1")?;
    lab.server.ip(&format!(
        "link add mv0 link client1 type macvlan mode bridge\nlink set mv0 up\naddr add {server_address}/{} dev mv0{}\n",
        length(family),
        nodad(family)
    ))?;
    client.ip(&format!("addr add {client_address}/{} dev eth0{}\n", length(family), nodad(family)))?;
    lab.server.wait_link_up("mv0")?;
    let place = Place { server: &lab.server, client, interface: "mv0", addresses: [server_address, client_address] };
    keeps_the_limit(&place, family, "generic", Some("refuses XDP"))
}

/// Its packets have no Ethernet header: XDP would take the first bytes of the IP header for one.
fn a_tun_keeps_the_limit(family: Family) -> Result<()> {
    let (server, client) = (Namespace::new()?, Namespace::new()?);
    let [server_address, client_address] = addresses(family);
    let _link = TunLink::new("tun0", [&server, &client])?;
    for (namespace, address) in [(&server, server_address), (&client, client_address)] {
        namespace.ip(&format!(
            "link set tun0 up\naddr add {address}/{} dev tun0{}\n",
            length(family),
            nodad(family)
        ))?;
    }
    let place =
        Place { server: &server, client: &client, interface: "tun0", addresses: [server_address, client_address] };
    keeps_the_limit(&place, family, "tc", Some("no Ethernet header"))?;
    let limiter = Limiter::new(&server)?;
    for mode in ["native", "generic"] {
        let outcome = limiter.outcome(["attach", "--interface", "tun0", "--port", "8080", "--attach-mode", mode])?;
        assert_eq!(outcome.status.code(), Some(1), "{}", outcome.stderr);
        assert!(outcome.stderr.contains("no Ethernet header"), "{}", outcome.stderr);
    }
    // The same by a filter.
    let limiter = Limiter::new(&server)?.without("tcx");
    let _server = PlainServer::start(&server, family)?;
    limiter.attach(["--interface", "tun0", "--port", "8080", "--connections-per-source", "5"])?;
    assert_eq!(limiter.json("status")?["interfaces"][0]["hook"], "clsact");
    let service = SocketAddr::new(server_address, PORT);
    let crowd = Crowd::connect_from(&client, Some(client_address), service, 30, PAST_RETRIES)?;
    assert_eq!(crowd.served.len(), 5);
    Ok(())
}

fn a_veth_with_large_frames_keeps_the_limit(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    lab.server.ip("link set client1 mtu 9000")?;
    client.namespace.ip("link set eth0 mtu 9000")?;
    let addresses = [client.server_address(family), client.address(family)];
    let place = Place { server: &lab.server, client: &client.namespace, interface: "client1", addresses };
    keeps_the_limit(&place, family, "generic", Some("refuses XDP"))
}

fn the_loopback_device_keeps_the_limit(family: Family) -> Result<()> {
    let host = Namespace::new()?;
    let addresses = addresses(family);
    let whole = if family == Family::V4 { 32 } else { 128 };
    for address in addresses {
        host.ip(&format!("addr add {address}/{whole} dev lo{}", nodad(family)))?;
    }
    let place = Place { server: &host, client: &host, interface: "lo", addresses };
    keeps_the_limit(&place, family, "generic", Some("refuses XDP"))
}

fn nodad(family: Family) -> &'static str {
    if family == Family::V6 { " nodad" } else { "" }
}

#[test]
fn a_daemon_attaches_an_interface_that_comes_back() -> Result<()> {
    attaches_what_comes_back("auto", "native", "")
}

#[test]
fn a_daemon_attaches_an_interface_that_comes_back_in_tc_mode() -> Result<()> {
    attaches_what_comes_back("tc", "tc", "")
}

#[test]
fn a_daemon_attaches_an_interface_that_comes_back_by_a_filter() -> Result<()> {
    attaches_what_comes_back("tc", "tc", "tcx")
}

/// A plain server at 8080 that is not limiter's, and the gateway at 8081.
const CONFIG: &str = "[limits]\nconnections_per_source = 5\nconnection_rate = 0\n\
    [[service]]\nname = \"plain\"\nport = 8080\n[[service]]\nname = \"chat\"\nport = 8081\n\
    [gateway]\nlisten = [\"0.0.0.0:8081\"]\n";

fn attaches_what_comes_back(wanted: &str, mode: &str, without: &'static str) -> Result<()> {
    let lab = Lab::new(2)?;
    let [stays, comes] = [&lab.clients[0], &lab.clients[1]];
    let server = PlainServer::start(&lab.server, Family::V4)?;
    let limiter = Limiter::new(&lab.server)?.without(without);
    let config = Limiter::config_file(CONFIG)?;
    let mut daemon = run(&limiter, &lab, config.path(), wanted)?;
    let held = Crowd::connect(&stays.namespace, stays.service(Family::V4), 5, SOON)?;
    assert_eq!(held.served.len(), 5);
    for round in 1..=2 {
        lab.server.ip("link del client2")?;
        eventually_equal(SOON, "it is not attached any more", &vec!["client1".to_owned()], || names(&limiter))?;
        comes.plug_in(&lab.server)?;
        let both = vec!["client1".to_owned(), "client2".to_owned()];
        eventually_equal(SOON, "it is attached again", &both, || names(&limiter))?;
        lab.server.wait_link_up("client2")?;
        let status = limiter.json("status")?;
        assert!(rows(&status).iter().all(|row| row["mode"] == mode), "{status}");
        let crowd = Crowd::connect(&comes.namespace, comes.service(Family::V4), 20, PAST_RETRIES)?;
        assert_eq!(crowd.served.len(), 5, "round {round}");
        assert_eq!(server.seen(comes.address(Family::V4)).accepted, 5 * round);
        drop(crowd);
        limiter.wait_held(comes.address(Family::V4), 0)?;
    }
    assert_eq!(limiter.held_by(stays.address(Family::V4))?, 5, "the other interface's counts are as they were");
    assert_eq!(limiter.counter("opened_unseen")?, 0);
    let stderr = daemon.process().stderr();
    assert_eq!(stderr.matches("an interface is gone").count(), 2, "{stderr}");
    assert_eq!(stderr.matches("attached an interface that has come").count(), 2, "{stderr}");
    drop((daemon, held));
    Ok(())
}

/// What comes back may be taken by somebody else. That is said once, and tried again at the next occasion.
#[test]
fn an_interface_that_can_not_be_attached_at_first_is_tried_again() -> Result<()> {
    let lab = Lab::new(2)?;
    let comes = &lab.clients[1];
    let limiter = Limiter::new(&lab.server)?;
    let config = Limiter::config_file(CONFIG)?;
    let mut daemon = run(&limiter, &lab, config.path(), "native")?;
    let _server = PlainServer::start(&lab.server, Family::V4)?;
    lab.server.ip("link del client2")?;
    eventually_equal(SOON, "it is not attached any more", &vec!["client1".to_owned()], || names(&limiter))?;
    lab.server.ip("link add other type veth peer name other2")?;
    let foreign = BareXdp::load(Answer::Pass)?.attach(&lab.server, "other")?;
    lab.server.ip("link set other name client2")?;
    eventually(SOON, "the failure is said", || {
        let stderr = daemon.process().stderr();
        Ok(stderr.contains("can't be attached; trying again") && stderr.contains("is taken by another program"))
    })?;
    lab.server.ip("link set client2 mtu 1400")?;
    drop(foreign);
    let both = vec!["client1".to_owned(), "client2".to_owned()];
    // The other program is gone a moment later; each change is an occasion.
    let mut mtu = 1300;
    eventually_equal(SOON, "it is attached", &both, || {
        mtu += 1;
        lab.server.ip(&format!("link set client2 mtu {mtu}"))?;
        names(&limiter)
    })?;
    let stderr = daemon.process().stderr();
    assert_eq!(stderr.matches("can't be attached").count(), 1, "{stderr}");
    // Another one of that name takes its place.
    lab.server.ip("link del client2")?;
    comes.plug_in(&lab.server)?;
    lab.server.wait_link_up("client2")?;
    eventually_equal(SOON, "it is attached", &both, || names(&limiter))?;
    connect_served(&comes.namespace, comes.service(Family::V4), SOON)?;
    Ok(())
}

/// Without a daemon, the link ends with its interface, and nobody attaches it again but another attach.
#[test]
fn without_a_daemon_an_interface_that_comes_back_has_no_limit() -> Result<()> {
    let lab = Lab::new(2)?;
    let comes = &lab.clients[1];
    let _server = PlainServer::start(&lab.server, Family::V4)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 5, &[])?;
    lab.server.ip("link del client2")?;
    comes.plug_in(&lab.server)?;
    lab.server.wait_link_up("client2")?;
    assert_eq!(names(&limiter)?, ["", "client1"], "what is pinned is shown");
    let crowd = Crowd::connect(&comes.namespace, comes.service(Family::V4), 8, SOON)?;
    assert_eq!(crowd.served.len(), 8);
    limiter.wait_held(comes.address(Family::V4), 8)?;
    limiter.protect(&lab, 5, &[])?;
    assert_eq!(names(&limiter)?, ["client1", "client2"]);
    let more = Crowd::connect(&comes.namespace, comes.service(Family::V4), 3, Duration::from_millis(300))?;
    assert_eq!(more.served.len(), 0, "they were counted all the while");
    Ok(())
}

fn run<'a>(limiter: &'a Limiter<'_>, lab: &Lab, config: &std::path::Path, mode: &str) -> Result<Daemon<'a>> {
    let mut arguments = lab.interface_flags();
    arguments.extend(["--attach-mode".into(), mode.into(), "--config".into(), config.display().to_string()]);
    limiter.run(arguments)
}

fn rows(status: &Value) -> Vec<Value> {
    status["interfaces"].as_array().cloned().unwrap_or_default()
}

/// The names of the interfaces that `limiter status` shows; an empty one for one that is gone.
fn names(limiter: &Limiter<'_>) -> Result<Vec<String>> {
    let status = limiter.json("status")?;
    let rows = status["interfaces"].as_array().context("status lists interfaces")?;
    let mut names: Vec<_> = rows.iter().map(|row| row["name"].as_str().unwrap_or_default().to_owned()).collect();
    names.sort();
    Ok(names)
}
