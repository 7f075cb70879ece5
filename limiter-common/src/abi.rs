//! The names and sizes by which user space finds what the kernel holds. A map or a program is named here and nowhere else.

/// Version of the layout of every pinned map; part of the pin path, so that two layouts never meet.
pub const ABI_VERSION: u32 = 4;

/// The XDP program that admits or refuses.
pub const PROGRAM_XDP: &str = "limiter_xdp";
/// The same as a classifier of TC.
pub const PROGRAM_TC: &str = "limiter_tc";
/// The same for devices whose packets have no Ethernet header.
pub const PROGRAM_TC_L3: &str = "limiter_tc_l3";
/// The `sock_ops` program that confirms and closes ledger entries.
pub const PROGRAM_SOCK_OPS: &str = "limiter_sockops";
/// The program that sees what is delivered to a listener which XDP does not see packets of as they arrive there: behind a
/// translation of addresses or ports, or in another network namespace (at the root of the cgroup v2 hierarchy).
pub const PROGRAM_DELIVERY: &str = "limiter_delivery";
/// The program by which user space takes entries out of the ledger (run by `BPF_PROG_TEST_RUN`, never attached).
pub const PROGRAM_CONTROL: &str = "limiter_control";

/// The program that has the stack tell of the connections which were open before the limiter was attached (run by reading
/// a `bpf_iter` of TCP sockets).
pub const PROGRAM_WATCH: &str = "limiter_watch";

/// [`crate::ConnectionKey`] → [`crate::LedgerEntry`]: every connection that is counted.
pub const MAP_LEDGER: &str = "LEDGER";
/// [`crate::SourceKey`] → [`crate::SourceEntry`]: every source that holds a connection.
pub const MAP_SOURCES: &str = "SOURCES";
/// Destination port → in each half of the word, the service index + 1 in one copy of the policy, or 0 where no service
/// listens, and where the sockets are that a packet may lead to ([`crate::policy::InForce::service`]).
pub const MAP_PORTS: &str = "PORTS";
/// Port of a socket → in each half of the word, for one copy of the policy, the service index + 1 of such sockets in the namespace
/// that limiter was attached in, and in the upper 16 bits in any other ([`crate::policy::InForce::service_of_socket`]).
pub const MAP_SOCKET_PORTS: &str = "SOCKET_PORTS";
/// [`crate::policy::InForce::place_of`] a service → [`crate::ServicePolicy`]: two copies, one of which is in force.
pub const MAP_SERVICES: &str = "SERVICES";
/// Service index → [`crate::policy::ServiceState`]: connections in all. At [`ALL_SERVICES`]: those of all services.
pub const MAP_SERVICE_STATE: &str = "SERVICE_STATE";
/// Service index × [`COUNTERS_PER_SERVICE`] + [`crate::Counter`] → count, per CPU.
pub const MAP_COUNTERS: &str = "COUNTERS";
/// Ring buffer of [`crate::event::Refusal`] records.
pub const MAP_EVENTS: &str = "EVENTS";
/// Queue of [`crate::ledger::Reservation`]: slots that the stack has yet to confirm.
pub const MAP_RESERVATIONS: &str = "RESERVATIONS";

/// [`crate::SourceKey`] → the word of its [`crate::bucket`] of new connections; the least recently used give way.
pub const MAP_RATES: &str = "RATES";
/// [`crate::rule::RuleKey`] → [`crate::rule::RuleEntry`]: what holds for prefixes of addresses. Two copies, one of which is in
/// force; the other is empty, but for the time in which a change is made.
pub const MAP_RULES: [&str; 2] = ["RULES_0", "RULES_1"];
/// At 0: the [`crate::policy::InForce`].
pub const MAP_IN_FORCE: &str = "IN_FORCE";

/// Service index → [`crate::audit::AuditReport`]: what the last audit found.
pub const MAP_AUDIT: &str = "AUDIT";

/// At 0: the [`crate::TagSecret`] of [`MAP_LEDGER`]. Written once, before anything is attached.
pub const MAP_TAG_SECRET: &str = "TAG_SECRET";

/// [`flow_slot`] → the [`crate::ConnectionKey::flow`] of a connection that has an entry in [`MAP_LEDGER`], and of which a packet was
/// seen; or 0.
pub const MAP_FLOWS: &str = "FLOWS";

/// A socket's cookie → the [`crate::user::Member`] that its connection counts against instead of its entry's source.
pub const MAP_MEMBERS: &str = "MEMBERS";

/// Service index → [`crate::challenge::Challenge`]: when it answers SYNs by cookies.
pub const MAP_CHALLENGES: &str = "CHALLENGES";

/// Every map that is pinned, in the order in which `detach` removes them.
pub const PINNED_MAPS: [&str; 18] = [
    MAP_LEDGER,
    MAP_SOURCES,
    MAP_PORTS,
    MAP_SOCKET_PORTS,
    MAP_SERVICES,
    MAP_SERVICE_STATE,
    MAP_COUNTERS,
    MAP_EVENTS,
    MAP_RESERVATIONS,
    MAP_RATES,
    MAP_RULES[0],
    MAP_RULES[1],
    MAP_AUDIT,
    MAP_IN_FORCE,
    MAP_TAG_SECRET,
    MAP_MEMBERS,
    MAP_CHALLENGES,
    MAP_FLOWS,
];

