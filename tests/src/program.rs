//! The programs of admission by `BPF_PROG_TEST_RUN`: not attached to anything, with maps of its own that nobody else sees.

use std::{
    collections::HashMap,
    net::IpAddr,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use aya::{
    Pod, TestRun as _,
    maps::{
        Array, HashMap as BpfHashMap, Map, MapData, PerCpuArray, Queue, RingBuf,
        lpm_trie::{Key, LpmTrie},
    },
    programs::{CgroupSkb, SchedClassifier, TestRunOptions, TestRunResult, Xdp},
};
use limiter::{
    config::Kernel,
    kernel::{EventLog, Hook, Loaded},
};
use limiter_common::{
    Address, ConnectionKey, Counter, Endpoints, LedgerEntry, ServicePolicy, SourceEntry, SourceKey, TagSecret, abi,
    challenge::Challenge,
    control::{Request, answer, op},
    event::Refusal,
    ledger::{Reservation, reservation_owner},
    policy::{InForce, ServiceState},
    rule::{MAPPED_BITS, RuleEntry},
};

use crate::{
    bpf,
    stack::{self, Chain},
};

/// What the program made of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// `XDP_DROP`, `TC_ACT_SHOT`
    Drop,
    /// `XDP_PASS`, `TC_ACT_UNSPEC`
    Pass,
    /// `XDP_TX`, `TC_ACT_REDIRECT`
    Transmit,
}

/// The programs' time, in nanoseconds of `CLOCK_MONOTONIC`.
///
/// # Panics
/// If the kernel has no such clock; all have.
pub fn now_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec of ours.
    let failed = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    assert_eq!(failed, 0, "this clock is always there");
    time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned()
}

/// The length of the kernel's jiffies, which its coarse clocks move by.
fn tick() -> Duration {
    let mut tick = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec of ours.
    let failed = unsafe { libc::clock_getres(libc::CLOCK_MONOTONIC_COARSE, &raw mut tick) };
    assert_eq!(failed, 0, "this clock is always there");
    Duration::from_nanos(tick.tv_nsec.cast_unsigned())
}

/// One of the programs with its maps.
#[derive(Debug)]
pub struct Program {
    loaded: Loaded,
    hook: Hook,
    out: Vec<u8>,
}

impl Program {
    /// Loads that of XDP anew.
    pub fn load() -> Result<Self> {
        Self::load_for(Hook::Xdp)
    }

    /// Loads one anew.
    pub fn load_for(hook: Hook) -> Result<Self> {
        Self::load_with(hook, 1024)
    }

    /// Loads that of XDP anew, with room for so many connections.
    pub fn load_sized(connections: u32) -> Result<Self> {
        Self::load_with(Hook::Xdp, connections)
    }

    fn load_with(hook: Hook, max_connections: u32) -> Result<Self> {
        let config = Kernel { max_connections, ..Kernel::default() };
        let mut loaded =
            limiter::kernel::load_unpinned(&config, 0).context("can't load the programs; this test needs root")?;
        loaded.load_admission(hook)?;
        Ok(Self { loaded, hook, out: vec![0; 4096] })
    }

    /// Whether the kernel makes a packet of a frame for a test: for TC, it wants the network header to be whole.
    pub fn takes(&self, frame: &[u8]) -> bool {
        let least = match (self.hook, frame.get(12..14)) {
            (Hook::Tc | Hook::TcL3, Some([0x08, 0x00])) => 34,
            (Hook::Tc | Hook::TcL3, Some([0x86, 0xdd])) => 54,
            _ => 14,
        };
        frame.len() >= least
    }

