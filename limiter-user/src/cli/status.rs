//! `limiter status`.

use std::{fmt::Write as _, time::Duration};

use limiter_common::{Counter, DenyReason, event::Stage};
use serde::Serialize;

use super::{
    Global,
    output::{Format, limit, per_source, ports, rate, service_rate, sockets, sources_are, table},
};
use crate::kernel::{AttachedInterface, Pinned, ServiceRow, Status};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    format: Format,
}

pub(super) fn run(global: &Global, args: &Args) -> anyhow::Result<()> {
    let pinned = Pinned::open(&global.pin_path()?)?;
    let (status, rules) = (pinned.status()?, pinned.rules()?.count()?);
    args.format.print(&Document { status: &status, rules }, || text(&status, rules))
}

#[derive(Serialize)]
struct Document<'s> {
    #[serde(flatten)]
    status: &'s Status,
    /// Rules that there are, those among them that have ended and were not removed yet.
    rules: u64,
}

fn text(status: &Status, rules: u64) -> String {
    let daemon = status.daemon.map_or_else(|| "none; the limits stay in force".to_owned(), |pid| format!("pid {pid}"));
    let mut text = format!(
        "Pinned at   {} (layout {})\nDaemon      {daemon}\nAccounting  {}\nLedger      {} of {} connections, {} sources\n\
         Rules       {rules} of {}\nAudit       {}\n\n",
        status.pin_path,
        status.abi,
        status.accounting,
        status.ledger_entries,
        status.ledger_size,
        status.sources,
        status.rules_size,
        audit(status),
    );
    let over_all = status.services.first().map_or(0, |service| service.limits.connections_total_all);
    if over_all != 0 {
        let at = text.len() - 1;
        text.insert_str(
            at,
            &format!("All         {} of {over_all} connections over all services\n", status.ledger_entries),
        );
    }
    text += &elsewhere(status);
    text += &challenge(status);
    let interfaces = status.interfaces.iter().map(interface);
    text += &table(["INTERFACE", "INDEX", "MODE", "HOOK", "WHY"], &[1], interfaces);
    text.push('\n');
    let header = [
        "SERVICE",
        "PORTS",
        "ON DENY",
        "CONNECTIONS",
        "TOTAL LIMIT",
        "PER SOURCE",
        "RATE",
        "SERVICE RATE",
        "SOURCE IS",
    ];
    text += &table(header, &[3, 4, 5], status.services.iter().map(service));

    let refused: Vec<[String; 5]> = status.services.iter().flat_map(refusals).collect();
    if !refused.is_empty() {
        text.push('\n');
        text += &table(["SERVICE", "REFUSED FOR", "SYNS", "HANDSHAKES", "OBSERVED"], &[2, 3, 4], refused);
    }
    let counted: Vec<[String; 3]> = status.services.iter().flat_map(counters).collect();
    if !counted.is_empty() {
        text.push('\n');
        text += &table(["SERVICE", "COUNTER", "VALUE"], &[2], counted);
    }
    if status.headers_unreadable > 0 {
        // A String takes whatever is written to it.
        let _ = writeln!(
            text,
            "\nOf {} packets not even the port could be read that they were for: cut in two within their first bytes, or with more tags or \
             extension headers than anybody needs.",
            status.headers_unreadable
        );
    }
    if status.rules_full > 0 {
        // A String takes whatever is written to it.
        let _ = writeln!(
            text,
            "\nThe rules were full: {} changes found no room and changed nothing. `limiter forget` makes room, or a higher \
             kernel.max_rules when it is attached again after `limiter detach`.",
            status.rules_full
        );
    }
    let uncounted: u64 = status.services.iter().map(|service| service.counters.get(Counter::LedgerFull)).sum();
    if uncounted > 0 {
        // A String takes whatever is written to it.
        let _ = writeln!(
            text,
            "\nThe ledger was full: {uncounted} connections passed uncounted. Raise kernel.max_connections and attach anew."
        );
    }
    text
}

/// Nothing, unless a service has sockets that XDP can't look up.
fn elsewhere(status: &Status) -> String {
    let Some(on_delivery) = status.counts_on_delivery else { return String::new() };
    let when =
        if on_delivery { "when their handshake ends" } else { "when they are open; a daemon cuts those past a limit" };
    let mut text = format!("Elsewhere   sockets are counted {when}\n");
    for row in status.services.iter().filter(|row| row.has_sockets_elsewhere()) {
        // A String takes whatever is written to it.
        let _ = writeln!(text, "            {}: {}", row.name, sockets(row));
    }
    text + "\n"
}

