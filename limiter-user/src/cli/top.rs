//! `limiter top`.

use std::{
    collections::HashMap,
    fmt::Write as _,
    io::{self, IsTerminal as _},
    thread,
    time::{Duration, Instant},
};

use limiter_common::{Counter, DenyReason};

use super::{
    Global,
    output::{limit, print, table},
};
use crate::kernel::{Pinned, ServiceRow, SourceRow, Status};

/// Clears the screen and goes to its beginning.
const CLEAR: &str = "\x1b[H\x1b[2J";

/// What is shown where the size of the screen is not known.
const DEFAULT_LINES: usize = 24;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Time between two looks
    #[arg(long, short, value_name = "TIME", default_value = "1s", value_parser = humantime::parse_duration)]
    interval: Duration,
    /// End after so many looks; without, when interrupted
    #[arg(long, short = 'n', value_name = "N")]
    count: Option<u64>,
}

pub(super) fn run(global: &Global, args: &Args) -> anyhow::Result<()> {
    let pin_path = global.pin_path()?;
    let screen = io::stdout().is_terminal();
    let mut before: Option<(Instant, Status)> = None;
    let mut looks = 0;
    loop {
        // Opened anew each time: it may have been detached, or attached again.
        let pinned = Pinned::open(&pin_path)?;
        let (now, status) = (Instant::now(), pinned.status()?);
        let since = before.as_ref().map(|(then, status)| (now.duration_since(*then), status));
        let text = text(&status, since, &pinned.sources()?, lines(screen));
        print(&if screen { format!("{CLEAR}{text}") } else { text })?;
        looks += 1;
        if args.count.is_some_and(|count| looks >= count) {
            return Ok(());
        }
        before = Some((now, status));
        thread::sleep(args.interval);
    }
}

/// How many lines there is room for.
fn lines(screen: bool) -> usize {
    // SAFETY: an all-zero size is a valid one.
    let mut size: libc::winsize = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is valid for the call.
    let known = screen && unsafe { libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, &raw mut size) } == 0;
    if known && size.ws_row > 0 { size.ws_row.into() } else { DEFAULT_LINES }
}

/// One look. `before`: the last one, and how long ago it was; the rates are of the time since.
fn text(status: &Status, before: Option<(Duration, &Status)>, sources: &[SourceRow], lines: usize) -> String {
    let daemon = status.daemon.map_or_else(|| "no daemon".to_owned(), |pid| format!("daemon {pid}"));
    let mut text = format!(
        "limiter: {} of {} connections, {} sources, {daemon}, drift {}\n\n",
        status.ledger_entries, status.ledger_size, status.sources, status.drift
    );
    let old: HashMap<&str, &ServiceRow> =
        before.iter().flat_map(|(_, status)| &status.services).map(|row| (row.name.as_str(), row)).collect();
    let rate = |row: &ServiceRow, sum: &dyn Fn(&ServiceRow) -> u64| match (before, old.get(row.name.as_str())) {
        (Some((time, _)), Some(old)) => per_second(sum(row).saturating_sub(sum(old)), time),
        _ => "-".to_owned(),
    };
    let rows = status.services.iter().map(|row| {
        [
            row.name.clone(),
            row.connections.to_string(),
            limit(row.limits.connections_total),
            rate(row, &opened),
            rate(row, &refused),
            reasons(row, old.get(row.name.as_str()).copied()),
        ]
    });
    text += &table(["SERVICE", "CONNECTIONS", "LIMIT", "OPENED/S", "REFUSED/S", "FOR"], &[1, 2, 3, 4], rows);
    let room = lines.saturating_sub(text.lines().count() + 3);
    let rows = sources
        .iter()
        .take(room)
        .map(|row| [row.service.clone(), row.source.clone(), row.connections.to_string(), limit(row.limit)]);
    // A String takes whatever is written to it.
    let _ = write!(text, "\n{}", table(["SERVICE", "SOURCE", "CONNECTIONS", "LIMIT"], &[2, 3], rows));
    text
}

