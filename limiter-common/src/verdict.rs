//! Why something is refused, and what is counted. One list for the kernel, the command line, the logs and the metrics.

use crate::event::Stage;

/// Why a connection was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum DenyReason {
    /// The source holds as many connections as it may.
    SourceLimit = 1,
    /// The service holds as many connections as it may.
    ServiceLimit = 2,
    /// The ledger has no room, and the service is to refuse then.
    LedgerFull = 3,
    /// The source opens connections faster than it may.
    RateLimit = 4,
    /// A rule denies it.
    Rule = 5,
    /// The source of the wider tier holds as many connections as it may.
    WideSourceLimit = 6,
    /// All services together hold as many connections as they may.
    TotalLimit = 7,
    /// The service is opened connections to faster than it takes them.
    ServiceRateLimit = 8,
}

impl DenyReason {
    /// All reasons, in the order of their numbers.
    pub const ALL: [Self; 8] = [
        Self::SourceLimit,
        Self::ServiceLimit,
        Self::LedgerFull,
        Self::RateLimit,
        Self::Rule,
        Self::WideSourceLimit,
        Self::TotalLimit,
        Self::ServiceRateLimit,
    ];

    /// The name in metrics, logs and `--json`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::SourceLimit => "source_limit",
            Self::ServiceLimit => "service_limit",
            Self::LedgerFull => "ledger_full",
            Self::RateLimit => "rate_limit",
            Self::Rule => "rule",
            Self::WideSourceLimit => "wide_source_limit",
            Self::TotalLimit => "total_limit",
            Self::ServiceRateLimit => "service_rate_limit",
        }
    }

    /// What it means, as the end of "refused because …".
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::SourceLimit => "its source holds as many connections as it may",
            Self::ServiceLimit => "the service holds as many connections as it may",
            Self::LedgerFull => "the ledger has no room, and on_full is closed",
            Self::RateLimit => "its source opens connections faster than it may",
            Self::Rule => "a rule denies it",
            Self::WideSourceLimit => "its source of the wider tier holds as many connections as it may",
            Self::TotalLimit => "all services together hold as many connections as they may",
            Self::ServiceRateLimit => "connections to the service are opened faster than it takes them",
        }
    }

    /// The reason of that number, if there is one.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::SourceLimit),
            2 => Some(Self::ServiceLimit),
            3 => Some(Self::LedgerFull),
            4 => Some(Self::RateLimit),
            5 => Some(Self::Rule),
            6 => Some(Self::WideSourceLimit),
            7 => Some(Self::TotalLimit),
            8 => Some(Self::ServiceRateLimit),
            _ => None,
        }
    }
}