/// Nothing, unless a challenge is configured.
fn challenge(status: &Status) -> String {
    let rows = || status.services.iter().filter(|row| row.challenge.challenge_threshold != 0);
    let Some(first) = rows().next() else { return String::new() };
    let when = match first.challenge.challenge_threshold {
        1 => "always".to_owned(),
        threshold => format!("from {threshold} SYNs a second on"),
    };
    let now: Vec<&str> = rows().filter(|row| row.challenge.challenging).map(|row| row.name.as_str()).collect();
    let now = if now.is_empty() { "no service now".to_owned() } else { format!("now: {}", now.join(", ")) };
    let mut text = format!("Challenge   {when}; {now}\n");
    let settings = [("tcp_syncookies", status.syncookies_before), ("tcp_timestamps", status.timestamps_before)];
    for (name, before) in settings {
        if let Some(before) = before {
            // A String takes whatever is written to it.
            let _ = writeln!(text, "            net.ipv4.{name} is 2 for it, and will be {before} again after detach");
        }
    }
    text + "\n"
}

fn audit(status: &Status) -> String {
    let Some(age) = status.audited else { return "none yet; a daemon does it (limiter run)".to_owned() };
    let age = humantime::format_duration(Duration::from_secs(age.as_secs()));
    format!("{age} ago: drift {}, {} repairs", status.drift, status.repairs)
}

fn interface(interface: &AttachedInterface) -> [String; 5] {
    let name = interface.name.clone().unwrap_or_else(|| "(gone, or in another namespace)".to_owned());
    let why = interface.why.clone().unwrap_or_default();
    [name, interface.index.to_string(), interface.mode.to_owned(), interface.hook.to_owned(), why]
}

fn service(service: &ServiceRow) -> [String; 9] {
    let limits = &service.limits;
    [
        service.name.clone(),
        ports(&service.ports),
        service.on_deny.to_owned(),
        service.connections.to_string(),
        limit(limits.connections_total),
        per_source(limits),
        rate(limits),
        service_rate(limits),
        sources_are(limits),
    ]
}

/// What was refused, by reason. Observed: what would have been.
pub(super) fn refusals(service: &ServiceRow) -> impl Iterator<Item = [String; 5]> + '_ {
    DenyReason::ALL.into_iter().filter_map(|reason| {
        let sum = |stage: Option<Stage>, observed: bool| -> u64 {
            Counter::ALL
                .into_iter()
                .filter(|counter| {
                    counter.as_refusal().is_some_and(|(at, why, seen)| {
                        why == reason && seen == observed && stage.is_none_or(|stage| stage == at)
                    })
                })
                .map(|counter| service.counters.get(counter))
                .sum()
        };
        let sums = [sum(Some(Stage::Syn), false), sum(Some(Stage::Handshake), false), sum(None, true)];
        let [syns, handshakes, observed] = sums.map(|sum| sum.to_string());
        (sums != [0; 3]).then(|| [service.name.clone(), reason.name().to_owned(), syns, handshakes, observed])
    })
}

