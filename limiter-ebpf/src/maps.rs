//! The maps. Keys, values, sizes and names are those of `limiter_common`; what each holds is said there, in `abi`.

use aya_ebpf::{
    Global,
    bindings::BPF_F_NO_PREALLOC,
    macros::map,
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, Queue, RingBuf},
};
use limiter_common::{
    Address, ConnectionKey, LedgerEntry, ServicePolicy, SourceEntry, SourceKey, TagSecret, abi, audit::AuditReport,
    challenge::Challenge, ledger::Reservation, policy::ServiceState, rule::RuleEntry, user::Member,
};

#[map]
pub static LEDGER: HashMap<ConnectionKey, LedgerEntry> = HashMap::with_max_entries(abi::DEFAULT_MAX_CONNECTIONS, 0);

#[map]
pub static SOURCES: HashMap<SourceKey, SourceEntry> = HashMap::with_max_entries(abi::DEFAULT_MAX_CONNECTIONS, 0);

#[map]
pub static PORTS: Array<u32> = Array::with_max_entries(65_536, 0);

#[map]
pub static SOCKET_PORTS: Array<u64> = Array::with_max_entries(65_536, 0);

#[map]
pub static SERVICES: Array<ServicePolicy> = Array::with_max_entries(2 * abi::MAX_SERVICES, 0);

#[map]
pub static SERVICE_STATE: Array<ServiceState> = Array::with_max_entries(abi::MAX_SERVICES + 1, 0);

#[map]
pub static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(abi::MAX_SERVICES * abi::COUNTERS_PER_SERVICE, 0);

#[map]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(abi::EVENTS_BYTES, 0);

#[map]
pub static RESERVATIONS: Queue<Reservation> = Queue::with_max_entries(abi::MAX_RESERVATIONS, 0);

/// Where an entry of the ledger is put together for which the stack has no room: by the programs of admission and of delivery alone,
/// which run one after the other on each CPU.
#[map]
pub static NEW_ENTRY: PerCpuArray<LedgerEntry> = PerCpuArray::with_max_entries(1, 0);

#[map]
pub static RATES: LruHashMap<SourceKey, u64> = LruHashMap::with_max_entries(abi::MAX_RATES, 0);

#[map]
pub static RULES_0: LpmTrie<Address, RuleEntry> = LpmTrie::with_max_entries(abi::DEFAULT_MAX_RULES, 0);

#[map]
pub static RULES_1: LpmTrie<Address, RuleEntry> = LpmTrie::with_max_entries(abi::DEFAULT_MAX_RULES, 0);

// No program reads it: it is a place for user space to leave its findings, and pinned with the rest.
#[map]
pub static AUDIT: Array<AuditReport> = Array::with_max_entries(abi::MAX_SERVICES, 0);

#[map]
pub static IN_FORCE: Array<u64> = Array::with_max_entries(1, 0);

// Memory is taken for those that there are.
#[map]
pub static MEMBERS: HashMap<u64, Member> = HashMap::with_max_entries(abi::DEFAULT_MAX_CONNECTIONS, BPF_F_NO_PREALLOC);

#[map]
pub static TAG_SECRET: Array<TagSecret> = Array::with_max_entries(1, 0);

#[map]
pub static FLOWS: Array<u64> = Array::with_max_entries(abi::FLOW_SLOTS, 0);

#[map]
pub static CHALLENGES: Array<Challenge> = Array::with_max_entries(abi::MAX_SERVICES, 0);

/// Offset of `snt_isn` in `struct tcp_request_sock`; 0 where the kernel has no BTF to tell it.
#[unsafe(no_mangle)]
pub static SNT_ISN_OFFSET: Global<u32> = Global::new(0);

// Where fields of the kernel's structures are, in bytes: [`limiter_common::abi::LISTENER_FIELDS`]. All of them are 0 where the kernel has no
// BTF to tell.

/// `struct net *` in `struct sock`, which `struct tcp_sock` begins with.
#[unsafe(no_mangle)]
pub static SOCK_NET: Global<u32> = Global::new(0);

#[unsafe(no_mangle)]
pub static SOCK_RCVBUF: Global<u32> = Global::new(0);

/// In bits, since that is what it has only some of in a byte.
#[unsafe(no_mangle)]
pub static SOCK_USERLOCKS: Global<u32> = Global::new(0);

#[unsafe(no_mangle)]
pub static TCP_WINDOW_CLAMP: Global<u32> = Global::new(0);

/// 0 before kernel 6.6, too.
#[unsafe(no_mangle)]
pub static TCP_SCALING_RATIO: Global<u32> = Global::new(0);

#[unsafe(no_mangle)]
pub static TCP_MAXSEG: Global<u32> = Global::new(0);

#[unsafe(no_mangle)]
pub static NET_TIMESTAMPS: Global<u32> = Global::new(0);

#[unsafe(no_mangle)]
pub static NET_SACK: Global<u32> = Global::new(0);

#[unsafe(no_mangle)]
pub static NET_WINDOW_SCALING: Global<u32> = Global::new(0);

#[unsafe(no_mangle)]
pub static NET_ECN: Global<u32> = Global::new(0);

#[unsafe(no_mangle)]
pub static NET_RMEM: Global<u32> = Global::new(0);

/// Whether programs may read the kernel's memory; 0 where it is locked down to keep its secrets.
#[unsafe(no_mangle)]
pub static READS_KERNEL_MEMORY: Global<u32> = Global::new(0);

/// How long a source's refusals are left out after one was reported, in jiffies.
#[unsafe(no_mangle)]
pub static REPORT_INTERVAL_JIFFIES: Global<u64> = Global::new(0);

/// Cookie of the network namespace whose sockets are counted.
#[unsafe(no_mangle)]
pub static NETNS_COOKIE: Global<u64> = Global::new(0);

/// What an insertion answers (negated) if the key is there already.
pub const EEXIST: i32 = 17;

/// What it answers if there is no room.
pub const E2BIG: i32 = 7;
