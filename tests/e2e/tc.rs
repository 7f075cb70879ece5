//! Limits on TC: where XDP is taken or can't be, by a link and by a filter, and what only a `sk_buff` can be.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    os::fd::AsRawFd,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use limiter_tests::{
    bare::{Answer, BareXdp},
    both_families,
    bpf::{Kind, objects_below},
    kernel::tc_hook,
    lab::{Family, Lab},
    limiter::Limiter,
    netns::Namespace,
    process::Process,
    raw::{RawClient, VnetSocket},
    segment::{Segment, flags},
    tcp::{Crowd, PlainServer, Seen, connect_served},
    wait::{NO_ANSWER, SOON, eventually, eventually_equal},
};
use serde_json::json;
use socket2::{Domain, Socket, Type};

both_families!(
    a_filter_keeps_the_limit,
    a_filter_keeps_the_limit_with_cookies,
    a_priority_tag_is_no_way_round,
    headers_in_fragments_of_memory_are_no_way_round,
    segments_in_one_piece_are_no_way_round,
);

const LIMIT: u32 = 5;

fn a_filter_keeps_the_limit(family: Family) -> Result<()> {
    filter_keeps_the_limit(family, "1")
}

fn a_filter_keeps_the_limit_with_cookies(family: Family) -> Result<()> {
    filter_keeps_the_limit(family, "2")
}

fn filter_keeps_the_limit(family: Family, syncookies: &str) -> Result<()> {
    let lab = Lab::new(1)?;
    lab.server.set_sysctl("net/ipv4/tcp_syncookies", syncookies)?;
    let client = &lab.clients[0];
    let server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?.without("tcx");
    limiter.protect(&lab, LIMIT, &["--attach-mode", "tc"])?;
    assert_eq!(limiter.json("status")?["interfaces"][0]["hook"], "clsact");

    let crowd = Crowd::connect(&client.namespace, client.service(family), 200, Duration::from_millis(2500))?;
    assert_eq!(crowd.served.len(), 5, "of 200 connects from one source");
    assert_eq!(server.seen(client.address(family)), Seen { accepted: 5, open: 5, peak: 5 });
    drop(crowd);
    limiter.wait_empty()?;

    let mut raw = RawClient::new(client, family)?;
    let connections = raw.half_open(50)?;
    raw.complete(&connections)?;
    limiter.wait_held(raw.address(), 5)?;
    eventually_equal(SOON, "45 of a batch of 50 are refused", &45, || limiter.counter("handshake_source_limit"))?;
    assert_eq!(server.seen(raw.address()).accepted, 5);
    raw.reset(&connections)?;
    limiter.wait_empty()
}

/// A tag of VLAN 0 says but a priority, and the stack takes the packet as any other. The kernel moves it out of the frame.
fn a_priority_tag_is_no_way_round(family: Family) -> Result<()> {
    let (lab, tagged) = (Lab::new(1)?, |mut frame: Vec<u8>| {
        frame.splice(12..12, [0x81, 0x00, 0x60, 0x00]);
        frame
    });
    past_the_limit(&lab, family, |raw, segments| {
        raw.send_frames(segments.iter().map(|segment| tagged(raw.frame(segment))).collect())
    })
}

/// Of a large packet, only the Ethernet header may be where a program can read directly.
fn headers_in_fragments_of_memory_are_no_way_round(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    lab.server.ip("link set client1 mtu 9000")?;
    client.namespace.ip("link set eth0 mtu 9000")?;
    let socket = VnetSocket::new(client)?;
    past_the_limit(&lab, family, |raw, segments| {
        segments.iter().try_for_each(|segment| {
            let large = Segment { payload: vec![b'?'; 6000], ..segment.clone() };
            socket.send(&raw.frame(&large), 14)
        })
    })
}

/// Sends eight handshakes by `send`, of which five get through; and then a SYN, which does not.
fn past_the_limit(lab: &Lab, family: Family, send: impl Fn(&RawClient, &[Segment]) -> Result<()>) -> Result<()> {
    let client = &lab.clients[0];
    let server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(lab, LIMIT, &["--attach-mode", "tc"])?;
    let mut raw = RawClient::new(client, family)?;
    let connections = raw.half_open(8)?;
    let before = limiter.counter("syn_admitted")?;
    send(&raw, &connections.iter().map(|connection| connection.segment(flags::ACK)).collect::<Vec<_>>())?;
    limiter.wait_held(raw.address(), 5)?;
    eventually_equal(SOON, "three are refused", &3, || limiter.counter("handshake_source_limit"))?;
    eventually_equal(SOON, "five are served", &5, || Ok(server.seen(raw.address()).accepted))?;

    let syn =
        Segment { source: SocketAddr::new(raw.address(), 45_000), sequence: 1, ..connections[0].segment(flags::SYN) };
    send(&raw, std::slice::from_ref(&syn))?;
    eventually_equal(SOON, "the SYN is refused", &1, || limiter.counter("syn_source_limit"))?;
    assert_eq!(limiter.counter("syn_admitted")?, before);
    raw.reset(&connections)?;
    Ok(())
}

