//! `limiter events`.

use std::{
    collections::HashMap,
    net::SocketAddr,
    thread,
    time::{Duration, SystemTime},
};

use ipnet::IpNet;
use limiter_common::Netns;
use serde::Serialize;

use super::{
    Global,
    connections::parse_cidr,
    exit,
    output::{print, printable},
};
use crate::kernel::{Event, EventBatch, EventLog, KernelError, Pinned, monotonic};

/// How often the buffer is looked at. The kernel wakes the one who consumes it, and nobody else.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// How many of the events that are there already come first with `--follow`.
const TAIL_FOLLOWED: usize = 10;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Go on with what comes, until interrupted
    #[arg(long, short)]
    follow: bool,
    /// Of those that are there already, only the last N [default: all; 10 with --follow]
    #[arg(long, short = 'n', value_name = "N")]
    tail: Option<usize>,
    /// Only those of clients with this address or prefix
    #[arg(long, value_name = "CIDR", value_parser = parse_cidr)]
    source: Option<IpNet>,
    /// Print one JSON object per line
    #[arg(long)]
    json: bool,
}

pub(super) fn run(global: &Global, args: &Args) -> anyhow::Result<()> {
    let pin_path = global.pin_path()?;
    let pinned = Pinned::open(&pin_path)?;
    let mut reader = Reader::new(&pinned)?;
    if reader.log.is_full() && pinned.daemon().is_none() {
        exit::complain(
            "the buffer was full, since no daemon reads it: what was refused later is counted and not shown; from now on \
             there is room",
        );
    }
    let mut there = reader.read(&pinned)?;
    there.events.retain(|event| args.wants(event));
    let tail = args.tail.unwrap_or(if args.follow { TAIL_FOLLOWED } else { usize::MAX });
    there.events.drain(..there.events.len().saturating_sub(tail));
    reader.print(&there, args.json)?;
    if !args.follow {
        return Ok(());
    }
    loop {
        thread::sleep(POLL_INTERVAL);
        if !reader.log.is_pinned() {
            return Err(KernelError::NotAttached { pin_path }.into());
        }
        let mut batch = reader.read(&pinned)?;
        batch.events.retain(|event| args.wants(event));
        reader.print(&batch, args.json)?;
    }
}

impl Args {
    fn wants(&self, event: &Event) -> bool {
        self.source.is_none_or(|source| source.contains(&event.remote.ip().to_canonical()))
    }
}

struct Reader {
    log: EventLog,
    /// Names of services by their index.
    names: HashMap<u32, String>,
    /// Names of other network namespaces than that of limiter, as far as they were asked for.
    namespaces: HashMap<Netns, String>,
}

impl Reader {
    fn new(pinned: &Pinned) -> anyhow::Result<Self> {
        Ok(Self { log: pinned.event_log()?, names: HashMap::new(), namespaces: HashMap::new() })
    }

    /// What has come. Where no daemon consumes it, there is room for more afterwards.
    fn read(&mut self, pinned: &Pinned) -> anyhow::Result<EventBatch> {
        let batch = self.log.read();
        if pinned.daemon().is_none() {
            self.log.consume();
        }
        if batch.events.iter().any(|event| !self.names.contains_key(&event.service)) {
            self.names = pinned.services()?.into_iter().map(|row| (row.index, row.name)).collect();
        }
        let others = batch.events.iter().map(|event| event.netns).filter(|netns| !netns.is_own());
        let unknown: Vec<Netns> = others.filter(|netns| !self.namespaces.contains_key(netns)).collect();
        if !unknown.is_empty() {
            self.namespaces.extend(pinned.namespaces(&unknown)?);
        }
        Ok(batch)
    }

    fn print(&self, batch: &EventBatch, json: bool) -> anyhow::Result<()> {
        if batch.lost > 0 {
            exit::complain(&format!("{} events were written over before they were read", batch.lost));
        }
        let clock = Clock::now();
        let mut text = String::new();
        for event in &batch.events {
            let row = Row::new(event, self.names.get(&event.service), self.namespaces.get(&event.netns), &clock);
            text += &if json { serde_json::to_string(&row)? } else { row.text() };
            text.push('\n');
        }
        if text.is_empty() { Ok(()) } else { print(&text) }
    }
}

