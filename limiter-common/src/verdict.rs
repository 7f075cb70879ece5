//! Why something is refused, and what is counted. One list for the kernel, the command line, the logs and the metrics.

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
}

impl DenyReason {
    /// All reasons, in the order of their numbers.
    pub const ALL: [Self; 3] = [Self::SourceLimit, Self::ServiceLimit, Self::LedgerFull];

    /// The name in metrics, logs and `--json`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::SourceLimit => "source_limit",
            Self::ServiceLimit => "service_limit",
            Self::LedgerFull => "ledger_full",
        }
    }

    /// The reason of that number, if there is one.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::SourceLimit),
            2 => Some(Self::ServiceLimit),
            3 => Some(Self::LedgerFull),
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
}

impl Counter {
    /// All counters, in the order of their numbers.
    pub const ALL: [Self; 18] = [
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
    ];

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
            Self::EventsLost => "events_lost",
            Self::HandshakeObservedSourceLimit => "handshake_observed_source_limit",
            Self::HandshakeObservedServiceLimit => "handshake_observed_service_limit",
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
    fn every_reason_comes_back_from_its_number() {
        for reason in DenyReason::ALL {
            assert_eq!(DenyReason::from_number(reason as u8), Some(reason));
        }
        assert_eq!(DenyReason::from_number(0), None);
        assert_eq!(DenyReason::from_number(u8::MAX), None);
    }
}