/// What completes the handshake is a dozen segments in one packet, as GRO makes them (and the stack itself, on a veth).
fn segments_in_one_piece_are_no_way_round(family: Family) -> Result<()> {
    const CLIENTS: usize = 20;
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let server = PlainServer::start(&lab.server, family)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, LIMIT, &["--attach-mode", "tc"])?;
    let packets_before = lab.server.received_packets("client1")?;
    let service = client.service(family);
    // All SYNs first, so that none of them is refused.
    let sockets =
        client.namespace.enter(|| (0..CLIENTS).map(|_| begin_quietly(service)).collect::<Result<Vec<_>>>())?;
    eventually_equal(SOON, "every SYN is admitted", &(CLIENTS as u64), || limiter.counter("syn_admitted"))?;
    let served = thread::scope(|scope| {
        let workers: Vec<_> = sockets.iter().map(|stream| scope.spawn(move || speak_first(stream))).collect();
        workers.into_iter().map(|worker| usize::from(worker.join().expect("no panic"))).sum::<usize>()
    });
    assert_eq!(served, 5, "of {CLIENTS}");
    assert_eq!(server.seen(client.address(family)).peak, 5);
    limiter.wait_held(client.address(family), 5)?;
    // Segments of data alone are more than packets in all.
    let packets = lab.server.received_packets("client1")? - packets_before;
    let segments = CLIENTS as u64 * (FIRST_WORDS as u64 / 1460);
    assert!(packets < segments, "{packets} packets for {segments} segments: they came one by one");
    drop(sockets);
    limiter.wait_empty()
}

/// As much as a client may send before it has heard anything (ten segments).
const FIRST_WORDS: usize = 14_000;

/// Begins to connect. The ACK of the handshake will not be sent but with data.
fn begin_quietly(server: SocketAddr) -> Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(server), Type::STREAM, None)?;
    let seconds: libc::c_int = 5;
    // SAFETY: the descriptor is open, and the length is that of the value.
    let outcome = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_DEFER_ACCEPT,
            (&raw const seconds).cast(),
            libc::socklen_t::try_from(size_of_val(&seconds))?,
        )
    };
    ensure!(outcome == 0, "TCP_DEFER_ACCEPT: {}", std::io::Error::last_os_error());
    socket.connect(&server.into()).with_context(|| format!("cannot connect to {server}"))?;
    Ok(socket.into())
}

/// Whether the server greets.
fn speak_first(mut stream: &TcpStream) -> bool {
    stream.write_all(&[b'?'; FIRST_WORDS]).is_ok()
        && stream.set_read_timeout(Some(SOON)).is_ok()
        && stream.read(&mut [0]).is_ok_and(|length| length == 1)
}

#[test]
fn where_xdp_is_taken_it_is_tc_and_says_so() -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let server = PlainServer::start(&lab.server, Family::V4)?;
    let limiter = Limiter::new(&lab.server)?;
    let foreign = BareXdp::load(Answer::Pass)?.attach(&lab.server, "client1")?;
    let outcome = limiter.outcome(["attach", "--interface", "client1", "--port", "8080"])?;
    assert!(outcome.status.success(), "{}", outcome.stderr);
    let said = "client1 is attached in tc mode, which is slower: another program holds its XDP hook";
    assert!(outcome.stderr.contains(said), "{}", outcome.stderr);
    let interface = |hook: &str| {
        json!({
            "name": "client1", "index": lab.server.interface_index("client1").ok(), "mode": "tc", "hook": hook,
            "why": "another program holds its XDP hook",
        })
    };
    assert_eq!(limiter.json("status")?["interfaces"], json!([interface(tc_hook()?)]));
    limiter.detach()?;

    let config = Limiter::config_file(
        "[limits]\nconnections_per_source = 5\n[[service]]\nname = \"a\"\nport = 8080\n\
         [[service]]\nname = \"b\"\nport = 8081\n[gateway]\nlisten = [\"0.0.0.0:8081\"]\n",
    )?;
    let config = config.path().display().to_string();
    let mut daemon = limiter.run(["--interface", "client1", "--config", &config])?;
    let (_, metrics) = daemon.http_get("/metrics").context("metrics")?;
    let gauge = r#"limiter_kernel_attached{interface="client1",mode="tc"} 1"#;
    assert!(metrics.contains(gauge), "{metrics}");
    assert!(daemon.process().stderr().contains("another program holds its XDP hook"));

    let mut crowd = Crowd::connect(&client.namespace, client.service(Family::V4), 20, NO_ANSWER)?;
    assert_eq!(crowd.served.len(), 5);
    assert_eq!(server.seen(client.address(Family::V4)).peak, 5);
    assert!(lab.server.link("client1")?.get("xdp").is_some(), "the other program stays");
    daemon.kill()?;
    let more = Crowd::connect(&client.namespace, client.service(Family::V4), 2, NO_ANSWER)?;
    assert_eq!(more.served.len(), 0, "the limit stays without a daemon");
    // Who still tries would take the new limit's slots.
    crowd.unanswered.clear();
    drop(more);
    limiter.attach(["--interface", "client1", "--port", "8080", "--connections-per-source", "6"])?;
    assert_eq!(limiter.json("status")?["interfaces"], json!([interface(tc_hook()?)]));
    connect_served(&client.namespace, client.service(Family::V4), SOON)
        .with_context(|| limiter.output(["status"]).unwrap_or_default())?;
    drop((crowd, foreign));
    Ok(())
}

