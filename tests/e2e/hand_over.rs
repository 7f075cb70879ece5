//! An upgrade of a running `limiter run` (SIGUSR2): no connect fails, and no count is lost.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::unix::{
        fs::symlink,
        net::{UnixDatagram, UnixStream},
    },
    path::Path,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    thread,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use limiter_tests::{
    lab::{Client, Family, Lab, PORT},
    limiter::{Daemon, Limiter, http_get},
    netns::Namespace,
    place::Place,
    process::Process,
    state::State,
    successor::Successor,
    wait::{SOON, eventually, eventually_equal},
    websocket::{self, Handshake},
};
use tungstenite::{Error, Message};

/// What came of a client that connects, says something, and hears it.
fn visit(client: &Client, service: SocketAddr) -> Result<()> {
    let mut session = websocket::open(&client.namespace, service)?;
    said_or_told_to_go(websocket::echo(&mut session, "hello"), &mut session)?;
    Ok(())
}

/// Whoever is in when the old process goes is told so, sooner or later: that is no failure.
fn said_or_told_to_go(said: Result<()>, session: &mut websocket::Client) -> Result<()> {
    let Err(error) = said else {
        let _ = session.close(None);
        return Ok(());
    };
    if error.to_string().contains("GoingAway") || error.to_string().contains("code: Away") {
        return Ok(());
    }
    // What was sent may have met a session that had just been closed.
    match error.downcast_ref::<Error>() {
        Some(Error::Protocol(_) | Error::ConnectionClosed | Error::AlreadyClosed) => Ok(()),
        _ => Err(error),
    }
}

const UPGRADES: u32 = 4;
const SITTERS: usize = 5;

#[test]
fn upgrades_in_a_row_refuse_nobody_and_lose_no_count() -> Result<()> {
    let lab = Lab::new(2)?;
    let [busy, quiet] = [&lab.clients[0], &lab.clients[1]];
    let limiter = Limiter::new(&lab.server)?;
    let place = Place::new(
        &limiter,
        "[kernel]\naudit_interval = \"200ms\"\n[limits]\nconnections_per_source = 100\nconnection_rate = 0\n\
         [gateway]\nlisten = [\"0.0.0.0:8080\"]\ndrain_timeout = \"2s\"\n",
    )?;
    let mut daemon = place.run(&limiter, &lab.interface_flags())?;
    let done = AtomicBool::new(false);
    let (visits, asked) = (AtomicU32::new(0), AtomicU32::new(0));
    let last = thread::scope(|scope| -> Result<_> {
        let visitors: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| -> Result<()> {
                    while !done.load(Ordering::Relaxed) {
                        visit(busy, busy.service(Family::V4))?;
                        visits.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(())
                })
            })
            .collect();
        let watcher = scope.spawn(|| -> Result<()> {
            while !done.load(Ordering::Relaxed) {
                let (status, body) = http_get(&lab.server, "/readyz")?;
                ensure!(status == 200, "{status}: {body}");
                asked.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        });
        let upgraded = upgrades(&lab, quiet, &limiter, &place, &mut daemon, (&visits, &asked));
        done.store(true, Ordering::Relaxed);
        for visitor in visitors {
            visitor.join().map_err(|_| anyhow!("a visitor panicked"))?.context("a visitor")?;
        }
        watcher.join().map_err(|_| anyhow!("the watcher panicked"))?.context("the admin address")?;
        upgraded
    })?;

    limiter.wait_empty()?;
    State::open(&limiter)?.wait_audited()?;
    let status = limiter.json("status")?;
    assert_eq!((status["drift"].as_u64(), status["repairs"].as_u64()), (Some(0), Some(0)), "{status}");
    last.signal(libc::SIGTERM)?;
    last.wait_gone()?;
    assert_eq!(limiter.json("status")?["daemon"], serde_json::Value::Null, "nobody holds the lock");
    limiter.detach()
}