/// Load-time constant (`u32`): offset of [`SNT_ISN`], from the kernel's BTF.
pub const GLOBAL_SNT_ISN_OFFSET: &str = "SNT_ISN_OFFSET";
/// The sequence number of a SYN-ACK in a half-open connection.
pub const SNT_ISN: (&str, &str) = ("tcp_request_sock", "snt_isn");

/// A field of the kernel's structures that programs read, and the load-time constant (`u32`) that says where it is; 0 where the
/// kernel does not tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelField {
    /// The constant.
    pub global: &'static str,
    /// Structures and their members, each in that before.
    pub path: &'static [(&'static str, &'static str)],
    /// Whether the constant counts bits, for a field that does not begin with a byte.
    pub in_bits: bool,
    /// Whether kernels may lack it.
    pub is_optional: bool,
}

/// What programs read of a listener and its network namespace. Without one of those that may not be missing, none is known. `struct
/// sock` is what `struct tcp_sock` begins with.
pub const LISTENER_FIELDS: [KernelField; 11] = [
    field("SOCK_NET", &[("sock", "__sk_common"), ("sock_common", "skc_net")]),
    field("SOCK_RCVBUF", &[("sock", "sk_rcvbuf")]),
    KernelField { in_bits: true, ..field("SOCK_USERLOCKS", &[("sock", "sk_userlocks")]) },
    field("TCP_WINDOW_CLAMP", &[("tcp_sock", "window_clamp")]),
    // Since 6.6.
    KernelField { is_optional: true, ..field("TCP_SCALING_RATIO", &[("tcp_sock", "scaling_ratio")]) },
    field("TCP_MAXSEG", &[("tcp_sock", "rx_opt"), ("tcp_options_received", "user_mss")]),
    field("NET_TIMESTAMPS", &[("net", "ipv4"), ("netns_ipv4", "sysctl_tcp_timestamps")]),
    field("NET_SACK", &[("net", "ipv4"), ("netns_ipv4", "sysctl_tcp_sack")]),
    field("NET_WINDOW_SCALING", &[("net", "ipv4"), ("netns_ipv4", "sysctl_tcp_window_scaling")]),
    field("NET_ECN", &[("net", "ipv4"), ("netns_ipv4", "sysctl_tcp_ecn")]),
    field("NET_RMEM", &[("net", "ipv4"), ("netns_ipv4", "sysctl_tcp_rmem")]),
];

const fn field(global: &'static str, path: &'static [(&'static str, &'static str)]) -> KernelField {
    KernelField { global, path, in_bits: false, is_optional: false }
}
/// Load-time constant (`u32`): 1 where programs may read the kernel's memory (`bpf_probe_read_kernel`).
pub const GLOBAL_READS_KERNEL_MEMORY: &str = "READS_KERNEL_MEMORY";
/// Load-time constant (`u64`): [`crate::source::REPORT_INTERVAL_SECONDS`] in jiffies, whose length is the kernel's choice.
pub const GLOBAL_REPORT_INTERVAL: &str = "REPORT_INTERVAL_JIFFIES";
/// Load-time constant (`u64`): cookie of the network namespace whose sockets are counted.
pub const GLOBAL_NETNS_COOKIE: &str = "NETNS_COOKIE";

/// How many services there may be.
pub const MAX_SERVICES: u32 = 64;
/// The place in [`MAP_SERVICE_STATE`] of what all services hold together; only its `connections` is used.
pub const ALL_SERVICES: u32 = MAX_SERVICES;
/// Room for counters of one service; at least the number of [`crate::Counter`]s.
pub const COUNTERS_PER_SERVICE: u32 = 64;
/// Default size of the ledger, in connections.
pub const DEFAULT_MAX_CONNECTIONS: u32 = 262_144;
/// How many connections can be in [`MAP_FLOWS`] at a time: 2 MiB.
pub const FLOW_SLOTS: u32 = 1 << 18;
/// The place in [`MAP_FLOWS`] of a connection with that [`crate::ConnectionKey::flow`]. Its upper bits are the ones that all of the key
/// has a part in.
#[expect(clippy::cast_possible_truncation, reason = "as many bits are left as there are slots")]
#[inline(always)]
pub const fn flow_slot(flow: u64) -> u32 {
    (flow >> (u64::BITS - FLOW_SLOTS.trailing_zeros())) as u32
}
/// Size of the ring buffer of events, in bytes.
pub const EVENTS_BYTES: u32 = 256 * 1024;
/// How many reservations can be waiting for the stack's confirmation.
pub const MAX_RESERVATIONS: u32 = 65_536;
/// How many sources' buckets of new connections are kept. Only one that is not full is worth keeping, and with the default
/// rate it fills within two seconds.
pub const MAX_RATES: u32 = 65_536;
/// Default for how many rules there may be. Memory is taken for those that there are.
pub const DEFAULT_MAX_RULES: u32 = 1 << 20;
