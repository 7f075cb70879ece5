//! `limiter explain`.

use std::{fmt::Write as _, net::IpAddr};

use serde::Serialize;

use super::{
    Global,
    output::{Format, limit, places, rate},
    rules::Row as RuleRow,
};
use crate::{
    kernel::{Explanation, Pinned, ServiceExplanation, SynOutcome},
    policy::Limits,
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The client's address
    ip: IpAddr,
    #[command(flatten)]
    format: Format,
}

pub(super) fn run(global: &Global, args: &Args) -> anyhow::Result<()> {
    let explanation = Pinned::open(&global.pin_path()?)?.explain(args.ip)?;
    args.format.print(&Document::new(&explanation), || text(&explanation))
}

#[derive(Serialize)]
struct Document<'e> {
    ip: IpAddr,
    rule: Option<RuleRow>,
    services: Vec<Row<'e>>,
}

/// One service. The limits are those that hold for the address, rule and all.
#[derive(Serialize)]
struct Row<'e> {
    service: &'e str,
    ports: &'e [u16],
    socket_ports: &'e [u16],
    namespaces: &'e str,
    source: &'e str,
    connections: u64,
    wide_source: Option<&'e str>,
    wide_connections: Option<u64>,
    service_connections: u64,
    /// `null`: any number.
    tokens: Option<u64>,
    #[serde(flatten)]
    limits: Limits,
    on_deny: &'e str,
    next_syn: NextSyn,
}

#[derive(Serialize)]
struct NextSyn {
    /// `admitted`, `denied` or `observed`.
    verdict: &'static str,
    /// When it is refused: `syn` or `handshake`.
    stage: Option<&'static str>,
    reason: Option<&'static str>,
}

impl<'e> Document<'e> {
    fn new(explanation: &'e Explanation) -> Self {
        Self {
            ip: explanation.ip,
            rule: explanation.rule.as_ref().map(RuleRow::new),
            services: explanation.services.iter().map(Row::new).collect(),
        }
    }
}

impl<'e> Row<'e> {
    fn new(row: &'e ServiceExplanation) -> Self {
        let refusal = row.next_syn.refusal();
        Self {
            service: &row.service.name,
            ports: &row.service.ports,
            socket_ports: &row.service.socket_ports,
            namespaces: row.service.namespaces,
            source: &row.source,
            connections: row.connections,
            wide_source: row.wide_source.as_ref().map(|(source, _)| source.as_str()),
            wide_connections: row.wide_source.as_ref().map(|(_, connections)| *connections),
            service_connections: row.service.connections,
            tokens: row.tokens,
            limits: row.limits,
            on_deny: row.service.on_deny,
            next_syn: NextSyn {
                verdict: row.next_syn.verdict(),
                stage: refusal.map(|(stage, _)| stage.name()),
                reason: refusal.map(|(_, reason)| reason.name()),
            },
        }
    }
}

fn text(explanation: &Explanation) -> String {
    let mut text = format!("Address     {}\nRule        {}\n", explanation.ip, rule(explanation));
    for row in &explanation.services {
        let limits = &row.limits;
        let of = |held: u64, most: u32| format!("{held} of {} connections", limit(most));
        let tokens = row.tokens.map_or_else(String::new, |tokens| format!("; {tokens} left"));
        let wide = row.wide_source.as_ref().map_or_else(String::new, |(source, connections)| {
            format!("Wide source {source}: {}\n", of(*connections, limits.connections_per_wide_source))
        });
        // A String takes whatever is written to it.
        let _ = write!(
            text,
            "\nService     {} (port {})\n\
             Source      {}: {}\n{wide}\
             In all      {}\n\
             Rate        {}{tokens}\n\
             Next SYN    {}\n",
            row.service.name,
            places(&row.service),
            row.source,
            of(row.connections, limits.connections_per_source),
            of(row.service.connections, limits.connections_total),
            rate(limits),
            outcome(row),
        );
    }
    text
}

fn rule(explanation: &Explanation) -> String {
    let Some(rule) = &explanation.rule else { return "none".to_owned() };
    let row = RuleRow::new(rule);
    let left = row.left().map_or_else(String::new, |left| format!(", {left} left"));
    format!("{} {} (from: {}{left})", row.action, row.cidr, row.from)
}