    /// Runs it once and returns what it decided and the frame that it left.
    pub fn run(&mut self, frame: &[u8]) -> Result<(Action, &[u8])> {
        let result = test_run(
            &self.loaded,
            self.hook,
            TestRunOptions {
                data_in: Some(frame),
                data_out: Some(&mut self.out),
                repeat: 1,
                ..TestRunOptions::default()
            },
        )?;
        let action = match (self.hook, result.return_value.cast_signed()) {
            (Hook::Xdp, 1) | (Hook::Tc | Hook::TcL3, 2) => Action::Drop,
            (Hook::Xdp, 2) | (Hook::Tc | Hook::TcL3, -1) => Action::Pass,
            (Hook::Xdp, 3) | (Hook::Tc | Hook::TcL3, 7) => Action::Transmit,
            (_, other) => bail!("the program answered {other}"),
        };
        Ok((action, &self.out[..result.data_size_out as usize]))
    }

    /// Runs it once, for what it does and not for what it decides. Any number of threads may at a time.
    pub fn touch(&self, frame: &[u8]) -> Result<()> {
        test_run(
            &self.loaded,
            self.hook,
            TestRunOptions { data_in: Some(frame), repeat: 1, ..TestRunOptions::default() },
        )?;
        Ok(())
    }

    /// Runs it so many times on one frame and returns the nanoseconds that one run takes, as the kernel measures it.
    pub fn time(&self, frame: &[u8], repeat: u32) -> Result<u128> {
        let options = TestRunOptions { data_in: Some(frame), repeat, ..TestRunOptions::default() };
        let result = test_run(&self.loaded, self.hook, options)?;
        Ok(result.duration.as_nanos())
    }

    /// How many instructions the verifier has looked at before it took the program.
    pub fn verified_instructions(&self) -> Result<u32> {
        let program = self.loaded.programs.program(self.hook.program()).context("no such program")?;
        program.info()?.verified_instruction_count().context("this kernel does not tell (5.16)")
    }

    /// Loads the program that sees what is delivered, too. (Kernel 6.17.)
    pub fn load_delivery(&mut self) -> Result<()> {
        let program = self.loaded.programs.program_mut(abi::PROGRAM_DELIVERY).context("no such program")?;
        let program: &mut CgroupSkb = program.try_into()?;
        Ok(program.load()?)
    }

    /// The chain of calls of each loaded program that takes the most of the stack, by the program's name.
    pub fn deepest_chains(&self) -> Result<Vec<(String, Chain)>> {
        let programs = self.loaded.programs.programs();
        // What is not loaded is none of this hook's.
        let loaded = programs.filter_map(|(name, program)| Some((name, program.fd().ok()?)));
        loaded.map(|(name, fd)| Ok((name.to_owned(), stack::deepest(&fd.as_fd())?))).collect()
    }

    /// Puts a service on a port.
    pub fn set_service(&mut self, index: u16, port: u16, policy: &ServicePolicy) -> Result<()> {
        self.array::<ServicePolicy>(abi::MAP_SERVICES)?.set(u32::from(index), policy, 0)?;
        self.array::<u32>(abi::MAP_PORTS)?.set(u32::from(port), u32::from(index) + 1, 0)?;
        Ok(())
    }

    /// Puts a connection into the ledger, with everything that counts it.
    pub fn add_connection(&mut self, ends: &Endpoints, source: &SourceKey) -> Result<()> {
        self.enter(ends, source, 1, 1)
    }

    /// Reserves a slot for a connection, as if its handshake had completed at that time, and it were the youngest.
    pub fn reserve(&mut self, ends: &Endpoints, source: &SourceKey, opened_ns: u64) -> Result<()> {
        let owner = reservation_owner(opened_ns);
        self.enter(ends, source, owner, opened_ns)?;
        self.set_state(source.service, |state| state.unconfirmed += 1)?;
        let key = ends.key(&self.array::<TagSecret>(abi::MAP_TAG_SECRET)?.get(&0, 0)?);
        let queue = self.loaded.programs.map_mut(abi::MAP_RESERVATIONS).context("no reservations")?;
        let mut queue: Queue<&mut MapData, Reservation> = queue.try_into()?;
        Ok(queue.push(Reservation { key, reserved: 0, owner, opened_ns }, 0)?)
    }

