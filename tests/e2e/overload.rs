//! `limiter run` when it runs short: of file descriptors, which a test can have few of.

use std::{io, net::SocketAddr, os::unix::process::CommandExt as _};

use anyhow::{Context, Result, bail};
use limiter_tests::{
    lab::PORT,
    limiter::{Daemon, Limiter},
    netns::Namespace,
    process::Process,
    wait::{SOON, eventually, eventually_equal},
    websocket::{self, Handshake},
};

/// Files that limiter may have open.
const DESCRIPTORS: u64 = 200;

/// From half of them on some are turned away, and from seven eighths on all.
const ENOUGH: u64 = 180;

#[test]
fn short_of_descriptors_who_is_in_stays_in_and_others_wait_until_it_is_over() -> Result<()> {
    let host = Namespace::new()?;
    let limiter = Limiter::new(&host)?;
    let config = Limiter::config_file(&format!(
        "[limits]\nconnections_per_source = 0\nconnection_rate = 0\n\
         [gateway]\nlisten = [\"127.0.0.1:{PORT}\"]\n\
         [gateway.overload]\nmemory = 0\nmemory_pressure = 0\ndescriptors = 50\nlag = \"0s\"\n"
    ))?;
    let mut command = limiter.command(["run".as_ref(), "--config".as_ref(), config.path().as_os_str()]);
    let limit = libc::rlimit { rlim_cur: DESCRIPTORS, rlim_max: DESCRIPTORS };
    // SAFETY: between fork and exec only a system call is made, which reads a structure.
    unsafe {
        command.pre_exec(move || match libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        });
    }
    let mut daemon = limiter.ready(Process::start(&mut command)?)?;
    let service = SocketAddr::from(([127, 0, 0, 1], PORT));
    let connect = || websocket::handshake(&host, None, service);

    let room = ENOUGH - metric(&daemon, "process_open_fds")?;
    let mut open = Vec::new();
    while (open.len() as u64) < room && level(&daemon)? < 10 {
        if let Handshake::Open(client) = connect()? {
            open.push(*client);
        }
    }
    eventually_equal(SOON, "the level is that of all", &10, || level(&daemon))?;
    for _ in 0..10 {
        let Handshake::Refused(response) = connect()? else { bail!("let in, and there is no room") };
        assert_eq!(response.status().as_u16(), 503);
        let seconds: u32 = response.headers().get("retry-after").context("no Retry-After")?.to_str()?.parse()?;
        assert!(seconds > 0);
    }
    for client in &mut open {
        websocket::echo(client, "still here")?;
    }
    let health = daemon.http_get("/healthz").context("no answer")?;
    assert!(health.0 == 200 && health.1.contains(r#""because":"descriptors""#), "{health:?}");
    assert_eq!(daemon.http_status("/readyz"), Some(200), "it serves those that are in");
    assert!(metric(&daemon, "limiter_handshakes_total{result=\"overloaded\"}")? >= 10);

    open.truncate(1);
    eventually_equal(SOON, "nobody is turned away", &0, || level(&daemon))?;
    let Handshake::Open(mut client) = connect()? else { bail!("turned away, and there is room") };
    websocket::echo(&mut client, "in")?;
    websocket::echo(&mut open[0], "still here")?;
    eventually(SOON, "both ends of it are in the log", || {
        let log = daemon.process().stderr();
        let has = |words: [&str; 2]| log.lines().any(|line| words.iter().all(|word| line.contains(word)));
        Ok(has(["overloaded: of ten new clients", "descriptors"]) && has(["not overloaded any longer", "turned_away="]))
    })
}

fn level(daemon: &Daemon<'_>) -> Result<u64> {
    metric(daemon, "limiter_overload_level")
}

fn metric(daemon: &Daemon<'_>, sample: &str) -> Result<u64> {
    let metrics = daemon.http_get("/metrics").context("no metrics")?.1;
    let value = metrics.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
    value.with_context(|| format!("no {sample} in {metrics}"))?.parse().context("no number")
}