fn upgrades(
    lab: &Lab,
    quiet: &Client,
    limiter: &Limiter<'_>,
    place: &Place,
    daemon: &mut Daemon<'_>,
    (visits, asked): (&AtomicU32, &AtomicU32),
) -> Result<Successor> {
    let mut last = None;
    for upgrade in 0..UPGRADES {
        let mut sitters = Vec::new();
        for _ in 0..SITTERS {
            let mut sitter = websocket::open(&quiet.namespace, quiet.service(Family::V4))?;
            websocket::echo(&mut sitter, "here")?;
            sitters.push(sitter);
        }
        limiter.wait_held(quiet.address(Family::V4), SITTERS as u64)?;
        place.put_binary(limiter.binary())?;
        let old = last.as_ref().map_or(daemon.id(), Successor::id);
        let next = daemon.hand_over(old)?;
        assert_ne!(next.id(), old);
        assert_eq!(fs::read_link(format!("/proc/{}/exe", next.id()))?, place.binary(), "the file that is there now");
        // The lock is the new one's.
        eventually_equal(SOON, "`limiter status` names the new process", &Some(u64::from(next.id())), || {
            Ok(limiter.json("status")?["daemon"].as_u64())
        })?;
        let refused = limiter.outcome(["detach"])?;
        assert!(!refused.status.success(), "{}", refused.stderr);
        assert!(lab.server.link("client1")?.get("xdp").is_some());
        for sitter in &mut sitters {
            assert_eq!(websocket::close_code(sitter)?, 1001);
            let _ = sitter.flush();
        }
        match last {
            None => assert_eq!(daemon.process().wait_status(SOON)?.code(), Some(0)),
            Some(old) => old.wait_gone()?,
        }
        limiter.wait_held(quiet.address(Family::V4), 0)?;
        for counted in [visits, asked] {
            let before = counted.load(Ordering::Relaxed);
            eventually(SOON, "clients come and go", || Ok(counted.load(Ordering::Relaxed) > before + 3))?;
        }
        assert!(!daemon.process().stderr().contains("cut=1"), "upgrade {upgrade}");
        last = Some(next);
    }
    last.context("there were upgrades")
}

/// Sessions of the old process that go on count as before, those that count for their users too, and are given back once.
#[test]
fn sessions_that_stay_with_the_old_process_count_until_they_end() -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let limiter = Limiter::new(&lab.server)?;
    let keys = tempfile::tempdir()?;
    let file = keys.path().join("keys.toml").display().to_string();
    let key = |user: &str| -> Result<String> {
        Ok(limiter.output(["key", "new", "--user", user, "--file", &file])?.trim().to_owned())
    };
    let (alice, bob) = (key("alice")?, key("bob")?);
    let place = Place::new(
        &limiter,
        &format!(
            "[kernel]\naudit_interval = \"200ms\"\n[limits]\nconnections_per_source = 2\nconnection_rate = 0\n\
             [gateway]\nlisten = [\"0.0.0.0:8080\"]\ndrain_timeout = \"10m\"\n[gateway.auth]\nauthorization = true\n\
             api_keys = {file:?}\n[gateway.auth.users]\nconnections = 2\n",
        ),
    )?;
    let mut daemon = place.run(&limiter, &lab.interface_flags())?;
    let service = client.service(Family::V4);
    let open = |key: &str| -> Result<websocket::Client> {
        let stream = client.namespace.enter(|| TcpStream::connect_timeout(&service, SOON))?;
        match websocket::upgrade_with(stream, service, &[("Authorization", &format!("Bearer {key}"))])? {
            Handshake::Open(mut session) => {
                websocket::echo(&mut session, "in")?;
                Ok(*session)
            }
            Handshake::Refused(response) => bail!("refused with {}", response.status()),
        }
    };
    let counted = || -> Result<Vec<String>> {
        let report = limiter.json("connections")?;
        let rows = report["connections"].as_array().context("rows")?;
        let mut counted: Vec<_> = rows.iter().filter_map(|row| row["source"].as_str().map(str::to_owned)).collect();
        counted.sort();
        Ok(counted)
    };
    let state = State::open(&limiter)?;
    let mut old_sessions = vec![open(&alice)?, open(&alice)?];
    let next = daemon.hand_over(daemon.id())?;

    // Nobody reads, so none of them ends.
    state.wait_audited()?;
    assert_eq!(counted()?, ["user:alice", "user:alice"]);
    let new_session = open(&bob)?;
    assert_eq!(counted()?, ["user:alice", "user:alice", "user:bob"]);
    // Two of the limit of two are free, since users don't count.
    let silent: Vec<_> = (0..2)
        .map(|_| client.namespace.enter(|| TcpStream::connect_timeout(&service, SOON)))
        .collect::<std::io::Result<_>>()?;
    limiter.wait_held(client.address(Family::V4), 2)?;
    drop(silent);
    limiter.wait_held(client.address(Family::V4), 0)?;

    for left in (0..2).rev() {
        let mut session = old_sessions.pop().context("two")?;
        assert_eq!(websocket::close_code(&mut session)?, 1001);
        let _ = session.flush();
        eventually_equal(SOON, "each gives back its own slot", &(left + 1), || Ok(counted()?.len()))?;
    }
    assert_eq!(daemon.process().wait_status(SOON)?.code(), Some(0));
    assert_eq!(counted()?, ["user:bob"]);
    state.wait_audited()?;
    drop(new_session);
    limiter.wait_empty()?;
    state.wait_audited()?;
    let status = limiter.json("status")?;
    assert_eq!((status["drift"].as_u64(), status["repairs"].as_u64()), (Some(0), Some(0)), "{status}");
    assert_eq!(limiter.counter("opened_adopted")?, 0, "they were in the ledger all the while");
    next.signal(libc::SIGTERM)?;
    next.wait_gone()
}

