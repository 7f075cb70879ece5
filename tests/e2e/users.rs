//! Clients that show who they are: their connections count against their users, in the kernel's maps too.

use std::net::SocketAddr;

use anyhow::{Context, Result, bail};
use limiter_tests::{
    both_families,
    lab::{Client, Family, Lab},
    limiter::{Daemon, Limiter},
    state::State,
    wait::{SOON, eventually, eventually_equal},
    websocket::{self, Handshake},
};
use tempfile::TempDir;

both_families!(
    users_behind_one_address_leave_each_other_room,
    kick_closes_what_a_user_has_open,
    users_that_come_and_go_leave_no_count_behind,
);

/// A limiter with the kernel's part, one connection per source and two per user, and API keys of some users.
struct Setup<'lab> {
    limiter: &'lab Limiter<'lab>,
    _daemon: Daemon<'lab>,
    _folder: TempDir,
    keys: Vec<String>,
}

impl<'lab> Setup<'lab> {
    fn start(lab: &'lab Lab, limiter: &'lab Limiter<'lab>, users: &[&str]) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("keys.toml");
        let file = file.display().to_string();
        let mut keys = Vec::new();
        for user in users {
            keys.push(limiter.output(["key", "new", "--user", user, "--file", &file])?.trim().to_owned());
        }
        let config = Limiter::config_file(&format!(
            "[kernel]\naudit_interval = \"200ms\"\n[gateway]\nlisten = [\"0.0.0.0:8080\", \"[::]:8080\"]\n[gateway.auth]\n\
             authorization = true\napi_keys = {file:?}\n[gateway.auth.users]\nconnections = 2\non_excess = \"refuse\"\n\
             attempts_per_minute = 0\n",
        ))?;
        let mut arguments = lab.interface_flags();
        arguments.extend(["--config".into(), config.path().display().to_string()]);
        arguments.extend(["--connections-per-source".into(), "1".into(), "--connection-rate".into(), "0".into()]);
        let daemon = limiter.run(arguments)?;
        Ok(Self { limiter, _daemon: daemon, _folder: folder, keys })
    }

    /// A session of the user with that number.
    fn open(&self, client: &Client, family: Family, user: usize) -> Result<websocket::Client> {
        let service = client.service(family);
        let stream = client.namespace.enter(|| std::net::TcpStream::connect_timeout(&service, SOON))?;
        let shown = format!("Bearer {}", self.keys[user]);
        match websocket::upgrade_with(stream, service, &[("Authorization", &shown)])? {
            Handshake::Open(websocket) => Ok(*websocket),
            Handshake::Refused(response) => bail!("refused with {}", response.status()),
        }
    }

    /// What the ledger's connections count against, sorted.
    fn counted(&self) -> Result<Vec<String>> {
        let report = self.limiter.json("connections")?;
        let rows = report["connections"].as_array().context("rows")?;
        let mut counted: Vec<_> = rows.iter().filter_map(|row| row["source"].as_str().map(str::to_owned)).collect();
        counted.sort();
        Ok(counted)
    }

    /// Waits until nobody is there, and checks that the audit had nothing to mend.
    fn finish(self) -> Result<()> {
        self.limiter.wait_empty()?;
        State::open(self.limiter)?.wait_audited()?;
        let status = self.limiter.json("status")?;
        assert_eq!((status["drift"].as_u64(), status["repairs"].as_u64()), (Some(0), Some(0)), "{status}");
        Ok(())
    }
}

fn users_behind_one_address_leave_each_other_room(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let limiter = Limiter::new(&lab.server)?;
    let setup = Setup::start(&lab, &limiter, &["alice", "bob", "\u{fc} owner"])?;
    let mut sessions = Vec::new();
    for user in [0, 0, 1, 2] {
        let mut session = setup.open(client, family, user)?;
        websocket::echo(&mut session, "in")?;
        sessions.push(session);
    }
    assert_eq!(setup.counted()?, ["user:alice", "user:alice", "user:bob", "user:\u{fc} owner"]);
    assert_eq!(limiter.held_by(client.address(family))?, 0, "none is its source's any more");
    let sources = limiter.json("sources")?;
    assert_eq!(sources["sources"][0]["source"], "user:alice");
    assert_eq!(sources["sources"][0]["connections"], 2);
    assert_eq!(limiter.counter("counted_for_user")?, 4);
    assert!(setup.open(client, family, 0).is_err(), "alice has her two");

    // Who shows nothing still counts where it comes from.
    let idle = client.namespace.enter(|| std::net::TcpStream::connect_timeout(&client.service(family), SOON))?;
    limiter.wait_held(client.address(family), 1)?;
    drop((idle, sessions));
    setup.finish()
}

fn kick_closes_what_a_user_has_open(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let limiter = Limiter::new(&lab.server)?;
    let setup = Setup::start(&lab, &limiter, &["alice", "bob"])?;
    let first = setup.open(client, family, 0)?;
    let second = setup.open(client, family, 0)?;
    let mut other = setup.open(client, family, 1)?;
    let said: serde_json::Value = serde_json::from_str(&limiter.output(["kick", "alice", "--json"])?)?;
    let mut closed: Vec<SocketAddr> = serde_json::from_value(said["kicked"].clone())?;
    let mut meant = vec![first.get_ref().local_addr()?, second.get_ref().local_addr()?];
    closed.sort();
    meant.sort();
    assert_eq!(closed, meant);
    eventually_equal(SOON, "only bob is there", &vec!["user:bob".to_owned()], || setup.counted())?;
    websocket::echo(&mut other, "still here")?;
    assert!(limiter.output(["kick", "alice"])?.contains("nothing is open from user alice"));
    // She may come again.
    eventually(SOON, "there is room for alice", || Ok(setup.open(client, family, 0).is_ok()))?;
    drop((first, second, other));
    setup.finish()
}

fn users_that_come_and_go_leave_no_count_behind(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let limiter = Limiter::new(&lab.server)?;
    let setup = Setup::start(&lab, &limiter, &["alice", "bob"])?;
    for round in 0..100 {
        // Some reset in the moment in which they are counted for their user.
        let service = client.service(family);
        let shown = format!("Bearer {}", setup.keys[round % 2]);
        let Ok(stream) = client.namespace.enter(|| std::net::TcpStream::connect_timeout(&service, SOON)) else {
            continue;
        };
        if round % 3 == 0 {
            use std::io::Write as _;
            let request = format!(
                "GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                 Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nAuthorization: {shown}\r\n\r\n"
            );
            (&stream).write_all(request.as_bytes())?;
            socket2::SockRef::from(&stream).set_linger(Some(std::time::Duration::ZERO))?;
        } else {
            _ = websocket::upgrade_with(stream, service, &[("Authorization", &shown)])?;
        }
        // One connection per source: the next one waits until this one is its user's, or gone.
        limiter.wait_held(client.address(family), 0)?;
    }
    setup.finish()
}