fn outcome(row: &ServiceExplanation) -> String {
    match row.next_syn {
        SynOutcome::Admitted => "is admitted".to_owned(),
        SynOutcome::Denied(limiter_common::event::Stage::Syn, reason) => {
            format!("is refused (on_deny = {}): {}, {}", row.service.on_deny, reason.name(), reason.meaning())
        }
        SynOutcome::Denied(_, reason) => {
            format!("is admitted, and its handshake is refused: {}, {}", reason.name(), reason.meaning())
        }
        SynOutcome::Observed(_, reason) => {
            format!("is admitted, and would be refused but for observe: {}, {}", reason.name(), reason.meaning())
        }
    }
}

#[cfg(test)]
mod tests {
    use limiter_common::{DenyReason, event::Stage};

    use super::*;
    use crate::{
        kernel::{ChallengeRow, Counters, RuleInForce, ServiceRow},
        policy::{Action, Rule},
    };

    fn explanation(next_syn: SynOutcome) -> Explanation {
        let limits = Limits { connections_per_source: 5, ..Limits::default() };
        let service = ServiceRow {
            index: 0,
            name: "chat".into(),
            ports: vec![80, 443],
            socket_ports: vec![80, 443],
            namespaces: "host",
            on_deny: "drop",
            limits,
            challenge: ChallengeRow::default(),
            connections: 17,
            counters: Counters::default(),
        };
        let (ip, source) = ("192.0.2.7".parse().unwrap(), "192.0.2.7/32".into());
        let services = vec![ServiceExplanation {
            service,
            source,
            connections: 5,
            wide_source: Some(("192.0.2.0/24".into(), 9)),
            limits,
            tokens: Some(3),
            next_syn,
        }];
        Explanation { ip, rule: None, services }
    }

    #[test]
    fn an_explanation_says_what_the_next_syn_gets_and_why() {
        let mut explained = explanation(SynOutcome::Denied(Stage::Syn, DenyReason::SourceLimit));
        explained.rule = Some(RuleInForce {
            rule: Rule::new("192.0.2.0/24".parse().unwrap(), Action::Deny),
            left: Some(std::time::Duration::from_secs(61)),
            from_file: false,
        });
        assert_eq!(
            text(&explained),
            "Address     192.0.2.7\n\
             Rule        deny 192.0.2.0/24 (from: command, 1m 1s left)\n\
             \n\
             Service     chat (port 80,443)\n\
             Source      192.0.2.7/32: 5 of 5 connections\n\
             Wide source 192.0.2.0/24: 9 of unlimited connections\n\
             In all      17 of 10000 connections\n\
             Rate        10/s, 20 at once; 3 left\n\
             Next SYN    is refused (on_deny = drop): source_limit, its source holds as many connections as it may\n"
        );
        explained.services[0].service.namespaces = "others";
        explained.services[0].service.socket_ports = vec![8443];
        assert!(text(&explained).contains("chat (port 80,443; sockets at 8443 in other namespaces)\n"));
        let document = serde_json::to_value(Document::new(&explained)).unwrap();
        assert_eq!(document["rule"]["cidr"], "192.0.2.0/24");
        let service = &document["services"][0];
        assert_eq!(service["connections_per_source"], 5);
        assert_eq!((&service["socket_ports"], &service["namespaces"]), (&serde_json::json!([8443]), &"others".into()));
        assert_eq!((&service["wide_source"], &service["wide_connections"]), (&"192.0.2.0/24".into(), &9.into()));
        assert_eq!(
            service["next_syn"],
            serde_json::json!({ "verdict": "denied", "stage": "syn", "reason": "source_limit" })
        );
    }

    #[test]
    fn each_outcome_has_its_words() {
        for (outcome, words) in [
            (SynOutcome::Admitted, "Next SYN    is admitted\n"),
            (SynOutcome::Denied(Stage::Handshake, DenyReason::LedgerFull), "its handshake is refused: ledger_full"),
            (SynOutcome::Observed(Stage::Syn, DenyReason::RateLimit), "would be refused but for observe: rate_limit"),
        ] {
            let text = text(&explanation(outcome));
            assert!(text.contains(words), "{text}");
            assert!(text.contains("Rule        none\n"), "{text}");
        }
    }
}
