//! What an upgrade of a running `limiter run` must not do: leave anything changed if it fails, let the old process go on working, or
//! do anything twice.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use limiter_tests::{
    lab::{Client, Family, Lab, PORT},
    limiter::{Daemon, Limiter},
    netns::Namespace,
    place::Place,
    process::Process,
    tcp::Crowd,
    wait::{SOON, eventually},
    websocket,
};

#[test]
fn a_new_process_that_cannot_start_changes_nothing() -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let limiter = Limiter::new(&lab.server)?;
    let good = "[gateway]\nlisten = [\"0.0.0.0:8080\"]\n[limits]\nconnections_per_source = 3\n";
    let place = Place::new(&limiter, good)?;
    let daemon = place.run(&limiter, &lab.interface_flags())?;
    let mut session = websocket::open(&client.namespace, client.service(Family::V4))?;
    let mut daemon = daemon;
    let stderr = |daemon: &mut Daemon<'_>| daemon.process().stderr();

    place.write("[limits]\nconnections_per_sauce = 7\n")?;
    daemon.process().signal(libc::SIGUSR2)?;
    eventually(SOON, "it says why not", || Ok(stderr(&mut daemon).contains("the new process ended (exit status: 2)")))?;
    assert!(stderr(&mut daemon).contains("limiter.toml:2:1"), "and what is wrong, in the new one's words");
    still_serves(&limiter, client, &mut session, &daemon)?;

    // One that gets further: what it has put in force in the kernel is put back. The pin path is the last argument.
    place.write(good)?;
    let set = format!("{} limit set connections_per_source=7", limiter.binary().display());
    place.put_script(&format!("for pin; do :; done\n{set} --pin-path \"$pin\" && echo changed >&2\nexit 1\n"))?;
    daemon.process().signal(libc::SIGUSR2)?;
    eventually(SOON, "it goes on with its own", || Ok(stderr(&mut daemon).contains("put back that of this one")))?;
    assert!(stderr(&mut daemon).contains("changed\n"));
    still_serves(&limiter, client, &mut session, &daemon)?;

    // While one is under way there is no other.
    place.put_script("while :; do sleep 0.1; done\n")?;
    daemon.process().signal(libc::SIGUSR2)?;
    let started = |daemon: &mut Daemon<'_>| stderr(daemon).matches("started the new process").count();
    eventually(SOON, "one is under way", || Ok(started(&mut daemon) == 3))?;
    daemon.process().signal(libc::SIGUSR2)?;
    eventually(SOON, "the signal is ignored", || Ok(stderr(&mut daemon).contains("is ignored")))?;
    assert_eq!(started(&mut daemon), 3);
    still_serves(&limiter, client, &mut session, &daemon)?;
    let text = stderr(&mut daemon);
    let line = text.lines().rfind(|line| line.contains("started the new process")).context("it was said")?;
    let pid: i32 = line.split("pid=").nth(1).context("a process id")?.trim().parse()?;
    // SAFETY: kill takes two integers; the daemon has just said that it is its child.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGKILL) }, 0);
    eventually(SOON, "it says how that ended", || Ok(stderr(&mut daemon).contains("signal: 9")))?;

    // The way is free again.
    place.write(good)?;
    place.put_binary(limiter.binary())?;
    let next = daemon.hand_over(daemon.id())?;
    assert_eq!(websocket::close_code(&mut session)?, 1001);
    let _ = session.flush();
    assert_eq!(daemon.process().wait_status(SOON)?.code(), Some(0));
    websocket::echo(&mut websocket::open(&client.namespace, client.service(Family::V4))?, "by the new one")?;
    next.signal(libc::SIGTERM)?;
    next.wait_gone()
}

fn still_serves(
    limiter: &Limiter<'_>,
    client: &Client,
    session: &mut websocket::Client,
    daemon: &Daemon<'_>,
) -> Result<()> {
    websocket::echo(session, "still here")?;
    websocket::echo(&mut websocket::open(&client.namespace, client.service(Family::V4))?, "and others")?;
    assert_eq!(daemon.http_status("/readyz"), Some(200));
    let status = limiter.json("status")?;
    assert_eq!(status["daemon"], daemon.id());
    assert_eq!(status["services"][0]["connections_per_source"], 3, "{status}");
    Ok(())
}

/// What the new process has taken off an interface stays off while the old one waits for its clients.
#[test]
fn the_old_process_attaches_nothing_any_more() -> Result<()> {
    let lab = Lab::new(2)?;
    let client = &lab.clients[0];
    let limiter = Limiter::new(&lab.server)?;
    let config = |interfaces: &str| {
        format!(
            "[kernel]\ninterfaces = [{interfaces}]\n[gateway]\nlisten = [\"0.0.0.0:8080\"]\ndrain_timeout = \"10m\"\n"
        )
    };
    let place = Place::new(&limiter, &config("\"client1\", \"client2\""))?;
    let mut daemon = place.run(&limiter, &[])?;
    let mut session = websocket::open(&client.namespace, client.service(Family::V4))?;
    assert!(lab.server.link("client2")?.get("xdp").is_some());
    place.write(&config("\"client1\""))?;
    let next = daemon.hand_over(daemon.id())?;
    assert!(lab.server.link("client2")?.get("xdp").is_none());
    // Each of these is a reason to look.
    for _ in 0..20 {
        lab.server.ip("link set client2 down\nlink set client2 up\n")?;
    }
    let seen = |daemon: &mut Daemon<'_>| daemon.process().stderr().contains("attached an interface");
    // Whoever still looks would have seen it by the time that the other's own is gone and back.
    lab.server.ip("link del client1")?;
    eventually(SOON, "the new one sees that", || Ok(daemon.process().stderr().contains("an interface is gone")))?;
    assert!(!seen(&mut daemon));
    assert!(lab.server.link("client2")?.get("xdp").is_none());
    assert_eq!(daemon.process().stderr().matches("an interface is gone").count(), 1, "and nobody else does");
    assert!(daemon.process().is_running()?, "it waits for its client");
    // That a signal ends.
    daemon.process().signal(libc::SIGTERM)?;
    assert_eq!(daemon.process().wait_status(SOON)?.code(), Some(0));
    let _ = websocket::close_code(&mut session);
    next.signal(libc::SIGTERM)?;
    next.wait_gone()
}