fn opened(row: &ServiceRow) -> u64 {
    [Counter::OpenedReserved, Counter::OpenedUnseen].map(|counter| row.counters.get(counter)).iter().sum()
}

fn refused(row: &ServiceRow) -> u64 {
    DenyReason::ALL.into_iter().map(|reason| refused_for(row, reason)).sum()
}

fn refused_for(row: &ServiceRow, wanted: DenyReason) -> u64 {
    let counts = |counter: &Counter| counter.as_refusal().is_some_and(|(_, reason, seen)| reason == wanted && !seen);
    Counter::ALL.into_iter().filter(counts).map(|counter| row.counters.get(counter)).sum()
}

/// The reasons of the refusals since the last look, the most frequent first.
fn reasons(row: &ServiceRow, old: Option<&ServiceRow>) -> String {
    let Some(old) = old else { return "-".to_owned() };
    let mut reasons: Vec<_> = DenyReason::ALL
        .into_iter()
        .map(|reason| (refused_for(row, reason).saturating_sub(refused_for(old, reason)), reason.name()))
        .filter(|(count, _)| *count > 0)
        .collect();
    reasons.sort_by_key(|(count, _)| std::cmp::Reverse(*count));
    if reasons.is_empty() {
        "-".to_owned()
    } else {
        reasons.iter().map(|(_, name)| *name).collect::<Vec<_>>().join(", ")
    }
}

fn per_second(count: u64, time: Duration) -> String {
    let milliseconds = time.as_millis().max(1);
    (u128::from(count) * 1000 / milliseconds).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        kernel::{ChallengeRow, Counters},
        policy::Limits,
    };

    fn status(counters: &[(&'static str, u64)]) -> Status {
        Status {
            pin_path: "/p".into(),
            abi: 1,
            daemon: Some(7),
            accounting: "socket",
            counts_on_delivery: None,
            interfaces: Vec::new(),
            syncookies_before: None,
            timestamps_before: None,
            services: vec![ServiceRow {
                index: 0,
                name: "chat".into(),
                ports: vec![8080],
                socket_ports: vec![8080],
                namespaces: "host",
                on_deny: "drop",
                limits: Limits::default(),
                challenge: ChallengeRow::default(),
                connections: 3,
                counters: Counters(counters.iter().copied().collect()),
            }],
            ledger_entries: 3,
            ledger_size: 1000,
            sources: 2,
            audited: None,
            drift: 0,
            rules_size: 500,
            rules_full: 0,
            headers_unreadable: 0,
            repairs: 0,
        }
    }

    #[test]
    fn a_look_shows_rates_since_the_last_one_and_as_many_sources_as_there_is_room_for() {
        let sources: Vec<_> = (1..=30)
            .map(|host| SourceRow {
                service: "chat".into(),
                source: format!("192.0.2.{host}/32"),
                tier: "narrow",
                connections: 31 - host,
                limit: 20,
                exceptions: Vec::new(),
            })
            .collect();
        let before = status(&[("opened_reserved", 10), ("syn_source_limit", 100), ("syn_rule", 5)]);
        let now = status(&[("opened_reserved", 14), ("syn_source_limit", 104), ("syn_rule", 65)]);
        let shown = text(&now, Some((Duration::from_secs(2), &before)), &sources, 9);
        assert_eq!(
            shown,
            "limiter: 3 of 1000 connections, 2 sources, daemon 7, drift 0\n\n\
             SERVICE  CONNECTIONS  LIMIT  OPENED/S  REFUSED/S  FOR\n\
             chat               3  10000         2         32  rule, source_limit\n\n\
             SERVICE  SOURCE        CONNECTIONS  LIMIT\n\
             chat     192.0.2.1/32           30     20\n\
             chat     192.0.2.2/32           29     20\n"
        );
        let first = text(&now, None, &[], 24);
        assert!(first.contains("chat               3  10000         -          -  -\n"), "{first}");
    }
}
