//! `limiter attach`.

use std::fmt::Write as _;

use super::{
    Global, exit, logging,
    output::{limit, ports, print},
    settings::{self, KernelSettings},
};
use crate::{
    config::Service,
    kernel::{AttachReport, Attached},
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    kernel: KernelSettings,
}

pub(super) fn run(global: &Global, args: Args) -> anyhow::Result<()> {
    let config = settings::for_attach(global, args.kernel)?;
    logging::start(&config.log)?;
    // Dropped with the process, which leaves everything pinned and in force.
    let (_attached, report) = Attached::attach(&config.kernel, &config.services, &config.rules)?;
    for remark in remarks(&report) {
        exit::complain(&remark);
    }
    print(&text(&report, &config.services))
}

/// The same for the log of a daemon.
pub(super) fn log(report: &AttachReport) {
    for remark in remarks(report) {
        tracing::warn!("{remark}");
    }
    for interface in &report.interfaces {
        tracing::info!(
            interface = interface.name,
            mode = interface.mode.name(),
            taken_over = report.taken_over,
            "attached"
        );
    }
}

/// What the user should know although it is no error.
fn remarks(report: &AttachReport) -> Vec<String> {
    let fallbacks = report.interfaces.iter().filter_map(|interface| {
        let why = interface.fallback.as_ref()?;
        let (name, mode) = (&interface.name, interface.mode.name());
        Some(format!("{name} is attached in {mode} mode, which is slower: {why}"))
    });
    report.warnings.iter().cloned().chain(fallbacks).collect()
}

fn text(report: &AttachReport, services: &[Service]) -> String {
    let verb = if report.taken_over { "taken over" } else { "attached" };
    let mut text = String::new();
    // A String takes whatever is written to it.
    for interface in &report.interfaces {
        let _ = writeln!(text, "{verb}: {} ({})", interface.name, interface.mode.name());
    }
    for service in services {
        let limits = &service.limits;
        let _ = writeln!(
            text,
            "in force: {} on port {}: {} connections per source, {} in all",
            service.name,
            ports(&service.ports),
            limit(limits.connections_per_source),
            limit(limits.connections_total)
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::OnDeny,
        kernel::{InterfaceReport, XdpMode},
        policy::Limits,
    };

    #[test]
    fn a_fallback_is_said_aloud_and_the_limits_are_shown() {
        let report = AttachReport {
            taken_over: false,
            interfaces: vec![InterfaceReport {
                name: "lo".into(),
                mode: XdpMode::Generic,
                fallback: Some("not supported".into()),
            }],
            warnings: vec!["the ledger keeps its size".into()],
        };
        assert_eq!(
            remarks(&report),
            ["the ledger keeps its size", "lo is attached in generic mode, which is slower: not supported"]
        );
        let service = Service {
            name: "default".into(),
            ports: vec![80, 443],
            limits: Limits { connections_total: 0, ..Limits::default() },
            on_deny: OnDeny::Drop,
        };
        assert_eq!(
            text(&report, &[service]),
            "attached: lo (generic)\nin force: default on port 80,443: 20 connections per source, unlimited in all\n"
        );
    }
}
