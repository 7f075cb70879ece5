//! `limiter run`: the gateway in front of the built-in echo application, with and without the kernel's part.

use std::{
    net::{SocketAddr, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, anyhow, bail};
use limiter_tests::{
    both_families,
    lab::{CLIENT_INTERFACE, Client, Family, Lab, PORT},
    limiter::{Daemon, Limiter},
    monitor::{self, Monitor},
    netns::Namespace,
    tcp::Crowd,
    wait::{NO_ANSWER, SOON, eventually, eventually_equal},
    websocket::{self, Handshake},
};
use tungstenite::{Message, http::header::RETRY_AFTER, protocol::CloseFrame};

both_families!(
    a_crowd_gets_the_limit,
    a_client_that_vanishes_gives_its_slot_back,
    a_new_limit_holds_at_once_and_cuts_nobody,
    without_the_kernel_a_client_is_told_that_it_is_past_the_limit,
    without_the_kernel_services_count_together_and_rules_end,
    behind_a_proxy_the_gateway_limits_by_the_true_address,
);

/// Longer than a client waits before it sends its SYN again (1 s), so that retries are part of what is seen.
const PAST_RETRIES: Duration = Duration::from_millis(2500);

/// Both families on one port.
const LISTEN: &str = "0.0.0.0:8080,[::]:8080";

fn a_crowd_gets_the_limit(family: Family) -> Result<()> {
    let lab = Lab::new(2)?;
    let (client, other) = (&lab.clients[0], &lab.clients[1]);
    let limiter = Limiter::new(&lab.server)?;
    let _daemon = run_with_kernel(&lab, &limiter, "")?;
    let monitor = Monitor::start(&lab.server, PORT)?;

    let crowd = Crowd::connect(&client.namespace, client.service(family), 200, PAST_RETRIES)?;
    assert!(crowd.unserved.len() >= 5, "{} of 200 connected", crowd.unserved.len());
    let mut open = Vec::new();
    for stream in crowd.unserved {
        stream.set_nonblocking(false)?;
        match websocket::upgrade(stream, client.service(family)) {
            Ok(Handshake::Open(websocket)) => open.push(websocket),
            Ok(Handshake::Refused(response)) => bail!("let in by the kernel, and then {}", response.status()),
            // Connected for all that the client knew.
            Err(_) => {}
        }
    }
    assert_eq!(open.len(), 5, "of 200 connects from one source");
    let mut others = (0..5)
        .map(|_| websocket::open(&other.namespace, other.service(family)))
        .collect::<Result<Vec<_>>>()
        .context("another source, while the first is at its limit")?;
    for websocket in open.iter_mut().map(|open| &mut **open).chain(&mut others) {
        websocket::echo(websocket, "hello")?;
    }
    let peaks = monitor.finish()?;
    assert_eq!(peaks.of(client.address(family)), 5, "most at any one time, {} samples", peaks.samples);
    assert_eq!(limiter.held_by(client.address(family))?, 5);

    // Close one, one more gets in.
    let mut last = open.pop().context("there are five")?;
    last.close(None)?;
    drop(last);
    limiter.wait_held(client.address(family), 4)?;
    let mut next = websocket::open(&client.namespace, client.service(family))?;
    websocket::echo(&mut next, "hello")?;
    drop((open, others, next, crowd.unanswered));
    limiter.wait_empty()
}

/// The gateway gives it up when no pong comes, and the slot is free at once; the kernel would go on for minutes to send
/// what the client never acknowledges.
fn a_client_that_vanishes_gives_its_slot_back(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let address = client.address(family);
    let limiter = Limiter::new(&lab.server)?;
    let _daemon = run_with_kernel(&lab, &limiter, "ping_interval = \"300ms\"\npong_timeout = \"300ms\"")?;
    let mut websockets =
        (0..5).map(|_| websocket::open(&client.namespace, client.service(family))).collect::<Result<Vec<_>>>()?;
    for websocket in &mut websockets {
        websocket::echo(websocket, "hello")?;
    }
    assert_eq!(limiter.held_by(address)?, 5);

    client.namespace.ip(&format!("link set {CLIENT_INTERFACE} down"))?;
    limiter.wait_held_within(Duration::from_secs(5), address, 0)?;
    eventually(SOON, "the ledger is empty", || Ok(limiter.ledger()?.is_empty()))?;
    assert!(limiter.counter("closed_gateway")? >= 5, "by the gateway's word, not by the sockets' end");

    client.namespace.ip(&format!("link set {CLIENT_INTERFACE} up"))?;
    client.namespace.wait_link_up(CLIENT_INTERFACE)?;
    lab.server.wait_link_up(&client.server_interface())?;
    let again = (0..5)
        .map(|_| websocket::open(&client.namespace, client.service(family)))
        .collect::<Result<Vec<_>>>()
        .context("after the link is up again")?;
    drop((again, websockets));
    limiter.wait_empty()
}

fn a_new_limit_holds_at_once_and_cuts_nobody(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let limiter = Limiter::new(&lab.server)?;
    let _daemon = run_with_kernel(&lab, &limiter, "")?;
    let refused = || -> Result<()> {
        let crowd = Crowd::connect(&client.namespace, client.service(family), 1, NO_ANSWER)?;
        assert_eq!(crowd.unanswered.len(), 1, "past the limit");
        Ok(())
    };
    let open = || websocket::open(&client.namespace, client.service(family));

    let mut websockets = (0..5).map(|_| open()).collect::<Result<Vec<_>>>()?;
    refused()?;
    limiter.set_limit("connections_per_source", 6)?;
    websockets.push(open()?);
    refused()?;
    limiter.set_limit("connections_per_source", 1)?;
    refused()?;
    for websocket in &mut websockets {
        websocket::echo(websocket, "still here")?;
    }
    drop(websockets);
    limiter.wait_empty()?;
    let _only = open()?;
    refused()
}

fn without_the_kernel_a_client_is_told_that_it_is_past_the_limit(family: Family) -> Result<()> {
    let lab = Lab::new(2)?;
    let (client, other) = (&lab.clients[0], &lab.clients[1]);
    let limiter = Limiter::new(&lab.server)?;
    let _daemon = limiter.run(["--listen", LISTEN, "--connections-per-source", "3", "--connections-total", "5"])?;
    assert!(!limiter.pin_path().exists(), "no interface, nothing to pin");

    let mut websockets =
        (0..3).map(|_| websocket::open(&client.namespace, client.service(family))).collect::<Result<Vec<_>>>()?;
    assert_turned_away(websocket::handshake(&client.namespace, None, client.service(family))?, 429)?;
    for _ in 0..2 {
        websockets.push(websocket::open(&other.namespace, other.service(family))?);
    }
    assert_turned_away(websocket::handshake(&other.namespace, None, other.service(family))?, 503)?;
    for websocket in &mut websockets {
        websocket::echo(websocket, "still here")?;
    }

    // The first is the first client's.
    let mut first = websockets.swap_remove(0);
    first.close(None)?;
    websocket::close_code(&mut first)?;
    drop(first);
    eventually(SOON, "its place is free", || {
        Ok(matches!(websocket::handshake(&client.namespace, None, client.service(family))?, Handshake::Open(_)))
    })
}

fn without_the_kernel_services_count_together_and_rules_end(family: Family) -> Result<()> {
    let lab = Lab::new(2)?;
    let (client, other) = (&lab.clients[0], &lab.clients[1]);
    let limiter = Limiter::new(&lab.server)?;
    // Long enough for what is tried before it ends.
    let ends = humantime::format_rfc3339_millis(SystemTime::now() + Duration::from_secs(8));
    let config = Limiter::config_file(&format!(
        "[limits]\nconnections_total_all = 3\nconnection_rate = 0\n\
         [gateway]\nlisten = [\"0.0.0.0:{PORT}\", \"[::]:{PORT}\", \"0.0.0.0:8081\", \"[::]:8081\"]\n\
         [[service]]\nname = \"chat\"\nport = {PORT}\n[[service]]\nname = \"game\"\nport = 8081\n\
         [[rule]]\ncidr = \"{}\"\naction = \"deny\"\nexpires = {ends}\n",
        other.address(family)
    ))?;
    let daemon = limiter.run(["--config".as_ref(), config.path().as_os_str()])?;
    let chat = client.service(family);
    let game = SocketAddr::new(chat.ip(), 8081);
    let answer = |client: &Client, server| -> Result<u16> {
        match websocket::handshake(&client.namespace, None, server)? {
            Handshake::Open(_) => Ok(101),
            Handshake::Refused(response) => Ok(response.status().as_u16()),
        }
    };
    assert_eq!(answer(other, other.service(family))?, 403, "a rule denies it");
    let mut held = Vec::new();
    for server in [chat, game, chat] {
        held.push(websocket::open(&client.namespace, server)?);
    }
    assert_eq!((answer(client, chat)?, answer(client, game)?), (503, 503), "of either service");
    let (_, metrics) = daemon.http_get("/metrics").context("metrics")?;
    assert!(metrics.contains("limiter_handshakes_total{result=\"total_full\"} 2"), "{metrics}");
    drop(held.swap_remove(1));
    eventually(SOON, "there is room again, for either", || Ok(answer(client, chat)? == 101))?;
    // Nobody reads the file again.
    eventually(SOON, "the rule has ended", || Ok(answer(other, other.service(family))? == 101))
}

#[test]
fn a_message_too_big_ends_its_session_only() -> Result<()> {
    let lab = Lab::new(1)?;
    let limiter = Limiter::new(&lab.server)?;
    let config = Limiter::config_file("[gateway.messages]\nmax_size = \"1KiB\"\n")?;
    let _daemon = limiter.run(["--listen", LISTEN, "--config", &config.path().display().to_string()])?;
    let service = lab.clients[0].service(Family::V4);
    let open = || websocket::open(&lab.clients[0].namespace, service);

    let (mut bystander, mut offender) = (open()?, open()?);
    websocket::echo(&mut offender, &"x".repeat(1024))?;
    offender.send(Message::text("x".repeat(1025)))?;
    assert_eq!(websocket::close_code(&mut offender)?, 1009);
    websocket::echo(&mut bystander, "hello")
}

#[test]
fn who_breaks_the_rules_too_often_is_denied_in_the_kernel() -> Result<()> {
    let lab = Lab::new(2)?;
    let limiter = Limiter::new(&lab.server)?;
    let _daemon = run_with_kernel(
        &lab,
        &limiter,
        "[gateway.messages]\nmax_size = \"1KiB\"\ndeny_after = 2\ndeny_for = \"1h\"\n",
    )?;
    let (client, other) = (&lab.clients[0], &lab.clients[1]);
    for _ in 0..2 {
        let mut offender = websocket::open(&client.namespace, client.service(Family::V4))?;
        offender.send(Message::text("x".repeat(1025)))?;
        assert_eq!(websocket::close_code(&mut offender)?, 1009);
    }
    let rules = limiter.json("rules")?;
    assert_eq!(rules["rules"][0]["cidr"], format!("{}/32", client.address(Family::V4)));
    assert_eq!(rules["rules"][0]["action"], "deny");
    let denied = Crowd::connect(&client.namespace, client.service(Family::V4), 1, NO_ANSWER)?;
    assert_eq!(denied.unanswered.len(), 1, "its SYN gets no answer");
    assert!(limiter.counter("syn_rule")? >= 1);
    let mut bystander = websocket::open(&other.namespace, other.service(Family::V4))?;
    websocket::echo(&mut bystander, "hello")
}

#[test]
fn messages_too_many_end_their_session_only() -> Result<()> {
    let lab = Lab::new(1)?;
    let limiter = Limiter::new(&lab.server)?;
    let config = Limiter::config_file("[gateway.messages]\nrate = 10\nwindow = \"1m\"\n")?;
    let _daemon = limiter.run(["--listen", LISTEN, "--config", &config.path().display().to_string()])?;
    let service = lab.clients[0].service(Family::V4);
    let open = || websocket::open(&lab.clients[0].namespace, service);

    let (mut bystander, mut offender) = (open()?, open()?);
    for message in 0..10 {
        websocket::echo(&mut offender, &message.to_string())?;
    }
    offender.send(Message::text("one too many"))?;
    assert_eq!(websocket::close_code(&mut offender)?, 1008);
    websocket::echo(&mut bystander, "hello")
}

#[test]
fn a_shutdown_says_goodbye() -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let limiter = Limiter::new(&lab.server)?;
    let daemon = run_with_kernel(&lab, &limiter, "")?;
    assert_eq!(daemon.http_status("/healthz"), Some(200));
    let mut websockets =
        (0..3).map(|_| websocket::open(&client.namespace, client.service(Family::V4))).collect::<Result<Vec<_>>>()?;

    let begun = Instant::now();
    daemon.begin_shutdown()?;
    for websocket in &mut websockets {
        assert_eq!(websocket::close_code(websocket)?, 1001);
    }
    // The clients' answers to the close frames.
    for websocket in &mut websockets {
        websocket.flush().or_else(|error| match error {
            tungstenite::Error::ConnectionClosed => Ok(()),
            error => Err(error),
        })?;
    }
    let ended = daemon.wait()?;
    assert_eq!(ended.status.code(), Some(0), "{}", ended.stderr);
    assert!(begun.elapsed() < SOON, "it waits for clients no longer than they need");
    drop(websockets);
    limiter.wait_empty()
}

