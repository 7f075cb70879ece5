//! Where `limiter run` listens: unix sockets, and sockets that the service manager hands over.

use std::{
    net::{SocketAddr, TcpListener, TcpStream},
    os::{
        fd::{AsRawFd, RawFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    path::Path,
    process::Command,
};

use anyhow::{Result, anyhow, bail};
use limiter_tests::{
    lab::{Family, Lab, PORT},
    limiter::Limiter,
    netns::Namespace,
    process::Process,
    wait::{SOON, eventually},
    websocket,
};
use tungstenite::{Message, WebSocket};

#[test]
fn a_unix_socket_serves_outlives_kill_and_goes_at_the_end() -> Result<()> {
    let host = Namespace::new()?;
    let limiter = Limiter::new(&host)?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("ws.sock");
    let listen = format!("unix:{}", path.display());
    let killed = limiter.run(["--listen", &listen])?;
    echo(&mut open_unix(&path)?)?;

    let second = limiter.start(["--listen", &listen, "--admin", ""])?.wait(SOON)?;
    assert!(!second.status.success());
    assert!(second.stderr.contains("Address in use") || second.stderr.contains("in use"), "{}", second.stderr);
    echo(&mut open_unix(&path)?)?;

    killed.kill()?;
    assert!(path.exists(), "left behind");
    let daemon = limiter.run(["--listen", &listen])?;
    let mut client = open_unix(&path)?;
    echo(&mut client)?;
    client.close(None)?;
    let _ = client.flush();
    daemon.begin_shutdown()?;
    assert!(daemon.wait()?.status.success());
    assert!(!path.exists());
    Ok(())
}

/// A socket of a `.socket` unit: clients wait in it while nobody serves, and its port is the default service's, so that the
/// kernel's limits hold for it.
#[test]
fn a_socket_that_systemd_hands_over_is_served_within_limits() -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let limiter = Limiter::new(&lab.server)?;
    let listener = lab.server.enter(|| TcpListener::bind(SocketAddr::from(([0, 0, 0, 0], PORT))))?;
    let service = client.service(Family::V4);
    let early = client.namespace.enter(|| TcpStream::connect(service))?;

    let config = Limiter::config_file("[gateway]\nlisten = [\"fd:ws\"]\n")?;
    let mut arguments = lab.interface_flags();
    arguments.extend(["--config".into(), config.path().display().to_string()]);
    arguments.extend(["--connections-per-source".into(), "2".into()]);
    let daemon = Process::start(&mut activated(&limiter, &listener, "ws", &arguments))?;
    eventually(SOON, "it listens", || Ok(daemon.stderr().contains("listening")))?;
    early.set_read_timeout(Some(SOON))?;
    let mut early = match websocket::upgrade(early, service)? {
        websocket::Handshake::Open(early) => early,
        websocket::Handshake::Refused(response) => bail!("refused: {}", websocket::describe(&response)),
    };
    websocket::echo(&mut early, "hello")?;
    limiter.wait_held(client.address(Family::V4), 1)?;
    let second = websocket::open(&client.namespace, service)?;
    limiter.wait_held(client.address(Family::V4), 2)?;
    drop((early, second));
    limiter.wait_empty()?;

    daemon.signal(libc::SIGTERM)?;
    assert!(daemon.wait(SOON)?.status.success());
    client.namespace.enter(|| TcpStream::connect(service))?;
    Ok(())
}

/// An upgrade: the next process has the socket under the same name, though the service manager gives it none.
#[test]
fn a_socket_that_systemd_hands_over_goes_on_to_the_next_process() -> Result<()> {
    let host = Namespace::new()?;
    let limiter = Limiter::new(&host)?;
    let listener = host.enter(|| TcpListener::bind(("127.0.0.1", PORT)))?;
    let service = listener.local_addr()?;
    let arguments = ["--listen", "fd:ws"].map(str::to_owned);
    let process = Process::start(&mut activated(&limiter, &listener, "ws", &arguments))?;
    let mut daemon = limiter.ready(process)?;
    let mut last = daemon.id();
    for _ in 0..2 {
        let next = daemon.hand_over(last)?;
        websocket::echo(&mut websocket::open(&host, service)?, "by the next one")?;
        last = next.id();
    }
    assert!(daemon.process().wait_status(SOON)?.success());
    Ok(())
}

#[test]
fn what_was_not_handed_over_is_said() -> Result<()> {
    let host = Namespace::new()?;
    let limiter = Limiter::new(&host)?;
    let alone = limiter.start(["--listen", "systemd", "--admin", ""])?.wait(SOON)?;
    assert!(!alone.status.success());
    assert!(alone.stderr.contains("LISTEN_FDS") && alone.stderr.contains(".socket"), "{}", alone.stderr);

    let listener = host.enter(|| TcpListener::bind("127.0.0.1:0"))?;
    let arguments = ["--listen", "fd:ws", "--admin", ""].map(str::to_owned);
    let other = Process::start(&mut activated(&limiter, &listener, "http", &arguments))?.wait(SOON)?;
    assert!(!other.status.success());
    assert!(other.stderr.contains("fd:ws"), "{}", other.stderr);

    // And one that no service has.
    let config = Limiter::config_file(
        "[gateway]\nlisten = [\"systemd\"]\n[admin]\nlisten = \"\"\n[[service]]\nname = \"a\"\nport = 1\n",
    )?;
    let arguments = ["--config".to_owned(), config.path().display().to_string()];
    let foreign = Process::start(&mut activated(&limiter, &listener, "http", &arguments))?.wait(SOON)?;
    assert_eq!(foreign.status.code(), Some(2));
    assert!(foreign.stderr.contains("would have no limits"), "{}", foreign.stderr);
    Ok(())
}

/// `limiter run` as systemd starts it: with the listener as descriptor 3.
fn activated(limiter: &Limiter<'_>, listener: &impl AsRawFd, name: &str, arguments: &[String]) -> Command {
    const FIRST: RawFd = 3;
    // Only the shell knows the process id that limiter will have.
    let script = "LISTEN_PID=$$ exec \"$0\" run \"$@\"";
    let mut all = vec!["-c".to_owned(), script.to_owned(), limiter.binary().display().to_string()];
    all.extend_from_slice(arguments);
    let mut command = limiter.command_of(Path::new("/bin/sh"), all);
    command.env("LISTEN_FDS", "1").env("LISTEN_FDNAMES", name);
    let fd = listener.as_raw_fd();
    // SAFETY: between fork and exec, only system calls that are async-signal-safe, on descriptors that are the child's own.
    unsafe {
        command.pre_exec(move || {
            // Elsewhere first, since a descriptor that is 3 already would keep its FD_CLOEXEC.
            let copy = libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 10);
            if copy < 0 || libc::dup2(copy, FIRST) < 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    command
}

fn open_unix(path: &Path) -> Result<WebSocket<UnixStream>> {
    let stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(SOON))?;
    let (client, _) = tungstenite::client("ws://localhost/", stream).map_err(|error| anyhow!("handshake: {error}"))?;
    Ok(client)
}

fn echo(client: &mut WebSocket<UnixStream>) -> Result<()> {
    client.send(Message::text("hello"))?;
    assert_eq!(client.read()?, Message::text("hello"));
    Ok(())
}
