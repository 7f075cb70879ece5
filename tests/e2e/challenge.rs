//! `challenge`: SYN cookies made in XDP while a service is flooded.

use std::{
    fs,
    net::{SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use aya::maps::{Array, Map, MapData};
use limiter_common::{abi, challenge::Challenge};
use limiter_tests::{
    bare::{Answer, Attachment, BareXdp},
    both_families,
    info::{Info, both_ways},
    lab::{CLIENT_INTERFACE, Family, Lab, PORT},
    limiter::Limiter,
    netns::Namespace,
    raw::RawClient,
    tcp::{Crowd, PlainServer, connect_served, listener, reset},
    tun::{TUN, TunLab},
    wait::{SOON, eventually, eventually_equal},
};

both_families!(
    a_flood_is_answered_by_cookies_and_ends,
    cookies_keep_to_the_limits,
    cookies_work_in_generic_mode,
    cookies_work_on_tc,
    cookies_work_on_a_tun,
    cookies_keep_the_options,
    cookies_keep_what_both_ends_want,
    segments_fit_the_device,
);

const SYSCTL: &str = "net/ipv4/tcp_syncookies";
const TIMESTAMPS: &str = "net/ipv4/tcp_timestamps";

fn sysctl(namespace: &Namespace) -> Result<String> {
    value(namespace, SYSCTL)
}

fn value(namespace: &Namespace, sysctl: &str) -> Result<String> {
    Ok(namespace.enter(|| fs::read_to_string(format!("/proc/sys/{sysctl}")))?.trim().to_owned())
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
    reset([before, during, after])?;
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
    drop(late);
    crowd.reset()?;
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

/// By a link and by a filter; on a device that computes checksums and on one that does not. What XDP needs at the other end, TC
/// does not.
fn cookies_work_on_tc(family: Family) -> Result<()> {
    for (without, offload) in [("", true), ("tcx", true), ("", false)] {
        let lab = Lab::new(2)?;
        let listener = listen(&lab, family)?;
        let limiter = Limiter::new(&lab.server)?.without(without);
        attach(&lab, &limiter, "challenge = \"always\"\nchallenge_timestamps = true\nattach_mode = \"tc\"")?;
        let client = &lab.clients[0];
        lab.server.set_checksum_offload(&client.server_interface(), offload)?;
        let connection = connect(&lab, &listener, family)?;
        assert_eq!((limiter.counter("syn_challenged")?, limiter.counter("syn_admitted")?), (1, 0));
        let infos = agreed(&connection, 4 * MEGABYTE)?;
        assert!(infos.iter().all(|info| info.timestamps && info.sack && info.window_scales.is_some()), "{infos:?}");
        limiter.wait_held(client.address(family), 1)?;

        // No half-open connection is left of who never answers.
        RawClient::new(&lab.clients[1], family)?.send_syns(100)?;
        eventually_equal(SOON, "they are answered", &101, || limiter.counter("syn_challenged"))?;
        assert_eq!(requests(&lab.server)?, 0);
    }
    Ok(())
}

/// Where there is no Ethernet header, and every checksum is looked at.
fn cookies_work_on_a_tun(family: Family) -> Result<()> {
    let lab = TunLab::new()?;
    let service = lab.service(family);
    let listener = listener(&lab.server, SocketAddr::new(family.unspecified(), PORT), 16)?;
    let limiter = Limiter::new(&lab.server)?;
    let config = Limiter::config_file("[kernel]\nchallenge = \"always\"\nchallenge_timestamps = true\n")?;
    limiter.attach(["--interface", TUN, "--port", "8080", "--config", &config.path().display().to_string()])?;
    let connected = lab.client.enter(|| TcpStream::connect_timeout(&service, SOON))?;
    let (served, _) = listener.accept()?;
    assert_eq!((limiter.counter("syn_challenged")?, limiter.counter("syn_admitted")?), (1, 0));
    let infos = agreed(&[connected, served], MEGABYTE)?;
    assert!(infos.iter().all(|info| info.timestamps && info.sack && info.window_scales.is_some()), "{infos:?}");
    Ok(())
}

/// A connection, the client's end first.
fn connect(lab: &Lab, listener: &TcpListener, family: Family) -> Result<[TcpStream; 2]> {
    let client = &lab.clients[0];
    let connected = client.namespace.enter(|| TcpStream::connect_timeout(&client.service(family), SOON))?;
    let (served, _) = listener.accept()?;
    Ok([connected, served])
}

fn listen(lab: &Lab, family: Family) -> Result<TcpListener> {
    listener(&lab.server, SocketAddr::new(family.unspecified(), PORT), 16)
}

/// What both ends say of a connection, after data went through it both ways, and that little was sent again.
fn agreed([client, server]: &[TcpStream; 2], bytes: usize) -> Result<[Info; 2]> {
    both_ways([client, server], bytes)?;
    let infos = [Info::of(client)?, Info::of(server)?];
    for info in &infos {
        let segments = u32::try_from(bytes)? / info.sends_at_most;
        ensure!(info.sent_again <= segments / 50 + 5, "of {segments} segments: {infos:?}");
    }
    // What one end shifts by, the other one has to know.
    let crossed = infos[1].window_scales.map(|(heard, told)| (told, heard));
    ensure!(infos[0].window_scales == crossed, "{infos:?}");
    Ok(infos)
}

const MEGABYTE: usize = 1 << 20;

fn cookies_keep_the_options(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    lab.server.set_sysctl(SYSCTL, "1")?;
    lab.server.set_sysctl(TIMESTAMPS, "1")?;
    let _receivers = receivers(&lab)?;
    let listener = listen(&lab, family)?;
    let of_stack = agreed(&connect(&lab, &listener, family)?, MEGABYTE)?;
    assert!(of_stack[0].timestamps && of_stack[0].sack && of_stack[0].window_scales.is_some());

    let limiter = Limiter::new(&lab.server)?;
    attach(&lab, &limiter, "challenge = \"always\"\nchallenge_timestamps = true")?;
    assert_eq!((sysctl(&lab.server)?, value(&lab.server, TIMESTAMPS)?), ("2".into(), "2".into()));
    assert_eq!(limiter.json("status")?["timestamps_before"], 1);
    let connection = connect(&lab, &listener, family)?;
    assert_eq!((limiter.counter("syn_challenged")?, limiter.counter("syn_admitted")?), (1, 0));
    let of_cookie = agreed(&connection, 30 * MEGABYTE)?;
    // Older kernels show it in their first namespace only; what the stack will scale by can't be known elsewhere.
    let knows_buffers = lab.server.enter(|| std::path::Path::new("/proc/sys/net/core/rmem_max").exists());
    for (stack, cookie) in of_stack.iter().zip(&of_cookie) {
        let window_scales = stack.window_scales.filter(|_| knows_buffers);
        let expected = Info { sent_again: cookie.sent_again, window_scales, ..*stack };
        assert_eq!(*cookie, expected, "it is as if the stack had answered");
    }
    limiter.detach()?;
    assert_eq!((sysctl(&lab.server)?, value(&lab.server, TIMESTAMPS)?), ("1".into(), "1".into()));
    both_ways([&connection[0], &connection[1]], MEGABYTE)
}

/// Whatever one of both does not want is not there, and the rest is.
fn cookies_keep_what_both_ends_want(family: Family) -> Result<()> {
    /// Whether timestamps, SACK, window scaling and ECN are there.
    type Options = (bool, bool, bool, bool);
    const ALL: Options = (true, true, true, false);
    const NONE: Options = (false, false, false, false);
    let lab = Lab::new(1)?;
    let _receivers = receivers(&lab)?;
    let listener = listen(&lab, family)?;
    let limiter = Limiter::new(&lab.server)?;
    attach(&lab, &limiter, "challenge = \"always\"\nchallenge_timestamps = true")?;
    let (client, server) = (&lab.clients[0].namespace, &lab.server);
    let rows: [(&str, &Namespace, &str, &str, Options); 10] = [
        ("the client has no timestamps", client, "tcp_timestamps", "0", NONE),
        ("the client's timestamps begin anywhere", client, "tcp_timestamps", "1", ALL),
        ("the client scales no windows", client, "tcp_window_scaling", "0", (true, true, false, false)),
        ("the client has no SACK", client, "tcp_sack", "0", (true, false, true, false)),
        ("the client asks for ECN", client, "tcp_ecn", "1", (true, true, true, true)),
        ("the server scales no windows", server, "tcp_window_scaling", "0", (true, true, false, false)),
        ("the server has no SACK", server, "tcp_sack", "0", (true, false, true, false)),
        ("the server has small buffers", server, "tcp_rmem", "4096 16384 60000", ALL),
        // Somebody has changed it while it is attached: what can't hide options is not promised.
        ("the server's timestamps begin anywhere", server, "tcp_timestamps", "1", NONE),
        ("the server has no timestamps", server, "tcp_timestamps", "0", NONE),
    ];
    for (number, (description, namespace, name, changed, wanted)) in rows.into_iter().enumerate() {
        let sysctl = format!("net/ipv4/{name}");
        let before = value(namespace, &sysctl)?;
        namespace.set_sysctl(&sysctl, changed)?;
        let connection = connect(&lab, &listener, family).context(description)?;
        assert_eq!(limiter.counter("syn_challenged")?, number as u64 + 1, "{description}");
        for info in agreed(&connection, 2 * MEGABYTE).context(description)? {
            let found = (info.timestamps, info.sack, info.window_scales.is_some(), info.ecn);
            assert_eq!(found, wanted, "{description}: {info:?}");
        }
        namespace.set_sysctl(&sysctl, &before)?;
    }
    Ok(())
}

/// The client is told the MTU of the server's device; and the server remembers the greatest of four sizes that the client takes.
fn segments_fit_the_device(family: Family) -> Result<()> {
    let headers = if family == Family::V4 { 40 } else { 60 };
    // Of 536, 1300, 1440 and 1460 (IPv4), and of 1220, 1420, 1440 and 8940 (IPv6).
    let remembered = if family == Family::V4 { [1460, 1300] } else { [1440, 1220] };
    let lab = Lab::new(1)?;
    let _receivers = receivers(&lab)?;
    let listener = listen(&lab, family)?;
    let limiter = Limiter::new(&lab.server)?;
    attach(&lab, &limiter, "challenge = \"always\"")?;
    let connection = connect(&lab, &listener, family)?;
    let infos = agreed(&connection, MEGABYTE)?;
    assert_eq!(infos.map(|info| info.sends_at_most), [1500 - headers, remembered[0]]);

    lab.server.ip(&format!("link set {} mtu 1400", lab.clients[0].server_interface()))?;
    let connection = connect(&lab, &listener, family)?;
    assert_eq!(Info::of(&connection[0])?.sends_at_most, 1400 - headers, "it was told");
    let reached = [Info::of(&connection[1])?.sends_at_most, 1400 - headers];
    assert!(reached[0] <= reached[1], "{reached:?}");
    lab.server.ip(&format!("link set {} mtu 1500", lab.clients[0].server_interface()))?;
    lab.clients[0].namespace.ip(&format!("link set {CLIENT_INTERFACE} mtu 1400"))?;
    let connection = connect(&lab, &listener, family)?;
    let infos = agreed(&connection, MEGABYTE)?;
    assert_eq!(infos.map(|info| info.sends_at_most), [1400 - headers, remembered[1]]);
    Ok(())
}

/// How windows are shifted depends on a setting of the host that no program sees.
#[test]
fn a_daemon_tells_the_programs_what_has_changed() -> Result<()> {
    let lab = Lab::new(1)?;
    let limiter = Limiter::new(&lab.server)?;
    let config = Limiter::config_file("[kernel]\nchallenge = \"auto\"\n[[service]]\nname = \"x\"\nport = 8080\n")?;
    let mut arguments = lab.interface_flags();
    arguments.extend(["--config".into(), config.path().display().to_string()]);
    let _daemon = limiter.run(arguments)?;
    let pin = limiter.pin_path().join(format!("v{}", abi::ABI_VERSION)).join(abi::MAP_CHALLENGES);
    let mut challenges: Array<_, Challenge> = Map::Array(MapData::from_pin(pin)?).try_into()?;
    let largest_buffer: u32 = value(&lab.server, "net/core/rmem_max")?.parse()?;
    let told = challenges.get(&0, 0)?;
    assert_eq!(told.largest_buffer, largest_buffer);
    challenges.set(0, Challenge { largest_buffer: 1, ..told }, 0)?;
    eventually_equal(SOON, "it is told anew", &told, || Ok(challenges.get(&0, 0)?))
}

#[test]
fn the_setting_is_put_back_whatever_became_of_the_process() -> Result<()> {
    let lab = Lab::new(1)?;
    lab.server.set_sysctl(SYSCTL, "0")?;
    let limiter = Limiter::new(&lab.server)?;
    let with = Limiter::config_file("[kernel]\nchallenge = \"auto\"\n[[service]]\nname = \"x\"\nport = 8080\n")?;
    let with_timestamps = Limiter::config_file(
        "[kernel]\nchallenge = \"auto\"\nchallenge_timestamps = true\n[[service]]\nname = \"x\"\nport = 8080\n",
    )?;
    let without = Limiter::config_file("[[service]]\nname = \"x\"\nport = 8080\n")?;
    let arguments = |config: &tempfile::NamedTempFile| {
        let mut arguments = lab.interface_flags();
        arguments.extend(["--config".into(), config.path().display().to_string()]);
        arguments
    };
    let daemon = limiter.run(arguments(&with))?;
    assert_eq!(
        (sysctl(&lab.server)?, value(&lab.server, TIMESTAMPS)?),
        ("2".into(), "1".into()),
        "only what is asked for"
    );
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

    // The one is asked for, and then no longer.
    limiter.attach(arguments(&with_timestamps))?;
    assert_eq!((sysctl(&lab.server)?, value(&lab.server, TIMESTAMPS)?), ("2".into(), "2".into()));
    limiter.attach(arguments(&with))?;
    assert_eq!((sysctl(&lab.server)?, value(&lab.server, TIMESTAMPS)?), ("2".into(), "1".into()));
    limiter.attach(arguments(&with_timestamps))?;
    limiter.attach(arguments(&without))?;
    assert_eq!((sysctl(&lab.server)?, value(&lab.server, TIMESTAMPS)?), ("0".into(), "1".into()));

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