#[test]
fn a_client_that_ignores_the_shutdown_does_not_hold_it_up() -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let limiter = Limiter::new(&lab.server)?;
    let daemon = run_with_kernel(&lab, &limiter, "drain_timeout = \"500ms\"")?;
    let _silent = websocket::open(&client.namespace, client.service(Family::V4))?;
    daemon.begin_shutdown()?;
    let ended = daemon.wait()?;
    assert_eq!(ended.status.code(), Some(0), "{}", ended.stderr);
    limiter.wait_empty()?;
    eventually_equal(SOON, "nothing is established", &None, || {
        Ok(monitor::established(&lab.server, PORT)?.get(&client.address(Family::V4)).copied())
    })
}

#[test]
fn what_is_no_websocket_handshake_is_told_so() -> Result<()> {
    use std::io::{Read, Write};
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let limiter = Limiter::new(&lab.server)?;
    let _daemon = run_with_kernel(&lab, &limiter, "")?;
    for (request, status) in [
        ("GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", "426"),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\r\n",
            "400",
        ),
        ("this is not HTTP\r\n\r\n", "400"),
    ] {
        let mut stream = client.namespace.enter(|| std::net::TcpStream::connect(client.service(Family::V4)))?;
        stream.set_read_timeout(Some(SOON))?;
        stream.write_all(request.as_bytes())?;
        let mut response = String::new();
        stream.read_to_string(&mut response).with_context(|| format!("after {request:?}: {response}"))?;
        assert_eq!(response.split(' ').nth(1), Some(status), "{request:?} got {response:?}");
    }
    limiter.wait_empty()
}