#[test]
fn a_handshake_that_was_under_way_is_completed() -> Result<()> {
    let host = Namespace::new()?;
    let limiter = Limiter::new(&host)?;
    // Long before the handshake is through.
    let place = Place::new(&limiter, "[gateway]\nlisten = [\"127.0.0.1:8080\"]\ndrain_timeout = \"10ms\"\n")?;
    let mut daemon = place.run(&limiter, &[])?;
    let service = SocketAddr::from(([127, 0, 0, 1], PORT));
    let connect = || host.enter(|| TcpStream::connect(service));
    let mut begun = connect()?;
    begun.set_read_timeout(Some(SOON))?;
    begun.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: web")?;
    let mut silent = connect()?;
    silent.set_read_timeout(Some(SOON))?;
    // Behind both in the queue.
    websocket::echo(&mut websocket::open(&host, service)?, "both are accepted")?;
    let next = daemon.hand_over(daemon.id())?;
    eventually(SOON, "the session before is over", || Ok(daemon.process().stderr().contains("draining")))?;

    begun.write_all(b"socket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")?;
    silent.write_all(
        b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
          Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
    )?;
    for mut stream in [begun, silent] {
        let mut answer = Vec::new();
        let mut buffer = [0; 1024];
        // Until there is a whole head and a frame behind it.
        let frame = loop {
            let length = stream.read(&mut buffer)?;
            ensure!(length > 0, "ended after {:?}", String::from_utf8_lossy(&answer));
            answer.extend_from_slice(&buffer[..length]);
            let end = answer.windows(4).position(|four| four == b"\r\n\r\n");
            if let Some(frame) = end.map(|end| &answer[end + 4..])
                && frame.len() >= 4
            {
                break frame.to_vec();
            }
        };
        assert!(answer.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&answer));
        assert_eq!((frame[0], u16::from_be_bytes([frame[2], frame[3]])), (0x88, 1001), "and then it is told to go");
    }
    assert_eq!(daemon.process().wait_status(SOON)?.code(), Some(0));
    websocket::echo(&mut websocket::open(&host, service)?, "by the new one")?;
    next.signal(libc::SIGTERM)?;
    next.wait_gone()
}

