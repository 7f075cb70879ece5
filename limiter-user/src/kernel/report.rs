//! What the kernel holds, as data for the command line and the metrics.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use limiter_common::Counter;
use serde::Serialize;

use crate::policy::Limits;

/// What is in force.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// Where the state is pinned.
    pub pin_path: String,
    /// Layout version of the pinned state.
    pub abi: u32,
    /// Process id of the daemon that runs on this state, if one does.
    pub daemon: Option<u32>,
    /// `socket`: `sock_ops` sees connections open and close.
    pub accounting: &'static str,
    /// Whether handshakes of sockets that XDP can't look up (in other namespaces, behind a translation of ports) are counted
    /// before the stack opens their connection; `None`: no service has such sockets.
    pub counts_on_delivery: Option<bool>,
    /// Interfaces and how they are attached.
    pub interfaces: Vec<AttachedInterface>,
    /// What `net.ipv4.tcp_syncookies` was before limiter set it to 2, and will be again; `None` if it was not changed.
    pub syncookies_before: Option<u8>,
    /// The same of `net.ipv4.tcp_timestamps`.
    pub timestamps_before: Option<u8>,
    /// Services, in the order of their index.
    pub services: Vec<ServiceRow>,
    /// Entries in the ledger.
    pub ledger_entries: u64,
    /// Room in the ledger.
    pub ledger_size: u32,
    /// Rules that there is room for.
    pub rules_size: u32,
    /// Changes of the rules that were refused, because there was no room for all that there would be.
    pub rules_full: u64,
    /// Sources that hold a connection.
    pub sources: u64,
    /// Packets of which not even the port could be read that they are for; they are dropped, unless the first service only observes.
    pub headers_unreadable: u64,
    /// How long ago the last audit was, in seconds; `None`: there was none since it was attached.
    #[serde(rename = "audited_seconds_ago", serialize_with = "whole_seconds_if_any")]
    pub audited: Option<Duration>,
    /// By how much counts and entries differed then; should be 0.
    pub drift: u64,
    /// Entries that audits have made or removed since it was attached; should be 0.
    pub repairs: u64,
}

/// What counts repairs of the ledger, and the kind of repair.
pub const REPAIRS: [(Counter, &str); 2] = [(Counter::OpenedAudit, "adopted"), (Counter::ClosedAudit, "removed")];

/// An interface that a program is attached to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AttachedInterface {
    /// Its name now; `None` if the interface is gone, or in another network namespace.
    pub name: Option<String>,
    /// Its index.
    pub index: u32,
    /// `native`, `generic` or `tc`.
    pub mode: &'static str,
    /// What of the kernel holds the program: `xdp`, `tcx` or `clsact`.
    pub hook: &'static str,
    /// Why it is not attached in a faster mode, if that was tried.
    pub why: Option<String>,
}

/// A service and what it holds.
#[derive(Clone, Debug, Serialize)]
pub struct ServiceRow {
    /// Its index in the kernel's maps.
    #[serde(skip)]
    pub index: u32,
    /// Its name.
    pub name: String,
    /// The ports that its clients connect to.
    pub ports: Vec<u16>,
    /// The ports of its sockets.
    pub socket_ports: Vec<u16>,
    /// Where its sockets are: `host`, `others` or `all`.
    pub namespaces: &'static str,
    /// `drop`, `reset` or `observe`.
    pub on_deny: &'static str,
    /// Its limits.
    #[serde(flatten)]
    pub limits: Limits,
    /// Whether it answers SYNs by cookies.
    #[serde(flatten)]
    pub challenge: ChallengeRow,
    /// Connections that it holds.
    pub connections: u64,
    /// What was counted, summed over all CPUs, since it was attached.
    pub counters: Counters,
}

impl ServiceRow {
    /// Whether XDP can't look up every one of its sockets.
    pub fn has_sockets_elsewhere(&self) -> bool {
        self.namespaces != "host" || self.ports != self.socket_ports
    }
}

/// Whether a service answers SYNs by cookies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ChallengeRow {
    /// From how many SYNs a second on; 0: never, 1: always.
    pub challenge_threshold: u32,
    /// Whether it does now.
    pub challenging: bool,
}

/// The counters of one service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Counters(pub BTreeMap<&'static str, u64>);

impl Counters {
    /// The value of one counter.
    pub fn get(&self, counter: Counter) -> u64 {
        self.0.get(counter.name()).copied().unwrap_or(0)
    }
}

/// A source and what it holds.
#[derive(Clone, Debug, Serialize)]
pub struct SourceRow {
    /// Name of the service.
    pub service: String,
    /// The source, as CIDR; or `user:` and the name of a user, to whom no limit of the kernel applies.
    pub source: String,
    /// `narrow`, or `wide` for the wider tier.
    pub tier: &'static str,
    /// Connections that it holds.
    pub connections: u64,
    /// How many it may hold; 0: any number.
    pub limit: u32,
    /// Where a rule is for a part of it, and gives others there.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub exceptions: Vec<Exception>,
}

/// What holds for a part of a source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Exception {
    /// The part.
    pub cidr: String,
    /// How many connections the source may hold for one more from there to get in; 0: any number.
    pub limit: u32,
}

/// A connection in the ledger.
#[derive(Clone, Debug, Serialize)]
pub struct ConnectionRow {
    /// Name of the service.
    pub service: String,
    /// What it counts against: its source as CIDR, or `user:` and the name of its user.
    pub source: String,
    /// The name of its user, if its client has shown who it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// The client.
    pub remote: SocketAddr,
    /// The address it connected to.
    pub local: SocketAddr,
    /// The network namespace of its socket, if that is not the one that limiter was attached in: its name, or `net:[INODE]`, or
    /// `cookie COOKIE` where it can't be found.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// `reserved` (the stack has yet to confirm it) or `open`.
    pub state: &'static str,
    /// How long it has been in the ledger, in seconds.
    #[serde(rename = "age_seconds", serialize_with = "whole_seconds")]
    pub age: Duration,
}

// The form is serde's.
#[expect(clippy::ref_option, reason = "serde hands over a reference to the field")]
fn whole_seconds_if_any<S: serde::Serializer>(age: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    age.map(|age| age.as_secs()).serialize(serializer)
}

fn whole_seconds<S: serde::Serializer>(age: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(age.as_secs())
}