/// What is counted per service. The number is the counter's place in its service's row of the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum Counter {
    /// SYNs that passed.
    SynAdmitted = 0,
    /// SYNs refused: the source was at its limit.
    SynSourceLimit = 1,
    /// SYNs refused: the service was full.
    SynServiceLimit = 2,
    /// SYNs that would have been refused for their source's limit, and passed because the service only observes.
    SynObservedSourceLimit = 3,
    /// SYNs that would have been refused because the service was full, and passed because it only observes.
    SynObservedServiceLimit = 4,
    /// Handshakes completed past the source's limit, and refused.
    HandshakeSourceLimit = 5,
    /// Handshakes completed while the service was full, and refused.
    HandshakeServiceLimit = 6,
    /// Handshakes refused because the ledger was full.
    HandshakeLedgerFull = 7,
    /// Segments to a half-open connection that acknowledged nothing that we sent: forged, or very late. They pass; the
    /// stack drops them.
    HandshakeUnproven = 8,
    /// Ledger entries made by XDP when a handshake completed.
    OpenedReserved = 9,
    /// Ledger entries made by `sock_ops`, for connections that XDP did not see.
    OpenedUnseen = 10,
    /// Ledger entries removed because the socket closed.
    ClosedSocket = 11,
    /// Ledger entries removed because the gateway had given the connection up.
    ClosedGateway = 12,
    /// Ledger entries removed because the stack did not confirm the connection in time.
    ClosedExpired = 13,
    /// Connections that passed uncounted because the ledger was full.
    LedgerFull = 14,
    /// Refusals that could not be reported because the ring buffer was full.
    EventsLost = 15,
    /// Handshakes that would have been refused for their source's limit, and passed because the service only observes.
    HandshakeObservedSourceLimit = 16,
    /// Handshakes that would have been refused because the service was full, and passed because it only observes.
    HandshakeObservedServiceLimit = 17,
    /// SYNs refused: the source had opened connections too fast.
    SynRateLimit = 18,
    /// SYNs that would have been refused for their source's rate, and passed because the service only observes.
    SynObservedRateLimit = 19,
    /// Handshakes completed past the source's rate, and refused.
    HandshakeRateLimit = 20,
    /// Handshakes that would have been refused for their source's rate, and passed because the service only observes.
    HandshakeObservedRateLimit = 21,
    /// SYNs refused: a rule denies their source.
    SynRule = 22,
    /// SYNs that a rule denies, and that passed because the service only observes.
    SynObservedRule = 23,
    /// Handshakes of sources that a rule denies, refused.
    HandshakeRule = 24,
    /// Handshakes of sources that a rule denies, and that passed because the service only observes.
    HandshakeObservedRule = 25,
    /// Ledger entries made for connections that were open before the limiter was attached.
    OpenedAdopted = 26,
    /// Ledger entries that were missing, and that the audit made.
    OpenedAudit = 27,
    /// Ledger entries of sockets that were gone, which the audit removed.
    ClosedAudit = 28,
    /// Connections cut because they had got past XDP and past their limits.
    CutPastLimit = 29,
    /// Packets laid out so that only the stack could find a TCP header in them: one cut in two by fragments, or behind more
    /// VLAN tags or extension headers than anybody needs. Dropped, or passed where the service only observes.
    HeadersHidden = 30,
    /// Refused SYNs that were answered by a RST.
    ResetSent = 31,
    /// Refused SYNs of a service that answers by a RST, and that were dropped: there had been too many, or there is no right
    /// answer to such a packet.
    ResetSuppressed = 32,
    /// Connections that count against a user from then on, and no longer against their source.
    CountedForUser = 33,
    /// SYNs that were answered by a SYN cookie before the stack saw them.
    SynChallenged = 34,
    /// SYNs refused: the source of the wider tier was at its limit.
    SynWideSourceLimit = 35,
    /// SYNs that would have been refused for their wider source's limit, and passed because the service only observes.
    SynObservedWideSourceLimit = 36,
    /// Handshakes completed past the limit of their wider source, and refused.
    HandshakeWideSourceLimit = 37,
    /// Handshakes that would have been refused for their wider source's limit, and passed because the service only
    /// observes.
    HandshakeObservedWideSourceLimit = 38,
    /// SYNs refused: all services together were full.
    SynTotalLimit = 39,
    /// SYNs that would have been refused for the limit of all services together, and passed because the service only
    /// observes.
    SynObservedTotalLimit = 40,
    /// Handshakes completed while all services together were full, and refused.
    HandshakeTotalLimit = 41,
    /// Handshakes that would have been refused for the limit of all services together, and passed because the service only
    /// observes.
    HandshakeObservedTotalLimit = 42,
    /// SYNs refused: the service was opened connections to faster than it takes them.
    SynServiceRateLimit = 43,
    /// SYNs that would have been refused for the service's rate, and passed because the service only observes.
    SynObservedServiceRateLimit = 44,
    /// Handshakes completed faster than the service takes them, and refused.
    HandshakeServiceRateLimit = 45,
    /// Handshakes that would have been refused for the service's rate, and passed because the service only observes.
    HandshakeObservedServiceRateLimit = 46,
    /// The same as [`Self::HeadersHidden`] where not even the port can be read. These are for nobody knows whom: they stand with the
    /// counters of the first service, whose `on_deny` decides on them, and are shown of none.
    HeadersUnreadable = 47,
    /// Changes of the rules that were refused, because there was no room for all that there would be. User space counts it, and
    /// for no service.
    RulesFull = 48,
    /// Connections that were open and could not be entered at that moment, though there may have been room: other CPUs were in the way.
    LedgerBusy = 49,
}

impl Counter {
    /// All counters, in the order of their numbers.
    pub const ALL: [Self; 50] = [
        Self::SynAdmitted,
        Self::SynSourceLimit,
        Self::SynServiceLimit,
        Self::SynObservedSourceLimit,
        Self::SynObservedServiceLimit,
        Self::HandshakeSourceLimit,
        Self::HandshakeServiceLimit,
        Self::HandshakeLedgerFull,
        Self::HandshakeUnproven,
        Self::OpenedReserved,
        Self::OpenedUnseen,
        Self::ClosedSocket,
        Self::ClosedGateway,
        Self::ClosedExpired,
        Self::LedgerFull,
        Self::EventsLost,
        Self::HandshakeObservedSourceLimit,
        Self::HandshakeObservedServiceLimit,
        Self::SynRateLimit,
        Self::SynObservedRateLimit,
        Self::HandshakeRateLimit,
        Self::HandshakeObservedRateLimit,
        Self::SynRule,
        Self::SynObservedRule,
        Self::HandshakeRule,
        Self::HandshakeObservedRule,
        Self::OpenedAdopted,
        Self::OpenedAudit,
        Self::ClosedAudit,
        Self::CutPastLimit,
        Self::HeadersHidden,
        Self::ResetSent,
        Self::ResetSuppressed,
        Self::CountedForUser,
        Self::SynChallenged,
        Self::SynWideSourceLimit,
        Self::SynObservedWideSourceLimit,
        Self::HandshakeWideSourceLimit,
        Self::HandshakeObservedWideSourceLimit,
        Self::SynTotalLimit,
        Self::SynObservedTotalLimit,
        Self::HandshakeTotalLimit,
        Self::HandshakeObservedTotalLimit,
        Self::SynServiceRateLimit,
        Self::SynObservedServiceRateLimit,
        Self::HandshakeServiceRateLimit,
        Self::HandshakeObservedServiceRateLimit,
        Self::HeadersUnreadable,
        Self::RulesFull,
        Self::LedgerBusy,
    ];