    fn enter(&mut self, ends: &Endpoints, source: &SourceKey, owner: u64, opened_ns: u64) -> Result<()> {
        let entry = LedgerEntry {
            owner,
            opened_ns,
            source: *source,
            flags: 0,
            wide_prefix: 0,
            local_port: ends.local_port,
            remote: ends.remote,
            local: ends.local,
            netns: ends.netns,
        };
        let secret = self.array::<TagSecret>(abi::MAP_TAG_SECRET)?.get(&0, 0)?;
        self.hash::<ConnectionKey, LedgerEntry>(abi::MAP_LEDGER)?.insert(ends.key(&secret), entry, 0)?;
        let first = self.count_at(source)? == 1;
        let mut states = self.array::<ServiceState>(abi::MAP_SERVICE_STATE)?;
        let mut state = states.get(&u32::from(source.service), 0)?;
        state.connections += 1;
        state.sources += u64::from(first);
        states.set(u32::from(source.service), state, 0)?;
        let mut all = states.get(&abi::ALL_SERVICES, 0)?;
        all.connections += 1;
        states.set(abi::ALL_SERVICES, all, 0)?;
        Ok(())
    }

    /// Puts connections into the ledger of which each is its source's only one.
    pub fn fill(&mut self, connections: impl Iterator<Item = (Endpoints, SourceKey)>) -> Result<()> {
        let secret = self.array::<TagSecret>(abi::MAP_TAG_SECRET)?.get(&0, 0)?;
        let (mut keys, mut entries) = (Vec::new(), Vec::new());
        let (mut sources, mut counts) = (Vec::new(), Vec::new());
        for (ends, source) in connections {
            keys.push(ends.key(&secret));
            entries.push(LedgerEntry {
                owner: 1,
                opened_ns: 1,
                source,
                flags: 0,
                wide_prefix: 0,
                local_port: ends.local_port,
                remote: ends.remote,
                local: ends.local,
                netns: ends.netns,
            });
            sources.push(source);
            counts.push(SourceEntry { connections: 1, key: source, ..SourceEntry::default() });
        }
        bpf::fill_map(self.map(abi::MAP_LEDGER)?, &keys, &entries)?;
        bpf::fill_map(self.map(abi::MAP_SOURCES)?, &sources, &counts)
    }

    /// How many bytes the kernel charges for a map.
    pub fn memory_bytes(&self, name: &'static str) -> Result<u64> {
        let info = std::fs::read_to_string(format!("/proc/thread-self/fdinfo/{}", self.map(name)?.as_raw_fd()))?;
        let line = info.lines().find_map(|line| line.strip_prefix("memlock:"));
        Ok(line.context("the kernel tells")?.trim().parse()?)
    }