/// What else has been counted at all, in the order of the counters.
fn counters(service: &ServiceRow) -> impl Iterator<Item = [String; 3]> + '_ {
    Counter::ALL.into_iter().filter(|counter| counter.as_refusal().is_none()).filter_map(|counter| {
        let value = service.counters.get(counter);
        (value > 0).then(|| [service.name.clone(), counter.name().to_owned(), value.to_string()])
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{
        kernel::{ChallengeRow, Counters},
        policy::Limits,
    };

    fn status() -> Status {
        Status {
            pin_path: "/sys/fs/bpf/limiter".into(),
            abi: 1,
            daemon: None,
            accounting: "socket",
            counts_on_delivery: None,
            interfaces: vec![
                AttachedInterface { name: Some("eth0".into()), index: 2, mode: "native", hook: "xdp", why: None },
                AttachedInterface { name: None, index: 77, mode: "tc", hook: "tcx", why: Some("it is taken".into()) },
            ],
            syncookies_before: None,
            timestamps_before: None,
            services: vec![ServiceRow {
                index: 0,
                name: "chat".into(),
                ports: vec![8080, 8443],
                socket_ports: vec![8080, 8443],
                namespaces: "host",
                on_deny: "drop",
                limits: Limits { connections_total: 0, ..Limits::default() },
                challenge: ChallengeRow::default(),
                connections: 3,
                counters: Counters(BTreeMap::from([
                    ("syn_admitted", 5),
                    ("syn_source_limit", 7),
                    ("handshake_source_limit", 1),
                    ("syn_rate_limit", 0),
                    ("handshake_observed_rule", 2),
                    ("syn_observed_rule", 3),
                    ("handshake_ledger_full", 4),
                    ("ledger_full", 2),
                ])),
            }],
            ledger_entries: 3,
            ledger_size: 1000,
            rules_size: 500,
            rules_full: 0,
            sources: 1,
            audited: Some(Duration::from_millis(2700)),
            drift: 0,
            headers_unreadable: 0,
            repairs: 4,
        }
    }

    #[test]
    fn the_text_says_what_is_in_force() {
        let expected = "\
Pinned at   /sys/fs/bpf/limiter (layout 1)
Daemon      none; the limits stay in force
Accounting  socket
Ledger      3 of 1000 connections, 1 sources
Rules       7 of 500
Audit       2s ago: drift 0, 4 repairs

INTERFACE                        INDEX  MODE    HOOK  WHY
eth0                                 2  native  xdp
(gone, or in another namespace)     77  tc      tcx   it is taken

SERVICE  PORTS      ON DENY  CONNECTIONS  TOTAL LIMIT  PER SOURCE  RATE              SERVICE RATE  SOURCE IS
chat     8080,8443  drop               3    unlimited          20  10/s, 20 at once  unlimited     /32 and /64

SERVICE  REFUSED FOR   SYNS  HANDSHAKES  OBSERVED
chat     source_limit     7           1         0
chat     ledger_full      0           4         0
chat     rule             0           0         5

SERVICE  COUNTER       VALUE
chat     syn_admitted      5
chat     ledger_full       2

The ledger was full: 2 connections passed uncounted. Raise kernel.max_connections and attach anew.
";
        assert_eq!(text(&status(), 7), expected);
        let full = text(&Status { rules_full: 2, ..status() }, 500);
        assert!(full.contains("\nThe rules were full: 2 changes found no room and changed nothing."), "{full}");
    }

    #[test]
    fn a_challenge_is_shown_where_one_is_configured() {
        let mut status = status();
        assert_eq!(challenge(&status), "");
        status.services[0].challenge = ChallengeRow { challenge_threshold: 500, challenging: false };
        assert_eq!(challenge(&status), "Challenge   from 500 SYNs a second on; no service now\n\n");
        status.syncookies_before = Some(1);
        status.timestamps_before = Some(0);
        status.services[0].challenge = ChallengeRow { challenge_threshold: 1, challenging: true };
        assert_eq!(
            challenge(&status),
            "Challenge   always; now: chat\n            net.ipv4.tcp_syncookies is 2 for it, and will be 1 again after detach\n            \
             net.ipv4.tcp_timestamps is 2 for it, and will be 0 again after detach\n\n"
        );
    }

    #[test]
    fn sockets_elsewhere_are_shown() {
        let mut status = status();
        assert_eq!(elsewhere(&status), "");
        status.counts_on_delivery = Some(true);
        status.services[0].namespaces = "others";
        status.services[0].socket_ports = vec![8443];
        assert_eq!(
            elsewhere(&status),
            "Elsewhere   sockets are counted when their handshake ends\n            chat: sockets at 8443 in other namespaces\n\n"
        );
        status.counts_on_delivery = Some(false);
        assert!(elsewhere(&status).contains("when they are open"));
    }

    #[test]
    fn a_limit_over_all_services_is_shown() {
        let mut status = status();
        status.services[0].limits.connections_total_all = 500;
        assert!(text(&status, 0).contains("repairs\nAll         3 of 500 connections over all services\n\nINTERFACE"));
    }

    #[test]
    fn the_document_has_the_keys_of_the_configuration() {
        let document = serde_json::to_value(Document { status: &status(), rules: 7 }).unwrap();
        assert_eq!(
            (&document["rules"], &document["rules_size"], &document["rules_full"]),
            (&7.into(), &500.into(), &0.into())
        );
        assert_eq!(document["services"][0]["connections_per_source"], 20);
        assert_eq!(document["services"][0]["counters"]["syn_admitted"], 5);
        assert_eq!(document["interfaces"][1]["name"], serde_json::Value::Null);
        assert_eq!((&document["audited_seconds_ago"], &document["repairs"]), (&2.into(), &4.into()));
    }
}
