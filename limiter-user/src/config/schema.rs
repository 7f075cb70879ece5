//! Every key of the configuration file, its type, its unit and its default.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use hyper::http::uri::PathAndQuery;
use ipnet::IpNet;
use rustls::pki_types::ServerName;

use super::{AllowedOrigin, Auth, CertificateFiles, Listen, Messages, Overload, Route, Target, Tls};
use crate::policy::{Limits, Rule};

/// A whole configuration, checked.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Config {
    /// `[kernel]`
    pub kernel: Kernel,
    /// `[limits]`: what holds for every service that does not say otherwise.
    pub limits: Limits,
    /// `[[service]]`
    pub services: Vec<Service>,
    /// `[[rule]]`
    pub rules: Vec<Rule>,
    /// `[gateway]`
    pub gateway: Gateway,
    /// `[admin]`
    pub admin: Admin,
    /// `[log]`
    pub log: Log,
}

/// `[kernel]`: what is attached where.
#[derive(Clone, Debug, PartialEq)]
pub struct Kernel {
    /// Interfaces to attach to; none: the gateway works alone.
    pub interfaces: Vec<String>,
    /// How to attach.
    pub attach_mode: AttachMode,
    /// What a refused SYN gets.
    pub on_deny: OnDeny,
    /// What happens to a connection that the ledger has no room for.
    pub on_full: OnFull,
    /// Where programs, links and maps are pinned; must be on a bpffs.
    pub pin_path: PathBuf,
    /// Size of the ledger, in connections.
    pub max_connections: u32,
    /// How many rules there may be, those of commands among them.
    pub max_rules: u32,
    /// How often the daemon compares the ledger with the kernel's sockets; zero: never.
    pub audit_interval: Duration,
    /// Whether SYNs are answered by cookies before the stack sees them.
    pub challenge: ChallengeMode,
    /// How many SYNs a second, refused ones not counted, make a service do so under [`ChallengeMode::Auto`].
    pub challenge_threshold: u32,
    /// Whether these cookies keep more of the SYN's options than the MSS, which takes `net.ipv4.tcp_timestamps` at 2.
    pub challenge_timestamps: bool,
    /// Debug messages of the kernel programs; off costs nothing, and it can only be changed by attaching anew.
    pub debug_log: bool,
}

impl Default for Kernel {
    fn default() -> Self {
        Self {
            interfaces: Vec::new(),
            attach_mode: AttachMode::Auto,
            on_deny: OnDeny::Drop,
            on_full: OnFull::Open,
            pin_path: "/sys/fs/bpf/limiter".into(),
            max_connections: limiter_common::abi::DEFAULT_MAX_CONNECTIONS,
            max_rules: limiter_common::abi::DEFAULT_MAX_RULES,
            audit_interval: Duration::from_secs(5),
            challenge: ChallengeMode::Never,
            challenge_threshold: 1000,
            challenge_timestamps: false,
            debug_log: false,
        }
    }
}

/// Where packets are seen, the faster modes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum AttachMode {
    /// The first of the three that is to be had; said aloud if it is not native.
    Auto,
    /// By XDP in the driver, or not at all.
    Native,
    /// By XDP in the network stack: slower.
    Generic,
    /// By TC: slower still, for every device, beside any other program.
    Tc,
}

/// What a refused SYN gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum OnDeny {
    /// Nothing.
    Drop,
    /// A RST, so that the client fails at once; past a thousand a second, nothing.
    Reset,
    /// It is counted and passes; the gateway does the same with whom it would refuse.
    Observe,
}

impl OnDeny {
    /// Its name in the file, on the command line and in `--json`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Drop => "drop",
            Self::Reset => "reset",
            Self::Observe => "observe",
        }
    }
}

/// Whether SYNs are answered by cookies, before the stack sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum ChallengeMode {
    /// They are not, and nothing of the host is changed for it.
    Never,
    /// Those of a service that is flooded are.
    Auto,
    /// All are.
    Always,
}

/// What happens to a connection that the ledger has no room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum OnFull {
    /// It passes, uncounted.
    Open,
    /// It is refused.
    Closed,
}