    /// What a refusal is counted in: at the SYN or at the handshake, enforced or only observed.
    #[inline(always)]
    pub const fn of_refusal(reason: DenyReason, stage: Stage, observed: bool) -> Self {
        match (stage, reason, observed) {
            // The ledger is looked at when a handshake completes, and to observe is to let pass.
            (_, DenyReason::LedgerFull, _) => Self::HandshakeLedgerFull,
            (Stage::Syn, DenyReason::SourceLimit, false) => Self::SynSourceLimit,
            (Stage::Syn, DenyReason::SourceLimit, true) => Self::SynObservedSourceLimit,
            (Stage::Syn, DenyReason::ServiceLimit, false) => Self::SynServiceLimit,
            (Stage::Syn, DenyReason::ServiceLimit, true) => Self::SynObservedServiceLimit,
            (Stage::Syn, DenyReason::RateLimit, false) => Self::SynRateLimit,
            (Stage::Syn, DenyReason::RateLimit, true) => Self::SynObservedRateLimit,
            (Stage::Syn, DenyReason::Rule, false) => Self::SynRule,
            (Stage::Syn, DenyReason::Rule, true) => Self::SynObservedRule,
            (Stage::Handshake | Stage::Open, DenyReason::Rule, false) => Self::HandshakeRule,
            (Stage::Handshake | Stage::Open, DenyReason::Rule, true) => Self::HandshakeObservedRule,
            (Stage::Handshake | Stage::Open, DenyReason::SourceLimit, false) => Self::HandshakeSourceLimit,
            (Stage::Handshake | Stage::Open, DenyReason::SourceLimit, true) => Self::HandshakeObservedSourceLimit,
            (Stage::Handshake | Stage::Open, DenyReason::ServiceLimit, false) => Self::HandshakeServiceLimit,
            (Stage::Handshake | Stage::Open, DenyReason::ServiceLimit, true) => Self::HandshakeObservedServiceLimit,
            (Stage::Handshake | Stage::Open, DenyReason::RateLimit, false) => Self::HandshakeRateLimit,
            (Stage::Handshake | Stage::Open, DenyReason::RateLimit, true) => Self::HandshakeObservedRateLimit,
            (Stage::Syn, DenyReason::WideSourceLimit, false) => Self::SynWideSourceLimit,
            (Stage::Syn, DenyReason::WideSourceLimit, true) => Self::SynObservedWideSourceLimit,
            (Stage::Handshake | Stage::Open, DenyReason::WideSourceLimit, false) => Self::HandshakeWideSourceLimit,
            (Stage::Handshake | Stage::Open, DenyReason::WideSourceLimit, true) => {
                Self::HandshakeObservedWideSourceLimit
            }
            (Stage::Syn, DenyReason::TotalLimit, false) => Self::SynTotalLimit,
            (Stage::Syn, DenyReason::TotalLimit, true) => Self::SynObservedTotalLimit,
            (Stage::Handshake | Stage::Open, DenyReason::TotalLimit, false) => Self::HandshakeTotalLimit,
            (Stage::Handshake | Stage::Open, DenyReason::TotalLimit, true) => Self::HandshakeObservedTotalLimit,
            (Stage::Syn, DenyReason::ServiceRateLimit, false) => Self::SynServiceRateLimit,
            (Stage::Syn, DenyReason::ServiceRateLimit, true) => Self::SynObservedServiceRateLimit,
            (Stage::Handshake | Stage::Open, DenyReason::ServiceRateLimit, false) => Self::HandshakeServiceRateLimit,
            (Stage::Handshake | Stage::Open, DenyReason::ServiceRateLimit, true) => {
                Self::HandshakeObservedServiceRateLimit
            }
        }
    }

    /// What [`Self::of_refusal`] puts into this counter: when, why, and whether it was only observed. `None` if it counts
    /// something else.
    pub fn as_refusal(self) -> Option<(Stage, DenyReason, bool)> {
        // The handshake first: a full ledger is found out there.
        [Stage::Handshake, Stage::Syn].into_iter().find_map(|stage| {
            DenyReason::ALL.into_iter().find_map(|reason| {
                [false, true]
                    .into_iter()
                    .find(|&observed| Self::of_refusal(reason, stage, observed) == self)
                    .map(|observed| (stage, reason, observed))
            })
        })
    }

