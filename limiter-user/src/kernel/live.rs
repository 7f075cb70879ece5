//! The policy that the gateway asks when the kernel's part is attached: the limits are those in the kernel's maps, and
//! connections that the gateway gives up leave the ledger.

use std::{
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use super::{
    KernelError,
    control::Control,
    pins::Pins,
    rules::{Rules, apply, is_allow, is_deny},
    services::Services,
    users,
};
use crate::{
    config::OnDeny,
    policy::{Action, Cidr, Connection, Limits, Policy, Rule, Source},
};

/// How many times as long as it took to look for rules that have ended it is not done again: with a great many rules it takes a
/// good part of a second, and whoever offends on purpose decides how often somebody is denied.
const SWEEP_PAUSE: u32 = 20;

/// One service's policy, read anew at every question.
#[derive(Debug)]
pub struct LivePolicy {
    services: Services,
    rules: Rules,
    denials: Mutex<Denials>,
    index: u32,
    control: Arc<Control>,
    /// What to go by should the map not be readable.
    last: Mutex<Limits>,
}

/// The rules, for changes.
#[derive(Debug)]
struct Denials {
    rules: Rules,
    /// When those that have ended are looked for again.
    sweep_at: Instant,
}

impl Denials {
    /// Denies a prefix that has no rule, until then.
    fn deny(&mut self, cidr: Cidr, expires: Option<SystemTime>) -> Result<(), KernelError> {
        let begin = Instant::now();
        if begin >= self.sweep_at {
            self.rules.remove_ended()?;
            self.sweep_at = Instant::now() + begin.elapsed() * SWEEP_PAUSE;
        }
        self.rules.set(&Rule { expires, ..Rule::new(cidr, Action::Deny) }, false)
    }
}

impl LivePolicy {
    /// The policy of the service of that index, which has these limits now.
    pub(super) fn new(pins: &Pins, index: u32, limits: Limits, control: Arc<Control>) -> Result<Self, KernelError> {
        Ok(Self {
            services: Services::open(pins)?,
            rules: Rules::open(pins)?,
            denials: Mutex::new(Denials { rules: Rules::open(pins)?, sweep_at: Instant::now() }),
            index,
            control,
            last: Mutex::new(limits),
        })
    }
}

impl Policy for LivePolicy {
    fn limits(&self) -> Limits {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match self.services.get(self.index) {
            Ok(Some(service)) => *last = service.limits,
            Ok(None) => {}
            Err(error) => tracing::warn!(%error, "can't read the limits in force; going by the last ones"),
        }
        *last
    }

    fn limits_for(&self, client: IpAddr) -> Limits {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        // Limits and rule of one policy, as the programs have them.
        match self.services.with_rule(self.index, &self.rules, client) {
            Ok((service, rule)) => {
                if let Some(service) = service {
                    *last = service.limits;
                }
                let mut limits = *last;
                if let Some(rule) = rule {
                    apply(&rule, &mut limits);
                }
                limits
            }
            Err(error) => {
                tracing::warn!(%error, "can't read the limits in force for a client; going by the service's last ones");
                *last
            }
        }
    }

    fn denies(&self, client: IpAddr) -> bool {
        match self.rules.holding(client) {
            Ok(found) => found.is_some_and(|(_, rule)| is_deny(&rule)),
            Err(error) => {
                tracing::warn!(%error, "can't look up the rule for a client; it is not taken for denied");
                false
            }
        }
    }

    fn observes(&self) -> bool {
        match self.services.get(self.index) {
            Ok(service) => service.is_some_and(|service| service.on_deny == OnDeny::Observe),
            Err(error) => {
                tracing::warn!(%error, "can't read whether the service only observes; it is taken not to");
                false
            }
        }
    }

    fn authenticated(&self, connection: &Connection, user: &str) {
        let Some(member) = users::member(self.index, user) else { return };
        // One that is not there is not counted, or ends just now.
        if let Err(error) = self.control.count_for_user(connection, member) {
            tracing::warn!(%error, "can't count a connection for its user; it goes on counting for its source");
        }
    }

    fn deny(&self, source: Source, time: Duration) -> bool {
        let Some(cidr) = Cidr::new(source.network, source.prefix) else { return false };
        let denied = match self.rules.holding(source.network) {
            // Somebody has decided that already, and for longer perhaps.
            Ok(Some((_, rule))) if is_allow(&rule) || is_deny(&rule) => return is_deny(&rule),
            Ok(_) => {
                // The configuration bounds the time.
                let expires = SystemTime::now().checked_add(time);
                let mut denials = self.denials.lock().unwrap_or_else(PoisonError::into_inner);
                match denials.rules.get(cidr) {
                    // Of the operator's, for this very source: it would be lost.
                    Ok(Some(_)) => return false,
                    Ok(None) => denials.deny(cidr, expires),
                    Err(error) => Err(error),
                }
            }
            Err(error) => Err(error),
        };
        match denied {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(%error, %source, "can't deny a source in the kernel; the gateway refuses it alone");
                false
            }
        }
    }

    fn closed(&self, connection: &Connection) {
        // It may be gone already: the kernel tells of a socket that closes by itself.
        if let Err(error) = self.control.release(connection.remote, connection.local, connection.cookie) {
            tracing::warn!(%error, "can't take a connection out of the ledger; its slot comes back when its socket closes");
        }
    }
}