/// `[[service]]`: one or several ports with limits of their own.
#[derive(Clone, Debug, PartialEq)]
pub struct Service {
    /// Its name, in output and metrics; at most 64 bytes.
    pub name: String,
    /// The ports that its clients connect to (`port = 8080` or `port = [8080, 8443]`).
    pub ports: Vec<u16>,
    /// The ports that its sockets have, where a translation of ports leads from the one to the other; empty: the same.
    pub socket_ports: Vec<u16>,
    /// Where its sockets are.
    pub namespaces: Namespaces,
    /// Its limits: those of `[limits]`, but for what it overrides.
    pub limits: Limits,
    /// What a refused SYN gets, where it differs from `[kernel]`.
    pub on_deny: OnDeny,
}

impl Service {
    /// One with the default limits.
    pub fn new(name: impl Into<String>, ports: impl Into<Vec<u16>>) -> Self {
        Self {
            name: name.into(),
            ports: ports.into(),
            socket_ports: Vec::new(),
            namespaces: Namespaces::Host,
            limits: Limits::default(),
            on_deny: OnDeny::Drop,
        }
    }

    /// The ports of its sockets, wherever these are.
    pub fn ports_of_sockets(&self) -> &[u16] {
        if self.socket_ports.is_empty() { &self.ports } else { &self.socket_ports }
    }

    /// The ports of its sockets in the network namespace that limiter works in.
    pub fn ports_here(&self) -> &[u16] {
        if self.namespaces.include_own() { self.ports_of_sockets() } else { &[] }
    }

    /// The ports of its sockets in every other network namespace.
    pub fn ports_elsewhere(&self) -> &[u16] {
        if self.namespaces.include_others() { self.ports_of_sockets() } else { &[] }
    }

    /// Whether XDP can't look up every one of its sockets.
    pub fn has_sockets_elsewhere(&self) -> bool {
        let here = self.ports_here();
        self.namespaces.include_others()
            || self.ports.iter().any(|port| !here.contains(port))
            || here.iter().any(|port| !self.ports.contains(port))
    }
}

/// The network namespaces whose sockets a service counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Namespaces {
    /// The one that limiter works in.
    #[default]
    Host,
    /// Every one on the host but that: containers.
    Others,
    /// Every one on the host.
    All,
}

impl Namespaces {
    /// The name in the file and in `--json`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Others => "others",
            Self::All => "all",
        }
    }

    /// Whether that which limiter works in is one of them.
    pub const fn include_own(self) -> bool {
        !matches!(self, Self::Others)
    }

    /// Whether the others are.
    pub const fn include_others(self) -> bool {
        !matches!(self, Self::Host)
    }
}

/// What a `[[rule]]` without limits of its own does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum RuleAction {
    /// No limit holds.
    Allow,
    /// Nobody gets in.
    Deny,
}

/// `[gateway]`: the WebSocket server in front of the application.
#[derive(Clone, Debug, PartialEq)]
pub struct Gateway {
    /// Where to listen.
    pub listen: Vec<Listen>,
    /// Who may connect to its unix sockets: the bits of their mode.
    pub unix_mode: u32,
    /// Whether other processes may listen on the same TCP addresses (`SO_REUSEPORT`).
    pub reuse_port: bool,
    /// What stands behind it.
    pub upstream: Upstream,
    /// `[gateway.upstream_tls]`
    pub upstream_tls: UpstreamTls,
    /// `[gateway.health]`
    pub health: Health,
    /// Proxies whose word on the client's address is taken (X-Forwarded-For, Forwarded); none: nobody's.
    pub trusted_proxies: Vec<IpNet>,
    /// Whether whoever connects to a unix socket is such a proxy (`"unix"` among them).
    pub trusts_unix: bool,
    /// Whether trusted proxies begin each connection with a PROXY header (version 1 or 2).
    pub proxy_protocol: bool,
    /// Origins whose pages may connect; none: any.
    pub allowed_origins: Vec<AllowedOrigin>,
    /// From accept to the end of the upgrade.
    pub handshake_timeout: Duration,
    /// A connection without a message either way for this long is closed (1001); zero: never.
    pub idle_timeout: Duration,
    /// How often a quiet client is sent a ping; zero: never.
    pub ping_interval: Duration,
    /// How long a client may take to answer a ping before it is given up.
    pub pong_timeout: Duration,
    /// A connection of this age is closed (1001), up to a tenth earlier, so that not all come back at once; zero: never.
    pub max_lifetime: Duration,
    /// How long the shutdown may take; the closes are spread over most of it.
    pub drain_timeout: Duration,
    /// `[gateway.tls]`; `None`: the gateway speaks plain HTTP.
    pub tls: Option<Tls>,
    /// `[gateway.auth]`; `None`: anybody may connect.
    pub auth: Option<Auth>,
    /// `[[gateway.route]]`: of those that a request is for, the one with the longest path holds.
    pub routes: Vec<Route>,
    /// `[gateway.messages]`
    pub messages: Messages,
    /// `[gateway.push]`
    pub push: Push,
    /// `[gateway.overload]`
    pub overload: Overload,
}

