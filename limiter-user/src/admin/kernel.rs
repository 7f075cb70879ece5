//! What the kernel holds, as metrics.

use std::{fmt, sync::Arc};

use limiter_common::Counter;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabel, NoLabelSet},
    metrics::MetricType,
};

use crate::kernel::{KernelError, Pinned, REPAIRS, ServiceRow, Status};

/// Where the state of the kernel is read from at a scrape.
pub trait KernelState: fmt::Debug + Send + Sync + 'static {
    /// What is in force now. Called from a thread that may block.
    fn status(&self) -> Result<Status, KernelError>;
}

impl KernelState for Pinned {
    fn status(&self) -> Result<Status, KernelError> {
        Self::status(self)
    }
}

#[derive(Debug)]
pub(super) struct KernelCollector {
    kernel: Arc<dyn KernelState>,
}

impl KernelCollector {
    pub(super) fn new(kernel: Arc<dyn KernelState>) -> Self {
        Self { kernel }
    }
}

impl Collector for KernelCollector {
    fn encode(&self, encoder: DescriptorEncoder) -> fmt::Result {
        let mut writer = Writer(encoder);
        match self.kernel.status() {
            Ok(status) => {
                writer.gauge("kernel_up", "Whether the kernel's state could be read", [(&[][..], 1)])?;
                write_status(&mut writer, &status)
            }
            Err(error) => {
                tracing::warn!(%error, "can't read the kernel's state for a scrape");
                writer.gauge("kernel_up", "Whether the kernel's state could be read", [(&[][..], 0)])
            }
        }
    }
}

/// A label and its value.
type Label<'a> = (&'static str, &'a str);

/// How a refused, observed or admitted packet is labelled: verdict and reason.
type Outcome = (Counter, &'static str, &'static str);

const SYNS: [Outcome; 9] = [
    (Counter::SynAdmitted, "admitted", ""),
    (Counter::SynSourceLimit, "denied", "source_limit"),
    (Counter::SynServiceLimit, "denied", "service_limit"),
    (Counter::SynRateLimit, "denied", "rate_limit"),
    (Counter::SynRule, "denied", "rule"),
    (Counter::SynObservedSourceLimit, "observed", "source_limit"),
    (Counter::SynObservedServiceLimit, "observed", "service_limit"),
    (Counter::SynObservedRateLimit, "observed", "rate_limit"),
    (Counter::SynObservedRule, "observed", "rule"),
];

/// What completed handshakes came to. Those that were admitted are `connections_opened_total`.
const ACKS: [Outcome; 10] = [
    (Counter::HandshakeSourceLimit, "denied", "source_limit"),
    (Counter::HandshakeServiceLimit, "denied", "service_limit"),
    (Counter::HandshakeRateLimit, "denied", "rate_limit"),
    (Counter::HandshakeRule, "denied", "rule"),
    (Counter::HandshakeLedgerFull, "denied", "ledger_full"),
    (Counter::HandshakeObservedSourceLimit, "observed", "source_limit"),
    (Counter::HandshakeObservedServiceLimit, "observed", "service_limit"),
    (Counter::HandshakeObservedRateLimit, "observed", "rate_limit"),
    (Counter::HandshakeObservedRule, "observed", "rule"),
    (Counter::HandshakeUnproven, "passed", "unproven"),
];

const OPENED: [(Counter, &str); 4] = [
    (Counter::OpenedReserved, "xdp"),
    (Counter::OpenedUnseen, "sock_ops"),
    (Counter::OpenedAdopted, "adopted"),
    (Counter::OpenedAudit, "audit"),
];

const CLOSED: [(Counter, &str); 4] = [
    (Counter::ClosedSocket, "socket"),
    (Counter::ClosedGateway, "gateway"),
    (Counter::ClosedExpired, "expired"),
    (Counter::ClosedAudit, "audit"),
];