#[test]
fn metrics_and_log_tell_what_was_refused() -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let limiter = Limiter::new(&lab.server)?;
    let mut daemon = run_with_kernel(&lab, &limiter, "")?;
    let service = client.service(Family::V4);
    let mut websockets = (0..5).map(|_| websocket::open(&client.namespace, service)).collect::<Result<Vec<_>>>()?;
    websocket::echo(&mut websockets[0], "hello")?;
    let past = Crowd::connect(&client.namespace, service, 7, NO_ANSWER)?;
    assert_eq!(past.unanswered.len(), 7);

    let metrics = daemon.http_get("/metrics").context("no metrics")?.1;
    let sample = |start: &str, labels: &[&str]| {
        metrics
            .lines()
            .filter(|line| line.starts_with(start) && labels.iter().all(|label| line.contains(label)))
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum::<f64>()
    };
    for (start, labels, expected) in [
        ("limiter_connections{", &[][..], 5.0),
        ("limiter_sources ", &[], 1.0),
        ("limiter_syn_total{", &["verdict=\"denied\"", "reason=\"source_limit\""], 7.0),
        ("limiter_kernel_attached{", &["interface=\"client1\"", "mode=\"native\""], 1.0),
    ] {
        let value = sample(start, labels);
        assert!((value - expected).abs() < 0.5, "{start} {labels:?} is {value}, not {expected}, in:\n{metrics}");
    }
    eventually(SOON, "the refusal is in the log", || {
        let log = daemon.process().stderr();
        Ok(log.lines().any(|line| ["refused", "source_limit", "198.18.1.2"].iter().all(|word| line.contains(word))))
    })
}

