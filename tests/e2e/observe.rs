//! `on_deny = "observe"` with the gateway: nobody is refused, and who would be is counted and counts.

use std::net::TcpStream;

use anyhow::{Context, Result, bail};
use limiter_tests::{
    both_families,
    lab::{Family, Lab},
    limiter::{Daemon, Limiter},
    wait::{SOON, eventually_equal},
    websocket::{self, Handshake},
};

both_families!(
    without_the_kernel_nobody_is_refused,
    behind_a_proxy_nobody_is_refused_until_the_service_does_more_than_observe,
);

/// Both families on one port.
const LISTEN: &str = "[gateway]\nlisten = [\"0.0.0.0:8080\", \"[::]:8080\"]\n";

/// How many handshakes were observed, for that reason.
fn observed(daemon: &Daemon<'_>, reason: &str) -> Result<u64> {
    let (_, metrics) = daemon.http_get("/metrics").context("metrics")?;
    let sample = format!("limiter_handshakes_observed_total{{reason=\"{reason}\"}} ");
    metrics.lines().find_map(|line| line.strip_prefix(&sample)).map_or(Ok(0), |count| Ok(count.parse()?))
}

fn without_the_kernel_nobody_is_refused(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let limiter = Limiter::new(&lab.server)?;
    let config = Limiter::config_file(LISTEN)?;
    let mut daemon = limiter.run([
        "--config",
        &config.path().display().to_string(),
        "--connections-per-source",
        "2",
        "--connection-rate",
        "0",
        "--on-deny",
        "observe",
    ])?;
    let mut held = Vec::new();
    for _ in 0..5 {
        held.push(websocket::open(&client.namespace, client.service(family))?);
    }
    for session in &mut held {
        websocket::echo(session, "in")?;
    }
    assert_eq!(observed(&daemon, "source_full")?, 3);
    let log = daemon.process().stderr();
    assert!(log.contains("would refuse the handshake") && log.contains("source_full"), "{log}");
    Ok(())
}

fn behind_a_proxy_nobody_is_refused_until_the_service_does_more_than_observe(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let proxy = &lab.clients[0];
    let address = proxy.address(family);
    let limiter = Limiter::new(&lab.server)?;
    let config = Limiter::config_file(&format!(
        "[kernel]\non_deny = \"observe\"\n[limits]\nconnections_per_source = 2\nconnection_rate = 0\n\
         {LISTEN}trusted_proxies = [\"{address}\"]\n[[rule]]\ncidr = \"{address}\"\naction = \"allow\"\n\
         [[rule]]\ncidr = \"203.0.113.66\"\naction = \"deny\"\n",
    ))?;
    let mut flags = lab.interface_flags();
    flags.extend(["--config".into(), config.path().display().to_string()]);
    let daemon = limiter.run(flags)?;
    let connect = |client: &str| -> Result<Handshake> {
        let stream = proxy.namespace.enter(|| TcpStream::connect(proxy.service(family)))?;
        websocket::upgrade_with(stream, proxy.service(family), &[("X-Forwarded-For", client)])
    };
    let mut held = Vec::new();
    for client in ["203.0.113.1", "203.0.113.66", "203.0.113.1", "203.0.113.1", "203.0.113.1"] {
        match connect(client)? {
            Handshake::Open(session) => held.push(session),
            Handshake::Refused(response) => bail!("{client} got {}", response.status()),
        }
    }
    assert_eq!((observed(&daemon, "source_full")?, observed(&daemon, "rule")?), (2, 1));

    limiter.output(["limit", "set", "on_deny=drop"])?;
    let refused = |client| match connect(client)? {
        Handshake::Open(_) => bail!("{client} got in"),
        Handshake::Refused(response) => Ok(response.status().as_u16()),
    };
    // Who was let in past the limit holds it on.
    assert_eq!((refused("203.0.113.1")?, refused("203.0.113.66")?), (429, 403));
    for left in [3, 2] {
        drop(held.pop());
        eventually_equal(SOON, "it has left", &(left + 1), || limiter.held_by(address))?;
        assert_eq!(refused("203.0.113.1")?, 429, "{left} are left");
    }
    Ok(())
}