#[test]
fn from_xdp_to_tc_and_back() -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let server = PlainServer::start(&lab.server, Family::V4)?;
    let limiter = Limiter::new(&lab.server)?.without("tcx");
    let mut held = Vec::new();
    for (mode, hook) in [("native", "xdp"), ("tc", "clsact"), ("generic", "xdp"), ("tc", "clsact"), ("auto", "clsact")]
    {
        limiter.protect(&lab, LIMIT, &["--attach-mode", mode])?;
        let interfaces = limiter.json("status")?["interfaces"].clone();
        assert_eq!(
            (interfaces[0]["hook"].as_str(), interfaces.as_array().map(Vec::len)),
            (Some(hook), Some(1)),
            "{mode}"
        );
        assert_eq!(lab.server.link("client1")?.get("xdp").is_some(), hook == "xdp", "{mode}");
        assert_eq!(own_filters(&lab.server), usize::from(hook == "clsact"), "{mode}");
        held.push(connect_served(&client.namespace, client.service(Family::V4), SOON)?);
    }
    let crowd = Crowd::connect(&client.namespace, client.service(Family::V4), 5, NO_ANSWER)?;
    assert_eq!(crowd.served.len(), 0);
    assert_eq!(server.seen(client.address(Family::V4)), Seen { accepted: 5, open: 5, peak: 5 });
    Ok(())
}

#[test]
fn detach_removes_the_filter_and_the_qdisc_that_was_made_for_it() -> Result<()> {
    let lab = Lab::new(1)?;
    let limiter = Limiter::new(&lab.server)?.without("tcx");
    limiter.protect(&lab, LIMIT, &["--attach-mode", "tc"])?;
    assert_eq!((own_filters(&lab.server), has_clsact(&lab.server)?), (1, true));
    limiter.protect(&lab, LIMIT, &["--attach-mode", "tc"])?;
    assert_eq!(own_filters(&lab.server), 1, "a second attach puts its program in the place of the first one's");
    let objects = objects_below(limiter.pin_path())?;
    limiter.detach()?;
    assert_eq!((own_filters(&lab.server), has_clsact(&lab.server)?), (0, false));
    assert!(!limiter.pin_path().exists());
    for object in objects.into_iter().filter(|object| object.kind == Kind::Map) {
        eventually(SOON, &format!("{object:?} is gone"), || Ok(!object.exists()?))?;
    }
    Ok(())
}

#[test]
fn a_qdisc_that_others_use_stays() -> Result<()> {
    let lab = Lab::new(1)?;
    let limiter = Limiter::new(&lab.server)?.without("tcx");
    // Theirs first.
    tc(&lab.server, "qdisc add dev client1 clsact")?;
    tc(&lab.server, &format!("filter add dev client1 ingress prio 1 {FOREIGN_FILTER}"))?;
    limiter.protect(&lab, LIMIT, &["--attach-mode", "tc"])?;
    assert_eq!(own_filters(&lab.server), 1, "at another priority");
    limiter.detach()?;
    assert_eq!((own_filters(&lab.server), has_clsact(&lab.server)?), (0, true));
    assert!(filters(&lab.server, "ingress").contains("protocol ip pref 1 bpf"), "theirs stays");
    tc(&lab.server, "qdisc del dev client1 clsact")?;
    // Theirs came later.
    limiter.protect(&lab, LIMIT, &["--attach-mode", "tc"])?;
    tc(&lab.server, &format!("filter add dev client1 egress prio 1 {FOREIGN_FILTER}"))?;
    limiter.detach()?;
    assert_eq!((own_filters(&lab.server), has_clsact(&lab.server)?), (0, true));
    assert!(filters(&lab.server, "egress").contains("protocol ip pref 1 bpf"), "theirs stays");
    Ok(())
}