#[test]
fn the_programs_log_what_they_refuse_if_they_are_asked_to() -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let limiter = Limiter::new(&lab.server)?;
    let mut daemon = run_with_kernel(&lab, &limiter, "[kernel]\ndebug_log = true\n[log]\nlevel = \"debug\"\n")?;
    let crowd = Crowd::connect(&client.namespace, client.service(Family::V4), 6, NO_ANSWER)?;
    assert_eq!(crowd.unanswered.len(), 1);
    eventually(SOON, "the program's message is in the log", || {
        Ok(daemon.process().stderr().lines().any(|line| line.contains("SYN refused, reason 1")))
    })
}

#[test]
fn it_works_on_loopback() -> Result<()> {
    let host = Namespace::new()?;
    let limiter = Limiter::new(&host)?;
    let _daemon = limiter.run(["--interface", "lo", "--listen", "127.0.0.1:8080", "--connections-per-source", "5"])?;
    assert_eq!(limiter.json("status")?["interfaces"][0]["mode"], "generic", "lo has no native XDP");
    let service = SocketAddr::from(([127, 0, 0, 1], PORT));
    let open = |source: [u8; 4]| match websocket::handshake(&host, Some(source.into()), service)? {
        Handshake::Open(client) => Ok(client),
        Handshake::Refused(response) => bail!("refused: {}", websocket::describe(&response)),
    };
    let mut websockets = (0..5).map(|_| open([127, 0, 0, 2])).collect::<Result<Vec<_>>>()?;
    let past = Crowd::connect_from(&host, Some([127, 0, 0, 2].into()), service, 20, NO_ANSWER)?;
    assert_eq!(past.unanswered.len(), 20, "past the limit");
    websockets.push(open([127, 0, 0, 3])?);
    for websocket in &mut websockets {
        websocket::echo(websocket, "hello")?;
    }
    limiter.wait_held([127, 0, 0, 2].into(), 5)?;
    drop((websockets, past));
    limiter.wait_empty()
}

