//! Whether the rules and limits of a service let a client in.
//!
//! Where the service only observes (`on_deny = "observe"`), they let everybody in. Who would have been refused is counted, once and by
//! the first reason, and its session counts like any other, as the kernel's part has it.

use std::mem;

use hyper::HeaderMap;
use tokio::time::Instant;

use super::{
    Shared,
    admission::{Full, Permit},
    answer::Refusal,
    arrival::Endpoints,
    forwarded::Identity,
    proxy_hint,
    route::Route,
};
use crate::policy::{Limits, TooFast};

/// Takes a slot for the session of a client whose request has these headers.
pub(super) fn admit(
    headers: &HeaderMap,
    endpoints: &Endpoints,
    identity: &Identity,
    route: &Route,
    shared: &Shared,
) -> Result<Permit, Refusal> {
    let mut ruling = Ruling { shared, client: identity.ip, is_observed: false };
    // The kernel has seen to those that it sees.
    let is_seen_below = shared.policy.is_kept_below() && identity.ip == endpoints.peer && endpoints.are_seen_below();
    if (!is_seen_below && shared.policy.denies(identity.ip)) || is_offender(identity, route, shared) {
        ruling.against(Refusal::Denied)?;
    }
    // A rule that lets a proxy past the limits is for what it carries, not for a client that it hides.
    let limits = if identity.is_proxy { shared.policy.limits() } else { shared.policy.limits_for(identity.ip) };
    let limits = if route.exempt { limits.lifted() } else { limits };
    let admitted = shared.admission.try_admit(identity.ip, &limits);
    proxy_hint::warn(shared, endpoints, headers, &limits);
    let permit = match admitted {
        Ok(permit) => permit,
        Err(full) => {
            ruling.against(match full {
                Full::Source(limit) => Refusal::SourceFull(limit),
                Full::Service => Refusal::ServiceFull,
                Full::AllServices => Refusal::AllFull,
            })?;
            shared.admission.admit_past(identity.ip, &limits)
        }
    };
    // Who would not have come this far takes no token from those who would.
    if !is_seen_below && !ruling.is_observed {
        // The kernel has counted a proxy's connection as one to the service, whoever the client is.
        let is_counted_below = shared.policy.is_kept_below() && endpoints.are_seen_below();
        let service_connection_rate = if is_counted_below { 0 } else { limits.service_connection_rate };
        let rates = Limits { service_connection_rate, ..limits };
        if let Err(too_fast) = shared.rates.spend(limits.source(identity.ip), &rates) {
            ruling.against(match too_fast {
                TooFast::Source => Refusal::SourceRate,
                TooFast::Service => Refusal::ServiceRate,
            })?;
        }
    }
    Ok(permit)
}

/// What a client is refused for.
struct Ruling<'a> {
    shared: &'a Shared,
    client: std::net::IpAddr,
    /// Whether it would have been refused already.
    is_observed: bool,
}

impl Ruling<'_> {
    /// Refuses it, unless the service only observes; then notes that it would have been.
    fn against(&mut self, refusal: Refusal) -> Result<(), Refusal> {
        if !self.shared.policy.observes() {
            return Err(refusal);
        }
        if !mem::replace(&mut self.is_observed, true) {
            let reason = refusal.label();
            self.shared.metrics.handshake_observed(reason);
            if let Some(left_out) = self.shared.log.admit(reason) {
                tracing::info!(client = %self.client, reason, left_out, "would refuse the handshake");
            }
        }
        Ok(())
    }
}

/// Whether a client's source has broken the rules on messages too often.
fn is_offender(identity: &Identity, route: &Route, shared: &Shared) -> bool {
    (shared.config.messages.deny_after != 0 || route.config.messages.deny_after != 0)
        && shared.offenders.denies(shared.policy.limits().source(identity.ip), Instant::now())
}
