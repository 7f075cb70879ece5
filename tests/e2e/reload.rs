//! SIGHUP to `limiter run`: the file is read again, and all of it is in force, or nothing.

use std::{fs, os::unix::net::UnixDatagram, path::Path};

use anyhow::{Context, Result, ensure};
use limiter_tests::{
    both_families,
    lab::{Client, Family, Lab, PORT},
    limiter::{Daemon, Limiter},
    process::Process,
    tcp::Crowd,
    wait::{NO_ANSWER, SOON, eventually},
    websocket::{self, Handshake},
};

both_families!(
    a_new_file_holds_for_who_comes_and_cuts_nobody,
    a_bad_file_leaves_the_old_one_in_force_whole,
    without_the_kernel_limits_change_too,
);

const DONE: &str = "the configuration was read again and is in force";
const NOT_DONE: &str = "the old one stays in force, whole";

/// A file for the lab's interfaces (or none), with a limit per source and more.
fn file(lab: Option<&Lab>, service: &str, connections: &str, more: &str) -> String {
    let interfaces: Vec<_> =
        lab.map(|lab| lab.clients.iter().map(Client::server_interface).collect()).unwrap_or_default();
    format!(
        "[kernel]\ninterfaces = {interfaces:?}\n[limits]\nconnection_rate = 0\n\
         [gateway]\nlisten = [\"0.0.0.0:{PORT}\", \"[::]:{PORT}\"]\n\
         [[service]]\nname = {service:?}\nport = {PORT}\nconnections_per_source = {connections}\n{more}"
    )
}

/// Writes the file, sends SIGHUP, and waits until the log has one more of these lines.
fn reload(daemon: &mut Daemon<'_>, path: &Path, text: &str, line: &str) -> Result<String> {
    fs::write(path, text)?;
    let lines = |daemon: &mut Daemon<'_>| daemon.process().stderr().matches(line).count();
    let before = lines(daemon);
    daemon.process().signal(libc::SIGHUP)?;
    eventually(SOON, &format!("the log says {line:?}"), || Ok(lines(daemon) > before))?;
    Ok(daemon.process().stderr())
}

fn a_new_file_holds_for_who_comes_and_cuts_nobody(family: Family) -> Result<()> {
    let lab = Lab::new(2)?;
    let (client, other) = (&lab.clients[0], &lab.clients[1]);
    let limiter = Limiter::new(&lab.server)?;
    let path = Limiter::config_file(&file(Some(&lab), "chat", "1", ""))?;
    let mut daemon = limiter.run(["--config".as_ref(), path.path().as_os_str()])?;
    let mut first = websocket::open(&client.namespace, client.service(family))?;
    let refused = Crowd::connect(&client.namespace, client.service(family), 1, NO_ANSWER)?;
    assert_eq!(refused.unanswered.len(), 1);
    drop(refused);

    let more = format!(
        "[[service]]\nname = \"extra\"\nport = 9000\n[[rule]]\ncidr = \"{}\"\naction = \"deny\"\n\
         [gateway.messages]\nmax_size = 10\n[admin]\nlisten = \"127.0.0.1:9181\"\n",
        other.address(family)
    );
    let log = reload(&mut daemon, path.path(), &file(Some(&lab), "chat", "3", &more), DONE)?;
    assert!(log.contains("takes a restart") && log.contains("admin.listen"), "{log}");

    // The kernel's part.
    let mut open =
        (0..2).map(|_| websocket::open(&client.namespace, client.service(family))).collect::<Result<Vec<_>>>()?;
    let refused = Crowd::connect(&client.namespace, client.service(family), 1, NO_ANSWER)?;
    assert_eq!(refused.unanswered.len(), 1, "of a fourth");
    let denied = Crowd::connect(&other.namespace, other.service(family), 1, NO_ANSWER)?;
    assert_eq!(denied.unanswered.len(), 1);
    let status = limiter.json("status")?;
    let services = status["services"].as_array().context("a list")?;
    assert!(services.iter().any(|row| row["name"] == "extra" && row["ports"][0] == 9000), "{services:?}");
    let rules = limiter.json("rules")?;
    assert_eq!(rules["rules"][0]["from"], "file");
    // The gateway's: who was connected keeps what it had.
    websocket::echo(&mut first, "longer than ten bytes")?;
    websocket::echo(&mut open[0], "short")?;
    assert!(websocket::echo(&mut open[0], "longer than ten bytes").is_err());
    // What takes a restart is as it was.
    assert_eq!(daemon.http_status("/readyz"), Some(200));

    // And back.
    drop((refused, denied, open));
    reload(&mut daemon, path.path(), &file(Some(&lab), "chat", "1", ""), DONE)?;
    let mut back = websocket::open(&other.namespace, other.service(family))?;
    websocket::echo(&mut back, "longer than ten bytes")?;
    assert_eq!(limiter.json("rules")?["rules"].as_array().map(Vec::len), Some(0));
    assert_eq!(limiter.json("status")?["services"].as_array().map(Vec::len), Some(1));
    drop((first, back));
    limiter.wait_empty()
}

