//! What applies to one address, and what its next SYN gets.
//!
//! The verdict is not made up here: it is the control program's, which runs the same function that the XDP program asks at a
//! SYN. Counts and limits are what stands in the maps at that moment.

use std::net::IpAddr;

use limiter_common::{DenyReason, SourceKey, event::Stage, policy::OnFull, rule::Effective};

use super::{
    KernelError, Pinned, RuleInForce, ServiceRow,
    control::Control,
    host, load,
    maps::{Rates, Sources},
    rules::{self, Rules},
    services::Services,
};
use crate::policy::Limits;

/// What applies to an address.
#[derive(Clone, Debug)]
pub struct Explanation {
    /// The address; an IPv4-mapped one is given as IPv4.
    pub ip: IpAddr,
    /// The rule that holds for it, if one does.
    pub rule: Option<RuleInForce>,
    /// Each service, in the order of its index.
    pub services: Vec<ServiceExplanation>,
}

/// What applies to an address at one service.
#[derive(Clone, Debug)]
pub struct ServiceExplanation {
    /// The service, with its own limits and all that it holds.
    pub service: ServiceRow,
    /// The source that the address belongs to, as CIDR.
    pub source: String,
    /// Connections that the source holds.
    pub connections: u64,
    /// The source of the wider tier, as CIDR, and the connections that it holds; `None`: there is no such tier.
    pub wide_source: Option<(String, u64)>,
    /// The limits that hold for the address, rule and all.
    pub limits: Limits,
    /// New connections that the source could open at once now; `None`: any number.
    pub tokens: Option<u64>,
    /// What a SYN gets.
    pub next_syn: SynOutcome,
}

/// What becomes of a SYN, and of the handshake after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SynOutcome {
    /// It passes, and so would its handshake.
    Admitted,
    /// It is refused: the SYN itself, or the handshake.
    Denied(Stage, DenyReason),
    /// It would be refused, and passes because the service only observes.
    Observed(Stage, DenyReason),
}

impl SynOutcome {
    /// The verdict, as in the metrics.
    pub const fn verdict(self) -> &'static str {
        match self {
            Self::Admitted => "admitted",
            Self::Denied(..) => "denied",
            Self::Observed(..) => "observed",
        }
    }

    /// When it is refused and why, if it is.
    pub const fn refusal(self) -> Option<(Stage, DenyReason)> {
        match self {
            Self::Admitted => None,
            Self::Denied(stage, reason) | Self::Observed(stage, reason) => Some((stage, reason)),
        }
    }
}

impl Pinned {
    /// What applies to an address, service by service.
    ///
    /// # Errors
    ///
    /// [`KernelError::Refused`] if the kernel does not take the control program, and what reading the maps can give.
    pub fn explain(&self, ip: IpAddr) -> Result<Explanation, KernelError> {
        let ip = ip.to_canonical();
        let maps = Maps::open(self)?;
        self.end_overdue(&maps.services)?;
        let is_full = self.services()?.iter().map(|service| service.connections).sum::<u64>() >= self.ledger_size();
        let services = self.services()?.into_iter().map(|service| maps.explain(ip, service, is_full));
        Ok(Explanation { ip, rule: maps.rules.holding_shown(ip)?, services: services.collect::<Result<_, _>>()? })
    }
}

struct Maps {
    services: Services,
    sources: Sources,
    rates: Rates,
    rules: Rules,
    control: Control,
}

impl Maps {
    fn open(pinned: &Pinned) -> Result<Self, KernelError> {
        let pins = pinned.pins();
        Ok(Self {
            services: Services::open(pins)?,
            sources: Sources::open(pins)?,
            rates: Rates::open(pins)?,
            rules: Rules::open(pins)?,
            control: Control::new(load::load_control(pins)?),
        })
    }

    fn explain(&self, ip: IpAddr, service: ServiceRow, is_full: bool) -> Result<ServiceExplanation, KernelError> {
        let policy = self.services.policy(service.index)?;
        let rule = self.rules.holding(ip)?;
        let mut limits = service.limits;
        if let Some((_, rule)) = &rule {
            rules::apply(rule, &mut limits);
        }
        // Indexes are below MAX_SERVICES.
        let index = u16::try_from(service.index).unwrap_or(u16::MAX);
        let source = SourceKey::new(index, &ip.into(), policy.ipv4_prefix, policy.ipv6_prefix);
        let wide_source = match policy.wide_prefix(&ip.into()) {
            0 => None,
            prefix => {
                let wide = SourceKey::wide(index, &ip.into(), prefix);
                Some((wide.to_string(), self.sources.held(&wide)?))
            }
        };
        let rate = Effective::new(&policy, rule.as_ref().map(|(_, rule)| rule)).rate;
        let tokens = if rate.is_limited() {
            Some(rate.tokens(self.rates.word(&source)?, rules::nanoseconds(host::monotonic())))
        } else {
            None
        };
        // A service without a port gets no SYN, and refuses none.
        let at_syn = match service.ports.first() {
            Some(&port) => self.control.judge(ip, port)?,
            None => None,
        };
        let observe = service.on_deny == "observe";
        let next_syn = match at_syn {
            Some(reason) if observe => SynOutcome::Observed(Stage::Syn, reason),
            Some(reason) => SynOutcome::Denied(Stage::Syn, reason),
            // Whether there is room is found out when the handshake completes; there, to observe makes no difference.
            None if is_full && policy.on_full == OnFull::Closed as u8 => {
                SynOutcome::Denied(Stage::Handshake, DenyReason::LedgerFull)
            }
            None => SynOutcome::Admitted,
        };
        Ok(ServiceExplanation {
            source: source.to_string(),
            connections: self.sources.held(&source)?,
            wide_source,
            limits,
            tokens,
            next_syn,
            service,
        })
    }
}
