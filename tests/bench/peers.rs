//! What a refused SYN takes with limiter and with what else a Linux host has for it, side by side.

use std::{
    fs,
    net::SocketAddr,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use limiter_tests::{
    bare::{Answer, BareXdp},
    frame::Frame,
    lab::{CLIENT_INTERFACE, Client, Family, Lab, PORT},
    limiter::Limiter,
    netns::Namespace,
    segment::{Segment, flags},
    tcp::{Crowd, PlainServer},
};

use crate::{refusal, table};

const ROUNDS: usize = 5;
const SYNS: u32 = 500_000;

/// Where xdp-tools pins.
const XDP_TOOLS: &str = "/sys/fs/bpf/xdp";

/// Debian's packages, and the command that each is needed for.
const PACKAGES: [(&str, &str); 3] = [("nftables", "nft"), ("iptables", "iptables"), ("xdp-tools", "xdp-filter")];

/// Who refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Peer {
    BareDrop,
    Limiter,
    XdpFilter,
    Nftables,
    Iptables,
}

const PEERS: [Peer; 5] = [Peer::BareDrop, Peer::Limiter, Peer::XdpFilter, Peer::Nftables, Peer::Iptables];

impl Peer {
    const fn name(self) -> &'static str {
        match self {
            Self::BareDrop => "bare XDP_DROP",
            Self::Limiter => "limiter, the source at its limit",
            Self::XdpFilter => "xdp-filter, the source denied statically",
            Self::Nftables => "nftables, `ct count over 1`",
            Self::Iptables => "iptables, connlimit above 1",
        }
    }
}

pub fn run() -> Result<()> {
    install_peers()?;
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let generator = BareXdp::load(Answer::Transmit)?;
    // A veth that sends from XDP needs a program at its own end, too.
    let _open = BareXdp::load(Answer::Pass)?.attach(&client.namespace, CLIENT_INTERFACE)?;
    let mut best = [Duration::MAX; PEERS.len()];
    for _ in 0..ROUNDS {
        for (peer, best) in PEERS.into_iter().zip(&mut best) {
            let taken = refused_by(peer, &lab, client, &generator).with_context(|| peer.name().to_owned())?;
            *best = taken.min(*best);
        }
    }
    let rows: Vec<Vec<String>> = PEERS
        .into_iter()
        .zip(best)
        .map(|(peer, taken)| {
            let ratio = taken.as_secs_f64() / best[0].as_secs_f64();
            vec![peer.name().to_owned(), taken.as_nanos().to_string(), format!("{ratio:.2}")]
        })
        .collect();
    table::print(
        "CPU per refused SYN, and what else there is",
        &format!(
            "IPv4, on a veth, everything on one CPU: nanoseconds per SYN hold the sending (a program that transmits), the \
             device, and whoever refuses (netfilter behind a bare XDP_PASS). The source holds one connection, which is its limit. The fastest of {ROUNDS} rounds \
             of {SYNS} SYNs, in turns."
        ),
        &["refused by", "ns", "of bare XDP_DROP"],
        &rows,
    );
    Ok(())
}