#[test]
fn a_relayed_session_is_the_upstreams() -> Result<()> {
    const BYE: u16 = 4001;
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let listener = lab.server.enter(|| TcpListener::bind("127.0.0.1:9000"))?;
    let upstream = thread::spawn(move || -> Result<()> {
        let (stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(SOON))?;
        let mut websocket = tungstenite::accept(stream).map_err(|error| anyhow!("the gateway's handshake: {error}"))?;
        loop {
            match websocket.read()? {
                Message::Text(text) if text.as_str() == "bye" => {
                    websocket.close(Some(CloseFrame { code: BYE.into(), reason: "as you wish".into() }))?;
                }
                Message::Text(text) => websocket.send(Message::text(format!("upstream: {text}")))?,
                Message::Binary(bytes) => websocket.send(Message::Binary(bytes))?,
                Message::Close(_) => return Ok(()),
                _ => {}
            }
        }
    });
    let limiter = Limiter::new(&lab.server)?;
    let mut arguments = lab.interface_flags();
    arguments.extend(["--listen", LISTEN, "--upstream", "ws://127.0.0.1:9000"].map(str::to_owned));
    let _daemon = limiter.run(arguments)?;

    let mut websocket = websocket::open(&client.namespace, client.service(Family::V4))?;
    websocket.send(Message::text("hello"))?;
    assert_eq!(websocket.read()?, Message::text("upstream: hello"));
    let bytes = Message::binary((0..=u8::MAX).cycle().take(50_000).collect::<Vec<_>>());
    websocket.send(bytes.clone())?;
    assert_eq!(websocket.read()?, bytes);
    websocket.send(Message::text("bye"))?;
    assert_eq!(websocket::close_code(&mut websocket)?, BYE);
    let _ = websocket.flush();
    upstream.join().map_err(|_| anyhow!("the upstream panicked"))??;
    drop(websocket);
    limiter.wait_empty()
}