/// Refusals as the kernel tells of them: of whom, at which stage, and how many are left out. A client that tries again is the same.
type Refusals = BTreeMap<(String, String, u64), usize>;

/// What both processes have logged of them: they write to the same place.
fn logged(log: &str) -> Result<Refusals> {
    let mut refusals = Refusals::new();
    for line in log.lines().filter(|line| line.contains(" stage=")) {
        let field = |name: &str| {
            let value = line.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
            value.map(|value| value.trim_matches('"').to_owned()).with_context(|| format!("no {name} in {line}"))
        };
        ensure!(field("left_out")? == "0", "too many for the log: {line}");
        *refusals.entry((field("remote")?, field("stage")?, field("unreported")?.parse()?)).or_default() += 1;
    }
    Ok(refusals)
}

/// The same by whoever reads beside them.
fn told(limiter: &Limiter<'_>) -> Result<Refusals> {
    let mut refusals = Refusals::new();
    for line in limiter.output(["events", "--json"])?.lines() {
        let event: serde_json::Value = serde_json::from_str(line)?;
        let field =
            |name: &str| event[name].as_str().map(str::to_owned).with_context(|| format!("no {name} in {line}"));
        let unreported = event["unreported"].as_u64().context("a number")?;
        *refusals.entry((field("remote")?, field("stage")?, unreported)).or_default() += 1;
    }
    Ok(refusals)
}

#[test]
fn each_refusal_is_logged_once_whichever_process_reads_it() -> Result<()> {
    const NO_ANSWER: Duration = Duration::from_millis(50);
    let lab = Lab::new(4)?;
    let limiter = Limiter::new(&lab.server)?;
    let place = Place::new(
        &limiter,
        "[gateway]\nlisten = [\"0.0.0.0:8080\", \"[::]:8080\"]\ndrain_timeout = \"10m\"\n\
         [limits]\nconnections_per_source = 1\nconnection_rate = 0\n",
    )?;
    let mut daemon = place.run(&limiter, &lab.interface_flags())?;
    let sources = || lab.clients.iter().flat_map(|client| [(client, Family::V4), (client, Family::V6)]);
    // Nobody reads, so they stay with the first process.
    let held = sources()
        .map(|(client, family)| websocket::open(&client.namespace, client.service(family)))
        .collect::<Result<Vec<_>>>()?;
    let done = AtomicBool::new(false);
    let mut upgraded = vec![daemon.id()];
    thread::scope(|scope| -> Result<()> {
        let knocking: Vec<_> = sources()
            .map(|(client, family)| {
                let done = &done;
                scope.spawn(move || -> Result<()> {
                    while !done.load(Ordering::Relaxed) {
                        let crowd = Crowd::connect(&client.namespace, client.service(family), 1, NO_ANSWER)?;
                        ensure!(crowd.unanswered.len() == 1, "{crowd:?}");
                    }
                    Ok(())
                })
            })
            .collect();
        let upgrades = (|| {
            for _ in 0..3 {
                let before = logged(&daemon.process().stderr())?.len();
                eventually(SOON, "refusals are logged", || {
                    Ok(logged(&daemon.process().stderr())?.len() >= before + held.len())
                })?;
                upgraded.push(daemon.hand_over(upgraded[upgraded.len() - 1])?.id());
            }
            let before = logged(&daemon.process().stderr())?.len();
            eventually(SOON, "by the last one, too", || Ok(logged(&daemon.process().stderr())?.len() > before))
        })();
        done.store(true, Ordering::Relaxed);
        for one in knocking {
            one.join().map_err(|_| anyhow!("one panicked"))??;
        }
        upgrades
    })?;
    // What clients had sent before they gave up may still come.
    eventually(SOON, "what the kernel told of is logged, and once", || {
        Ok(logged(&daemon.process().stderr())? == told(&limiter)?)
    })?;
    assert!(daemon.process().is_running()?, "the first process is there all the while");
    drop(held);
    Ok(())
}

/// Its container would end with it.
#[test]
fn process_1_of_a_container_refuses() -> Result<()> {
    let host = Namespace::new()?;
    let limiter = Limiter::new(&host)?;
    let place = Place::new(&limiter, "[gateway]\nlisten = [\"127.0.0.1:8080\"]\n")?;
    let [binary, config] = [place.binary(), place.config()].map(|path| path.display().to_string());
    let arguments = ["--pid", "--fork", "--kill-child", &binary, "run", "--config", &config];
    let mut daemon = limiter.ready(Process::start(&mut limiter.command_of(Path::new("unshare"), arguments))?)?;
    let outer = daemon.id();
    let inner = fs::read_to_string(format!("/proc/{outer}/task/{outer}/children"))?;
    let inner: i32 = inner.trim().parse().context("unshare has one child")?;
    // SAFETY: kill takes two integers; the process is the child of one that this test has started, and runs.
    assert_eq!(unsafe { libc::kill(inner, libc::SIGUSR2) }, 0);
    eventually(SOON, "it says why not", || Ok(daemon.process().stderr().contains("process 1 of its container")))?;
    websocket::echo(&mut websocket::open(&host, SocketAddr::from(([127, 0, 0, 1], PORT)))?, "still here")
}