fn write_status(writer: &mut Writer, status: &Status) -> fmt::Result {
    let services = || status.services.iter();
    writer.gauge(
        "connections",
        "Connections in the ledger",
        services().map(|service| ([("service", service.name.as_str())], service.connections)),
    )?;
    writer.gauge("sources", "Sources that hold a connection", [(&[][..], status.sources)])?;
    writer.gauge("ledger_size", "Connections that the ledger has room for", [(&[][..], status.ledger_size.into())])?;
    writer.gauge(
        "connections_per_source_limit",
        "Connections that one source may hold; 0: any number",
        services()
            .map(|service| ([("service", service.name.as_str())], u64::from(service.limits.connections_per_source))),
    )?;
    writer.gauge(
        "connections_total_limit",
        "Connections that the service may hold; 0: any number",
        services().map(|service| ([("service", service.name.as_str())], service.limits.connections_total.into())),
    )?;
    writer.gauge(
        "kernel_attached",
        "Interfaces that the XDP program is attached to",
        status
            .interfaces
            .iter()
            .map(|interface| ([("interface", interface.name.as_deref().unwrap_or("")), ("mode", interface.mode)], 1)),
    )?;
    writer.counter("syn", "SYNs by what was done with them", services().flat_map(|row| outcomes(row, &SYNS)))?;
    writer.counter(
        "ack",
        "Segments that completed a handshake past a limit, or claimed to complete one",
        services().flat_map(|row| outcomes(row, &ACKS)),
    )?;
    writer.counter(
        "connections_opened",
        "Ledger entries made, by what made them",
        services().flat_map(|row| {
            OPENED.map(|(counter, by)| ([("service", row.name.as_str()), ("by", by)], row.counters.get(counter)))
        }),
    )?;
    writer.counter(
        "connections_closed",
        "Ledger entries removed, by what ended them",
        services().flat_map(|row| {
            CLOSED.map(|(counter, reason)| {
                ([("service", row.name.as_str()), ("reason", reason)], row.counters.get(counter))
            })
        }),
    )?;
    writer.counter(
        "connections_cut",
        "Connections closed because they had got past XDP and past their limits",
        services().map(|row| ([("service", row.name.as_str())], row.counters.get(Counter::CutPastLimit))),
    )?;
    writer.counter(
        "headers_hidden",
        "Packets laid out so that only the stack could find a TCP header in them",
        services().map(|row| ([("service", row.name.as_str())], row.counters.get(Counter::HeadersHidden))),
    )?;
    writer.gauge(
        "ledger_drift",
        "By how much counts and ledger entries differed at the last audit; should be 0",
        [(&[][..], status.drift)],
    )?;
    writer.counter(
        "ledger_repairs",
        "Ledger entries that the audit has made or removed; should be 0",
        services().flat_map(|row| {
            REPAIRS.map(|(counter, kind)| ([("service", row.name.as_str()), ("kind", kind)], row.counters.get(counter)))
        }),
    )?;
    writer.counter(
        "ledger_full",
        "Connections that passed uncounted because the ledger was full",
        services().map(|row| ([("service", row.name.as_str())], row.counters.get(Counter::LedgerFull))),
    )?;
    writer.counter(
        "events_lost",
        "Refusals that were not reported because the ring buffer was full",
        services().map(|row| ([("service", row.name.as_str())], row.counters.get(Counter::EventsLost))),
    )
}

fn outcomes<'a>(service: &'a ServiceRow, outcomes: &'a [Outcome]) -> impl Iterator<Item = ([Label<'a>; 3], u64)> {
    outcomes.iter().map(|&(counter, verdict, reason)| {
        let labels = [("service", service.name.as_str()), ("verdict", verdict), ("reason", reason)];
        (labels, service.counters.get(counter))
    })
}

/// Writes metrics whose labels are known only at the scrape.
struct Writer<'a>(DescriptorEncoder<'a>);

impl Writer<'_> {
    fn gauge<'l, L: AsRef<[Label<'l>]>>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (L, u64)>,
    ) -> fmt::Result {
        let mut metric = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (labels, value) in samples {
            // A gauge is signed; no map has room for 2^63 entries.
            let value = i64::try_from(value).unwrap_or(i64::MAX);
            match labels.as_ref() {
                // An empty family would be written as `{}`.
                [] => metric.encode_gauge(&value)?,
                labels => metric.encode_family(&Labels(labels))?.encode_gauge(&value)?,
            }
        }
        Ok(())
    }

    fn counter<'l, L: AsRef<[Label<'l>]>>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (L, u64)>,
    ) -> fmt::Result {
        let mut metric = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (labels, value) in samples {
            metric.encode_family(&Labels(labels.as_ref()))?.encode_counter::<NoLabelSet, _, u64>(&value, None)?;
        }
        Ok(())
    }
}

#[derive(Debug)]
struct Labels<'a>(&'a [Label<'a>]);

impl prometheus_client::encoding::EncodeLabelSet for Labels<'_> {
    fn encode(&self, encoder: &mut prometheus_client::encoding::LabelSetEncoder) -> fmt::Result {
        self.0.iter().try_for_each(|label| label.encode(encoder.encode_label()))
    }
}
