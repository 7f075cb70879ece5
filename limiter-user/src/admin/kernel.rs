//! What the kernel holds, as metrics.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use limiter_common::{Counter, event::Stage};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabel, NoLabelSet},
    metrics::MetricType,
};

use crate::{
    kernel::{KernelError, Pinned, REPAIRS, ServiceRow, Status},
    policy::Action,
};

/// Where the state of the kernel is read from at a scrape.
pub trait KernelState: fmt::Debug + Send + Sync + 'static {
    /// What is in force now. Called from a thread that may block.
    fn status(&self) -> Result<Status, KernelError>;

    /// How many rules there are of each action. Called from a thread that may block; takes long where there are many.
    fn rules(&self) -> Result<Vec<(&'static str, u64)>, KernelError>;
}

impl KernelState for Pinned {
    fn status(&self) -> Result<Status, KernelError> {
        Self::status(self)
    }

    fn rules(&self) -> Result<Vec<(&'static str, u64)>, KernelError> {
        let rules = Self::rules(self)?.all()?;
        let count = |action| rules.iter().filter(|rule| rule.rule.action.name() == action).count() as u64;
        Ok(Action::NAMES.map(|action| (action, count(action))).to_vec())
    }
}

#[derive(Debug)]
pub(super) struct KernelCollector {
    kernel: Arc<dyn KernelState>,
    rules: Mutex<Option<RuleCounts>>,
}

/// Rules, counted at some time.
#[derive(Clone, Debug)]
struct RuleCounts {
    counted: Instant,
    took: Duration,
    by_action: Vec<(&'static str, u64)>,
}

/// Rules are counted again only after so many times as long as it took the last time: a hundred thousand of them must not
/// be walked through at each scrape.
const RULES_PAUSE: u32 = 50;

impl KernelCollector {
    pub(super) fn new(kernel: Arc<dyn KernelState>) -> Self {
        Self { kernel, rules: Mutex::default() }
    }

    fn rules(&self) -> Result<Vec<(&'static str, u64)>, KernelError> {
        let mut last = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(last) = last.as_ref().filter(|last| last.counted.elapsed() < last.took * RULES_PAUSE) {
            return Ok(last.by_action.clone());
        }
        let begin = Instant::now();
        let by_action = self.kernel.rules()?;
        *last = Some(RuleCounts { counted: Instant::now(), took: begin.elapsed(), by_action: by_action.clone() });
        Ok(by_action)
    }
}

impl Collector for KernelCollector {
    fn encode(&self, encoder: DescriptorEncoder) -> fmt::Result {
        let mut writer = Writer(encoder);
        match self.kernel.status().and_then(|status| Ok((status, self.rules()?))) {
            Ok((status, rules)) => {
                writer.gauge("kernel_up", "Whether the kernel's state could be read", [(&[][..], 1)])?;
                write_status(&mut writer, &status)?;
                writer.gauge(
                    "rules",
                    "Rules in force, by what they do",
                    rules.into_iter().map(|(action, count)| ([("action", action)], count)),
                )
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

const RESETS: [(Counter, &str); 2] = [(Counter::ResetSent, "sent"), (Counter::ResetSuppressed, "suppressed")];

/// What completed handshakes came to. Those that were admitted are `connections_opened_total`.
const ACKS_PASSED: (Counter, &str, &str) = (Counter::HandshakeUnproven, "passed", "unproven");
const SYNS_PASSED: (Counter, &str, &str) = (Counter::SynAdmitted, "admitted", "");

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
    writer.gauge("rules_size", "Rules that there is room for", [(&[][..], status.rules_size.into())])?;
    writer.counter(
        "rules_full",
        "Changes of the rules that found no room and changed nothing",
        [(&[][..], status.rules_full)],
    )?;
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
        "connections_per_wide_source_limit",
        "Connections that one source of the wider tier may hold; 0: any number",
        services().map(|service| {
            ([("service", service.name.as_str())], u64::from(service.limits.connections_per_wide_source))
        }),
    )?;
    let over_all = status.services.first().map_or(0, |service| service.limits.connections_total_all);
    writer.gauge(
        "connections_total_all_limit",
        "Connections that all services may hold together; 0: any number",
        [(&[][..], over_all.into())],
    )?;
    writer.gauge(
        "kernel_attached",
        "Interfaces that a program of admission is attached to",
        status
            .interfaces
            .iter()
            .map(|interface| ([("interface", interface.name.as_deref().unwrap_or("")), ("mode", interface.mode)], 1)),
    )?;
    writer.counter(
        "syn",
        "SYNs by what was done with them",
        services().flat_map(|row| outcomes(row, Stage::Syn, SYNS_PASSED)),
    )?;
    writer.gauge(
        "challenging",
        "Whether SYNs are answered by SYN cookies now, before the stack sees them",
        services().map(|row| ([("service", row.name.as_str())], row.challenge.challenging.into())),
    )?;
    writer.counter(
        "syn_challenged",
        "SYNs answered by SYN cookies, before the stack saw them",
        services().map(|row| ([("service", row.name.as_str())], row.counters.get(Counter::SynChallenged))),
    )?;
    writer.counter(
        "resets",
        "Refused SYNs of services that answer by a RST, by whether they got one",
        services().flat_map(|row| {
            RESETS.map(|(counter, result)| {
                ([("service", row.name.as_str()), ("result", result)], row.counters.get(counter))
            })
        }),
    )?;
    writer.counter(
        "ack",
        "Segments that completed a handshake past a limit, or claimed to complete one",
        services().flat_map(|row| outcomes(row, Stage::Handshake, ACKS_PASSED)),
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
    writer.counter(
        "headers_unreadable",
        "The same where not even the port could be read that they are for",
        [(&[][..], status.headers_unreadable)],
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
        "ledger_busy",
        "Connections that were not counted at once because other CPUs were in the way; the audit enters them",
        services().map(|row| ([("service", row.name.as_str())], row.counters.get(Counter::LedgerBusy))),
    )?;
    writer.counter(
        "events_lost",
        "Refusals that were not reported because the ring buffer was full",
        services().map(|row| ([("service", row.name.as_str())], row.counters.get(Counter::EventsLost))),
    )
}

/// What was done at that stage, by verdict and reason: what passed, and each way to be refused.
fn outcomes<'a>(
    service: &'a ServiceRow,
    stage: Stage,
    passed: (Counter, &'static str, &'static str),
) -> impl Iterator<Item = ([Label<'a>; 3], u64)> {
    let refusals = Counter::ALL.into_iter().filter_map(move |counter| {
        let (of, reason, observed) = counter.as_refusal()?;
        (of == stage).then_some((counter, if observed { "observed" } else { "denied" }, reason.name()))
    });
    std::iter::once(passed).chain(refusals).map(|(counter, verdict, reason)| {
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
