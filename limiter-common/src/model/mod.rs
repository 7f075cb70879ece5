//! The model of admission: what the XDP program decides, in plain Rust over plain data.
//!
//! It is written for the reader, not for the verifier, and shares no code with the program but the keys of the maps. The
//! tests feed both the same packets and compare each verdict and each counter.

mod packet;
mod reply;

pub use packet::{FastOpen, Frame, Segment};
pub use reply::{Grants, reset, syn_ack};

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
};

use crate::{
    Address, Counter, DenyReason, Endpoints, ServicePolicy, SourceKey,
    bucket::Rate,
    event::Stage,
    policy::{OnDeny, OnFull, at_limit},
    rule::{OWN_CONNECTIONS, OWN_RATE, OWN_WIDE_CONNECTIONS, RuleAction, RuleEntry},
};

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It passes as it is.
    Pass,
    /// It is dropped.
    Drop,
    /// It passes as a RST.
    Reset,
    /// It goes back as [`reset`] makes it.
    Answer,
    /// It passes, with this option given a number that the stack does not know.
    PassWithout(FastOpen),
}

/// What the TCP stack knows of the connection that a segment belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handshake {
    /// Nothing, or it is open already.
    None,
    /// It is half open, and the segment acknowledges nothing that was sent.
    Unproven,
    /// It is half open, and the segment completes it.
    Completed,
}

/// Services, and who holds which connections.
#[derive(Clone, Debug, Default)]
pub struct Admission {
    /// The service on each port.
    pub ports: HashMap<u16, u16>,
    /// The limits of each service.
    pub policies: HashMap<u16, ServicePolicy>,
    /// Every connection that is counted, with the sources that it counts against.
    pub ledger: HashMap<Endpoints, Sources>,
    /// How many entries the ledger has room for.
    pub ledger_size: usize,
    /// The word of the bucket of each source that has opened connections.
    pub rates: HashMap<SourceKey, u64>,
    /// The word of the bucket of each service that connections were opened to.
    pub service_rates: HashMap<u16, u64>,
    /// Rules by prefix: an address and how many bits of it count, in its own family.
    pub rules: HashMap<(IpAddr, u8), RuleEntry>,
    /// The time, in nanoseconds.
    pub now_ns: u64,
    /// What was counted.
    pub counters: HashMap<(u16, Counter), u64>,
}

/// What a connection counts against, beside its service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sources {
    /// The source that it is of.
    pub narrow: SourceKey,
    /// That of the wider tier, if there is such a tier.
    pub wide: Option<SourceKey>,
}

impl Sources {
    /// Those of an address.
    pub fn of(service: u16, policy: &ServicePolicy, address: &Address) -> Self {
        let wide = match IpAddr::from(*address) {
            IpAddr::V4(_) => policy.wide_ipv4_prefix,
            IpAddr::V6(_) => policy.wide_ipv6_prefix,
        };
        Self {
            narrow: SourceKey::new(service, address, policy.ipv4_prefix, policy.ipv6_prefix),
            wide: (wide != 0).then(|| SourceKey::wide(service, address, wide)),
        }
    }
}

impl Admission {
    /// Decides on a frame, as if there never were more RSTs than there may be. `stack` tells what the TCP stack knows of a
    /// segment, and is asked only if that matters.
    pub fn admit(&mut self, frame: &[u8], stack: impl FnOnce(&Segment) -> Handshake) -> Verdict {
        let segment = match Frame::parse(frame) {
            Frame::Segment(segment) => segment,
            Frame::Hidden(port) => return self.hidden(port),
            Frame::Other => return Verdict::Pass,
        };
        let Some(&service) = self.ports.get(&segment.local.port()) else { return Verdict::Pass };
        let Some(&policy) = self.policies.get(&service) else { return Verdict::Pass };
        let ends = Endpoints::new(segment.remote, segment.local);
        if segment.asks() {
            match (self.syn(service, &policy, &ends, frame), segment.fast_open) {
                (Verdict::Pass, Some(option)) if policy.on_deny != OnDeny::Observe as u8 => {
                    Verdict::PassWithout(option)
                }
                (verdict, _) => verdict,
            }
        } else if segment.continues() && !self.ledger.contains_key(&ends) {
            match stack(&segment) {
                Handshake::None => Verdict::Pass,
                Handshake::Unproven => {
                    self.count(service, Counter::HandshakeUnproven);
                    Verdict::Pass
                }
                Handshake::Completed => self.handshake(service, &policy, &ends),
            }
        } else {
            Verdict::Pass
        }
    }

    /// What can't be read and is for a service, or for nobody knows which, is dropped. In that case it counts for none, and the first
    /// one decides.
    fn hidden(&mut self, port: Option<u16>) -> Verdict {
        let (service, counter) = match port {
            Some(port) => (self.ports.get(&port).copied(), Counter::HeadersHidden),
            None => (Some(0), Counter::HeadersUnreadable),
        };
        let Some(service) = service else { return Verdict::Pass };
        self.count(service, counter);
        let observe = self.policies.get(&service).is_some_and(|policy| policy.on_deny == OnDeny::Observe as u8);
        if observe { Verdict::Pass } else { Verdict::Drop }
    }

    fn syn(&mut self, service: u16, policy: &ServicePolicy, ends: &Endpoints, frame: &[u8]) -> Verdict {
        let observe = policy.on_deny == OnDeny::Observe as u8;
        let Some(reason) = self.reason(service, policy, ends) else {
            self.count(service, Counter::SynAdmitted);
            return Verdict::Pass;
        };
        self.count(service, Counter::of_refusal(reason, Stage::Syn, observe));
        if observe {
            Verdict::Pass
        } else if policy.on_deny != OnDeny::Reset as u8 {
            Verdict::Drop
        } else if reset(frame).is_some() {
            self.count(service, Counter::ResetSent);
            Verdict::Answer
        } else {
            self.count(service, Counter::ResetSuppressed);
            Verdict::Drop
        }
    }