fn a_bad_file_leaves_the_old_one_in_force_whole(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let limiter = Limiter::new(&lab.server)?;
    let good = file(Some(&lab), "chat", "1", "");
    let path = Limiter::config_file(&good)?;
    let mut daemon = limiter.run(["--config".as_ref(), path.path().as_os_str()])?;
    let held = websocket::open(&client.namespace, client.service(family))?;
    let name = path.path().display().to_string();
    let deny = format!("[[rule]]\ncidr = \"{}\"\naction = \"deny\"\n", client.address(family));
    for (text, complaint) in [
        (file(Some(&lab), "chat", "\"many\"", &deny), format!("{name}:10:26: service.connections_per_source")),
        (format!("{good}{deny}[gateway.mesages]\n"), format!("{name}:14:10: unknown key gateway.mesages")),
        (file(Some(&lab), "game", "9", &deny), "the port would belong to \"game\"".to_owned()),
        (format!("{good}{deny}[gateway.tls]\ncertificate = \"/no\"\nkey = \"/no\"\n"), "cannot read /no".to_owned()),
    ] {
        let log = reload(&mut daemon, path.path(), &text, NOT_DONE)?;
        assert!(log.contains(&complaint), "{complaint:?} is not in {log}");
        let refused = Crowd::connect(&client.namespace, client.service(family), 1, NO_ANSWER)?;
        assert_eq!(refused.unanswered.len(), 1, "the limit is 1: {complaint}");
        let status = limiter.json("status")?;
        assert_eq!(status["services"][0]["name"], "chat");
        assert_eq!(limiter.json("rules")?["rules"].as_array().map(Vec::len), Some(0), "{complaint}");
    }
    fs::remove_file(path.path())?;
    daemon.process().signal(libc::SIGHUP)?;
    eventually(SOON, "a missing file is told", || {
        Ok(daemon.process().stderr().contains("can't read the configuration"))
    })?;
    eventually(SOON, "every reload is counted", || {
        let metrics = daemon.http_get("/metrics").context("the admin address answers")?.1;
        Ok(metrics.contains("limiter_config_reloads_total{result=\"failed\"} 5"))
    })?;

    reload(&mut daemon, path.path(), &file(Some(&lab), "chat", "2", ""), DONE)?;
    let second = websocket::open(&client.namespace, client.service(family))?;
    drop((held, second));
    limiter.wait_empty()
}

fn without_the_kernel_limits_change_too(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let limiter = Limiter::new(&lab.server)?;
    let path = Limiter::config_file(&file(None, "chat", "1", ""))?;
    let mut daemon = limiter.run(["--config".as_ref(), path.path().as_os_str()])?;
    let connect = || websocket::handshake(&client.namespace, None, client.service(family));
    let _first = websocket::open(&client.namespace, client.service(family))?;
    match connect()? {
        Handshake::Refused(response) => assert_eq!(response.status(), 429),
        Handshake::Open(_) => panic!("the limit is 1"),
    }
    reload(&mut daemon, path.path(), &file(None, "chat", "2", ""), DONE)?;
    let second = connect()?;
    assert!(matches!(second, Handshake::Open(_)));
    assert!(matches!(connect()?, Handshake::Refused(_)), "the first still counts");
    Ok(())
}

#[test]
fn systemd_is_told_of_a_reload() -> Result<()> {
    let lab = Lab::new(1)?;
    let limiter = Limiter::new(&lab.server)?;
    let path = Limiter::config_file(&file(None, "chat", "1", ""))?;
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("notify");
    let systemd = UnixDatagram::bind(&socket)?;
    systemd.set_read_timeout(Some(SOON))?;
    let told = || -> Result<String> {
        let mut buffer = [0; 1024];
        let length = systemd.recv(&mut buffer)?;
        Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
    };
    let arguments = ["run".as_ref(), "--config".as_ref(), path.path().as_os_str()];
    let daemon = Process::start(limiter.command(arguments).env("NOTIFY_SOCKET", &socket))?;
    assert_eq!(told()?.trim(), "READY=1");
    daemon.signal(libc::SIGHUP)?;
    let reloading = told()?;
    ensure!(reloading.contains("RELOADING=1") && reloading.contains("MONOTONIC_USEC="), "{reloading}");
    assert_eq!(told()?.trim(), "READY=1");
    daemon.signal(libc::SIGTERM)?;
    let stopping = told()?;
    ensure!(stopping.lines().any(|line| line == "STOPPING=1"), "{stopping}");
    let ended = daemon.wait(SOON)?;
    assert!(ended.status.success(), "{}", ended.stderr);
    Ok(())
}