fn refused_by(peer: Peer, lab: &Lab, client: &Client, generator: &BareXdp) -> Result<Duration> {
    let server = PlainServer::start(&lab.server, Family::V4)?;
    let held = || -> Result<Crowd> {
        let crowd = Crowd::connect(&client.namespace, client.service(Family::V4), 1, Duration::from_secs(5))?;
        ensure!(crowd.served.len() == 1, "no connection");
        Ok(crowd)
    };
    let interface = client.server_interface();
    // Without XDP at this end, too, the veth takes nothing that a program sends. It costs netfilter's rules what a
    // program takes that passes everything.
    let _passes = match peer {
        Peer::Nftables | Peer::Iptables => Some(BareXdp::load(Answer::Pass)?.attach(&lab.server, &interface)?),
        Peer::BareDrop | Peer::Limiter | Peer::XdpFilter => None,
    };
    let taken = match peer {
        Peer::BareDrop => {
            let _drop = BareXdp::load(Answer::Drop)?.attach(&lab.server, &interface)?;
            flood(lab, client, generator)?
        }
        Peer::Limiter => {
            let limiter = Limiter::new(&lab.server)?;
            limiter.protect(lab, 1, &[])?;
            let _held = held()?;
            let taken = flood(lab, client, generator)?;
            let counted = limiter.counter("syn_source_limit")?;
            ensure!(counted >= u64::from(SYNS) / 2, "only {counted} of {SYNS} SYNs were refused");
            taken
        }
        Peer::XdpFilter => {
            let was_there = Path::new(XDP_TOOLS).exists();
            inside(&lab.server, "xdp-filter", &["load", "-m", "native", "-f", "ipv4", &interface])?;
            let source = client.address(Family::V4).to_string();
            let taken = inside(&lab.server, "xdp-filter", &["ip", "-m", "src", &source])
                .and_then(|()| flood(lab, client, generator));
            inside(&lab.server, "xdp-filter", &["unload", &interface])?;
            // It leaves an empty folder.
            if !was_there {
                fs::remove_dir(XDP_TOOLS).with_context(|| format!("cannot remove {XDP_TOOLS}"))?;
            }
            taken?
        }
        Peer::Nftables => {
            let _held = held()?;
            let rules = format!(
                "add table ip bench; add set ip bench conns {{ type ipv4_addr; size 65535; flags dynamic; }}; \
                 add chain ip bench input {{ type filter hook input priority 0; }}; \
                 add rule ip bench input tcp dport {PORT} ct state new add @conns {{ ip saddr ct count over 1 }} counter drop"
            );
            inside(&lab.server, "nft", &[&rules])?;
            let taken = seen_by_conntrack(client).and_then(|_open| flood(lab, client, generator));
            inside(&lab.server, "nft", &["delete table ip bench"])?;
            taken?
        }
        Peer::Iptables => {
            let port = PORT.to_string();
            let mut rule = vec!["-A", "INPUT", "-p", "tcp", "--syn", "--dport", &port, "-m", "connlimit"];
            rule.extend(["--connlimit-above", "1", "--connlimit-mask", "32", "-j", "DROP"]);
            inside(&lab.server, "iptables", &rule)?;
            let taken = seen_by_conntrack(client).and_then(|_open| flood(lab, client, generator));
            inside(&lab.server, "iptables", &["-F", "INPUT"])?;
            taken?
        }
    };
    drop(server);
    Ok(taken)
}

/// A connection that was opened after the rule: conntrack sees nothing before there is one.
fn seen_by_conntrack(client: &Client) -> Result<Crowd> {
    let crowd = Crowd::connect(&client.namespace, client.service(Family::V4), 1, Duration::from_secs(5))?;
    ensure!(crowd.served.len() == 1, "the first connection is served");
    let more = Crowd::connect(&client.namespace, client.service(Family::V4), 1, Duration::from_millis(300))?;
    ensure!(more.served.is_empty(), "the second is not refused");
    Ok(crowd)
}

/// Sends SYNs of one source and returns how long each one that arrived took.
fn flood(lab: &Lab, client: &Client, generator: &BareXdp) -> Result<Duration> {
    let source = SocketAddr::new(client.address(Family::V4), 50_000);
    let service = client.service(Family::V4);
    // With right checksums: netfilter looks at them.
    let syn = Segment {
        source,
        destination: service,
        sequence: 1,
        acknowledgement: 0,
        flags: flags::SYN,
        options: Vec::new(),
        payload: Vec::new(),
    }
    .to_frame(client.mac(), client.server_mac());
    ensure!(syn.len() == Frame::syn(source, service).to_bytes().len(), "a SYN like those of the other benchmark");
    refusal::send_counted(lab, client, generator, &syn, SYNS)
}

fn inside(namespace: &Namespace, program: &str, arguments: &[&str]) -> Result<()> {
    let output = namespace
        .command(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {program}"))?;
    ensure!(
        output.status.success(),
        "{program} {}: {}{}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr),
        String::from_utf8_lossy(&output.stdout)
    );
    Ok(())
}

/// Installs with apt-get what is not there, and says so.
fn install_peers() -> Result<()> {
    let there = |command: &str| {
        ["/usr/sbin", "/sbin", "/usr/bin"].iter().any(|folder| Path::new(folder).join(command).exists())
    };
    let missing: Vec<&str> =
        PACKAGES.iter().filter(|(_, command)| !there(command)).map(|(package, _)| *package).collect();
    if missing.is_empty() {
        return Ok(());
    }
    eprintln!("bench: installing {} with apt-get, to compare limiter with", missing.join(", "));
    let status = Command::new("apt-get")
        .args(["install", "--yes", "--quiet", "--no-install-recommends"])
        .args(&missing)
        .stdout(Stdio::null())
        .status()
        .context("cannot run apt-get: install them by hand")?;
    if !status.success() {
        bail!(
            "apt-get could not install {} ({status}): try apt-get update, or install them by hand",
            missing.join(", ")
        );
    }
    Ok(())
}
