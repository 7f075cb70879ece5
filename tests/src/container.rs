//! A container as an engine makes it: a network namespace behind a link of the host's, a process in it, and ports of the host
//! that lead to it.

use std::{
    io::Write as _,
    net::{IpAddr, SocketAddr},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    lab::{CLIENT_INTERFACE, Client, Family},
    netns::Namespace,
    process::Process,
};

/// A container.
#[derive(Debug)]
pub struct Container {
    /// Where its sockets are.
    pub namespace: Namespace,
    number: u8,
    address: IpAddr,
    /// What keeps it alive, and shows where it is.
    init: Option<Process>,
}

impl Container {
    /// One behind `host`, which forwards packets from now on, and reaches it at that address where it is [published](Self::publish) or
    /// [routed](Self::route).
    pub fn new(host: &Namespace, number: u8, address: IpAddr) -> Result<Self> {
        let namespace = Namespace::new()?;
        let gateway = neighbour(address);
        let length = length(address);
        let forwarding = if address.is_ipv4() { "net/ipv4/ip_forward" } else { "net/ipv6/conf/all/forwarding" };
        host.set_sysctl(forwarding, "1")?;
        host.ip(&format!(
            "link add veth{number} type veth peer name eth0 netns {}\n\
             link set veth{number} up\naddr add {gateway}/{length} dev veth{number} nodad\n\
             route add {address}/{length} dev veth{number} table {number}\n",
            namespace.path().display()
        ))?;
        namespace.ip(&format!(
            "link set eth0 up\naddr add {address}/{length} dev eth0 nodad\nroute add {gateway}/{length} dev eth0\n\
             route add default via {gateway}"
        ))?;
        host.wait_link_up(&format!("veth{number}"))?;
        namespace.wait_link_up("eth0")?;
        let init = Process::start(namespace.command("sleep").arg("1000"))?;
        Ok(Self { namespace, number, address, init: Some(init) })
    }

    /// Has the host lead what comes by one of these interfaces for its port `from` to a port of the container's. Once.
    pub fn publish(&self, host: &Namespace, interfaces: &[String], from: u16, to: SocketAddr) -> Result<()> {
        let number = self.number;
        let interfaces = interfaces.join(", ");
        let family = if self.address.is_ipv4() { "ip" } else { "ip6" };
        nft(
            host,
            &format!(
                "table {family} published{number} {{\n\
                 chain steer {{ type filter hook prerouting priority mangle\n\
                 iifname {{ {interfaces} }} tcp dport {from} meta mark set {number}\n}}\n\
                 chain lead {{ type nat hook prerouting priority dstnat\n\
                 iifname {{ {interfaces} }} tcp dport {from} dnat to {to}\n}}\n}}\n"
            ),
        )?;
        let rule = format!("rule add fwmark {number} table {number}");
        if self.address.is_ipv4() { host.ip(&rule) } else { host.ip6(&rule) }
    }

    /// Has a client reach it at its own address, through the host, with no translation.
    pub fn route(&self, host: &Namespace, client: &Client) -> Result<()> {
        let family = if self.address.is_ipv4() { Family::V4 } else { Family::V6 };
        let (address, length) = (self.address, length(self.address));
        host.ip(&format!("route add {address}/{length} dev veth{}", self.number))?;
        let host_address = client.server_address(family);
        client.namespace.ip(&format!("route add {address}/{length} via {host_address} dev {CLIENT_INTERFACE}"))
    }

    /// Ends its processes and takes its link away, as an engine does. Its sockets must have been closed.
    pub fn kill(mut self, host: &Namespace) -> Result<()> {
        self.init.take().context("it has a process")?.kill()?;
        host.ip(&format!("link delete veth{}", self.number))
    }
}

/// The host's address on the link to a container.
fn neighbour(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(address) => IpAddr::V4((address.to_bits() ^ 3).into()),
        IpAddr::V6(address) => IpAddr::V6((address.to_bits() ^ 3).into()),
    }
}

/// Of the prefix that is one address.
const fn length(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// Rules of nftables in a namespace.
pub fn nft(namespace: &Namespace, rules: &str) -> Result<()> {
    let mut command: Command = namespace.command("nft");
    let mut child = command
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run `nft`: these tests need nftables")?;
    child.stdin.take().context("stdin is piped")?.write_all(rules.as_bytes())?;
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "nft: {}\nin:\n{rules}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}