/// `[gateway.push]`: messages that others have for a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Push {
    /// How far a client may be behind, in bytes; past that it is closed (1008). Each message counts for 128 bytes more than it
    /// has. Whatever this is, a client that is not behind gets a message of any length.
    pub queue: usize,
}

impl Default for Push {
    fn default() -> Self {
        Self { queue: 256 * 1024 }
    }
}

impl Default for Gateway {
    fn default() -> Self {
        Self {
            listen: vec![SocketAddr::from(([0, 0, 0, 0], 8080)).into()],
            unix_mode: 0o660,
            reuse_port: false,
            upstream: Upstream::Echo,
            upstream_tls: UpstreamTls::default(),
            health: Health::default(),
            trusted_proxies: Vec::new(),
            trusts_unix: false,
            proxy_protocol: false,
            allowed_origins: Vec::new(),
            handshake_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_mins(5),
            ping_interval: Duration::from_secs(30),
            pong_timeout: Duration::from_secs(10),
            max_lifetime: Duration::ZERO,
            drain_timeout: Duration::from_secs(30),
            tls: None,
            auth: None,
            routes: Vec::new(),
            messages: Messages::default(),
            push: Push::default(),
            overload: Overload::default(),
        }
    }
}

/// What stands behind the gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Upstream {
    /// The built-in application that sends each message back.
    Echo,
    /// The built-in application that sends each message to all other clients in the same room, which is the path.
    Broadcast,
    /// WebSocket servers, of which each session gets one.
    Relay(Vec<Target>),
}

impl Upstream {
    /// The servers, if there are any.
    pub fn targets(&self) -> &[Target] {
        match self {
            Self::Echo | Self::Broadcast => &[],
            Self::Relay(targets) => targets,
        }
    }
}

/// `[gateway.upstream_tls]`: how TLS is spoken to upstreams at `wss://`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UpstreamTls {
    /// A file of certificates in PEM, of those who may sign an upstream's; `None`: those that the system trusts.
    pub ca: Option<PathBuf>,
    /// Whom an upstream's certificate must be for; `None`: for the host in its URL.
    pub server_name: Option<ServerName<'static>>,
    /// What upstreams are shown that ask who we are.
    pub certificate: Option<CertificateFiles>,
}

/// `[gateway.health]`: how it is found out whether upstreams are there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Health {
    /// What is asked for by GET, and must be answered by 2xx; `None`: it is only connected to.
    pub path: Option<PathAndQuery>,
    /// How often; zero: never.
    pub interval: Duration,
    /// How long the answer may take.
    pub timeout: Duration,
    /// Good checks in a row that put a server into use.
    pub rise: u32,
    /// Bad checks in a row that put it out of use.
    pub fall: u32,
}

impl Default for Health {
    fn default() -> Self {
        Self { path: None, interval: Duration::ZERO, timeout: Duration::from_secs(2), rise: 2, fall: 3 }
    }
}

/// `[admin]`: metrics, health and control over HTTP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admin {
    /// Where it listens; `None` (`listen = ""`): nowhere.
    pub listen: Option<SocketAddr>,
    /// A file with the secret that whoever publishes and disconnects has to show; `None`: nobody can.
    pub token_file: Option<PathBuf>,
}

impl Default for Admin {
    fn default() -> Self {
        Self { listen: Some(SocketAddr::from(([127, 0, 0, 1], 9180))), token_file: None }
    }
}

/// `[log]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    /// A level (`error`, `warn`, `info`, `debug`, `trace`) or a filter as of `tracing_subscriber::EnvFilter`.
    pub level: String,
    /// Lines of text or of JSON.
    pub format: LogFormat,
}

impl Default for Log {
    fn default() -> Self {
        Self { level: "info".into(), format: LogFormat::Text }
    }
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For programs: one object per line.
    Json,
}