#[test]
fn an_attach_that_fails_takes_its_filter_away_again() -> Result<()> {
    let lab = Lab::new(2)?;
    let limiter = Limiter::new(&lab.server)?.without("tcx");
    // No room for another filter on the second interface.
    tc(&lab.server, "qdisc add dev client2 clsact")?;
    for priority in 1..=16 {
        tc(&lab.server, &format!("filter add dev client2 ingress prio {priority} {FOREIGN_FILTER}"))?;
    }
    let arguments =
        ["attach", "--interface", "client1", "--interface", "client2", "--port", "8080", "--attach-mode", "tc"];
    let outcome = limiter.outcome(arguments)?;
    assert_eq!(outcome.status.code(), Some(1), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("client2"), "{}", outcome.stderr);
    assert_eq!((own_filters(&lab.server), has_clsact(&lab.server)?), (0, false));
    assert!(!limiter.pin_path().exists());
    Ok(())
}

/// Wherever it is cut off, the next attach works, and the next detach leaves nothing.
#[test]
fn an_attach_by_filter_that_is_killed_is_made_good() -> Result<()> {
    const STEPS: u32 = 6;
    let lab = Lab::new(1)?;
    let limiter = Limiter::new(&lab.server)?.without("tcx");
    let arguments = ["attach", "--interface", "client1", "--port", "8080", "--attach-mode", "tc"];
    let begun = std::time::Instant::now();
    limiter.output(arguments)?;
    let whole = begun.elapsed();
    limiter.detach()?;
    for step in 0..STEPS {
        let process = Process::start(&mut limiter.command(arguments))?;
        // The point is to cut it off at every stage, so here it is the time that counts.
        thread::sleep(whole * (STEPS + step) / (2 * STEPS));
        process.kill()?;
        limiter.output(arguments)?;
        assert_eq!(own_filters(&lab.server), 1, "step {step}");
        limiter.detach()?;
        assert_eq!((own_filters(&lab.server), has_clsact(&lab.server)?), (0, false), "step {step}");
    }
    Ok(())
}

#[test]
fn a_filter_is_removed_from_its_own_namespace_only() -> Result<()> {
    let (lab, elsewhere) = (Lab::new(1)?, Namespace::new()?);
    let limiter = Limiter::new(&lab.server)?.without("tcx");
    limiter.protect(&lab, LIMIT, &["--attach-mode", "tc"])?;
    let mut command = elsewhere.command(limiter.binary());
    command.arg("detach").arg("--pin-path").arg(limiter.pin_path());
    let outcome = Process::start(&mut command)?.wait(SOON)?;
    assert_eq!(outcome.status.code(), Some(1), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("another network namespace"), "{}", outcome.stderr);
    assert_eq!(own_filters(&lab.server), 1);
    assert!(limiter.json("status")?["services"][0]["ports"] == json!([8080]), "it is whole");
    limiter.detach()
}

/// One that lets everything pass (a classic BPF program of one instruction), of a protocol of its own: no other filter has its
/// priority then.
const FOREIGN_FILTER: &str = "protocol ip bpf bytecode 1,6|0|0|0, flowid 1:1";

/// Runs `tc` (iproute2) in a namespace. A bar stands for a space within an argument.
fn tc(namespace: &Namespace, arguments: &str) -> Result<String> {
    let output = namespace
        .command("tc")
        .args(arguments.split(' ').map(|word| word.replace('|', " ")))
        .output()
        .context("cannot run tc (iproute2)")?;
    ensure!(output.status.success(), "tc {arguments}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(String::from_utf8(output.stdout)?)
}

fn filters(namespace: &Namespace, side: &str) -> String {
    // Where there is no qdisc, there are no filters, and tc may say so as an error.
    tc(namespace, &format!("filter show dev client1 {side}")).unwrap_or_default()
}

fn own_filters(namespace: &Namespace) -> usize {
    filters(namespace, "ingress").matches("handle 0x6c696d31").count()
}

fn has_clsact(namespace: &Namespace) -> Result<bool> {
    Ok(tc(namespace, "qdisc show dev client1")?.contains("clsact"))
}