/// `limiter run` on the lab's interfaces with a limit of 5, and more lines for `[gateway]`.
fn run_with_kernel<'limiter>(lab: &Lab, limiter: &'limiter Limiter<'_>, gateway: &str) -> Result<Daemon<'limiter>> {
    let listen: Vec<_> = LISTEN.split(',').collect();
    let config = Limiter::config_file(&format!("[gateway]\nlisten = {listen:?}\nupstream = \"echo\"\n{gateway}\n"))?;
    let mut arguments = lab.interface_flags();
    arguments.extend(["--config".into(), config.path().display().to_string()]);
    arguments.extend(["--connections-per-source".into(), "5".into()]);
    limiter.run(arguments)
}

/// The kernel lets the proxy past its limits and counts its connections; the gateway limits the clients that it names, by
/// the same limits and rules.
fn behind_a_proxy_the_gateway_limits_by_the_true_address(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let proxy = &lab.clients[0];
    let address = proxy.address(family);
    let limiter = Limiter::new(&lab.server)?;
    let rules = format!("trusted_proxies = [\"{address}\"]\n[[rule]]\ncidr = \"{address}\"\naction = \"allow\"");
    let _daemon = run_with_kernel(&lab, &limiter, &rules)?;
    let connect = |client: &str| -> Result<Handshake> {
        let stream = proxy.namespace.enter(|| TcpStream::connect(proxy.service(family)))?;
        websocket::upgrade_with(stream, proxy.service(family), &[("X-Forwarded-For", client)])
    };
    let mut open = Vec::new();
    for n in 0..12 {
        // Two clients, six each: one more than they may.
        match connect(if n % 2 == 0 { "203.0.113.1" } else { "2001:db8::1" })? {
            Handshake::Open(websocket) => open.push(websocket),
            refused @ Handshake::Refused(_) => {
                assert!(n >= 10, "the {n}th was refused");
                assert_turned_away(refused, 429)?;
            }
        }
    }
    assert_eq!(open.len(), 10);
    assert_eq!(limiter.held_by(address)?, 10, "the ledger has the proxy's connections");

    limiter.output(["deny", "203.0.113.0/24"])?;
    match connect("203.0.113.77")? {
        Handshake::Refused(response) => assert_eq!(response.status().as_u16(), 403),
        Handshake::Open(_) => bail!("let in, and a rule denies it"),
    }
    drop(open);
    limiter.wait_empty()
}

/// An answer that says when to come again.
fn assert_turned_away(handshake: Handshake, status: u16) -> Result<()> {
    let response = match handshake {
        Handshake::Open(_) => bail!("let in, and {status} expected"),
        Handshake::Refused(response) => response,
    };
    assert_eq!(response.status().as_u16(), status);
    let retry_after = response.headers().get(RETRY_AFTER).context("no Retry-After")?.to_str()?;
    let seconds: u32 = retry_after.parse().with_context(|| format!("Retry-After: {retry_after}"))?;
    assert!(seconds > 0);
    let kind = response.headers().get("content-type").context("no Content-Type")?;
    assert_eq!(kind, "application/problem+json");
    Ok(())
}