/// What time it was when the host was booted, as far as that can be said.
struct Clock {
    boot: SystemTime,
}

impl Clock {
    fn now() -> Self {
        Self { boot: SystemTime::now().checked_sub(monotonic()).unwrap_or(SystemTime::UNIX_EPOCH) }
    }
}

#[derive(Serialize)]
struct Row {
    /// By RFC 3339, in UTC.
    time: String,
    service: String,
    /// `denied` or `observed`, as in the metrics.
    verdict: &'static str,
    reason: &'static str,
    /// `syn`, `handshake` or `open`.
    stage: &'static str,
    remote: SocketAddr,
    local: SocketAddr,
    /// The network namespace of its socket, where that is not the one that limiter was attached in.
    #[serde(skip_serializing_if = "Option::is_none")]
    namespace: Option<String>,
    /// Refusals of the same source (or the same service) since the last event, left out.
    unreported: u64,
}

impl Row {
    fn new(event: &Event, service: Option<&String>, namespace: Option<&String>, clock: &Clock) -> Self {
        let time = clock.boot + event.since_boot;
        Self {
            time: humantime::format_rfc3339_millis(time).to_string(),
            service: service.cloned().unwrap_or_else(|| format!("#{}", event.service)),
            verdict: if event.observed { "observed" } else { "denied" },
            reason: event.reason.name(),
            stage: event.stage.name(),
            remote: event.remote,
            local: event.local,
            namespace: namespace.cloned(),
            unreported: event.unreported,
        }
    }

    fn text(&self) -> String {
        let Self { time, service, verdict, reason, stage, remote, local, namespace, unreported } = self;
        let more = if *unreported == 0 { String::new() } else { format!(" ({unreported} more before it)") };
        let service = printable(service);
        let place = namespace.as_ref().map_or_else(String::new, |namespace| format!(" in {}", printable(namespace)));
        format!("{time} {service}: {verdict} {reason} at {stage}: {remote} -> {local}{place}{more}")
    }
}

#[cfg(test)]
mod tests {
    use limiter_common::{DenyReason, event::Stage};

    use super::*;

    #[test]
    fn an_event_is_a_line_of_text_or_of_json() {
        let event = Event {
            since_boot: Duration::from_millis(61_250),
            service: 3,
            reason: DenyReason::SourceLimit,
            stage: Stage::Syn,
            observed: false,
            remote: "192.0.2.7:40000".parse().unwrap(),
            local: "192.0.2.1:8080".parse().unwrap(),
            netns: Netns::OWN,
            unreported: 12,
        };
        let clock = Clock { boot: SystemTime::UNIX_EPOCH };
        let row = Row::new(&event, Some(&"chat".to_owned()), None, &clock);
        assert_eq!(
            row.text(),
            "1970-01-01T00:01:01.250Z chat: denied source_limit at syn: 192.0.2.7:40000 -> 192.0.2.1:8080 (12 more before it)"
        );
        assert_eq!(
            serde_json::to_string(&row).unwrap(),
            r#"{"time":"1970-01-01T00:01:01.250Z","service":"chat","verdict":"denied","reason":"source_limit","stage":"syn","remote":"192.0.2.7:40000","local":"192.0.2.1:8080","unreported":12}"#
        );
        let event = Event { observed: true, unreported: 0, ..event };
        let row = Row::new(&event, None, None, &clock);
        let text = "1970-01-01T00:01:01.250Z #3: observed source_limit at syn: 192.0.2.7:40000 -> 192.0.2.1:8080";
        assert_eq!(row.text(), text);
        let row = Row::new(&event, None, Some(&"web\u{1b}".to_owned()), &clock);
        assert_eq!(row.text(), format!("{text} in web\u{fffd}"));
        assert_eq!(serde_json::to_value(&row).unwrap()["namespace"], "web\u{1b}");
    }
}
