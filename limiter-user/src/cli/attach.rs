//! `limiter attach`.

use std::fmt::Write as _;

use super::{
    Global, exit, logging,
    output::{limit, ports, print},
    settings::{self, KernelSettings},
};
use crate::{
    config::Service,
    kernel::{AdoptedOpen, AttachReport, Attached},
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
    let (attached, report) = Attached::attach(&config.kernel, &config.services, &config.rules)?;
    let adopted = adopt_open(&attached, false);
    for remark in config.warnings_of_rules().iter().chain(&remarks(&report)).chain(&adopted.remarks) {
        exit::complain(remark);
    }
    print(&(text(&report, &config.services) + &text_of_adopted(adopted.count)))
}

/// The connections that were open before.
pub(super) struct Adopted {
    /// How many count from now on.
    count: u64,
    /// What the user should know about the others.
    remarks: Vec<String>,
}

/// Has the connections count that were open before. Without them the limits hold all the same, so it is no error if that
/// fails. `audited`: a daemon will see to those whose end the kernel can't tell.
pub(super) fn adopt_open(attached: &Attached, audited: bool) -> Adopted {
    match attached.auditor().and_then(|mut auditor| auditor.adopt_open(audited)) {
        Ok(AdoptedOpen { adopted, left_out, no_room }) => {
            let mut remarks = Vec::new();
            if left_out > 0 {
                remarks.push(format!(
                    "{left_out} connections were open before and don't count: this kernel can't tell of their end \
                     (it must be 6.12 or later), so only a running `limiter run` could count them"
                ));
            }
            if no_room > 0 {
                remarks.push(format!(
                    "{no_room} connections were open before and don't count: the ledger is full (kernel.max_connections)"
                ));
            }
            Adopted { count: adopted, remarks }
        }
        Err(error) => Adopted {
            count: 0,
            remarks: vec![format!(
                "the connections that were open before don't count: {:#}",
                anyhow::Error::from(error)
            )],
        },
    }
}

/// The same for the log of a daemon.
pub(super) fn log_adopted(Adopted { count, remarks }: Adopted) {
    for remark in remarks {
        tracing::warn!("{remark}");
    }
    if count > 0 {
        tracing::info!(connections = count, "connections that were open before count from now on");
    }
}

fn text_of_adopted(count: u64) -> String {
    if count == 0 { String::new() } else { format!("adopted: {count} connections that were open before\n") }
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
            hook = interface.mode.hook(),
            taken_over = report.taken_over,
            "attached"
        );
    }
}

/// What the user should know although it is no error.
fn remarks(report: &AttachReport) -> Vec<String> {
    let fallbacks = report.interfaces.iter().filter_map(|interface| {
        let why = interface.why?;
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
        kernel::{InterfaceReport, Mode, Why},
        policy::Limits,
    };

    #[test]
    fn a_fallback_is_said_aloud_and_the_limits_are_shown() {
        let report = AttachReport {
            taken_over: false,
            interfaces: vec![InterfaceReport {
                name: "lo".into(),
                mode: Mode::Generic,
                why: Some(Why::Refused(libc::EOPNOTSUPP)),
            }],
            warnings: vec!["the ledger keeps its size".into()],
        };
        assert_eq!(
            remarks(&report),
            [
                "the ledger keeps its size",
                "lo is attached in generic mode, which is slower: it refuses XDP in a faster mode: \
                 Operation not supported (os error 95)"
            ]
        );
        let service = Service {
            limits: Limits { connections_total: 0, ..Limits::default() },
            ..Service::new("default", [80, 443])
        };
        assert_eq!(
            text(&report, &[service]),
            "attached: lo (generic)\nin force: default on port 80,443: 20 connections per source, unlimited in all\n"
        );
    }
}
