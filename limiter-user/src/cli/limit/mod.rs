//! `limiter limit`.

mod change;

use std::path::Path;

use serde::Serialize;

use super::{
    Global, Usage, exit,
    output::{Format, limit, per_source, ports, rate, service_rate, sources_are, table},
    rules,
};
use crate::{
    config::{LimitKey, Setting, prepare_settings},
    kernel::{Pinned, ServiceRow},
    policy::{Action, Cidr, Limits},
};
use change::Change;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Show the limits in force
    Show {
        #[command(flatten)]
        format: Format,
    },
    /// Change limits, and what refused clients get, at once; connections that are open stay open
    Set(SetArgs),
}

#[derive(Debug, clap::Args)]
pub(super) struct SetArgs {
    // As `help`, not as a comment: the names are to be read in a terminal.
    #[arg(
        required = true,
        value_name = "KEY=VALUE",
        help = "What to change: connections_per_source, connections_per_wide_source, connections_total, connections_total_all, connection_rate, service_connection_rate (0: any number), connection_burst, service_connection_burst, ipv4_prefix, ipv6_prefix, wide_ipv4_prefix, wide_ipv6_prefix (0: no wider source), on_deny (drop, reset, observe)",
        value_parser = Setting::parse
    )]
    values: Vec<Setting>,
    /// Only for this service; without, for all
    #[arg(long, value_name = "NAME")]
    service: Option<String>,
    /// For this address or prefix, in every service: a rule
    #[arg(long, value_name = "CIDR", conflicts_with = "service")]
    rule: Option<Cidr>,
    /// Write it into the configuration file too (--config), comments kept
    #[arg(long)]
    save: bool,
    #[command(flatten)]
    format: Format,
}

pub(super) fn run(global: &Global, command: Command) -> anyhow::Result<()> {
    match command {
        Command::Show { format } => {
            let services = Pinned::open(&global.pin_path()?)?.services()?;
            show(format, &services)
        }
        Command::Set(args) => set(global, &args),
    }
}

#[derive(Serialize)]
struct ShowDocument<'s> {
    limits: Vec<ShowRow<'s>>,
}

#[derive(Serialize)]
struct ShowRow<'s> {
    service: &'s str,
    ports: &'s [u16],
    #[serde(flatten)]
    limits: Limits,
    on_deny: &'s str,
}

fn show(format: Format, services: &[ServiceRow]) -> anyhow::Result<()> {
    let limits = services
        .iter()
        .map(|row| ShowRow { service: &row.name, ports: &row.ports, limits: row.limits, on_deny: row.on_deny })
        .collect();
    format.print(&ShowDocument { limits }, || {
        let rows = services.iter().map(|row| {
            [
                row.name.clone(),
                ports(&row.ports),
                per_source(&row.limits),
                limit(row.limits.connections_total),
                limit(row.limits.connections_total_all),
                rate(&row.limits),
                service_rate(&row.limits),
                sources_are(&row.limits),
                row.on_deny.to_owned(),
            ]
        });
        let header =
            ["SERVICE", "PORTS", "PER SOURCE", "TOTAL", "TOTAL OF ALL", "RATE", "SERVICE RATE", "SOURCE IS", "ON DENY"];
        table(header, &[2, 3, 4], rows)
    })
}

#[derive(Serialize)]
struct SetDocument {
    changes: Vec<Change>,
    saved: bool,
}

/// All or nothing: everything that can be refused is refused before anything is touched, and what has been done is undone
/// if a later step fails.
fn set(global: &Global, args: &SetArgs) -> anyhow::Result<()> {
    let values = change::once_each(&args.values)?;
    let file = global.file_to_save(args.save)?;
    if let Some(cidr) = args.rule {
        return set_rule(global, cidr, &values, file, args.format);
    }
    let pinned = Pinned::open(&global.pin_path()?)?;
    let plan = change::Plan::new(&pinned.services()?, args.service.as_deref(), &values)?;
    let file = file.map(|path| prepare_settings(path, args.service.as_deref(), &values)).transpose()?;
    plan.apply(&pinned)?;
    let saved = file.is_some();
    if let Some(Err(error)) = file.map(crate::config::PreparedFile::commit) {
        return Err(plan.undo(&pinned, error.into()));
    }

    if args.service.is_none() && plan.services() > 1 {
        exit::complain(&format!("no --service was named: this holds for all {} services", plan.services()));
    }
    let document = SetDocument { changes: plan.changes(&values), saved };
    args.format.print(&document, || {
        let lines: Vec<_> = document.changes.iter().map(ToString::to_string).collect();
        lines.join("\n") + "\n"
    })
}

#[derive(Serialize)]
struct RuleDocument {
    rule: String,
    connections_per_source: Option<u32>,
    connections_per_wide_source: Option<u32>,
    connection_rate: Option<u32>,
    connection_burst: Option<u32>,
    saved: bool,
}

/// Gives a rule limits of its own, and makes it if there is none.
fn set_rule(
    global: &Global,
    cidr: Cidr,
    values: &[Setting],
    file: Option<&Path>,
    format: Format,
) -> anyhow::Result<()> {
    let of_rules = [
        LimitKey::ConnectionsPerSource,
        LimitKey::ConnectionsPerWideSource,
        LimitKey::ConnectionRate,
        LimitKey::ConnectionBurst,
    ];
    let is_of_rules = |setting: &Setting| matches!(setting, Setting::Limit(key, _) if of_rules.contains(key));
    if let Some(setting) = values.iter().find(|setting| !is_of_rules(setting)) {
        let names = of_rules.map(LimitKey::name).join(", ");
        return Err(Usage(format!("a rule has no {}; it may have {names}", setting.name())).into());
    }
    let value = |wanted| {
        values.iter().find_map(|setting| match setting {
            Setting::Limit(key, value) if *key == wanted => Some(*value),
            _ => None,
        })
    };
    let pinned = Pinned::open(&global.pin_path()?)?;
    let own = match rules::set_own(&pinned, cidr, of_rules.map(value), file)?.rule.action {
        Action::Limit(own) => own,
        // It gives limits and nothing else.
        Action::Allow | Action::Deny => crate::policy::OwnLimits::default(),
    };
    let document = RuleDocument {
        rule: cidr.to_string(),
        connections_per_source: own.connections_per_source,
        connections_per_wide_source: own.connections_per_wide_source,
        connection_rate: own.rate.map(|(rate, _)| rate),
        connection_burst: own.rate.map(|(_, burst)| burst),
        saved: file.is_some(),
    };
    format.print(&document, || {
        let named = [
            ("connections_per_source", document.connections_per_source),
            ("connections_per_wide_source", document.connections_per_wide_source),
            ("connection_rate", document.connection_rate),
            ("connection_burst", document.connection_burst),
        ];
        let lines = named.into_iter().filter_map(|(name, value)| Some(format!("{cidr}: {name} {}\n", value?)));
        lines.collect()
    })
}