    fn handshake(&mut self, service: u16, policy: &ServicePolicy, ends: &Endpoints) -> Verdict {
        let observe = policy.on_deny == OnDeny::Observe as u8;
        let reason = self.reason(service, policy, ends);
        if let Some(reason) = reason {
            self.count(service, Counter::of_refusal(reason, Stage::Handshake, observe));
            if !observe {
                return Verdict::Reset;
            }
        }
        if self.ledger.len() >= self.ledger_size {
            if policy.on_full == OnFull::Closed as u8 {
                self.count(service, Counter::HandshakeLedgerFull);
                return Verdict::Reset;
            }
            // It is counted when it is open.
            return Verdict::Pass;
        }
        let sources = Sources::of(service, policy, &ends.remote);
        if let (None, Some(limits)) = (reason, self.limits(policy, ends)) {
            if limits.rate.is_limited() {
                let word = self.rates.entry(sources.narrow).or_default();
                *word = limits.rate.spent(*word, self.now_ns);
            }
            if limits.service_rate.is_limited() {
                let word = self.service_rates.entry(service).or_default();
                *word = limits.service_rate.spent(*word, self.now_ns);
            }
        }
        self.ledger.insert(*ends, sources);
        self.count(service, Counter::OpenedReserved);
        Verdict::Pass
    }

    /// Why one more connection would be one too many, if it would.
    fn reason(&self, service: u16, policy: &ServicePolicy, ends: &Endpoints) -> Option<DenyReason> {
        let Some(limits) = self.limits(policy, ends) else { return Some(DenyReason::Rule) };
        let sources = Sources::of(service, policy, &ends.remote);
        let held = |by: &dyn Fn(&Sources) -> bool| self.ledger.values().filter(|other| by(other)).count() as u64;
        let has_token = |rate: &Rate, word: Option<&u64>| {
            !rate.is_limited() || word.is_none_or(|word| rate.has_token(*word, self.now_ns))
        };
        if at_limit(held(&|other| other.narrow == sources.narrow), limits.per_source) {
            Some(DenyReason::SourceLimit)
        } else if sources.wide.is_some() && at_limit(held(&|other| other.wide == sources.wide), limits.per_wide_source)
        {
            Some(DenyReason::WideSourceLimit)
        } else if at_limit(held(&|other| other.narrow.service == service), limits.total) {
            Some(DenyReason::ServiceLimit)
        } else if at_limit(self.ledger.len() as u64, limits.total_all) {
            Some(DenyReason::TotalLimit)
        } else if !has_token(&limits.rate, self.rates.get(&sources.narrow)) {
            Some(DenyReason::RateLimit)
        } else if !has_token(&limits.service_rate, self.service_rates.get(&service)) {
            Some(DenyReason::ServiceRateLimit)
        } else {
            None
        }
    }

    /// The limits that hold for a client; `None` if a rule denies it.
    fn limits(&self, policy: &ServicePolicy, ends: &Endpoints) -> Option<Limits> {
        let service = Limits {
            per_source: policy.connections_per_source,
            per_wide_source: policy.connections_per_wide_source,
            total: policy.connections_total,
            total_all: policy.connections_total_all,
            rate: policy.rate,
            service_rate: policy.service_rate,
        };
        let ip = ends.remote.into();
        let longest = self
            .rules
            .iter()
            .filter(|((address, prefix), rule)| {
                (rule.expires_ns == 0 || self.now_ns < rule.expires_ns) && contains(*address, *prefix, ip)
            })
            .max_by_key(|((_, prefix), _)| *prefix);
        let Some((_, rule)) = longest else { return Some(service) };
        if rule.action == RuleAction::Deny as u8 {
            return None;
        }
        if rule.action == RuleAction::Allow as u8 {
            return Some(Limits::default());
        }
        let own = |bit| rule.own & bit != 0;
        Some(Limits {
            per_source: if own(OWN_CONNECTIONS) { rule.connections_per_source } else { service.per_source },
            per_wide_source: if own(OWN_WIDE_CONNECTIONS) {
                rule.connections_per_wide_source
            } else {
                service.per_wide_source
            },
            rate: if own(OWN_RATE) { rule.rate } else { service.rate },
            ..service
        })
    }

    /// The sources that hold a connection.
    pub fn sources(&self) -> HashSet<SourceKey> {
        self.ledger.values().map(|sources| sources.narrow).collect()
    }

    fn count(&mut self, service: u16, counter: Counter) {
        *self.counters.entry((service, counter)).or_default() += 1;
    }
}

/// The limits of one service, as they hold for one client; the default is none.
#[derive(Default)]
struct Limits {
    per_source: u32,
    per_wide_source: u32,
    total: u32,
    total_all: u32,
    rate: Rate,
    service_rate: Rate,
}

/// Whether an address is in a prefix of its own family.
fn contains(network: IpAddr, prefix: u8, ip: IpAddr) -> bool {
    let same = |difference: u128, bits: u8| difference.checked_shr(u32::from(bits - prefix)).unwrap_or(0) == 0;
    match (network, ip) {
        (IpAddr::V4(network), IpAddr::V4(ip)) => same((network.to_bits() ^ ip.to_bits()).into(), 32),
        (IpAddr::V6(network), IpAddr::V6(ip)) => same(network.to_bits() ^ ip.to_bits(), 128),
        _ => false,
    }
}