    /// The descriptor of one of the hash maps.
    fn map(&self, name: &'static str) -> Result<BorrowedFd<'_>> {
        match self.loaded.programs.map(name) {
            Some(Map::HashMap(map)) => Ok(map.fd().as_fd()),
            _ => bail!("no hash map {name}"),
        }
    }

    /// Adds a connection to a source alone, as for one of the wider tier, and returns how many it holds then.
    pub fn count_at(&mut self, source: &SourceKey) -> Result<u64> {
        let mut sources = self.hash::<SourceKey, SourceEntry>(abi::MAP_SOURCES)?;
        let known = sources.get(source, 0).unwrap_or(SourceEntry { key: *source, ..SourceEntry::default() });
        let connections = known.connections + 1;
        sources.insert(source, SourceEntry { connections, ..known }, 0)?;
        Ok(connections)
    }

    /// Has user space's program take a connection out of the ledger, if its entry has that owner. Whether it did.
    pub fn release(&self, ends: &Endpoints, owner: u64) -> Result<bool> {
        let request = Request {
            op: op::RELEASE,
            counter: Counter::ClosedSocket as u32,
            owner,
            connection: *ends,
            ..Request::default()
        };
        let program = self.loaded.programs.program(abi::PROGRAM_CONTROL).context("no such program")?;
        let options =
            TestRunOptions { data_in: Some(bytemuck::bytes_of(&request)), repeat: 1, ..TestRunOptions::default() };
        match <&Xdp>::try_from(program)?.test_run(options)?.return_value {
            answer::DONE => Ok(true),
            answer::NOT_THERE => Ok(false),
            other => bail!("the control program answered {other}"),
        }
    }

    /// The number that stands for a connection among those known to have an entry, and its place there.
    pub fn flow(&mut self, ends: &Endpoints) -> Result<(u64, u32)> {
        let secret = self.array::<TagSecret>(abi::MAP_TAG_SECRET)?.get(&0, 0)?;
        let flow = ends.key(&secret).flow(&secret);
        Ok((flow, abi::flow_slot(flow)))
    }

    /// The number at a place among the connections known to have an entry; 0 if there is none.
    pub fn flow_at(&mut self, slot: u32) -> Result<u64> {
        Ok(self.array::<u64>(abi::MAP_FLOWS)?.get(&slot, 0)?)
    }

    /// Gives a source a bucket of new connections.
    pub fn set_bucket(&mut self, source: &SourceKey, word: u64) -> Result<()> {
        Ok(self.hash::<SourceKey, u64>(abi::MAP_RATES)?.insert(source, word, 0)?)
    }

    /// The word of a source's bucket of new connections, if it has one.
    pub fn bucket(&mut self, source: &SourceKey) -> Result<Option<u64>> {
        Ok(self.hash::<SourceKey, u64>(abi::MAP_RATES)?.get(source, 0).ok())
    }

    /// Puts a rule in force for a prefix in its own family, and returns it as it lies in the map.
    pub fn set_rule(&mut self, network: IpAddr, prefix: u8, rule: RuleEntry) -> Result<RuleEntry> {
        let length = if network.is_ipv4() { prefix + MAPPED_BITS } else { prefix };
        let mut rules: LpmTrie<&mut MapData, Address, RuleEntry> =
            self.loaded.programs.map_mut(abi::MAP_RULES[0]).context("no rules")?.try_into()?;
        let rule = RuleEntry { length, ..rule };
        rules.insert(&Key::new(length.into(), network.into()), rule, 0)?;
        self.array::<u64>(abi::MAP_IN_FORCE)?.set(0, InForce::default().with_rules(true).0, 0)?;
        Ok(rule)
    }

    /// Every counter that is not zero.
    pub fn counters(&mut self) -> Result<HashMap<(u16, Counter), u64>> {
        let map: PerCpuArray<&mut MapData, u64> =
            self.loaded.programs.map_mut(abi::MAP_COUNTERS).context("no counters")?.try_into()?;
        let mut counters = HashMap::new();
        for service in 0..8 {
            for counter in Counter::ALL {
                let index = u32::from(service) * abi::COUNTERS_PER_SERVICE + counter as u32;
                let count: u64 = map.get(&index, 0)?.iter().sum();
                if count != 0 {
                    counters.insert((service, counter), count);
                }
            }
        }
        Ok(counters)
    }

    /// Has a service answer SYNs by cookies from so many a second on.
    pub fn set_challenge(&mut self, service: u16, threshold: u32) -> Result<()> {
        let largest_buffer = std::fs::read_to_string("/proc/sys/net/core/rmem_max")?.trim().parse()?;
        self.put_challenge(service, Challenge { threshold, largest_buffer, ..Challenge::default() })
    }

    /// Puts a service where it answers so.
    pub fn put_challenge(&mut self, service: u16, challenge: Challenge) -> Result<()> {
        Ok(self.array::<Challenge>(abi::MAP_CHALLENGES)?.set(u32::from(service), challenge, 0)?)
    }

    /// How that stands.
    pub fn challenge(&mut self, service: u16) -> Result<Challenge> {
        Ok(self.array::<Challenge>(abi::MAP_CHALLENGES)?.get(&u32::from(service), 0)?)
    }

    /// What a service holds.
    pub fn state(&mut self, service: u16) -> Result<ServiceState> {
        Ok(self.array::<ServiceState>(abi::MAP_SERVICE_STATE)?.get(&u32::from(service), 0)?)
    }

    /// Changes what a service holds.
    pub fn set_state(&mut self, service: u16, change: impl FnOnce(&mut ServiceState)) -> Result<()> {
        let mut state = self.state(service)?;
        change(&mut state);
        Ok(self.array::<ServiceState>(abi::MAP_SERVICE_STATE)?.set(u32::from(service), state, 0)?)
    }

    /// What a source holds, if it is there.
    pub fn source(&mut self, key: &SourceKey) -> Result<Option<SourceEntry>> {
        Ok(self.hash::<SourceKey, SourceEntry>(abi::MAP_SOURCES)?.get(key, 0).ok())
    }

    /// Has a source hold so many connections, as if nothing had ever been reported of it.
    pub fn set_source(&mut self, key: &SourceKey, connections: u64) -> Result<()> {
        let entry = SourceEntry { connections, key: *key, ..SourceEntry::default() };
        Ok(self.hash::<SourceKey, SourceEntry>(abi::MAP_SOURCES)?.insert(key, entry, 0)?)
    }

    /// Has the last report of a source's refusals be that much older.
    pub fn age_report(&mut self, key: &SourceKey, by: Duration) -> Result<()> {
        let mut sources = self.hash::<SourceKey, SourceEntry>(abi::MAP_SOURCES)?;
        let mut entry = sources.get(key, 0)?;
        let ticks = by.as_nanos() / tick().as_nanos();
        entry.reported_jiffies = entry.reported_jiffies.wrapping_sub(u64::try_from(ticks)?);
        Ok(sources.insert(key, entry, 0)?)
    }

    /// Another reader of the reported refusals.
    pub fn event_log(&self) -> Result<EventLog> {
        match self.loaded.programs.map(abi::MAP_EVENTS).context("no events")? {
            Map::RingBuf(data) => Ok(EventLog::on(data.fd().as_fd())?),
            _ => bail!("no ring buffer"),
        }
    }

    /// Takes the reported refusals.
    pub fn refusals(&mut self) -> Result<Vec<Refusal>> {
        let mut buffer: RingBuf<&mut MapData> =
            self.loaded.programs.map_mut(abi::MAP_EVENTS).context("no events")?.try_into()?;
        let mut refusals = Vec::new();
        while let Some(record) = buffer.next() {
            anyhow::ensure!(record.len() == size_of::<Refusal>(), "a record of {} bytes", record.len());
            // SAFETY: the length was checked, and every bit pattern is a record.
            refusals.push(unsafe { record.as_ptr().cast::<Refusal>().read_unaligned() });
        }
        Ok(refusals)
    }

    fn array<V: Pod>(&mut self, name: &'static str) -> Result<Array<&mut MapData, V>> {
        Ok(self.loaded.programs.map_mut(name).with_context(|| format!("no map {name}"))?.try_into()?)
    }

    fn hash<K: Pod, V: Pod>(&mut self, name: &'static str) -> Result<BpfHashMap<&mut MapData, K, V>> {
        Ok(self.loaded.programs.map_mut(name).with_context(|| format!("no map {name}"))?.try_into()?)
    }
}

fn test_run(loaded: &Loaded, hook: Hook, options: TestRunOptions<'_>) -> Result<TestRunResult> {
    let program = loaded.programs.program(hook.program()).context("no such program")?;
    Ok(match hook {
        Hook::Xdp => <&Xdp>::try_from(program)?.test_run(options),
        Hook::Tc | Hook::TcL3 => <&SchedClassifier>::try_from(program)?.test_run(options),
    }?)
}