    /// The name in metrics, logs and `--json`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::SynAdmitted => "syn_admitted",
            Self::SynSourceLimit => "syn_source_limit",
            Self::SynServiceLimit => "syn_service_limit",
            Self::SynObservedSourceLimit => "syn_observed_source_limit",
            Self::SynObservedServiceLimit => "syn_observed_service_limit",
            Self::HandshakeSourceLimit => "handshake_source_limit",
            Self::HandshakeServiceLimit => "handshake_service_limit",
            Self::HandshakeLedgerFull => "handshake_ledger_full",
            Self::HandshakeUnproven => "handshake_unproven",
            Self::OpenedReserved => "opened_reserved",
            Self::OpenedUnseen => "opened_unseen",
            Self::ClosedSocket => "closed_socket",
            Self::ClosedGateway => "closed_gateway",
            Self::ClosedExpired => "closed_expired",
            Self::LedgerFull => "ledger_full",
            Self::LedgerBusy => "ledger_busy",
            Self::EventsLost => "events_lost",
            Self::HandshakeObservedSourceLimit => "handshake_observed_source_limit",
            Self::HandshakeObservedServiceLimit => "handshake_observed_service_limit",
            Self::SynRateLimit => "syn_rate_limit",
            Self::SynObservedRateLimit => "syn_observed_rate_limit",
            Self::HandshakeRateLimit => "handshake_rate_limit",
            Self::HandshakeObservedRateLimit => "handshake_observed_rate_limit",
            Self::SynRule => "syn_rule",
            Self::SynObservedRule => "syn_observed_rule",
            Self::HandshakeRule => "handshake_rule",
            Self::HandshakeObservedRule => "handshake_observed_rule",
            Self::OpenedAdopted => "opened_adopted",
            Self::OpenedAudit => "opened_audit",
            Self::ClosedAudit => "closed_audit",
            Self::CutPastLimit => "cut_past_limit",
            Self::HeadersHidden => "headers_hidden",
            Self::ResetSent => "reset_sent",
            Self::ResetSuppressed => "reset_suppressed",
            Self::CountedForUser => "counted_for_user",
            Self::SynChallenged => "syn_challenged",
            Self::SynWideSourceLimit => "syn_wide_source_limit",
            Self::SynObservedWideSourceLimit => "syn_observed_wide_source_limit",
            Self::HandshakeWideSourceLimit => "handshake_wide_source_limit",
            Self::HandshakeObservedWideSourceLimit => "handshake_observed_wide_source_limit",
            Self::SynTotalLimit => "syn_total_limit",
            Self::SynObservedTotalLimit => "syn_observed_total_limit",
            Self::HandshakeTotalLimit => "handshake_total_limit",
            Self::HandshakeObservedTotalLimit => "handshake_observed_total_limit",
            Self::SynServiceRateLimit => "syn_service_rate_limit",
            Self::SynObservedServiceRateLimit => "syn_observed_service_rate_limit",
            Self::HandshakeServiceRateLimit => "handshake_service_rate_limit",
            Self::HandshakeObservedServiceRateLimit => "handshake_observed_service_rate_limit",
            Self::HeadersUnreadable => "headers_unreadable",
            Self::RulesFull => "rules_full",
        }
    }
}

const _: () = assert!(Counter::ALL.len() <= crate::abi::COUNTERS_PER_SERVICE as usize);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_counter_stands_at_its_number() {
        for (place, counter) in Counter::ALL.into_iter().enumerate() {
            assert_eq!(counter as usize, place);
        }
    }

    #[test]
    fn each_counter_of_a_refusal_says_which() {
        assert_eq!(Counter::SynAdmitted.as_refusal(), None);
        assert_eq!(Counter::LedgerFull.as_refusal(), None);
        assert_eq!(Counter::HandshakeLedgerFull.as_refusal(), Some((Stage::Handshake, DenyReason::LedgerFull, false)));
        for reason in DenyReason::ALL {
            for stage in [Stage::Syn, Stage::Handshake] {
                for observed in [false, true] {
                    let counter = Counter::of_refusal(reason, stage, observed);
                    let told = counter.as_refusal().expect("it counts a refusal");
                    assert_eq!(told.1, reason);
                    assert_eq!(counter, Counter::of_refusal(told.1, told.0, told.2));
                }
            }
        }
    }

    #[test]
    fn every_reason_comes_back_from_its_number() {
        for reason in DenyReason::ALL {
            assert_eq!(DenyReason::from_number(reason as u8), Some(reason));
        }
        assert_eq!(DenyReason::from_number(0), None);
        assert_eq!(DenyReason::from_number(u8::MAX), None);
    }
}
