//! `limiter run` in front of an upstream that is another host's.

use std::{
    net::{Shutdown, SocketAddr, TcpListener},
    thread::JoinHandle,
    time::Instant,
};

use anyhow::{Context, Result, anyhow};
use limiter_tests::{
    both_families,
    lab::{CLIENT_INTERFACE, Client, Family, Lab},
    limiter::{Daemon, Limiter},
    wait::SOON,
    websocket,
};
use tungstenite::Message;

both_families!(a_client_whose_upstream_has_vanished_is_told_so, data_that_the_upstream_never_gets_ends_the_session);

const LISTEN: &str = "0.0.0.0:8080,[::]:8080";

/// An application on a host of its own, which echoes on the first connection that it gets.
struct Upstream {
    address: SocketAddr,
    thread: JoinHandle<Result<()>>,
}

impl Upstream {
    fn start(host: &Client, family: Family) -> Result<Self> {
        let listener = host.namespace.enter(|| TcpListener::bind((host.address(family), 9000)))?;
        let address = listener.local_addr()?;
        let thread = host.namespace.spawn(move || -> Result<()> {
            let (stream, _) = listener.accept()?;
            stream.set_read_timeout(Some(2 * SOON))?;
            let mut websocket = tungstenite::accept(stream).map_err(|error| anyhow!("no handshake: {error}"))?;
            while let Ok(message) = websocket.read() {
                if message.is_text() || message.is_binary() {
                    websocket.send(message)?;
                }
            }
            _ = websocket.get_ref().shutdown(Shutdown::Both);
            Ok(())
        })?;
        Ok(Self { address, thread })
    }
}

fn run<'limiter>(
    lab: &Lab,
    limiter: &'limiter Limiter<'_>,
    upstream: &Upstream,
    gateway: &str,
) -> Result<Daemon<'limiter>> {
    let config = Limiter::config_file(&format!("[gateway]\nupstream = \"ws://{}\"\n{gateway}\n", upstream.address))?;
    let mut arguments = lab.interface_flags();
    arguments.extend(["--config".into(), config.path().display().to_string()]);
    arguments.extend(["--listen".into(), LISTEN.into()]);
    limiter.run(arguments)
}

/// Asked after a second of silence, and given up a second later.
const IMPATIENT: &str = "ping_interval = \"1s\"\npong_timeout = \"1s\"";

/// Its host is gone, and no FIN or RST says so. The client answers its pings all the time.
fn a_client_whose_upstream_has_vanished_is_told_so(family: Family) -> Result<()> {
    let lab = Lab::new(2)?;
    let (client, host) = (&lab.clients[0], &lab.clients[1]);
    let upstream = Upstream::start(host, family)?;
    let limiter = Limiter::new(&lab.server)?;
    let _daemon = run(&lab, &limiter, &upstream, IMPATIENT)?;
    let mut websocket = websocket::open(&client.namespace, client.service(family))?;
    websocket::echo(&mut websocket, "hello")?;

    let vanished = Instant::now();
    host.namespace.ip(&format!("link set {CLIENT_INTERFACE} down"))?;
    assert_eq!(websocket::close_code(&mut websocket)?, 1012);
    assert!(vanished.elapsed() < SOON, "{:?}", vanished.elapsed());
    // The close code came with it; the answer to it ends the session.
    _ = websocket.flush();
    drop(websocket);
    limiter.wait_empty()?;
    drop(upstream.thread);
    Ok(())
}

/// Nobody asks after a host while there is data on the way to it.
fn data_that_the_upstream_never_gets_ends_the_session(family: Family) -> Result<()> {
    let lab = Lab::new(2)?;
    let (client, host) = (&lab.clients[0], &lab.clients[1]);
    let upstream = Upstream::start(host, family)?;
    let limiter = Limiter::new(&lab.server)?;
    let _daemon = run(&lab, &limiter, &upstream, IMPATIENT)?;
    let mut websocket = websocket::open(&client.namespace, client.service(family))?;
    websocket::echo(&mut websocket, "hello")?;

    let vanished = Instant::now();
    host.namespace.ip(&format!("link set {CLIENT_INTERFACE} down"))?;
    websocket.send(Message::text("never arrives"))?;
    assert_eq!(websocket::close_code(&mut websocket)?, 1012);
    assert!(vanished.elapsed() < SOON, "{:?}", vanished.elapsed());
    _ = websocket.flush();
    drop(websocket);
    limiter.wait_empty()?;
    drop(upstream.thread);
    Ok(())
}

#[test]
fn texts_reach_the_upstream_sanitised_and_only_if_they_fit_the_schema() -> Result<()> {
    let lab = Lab::new(2)?;
    let (client, host) = (&lab.clients[0], &lab.clients[1]);
    let upstream = Upstream::start(host, Family::V4)?;
    let folder = tempfile::tempdir()?;
    let schema = folder.path().join("message.json");
    std::fs::write(
        &schema,
        r#"{"type": "object", "required": ["to"], "properties": {"to": {"type": "string", "maxLength": 20}}}"#,
    )?;
    let messages = format!(
        "[gateway.messages]\nschema = \"{}\"\nsanitize = \"html\"\non_violation = \"drop\"\n",
        schema.display()
    );
    let limiter = Limiter::new(&lab.server)?;
    let daemon = run(&lab, &limiter, &upstream, &messages)?;
    let mut websocket = websocket::open(&client.namespace, client.service(Family::V4))?;

    // What is clean and fits passes as it was written.
    websocket::echo(&mut websocket, r#" { "to" : "alice" , "n" : 1.0e0 } "#)?;
    for left_out in [r#"{"to": 1}"#, "no JSON", "{}", r#"{"to": "<<<<<<<<<<"}"#] {
        websocket.send(Message::text(left_out))?;
    }
    websocket.send(Message::binary(b"past the schema".to_vec()))?;
    websocket.send(Message::text(r#"{"to": "<b>\u0007"}"#))?;
    // All that was left out would have come before.
    let got = websocket.read().context("an echo")?;
    assert_eq!(got, Message::text(r#"{"to": "&lt;b&gt;"}"#));
    let (_, metrics) = daemon.http_get("/metrics").context("no metrics")?;
    for (verdict, count) in [("schema", 3), ("not_json", 1), ("wrong_kind", 1)] {
        let sample = format!("limiter_messages_total{{direction=\"in\",verdict=\"{verdict}\"}} {count}");
        assert!(metrics.lines().any(|line| line == sample), "{sample} is not in\n{metrics}");
    }
    websocket.close(None)?;
    assert_eq!(websocket::close_code(&mut websocket)?, 1005);
    drop(websocket);
    limiter.wait_empty()?;
    upstream.thread.join().map_err(|_| anyhow!("the upstream panicked"))?
}
