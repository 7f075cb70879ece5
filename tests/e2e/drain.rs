//! The end of `limiter run`: SIGTERM spreads the closes, a second signal does not wait.

use std::{
    net::{SocketAddr, TcpStream},
    os::unix::net::UnixDatagram,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow};
use limiter_tests::{
    lab::PORT,
    limiter::Limiter,
    netns::Namespace,
    process::Process,
    wait::{SOON, eventually},
    websocket,
};

const CLIENTS: usize = 40;

#[test]
fn sigterm_spreads_the_closes_and_ends_with_0() -> Result<()> {
    let host = Namespace::new()?;
    let limiter = Limiter::new(&host)?;
    // 2.4 s of the 3 are for the turns: one every 60 ms.
    let config = Limiter::config_file(&config("3s"))?;
    let daemon = limiter.run(["--config".as_ref(), config.path().as_os_str()])?;
    let service = SocketAddr::from(([127, 0, 0, 1], PORT));
    let clients: Vec<_> = (0..CLIENTS).map(|_| websocket::open(&host, service)).collect::<Result<_>>()?;
    let readers: Vec<_> = clients
        .into_iter()
        .map(|mut client| {
            thread::spawn(move || {
                let code = websocket::close_code(&mut client);
                let at = Instant::now();
                // The library has the answer ready.
                let _ = client.flush();
                code.map(|code| (code, at))
            })
        })
        .collect();

    daemon.begin_shutdown()?;
    eventually(SOON, "it says that it drains", || Ok(daemon.http_status("/readyz") == Some(503)))?;
    eventually(SOON, "nobody listens", || Ok(host.enter(|| TcpStream::connect(service)).is_err()))?;
    let told = readers
        .into_iter()
        .map(|reader| reader.join().map_err(|_| anyhow!("a client panicked"))?)
        .collect::<Result<Vec<_>>>()?;
    assert!(told.iter().all(|(code, _)| *code == 1001), "{told:?}");
    let at: Vec<Instant> = told.into_iter().map(|(_, at)| at).collect();
    let (first, last) = (at.iter().min().context("clients")?, at.iter().max().context("clients")?);
    let took = last.duration_since(*first);
    assert!((Duration::from_millis(1500)..Duration::from_secs(3)).contains(&took), "all within {took:?}");
    assert!(!at.is_sorted(), "in the order in which they came");
    let ended = daemon.wait()?;
    assert_eq!(ended.status.code(), Some(0));
    assert!(ended.stderr.contains(&format!("closed={CLIENTS} cut=0")), "{}", ended.stderr);
    Ok(())
}

#[test]
fn a_second_signal_does_not_wait_and_systemd_is_told_of_the_first() -> Result<()> {
    for second in [libc::SIGTERM, libc::SIGINT] {
        let host = Namespace::new()?;
        let limiter = Limiter::new(&host)?;
        let config = Limiter::config_file(&config("10m"))?;
        let folder = tempfile::tempdir()?;
        let socket = folder.path().join("notify");
        let systemd = UnixDatagram::bind(&socket)?;
        systemd.set_read_timeout(Some(SOON))?;
        let told = || -> Result<String> {
            let mut buffer = [0; 1024];
            let length = systemd.recv(&mut buffer).context("systemd was told nothing")?;
            Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
        };
        let arguments = ["run".as_ref(), "--config".as_ref(), config.path().as_os_str()];
        let daemon = Process::start(limiter.command(arguments).env("NOTIFY_SOCKET", &socket))?;
        assert_eq!(told()?.trim(), "READY=1");
        // It never reads, so it never closes.
        let _silent = websocket::open(&host, SocketAddr::from(([127, 0, 0, 1], PORT)))?;

        daemon.signal(libc::SIGTERM)?;
        let told = told()?;
        assert!(told.lines().any(|line| line == "STOPPING=1"), "{told}");
        // Ten minutes and a little: the unit's TimeoutStopSec= may be shorter.
        assert!(told.lines().any(|line| line.starts_with("EXTEND_TIMEOUT_USEC=60")), "{told}");
        daemon.signal(second)?;
        let ended = daemon.wait(SOON)?;
        assert_eq!(ended.status.code(), Some(0));
        assert!(ended.stderr.contains("a second signal"), "{}", ended.stderr);
    }
    Ok(())
}

fn config(drain_timeout: &str) -> String {
    format!(
        "[limits]\nconnections_per_source = 0\nconnection_rate = 0\n\
         [gateway]\nlisten = [\"127.0.0.1:{PORT}\"]\ndrain_timeout = \"{drain_timeout}\"\n"
    )
}