/// Without the kernel's part; a unix socket stays where it is, and what the new file names takes the place of what it does not.
#[test]
fn unix_sockets_and_changed_addresses_go_over() -> Result<()> {
    let host = Namespace::new()?;
    let limiter = Limiter::new(&host)?;
    let folder = tempfile::tempdir()?;
    let [path, other] = ["ws.sock", "other.sock"].map(|name| folder.path().join(name));
    let listen = |listen: &[String]| {
        let limits = "[limits]\nconnections_per_source = 0\nconnection_rate = 0\n";
        format!("{limits}[gateway]\nlisten = {listen:?}\ndrain_timeout = \"1s\"\n")
    };
    let unix = |path: &Path| format!("unix:{}", path.display());
    let place = Place::new(&limiter, &listen(&[unix(&path), unix(&other), "127.0.0.1:8080".into()]))?;
    let mut daemon = place.run(&limiter, &[])?;
    let done = AtomicBool::new(false);
    let next = thread::scope(|scope| -> Result<_> {
        let visitor = scope.spawn(|| -> Result<u32> {
            let mut visits = 0;
            while !done.load(Ordering::Relaxed) {
                let stream = UnixStream::connect(&path)?;
                stream.set_read_timeout(Some(SOON))?;
                let (mut session, _) =
                    tungstenite::client("ws://localhost/", stream).map_err(|error| anyhow!("handshake: {error}"))?;
                // It may be told to go before it has said anything.
                if session.send(Message::text("hello")).is_ok() {
                    match session.read() {
                        Ok(Message::Text(_) | Message::Close(_)) => {}
                        other => bail!("{other:?}"),
                    }
                }
                let _ = session.close(None);
                visits += 1;
            }
            Ok(visits)
        });
        let upgraded = (|| {
            let next = daemon.hand_over(daemon.id())?;
            assert_eq!(daemon.process().wait_status(SOON)?.code(), Some(0));
            assert!(path.exists() && other.exists(), "they are the new one's");
            place.write(&listen(&[unix(&path), "127.0.0.1:8081".into()]))?;
            let last = daemon.hand_over(next.id())?;
            next.wait_gone()?;
            Ok::<_, anyhow::Error>(last)
        })();
        done.store(true, Ordering::Relaxed);
        let visits = visitor.join().map_err(|_| anyhow!("the visitor panicked"))??;
        assert!(visits > 0);
        upgraded
    })?;
    assert!(path.exists() && !other.exists(), "what nobody wants is removed");
    let connect = |port| host.enter(move || TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], port))));
    assert!(connect(8080).is_err(), "it does not listen there any longer");
    websocket::echo(&mut websocket::open(&host, SocketAddr::from(([127, 0, 0, 1], 8081)))?, "here instead")?;
    next.signal(libc::SIGTERM)?;
    next.wait_gone()?;
    assert!(!path.exists(), "removed by the last one");
    Ok(())
}

#[test]
fn systemd_is_told_whom_to_follow() -> Result<()> {
    let host = Namespace::new()?;
    let limiter = Limiter::new(&host)?;
    let place = Place::new(&limiter, "[gateway]\nlisten = [\"127.0.0.1:8080\"]\n")?;
    let socket = place.folder().join("notify");
    let systemd = UnixDatagram::bind(&socket)?;
    systemd.set_read_timeout(Some(SOON))?;
    let told = || -> Result<String> {
        let mut buffer = [0; 1024];
        let length = systemd.recv(&mut buffer).context("systemd was told nothing")?;
        Ok(String::from_utf8_lossy(&buffer[..length]).trim().to_owned())
    };
    let arguments =
        ["run".as_ref(), "--config".as_ref(), place.config().into_os_string().as_os_str()].map(ToOwned::to_owned);
    // Started through a link, as where several versions are installed beside each other.
    let link = place.folder().join("current");
    symlink(place.binary(), &link)?;
    let process = Process::start(limiter.command_of(&link, arguments).env("NOTIFY_SOCKET", &socket))?;
    assert_eq!(told()?, "READY=1");
    let mut daemon = limiter.ready(process)?;
    let version = place.folder().join("limiter-2");
    fs::copy(limiter.binary(), &version)?;
    fs::remove_file(&link)?;
    symlink(&version, &link)?;
    let next = daemon.hand_over(daemon.id())?;
    assert_eq!(fs::read_link(format!("/proc/{}/exe", next.id()))?, version);
    // In this order: with NotifyAccess=main, the second comes from the main process.
    assert_eq!(told()?, format!("MAINPID={}", next.id()));
    assert_eq!(told()?, "READY=1");
    assert_eq!(daemon.process().wait_status(SOON)?.code(), Some(0));
    next.signal(libc::SIGTERM)?;
    assert!(told()?.contains("STOPPING=1"), "and nobody has said so before");
    next.wait_gone()
}
