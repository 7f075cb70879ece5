//! `limiter rules`, `allow`, `deny` and `forget`.

use std::{
    net::SocketAddr,
    path::Path,
    time::{Duration, SystemTime},
};

use anyhow::Context as _;
use serde::Serialize;

use super::{
    Global, Usage,
    output::{Format, limit, table},
};
use crate::{
    config::{PreparedFile, prepare_rule, prepare_without_rule},
    kernel::{Cutter, KernelError, Pinned, RuleInForce, Rules},
    policy::{Action, Cidr, Rule},
};

/// Longest time that a rule can be made for; longer is for ever.
const LONGEST: Duration = Duration::from_hours(365 * 24);

#[derive(Debug, clap::Args)]
pub(super) struct RulesArgs {
    #[command(flatten)]
    format: Format,
}

#[derive(Debug, clap::Args)]
pub(super) struct AllowArgs {
    /// The address or the prefix
    cidr: Cidr,
    /// Write it into the configuration file too (--config), comments kept
    #[arg(long)]
    save: bool,
    #[command(flatten)]
    format: Format,
}

#[derive(Debug, clap::Args)]
pub(super) struct DenyArgs {
    /// The address or the prefix
    cidr: Cidr,
    /// How long, such as 10m; without, until it is forgotten
    #[arg(long = "for", value_name = "TIME", value_parser = parse_time)]
    time: Option<Duration>,
    /// Also close what is open from there
    #[arg(long)]
    cut: bool,
    /// Write it into the configuration file too (--config), comments kept
    #[arg(long)]
    save: bool,
    #[command(flatten)]
    format: Format,
}

impl DenyArgs {
    /// The rule that is asked for, as from now.
    fn rule(&self) -> Rule {
        // `parse_time` bounds the time.
        let expires = self.time.and_then(|time| SystemTime::now().checked_add(time));
        Rule { expires, ..Rule::new(self.cidr, Action::Deny) }
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct ForgetArgs {
    /// The prefix of the rule
    cidr: Cidr,
    /// Take it out of the configuration file too (--config)
    #[arg(long)]
    save: bool,
    #[command(flatten)]
    format: Format,
}

pub(super) fn rules(global: &Global, args: &RulesArgs) -> anyhow::Result<()> {
    let rules: Vec<Row> = Pinned::open(&global.pin_path()?)?.rules()?.all()?.iter().map(Row::new).collect();
    let document = Document { rules };
    args.format.print(&document, || text(&document.rules))
}

pub(super) fn allow(global: &Global, args: &AllowArgs) -> anyhow::Result<()> {
    let file = global.file_to_save(args.save)?;
    let pinned = Pinned::open(&global.pin_path()?)?;
    let document = set(&pinned, Rule::new(args.cidr, Action::Allow), file)?;
    args.format.print(&document, || document.text())
}

pub(super) fn deny(global: &Global, args: &DenyArgs) -> anyhow::Result<()> {
    let file = global.file_to_save(args.save)?;
    let pinned = Pinned::open(&global.pin_path()?)?;
    // Whatever can be refused is refused before anything is in force.
    let mut cutter = args.cut.then(|| Cutter::new(&pinned)).transpose()?;
    let mut document = set(&pinned, args.rule(), file)?;
    if let Some(cutter) = &mut cutter {
        let cut = cutter.cut_all(&args.cidr.network());
        document.cut =
            Some(cut.with_context(|| format!("{} is denied, and what is open from there stays open", args.cidr))?);
    }
    args.format.print(&document, || document.text())
}

pub(super) fn forget(global: &Global, args: &ForgetArgs) -> anyhow::Result<()> {
    let file = global.file_to_save(args.save)?;
    let mut rules = Pinned::open(&global.pin_path()?)?.rules()?;
    let file = file.map(|path| prepare_without_rule(path, args.cidr)).transpose()?.flatten();
    let before = rules.get(args.cidr)?;
    // The file may have one that is not in force.
    if !rules.remove(args.cidr)? && file.is_none() {
        let source = "a rule is forgotten by its own prefix; `limiter rules` shows them".into();
        return Err(KernelError::Failed { what: format!("there is no rule for {}", args.cidr), source }.into());
    }
    let saved = commit(&mut rules, args.cidr, before, file)?;
    rules.remove_ended()?;
    let document = ForgetDocument { forgotten: args.cidr.to_string(), saved };
    args.format.print(&document, || format!("forgotten: {}\n", document.forgotten))
}

#[derive(Serialize)]
struct ForgetDocument {
    forgotten: String,
    /// Whether it was taken out of the file.
    saved: bool,
}

/// What `allow` and `deny` have done.
#[derive(Serialize)]
struct SetDocument {
    rule: Row,
    /// What the rule that it replaces did; `null`: there was none.
    instead_of: Option<&'static str>,
    /// The clients whose connections were closed; `null` without `--cut`.
    cut: Option<Vec<SocketAddr>>,
    /// Whether it was written into the file.
    saved: bool,
}

/// `file`: where to save it, too; then it is a rule of the file's.
fn set(pinned: &Pinned, rule: Rule, file: Option<&Path>) -> anyhow::Result<SetDocument> {
    let file = file.map(|path| prepare_rule(path, &rule)).transpose()?;
    let mut rules = pinned.rules()?;
    let before = rules.get(rule.cidr)?;
    let from_file = file.is_some();
    rules.remove_ended()?;
    rules.set(&rule, from_file)?;
    let saved = commit(&mut rules, rule.cidr, before, file)?;
    let left = rule.expires.map(|expires| expires.duration_since(SystemTime::now()).unwrap_or_default());
    let rule = Row::new(&RuleInForce { rule, left, from_file });
    Ok(SetDocument { rule, instead_of: before.map(|before| before.rule.action.name()), cut: None, saved })
}

/// Puts the new file in its place, and says whether there was one. If that fails, the rule of `cidr` is again what it was
/// `before`.
fn commit(
    rules: &mut Rules,
    cidr: Cidr,
    before: Option<RuleInForce>,
    file: Option<PreparedFile>,
) -> anyhow::Result<bool> {
    let saved = file.is_some();
    let Some(Err(error)) = file.map(PreparedFile::commit) else { return Ok(saved) };
    let restored = match before {
        Some(before) => rules.set(&before.rule, before.from_file),
        None => rules.remove(cidr).map(|_| ()),
    };
    let error = anyhow::Error::from(error);
    Err(match restored {
        Ok(()) => error.context("nothing was changed"),
        Err(failed) => error.context(format!(
            "what holds for {cidr} was changed and couldn't be changed back: {:#}",
            anyhow::Error::from(failed)
        )),
    })
}

impl SetDocument {
    fn text(&self) -> String {
        let verb = if self.rule.action == Action::Allow.name() { "allowed" } else { "denied" };
        let time = self.rule.left().map_or_else(String::new, |time| format!(" for {time}"));
        let instead = self.instead_of.map_or_else(String::new, |before| format!(", instead of: {before}"));
        let cut = match self.cut.as_deref().map(<[_]>::len) {
            None => String::new(),
            Some(1) => "closed 1 connection\n".to_owned(),
            Some(count) => format!("closed {count} connections\n"),
        };
        format!("{verb}: {}{time}{instead}\n{cut}", self.rule.cidr)
    }
}

fn parse_time(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|_| "expected a time with its unit, such as 10m or 1h")?;
    if time < Duration::from_secs(1) || time > LONGEST {
        return Err("expected a time from 1s to 365days".to_owned());
    }
    Ok(time)
}

#[derive(Serialize)]
struct Document {
    rules: Vec<Row>,
}

/// A rule, with the keys of the configuration. `null`: as the service has it; for ever.
#[derive(Serialize)]
pub(super) struct Row {
    pub(super) cidr: String,
    pub(super) action: &'static str,
    connections_per_source: Option<u32>,
    connections_per_wide_source: Option<u32>,
    connection_rate: Option<u32>,
    connection_burst: Option<u32>,
    /// When it ends, as the file has it.
    expires: Option<String>,
    seconds_left: Option<u64>,
    pub(super) from: &'static str,
}

impl Row {
    pub(super) fn new(rule: &RuleInForce) -> Self {
        let own = match rule.rule.action {
            Action::Limit(own) => own,
            Action::Allow | Action::Deny => crate::policy::OwnLimits::default(),
        };
        Self {
            cidr: rule.rule.cidr.to_string(),
            action: rule.rule.action.name(),
            connections_per_source: own.connections_per_source,
            connections_per_wide_source: own.connections_per_wide_source,
            connection_rate: own.rate.map(|(rate, _)| rate),
            connection_burst: own.rate.map(|(_, burst)| burst),
            expires: rule.rule.expires.and_then(shown),
            // A rule that has half a second left is not one that has ended.
            seconds_left: rule.left.map(|left| left.as_millis().div_ceil(1000).try_into().unwrap_or(u64::MAX)),
            from: if rule.from_file { "file" } else { "command" },
        }
    }

    /// How long it will hold yet, for people.
    pub(super) fn left(&self) -> Option<String> {
        self.seconds_left.map(|seconds| humantime::format_duration(Duration::from_secs(seconds)).to_string())
    }
}

/// A point in time to the nearest second: it was counted back from another clock, and may be a moment off.
fn shown(time: SystemTime) -> Option<String> {
    let rounded = time.checked_add(Duration::from_millis(500))?;
    Some(humantime::format_rfc3339_seconds(rounded).to_string())
}

fn text(rules: &[Row]) -> String {
    let rows = rules.iter().map(|row| {
        let as_service = || "-".to_owned();
        let rate = match (row.connection_rate, row.connection_burst) {
            (Some(0), _) => limit(0),
            (Some(rate), Some(burst)) => format!("{rate}/s, {burst} at once"),
            _ => as_service(),
        };
        [
            row.cidr.clone(),
            row.action.to_owned(),
            row.connections_per_source.map_or_else(as_service, limit),
            row.connections_per_wide_source.map_or_else(as_service, limit),
            rate,
            row.left().unwrap_or_else(|| "-".to_owned()),
            row.from.to_owned(),
        ]
    });
    table(["CIDR", "ACTION", "PER SOURCE", "PER WIDE SOURCE", "RATE", "LEFT", "FROM"], &[2, 3], rows)
}

/// `limit set --rule`: gives a rule limits of its own: `connections_per_source`, `connections_per_wide_source`,
/// `connection_rate` and `connection_burst`. Gives what they are now. `file`: where to save them, too; then it is a rule of
/// the file's.
pub(super) fn set_own(
    pinned: &Pinned,
    cidr: Cidr,
    limits: [Option<u32>; 4],
    file: Option<&Path>,
) -> anyhow::Result<RuleInForce> {
    let [connections_per_source, connections_per_wide_source, rate, burst] = limits;
    let mut rules = pinned.rules()?;
    let before = rules.get(cidr)?;
    let mut own = match before.map(|before| before.rule.action) {
        None => crate::policy::OwnLimits::default(),
        Some(Action::Limit(own)) => own,
        Some(action) => {
            let action = action.name();
            return Err(Usage(format!("the rule for {cidr} is {action}: `limiter forget {cidr}` comes first")).into());
        }
    };
    own.connections_per_source = connections_per_source.or(own.connections_per_source);
    own.connections_per_wide_source = connections_per_wide_source.or(own.connections_per_wide_source);
    own.rate = match (rate, burst, own.rate) {
        (None, None, rate) => rate,
        (None, Some(_), None) => {
            return Err(
                Usage("connection_burst goes with a connection_rate, which this rule has none of".into()).into()
            );
        }
        (None, Some(burst), Some((rate, _))) => Some((rate, burst)),
        (Some(rate), burst, old) => {
            let default = crate::policy::Limits::default().connection_burst;
            Some((rate, burst.or(old.map(|(_, burst)| burst)).unwrap_or(default)))
        }
    };
    let rule = Rule { cidr, action: Action::Limit(own), expires: before.and_then(|before| before.rule.expires) };
    let file = file.map(|path| prepare_rule(path, &rule)).transpose()?;
    let (left, was_from_file) = before.map_or((None, false), |before| (before.left, before.from_file));
    let from_file = was_from_file || file.is_some();
    rules.remove_ended()?;
    rules.set(&rule, from_file)?;
    commit(&mut rules, cidr, before, file)?;
    Ok(RuleInForce { rule, left, from_file })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::OwnLimits;

    #[test]
    fn rules_are_a_table_or_a_document() {
        let own =
            OwnLimits { connections_per_source: Some(500), connections_per_wide_source: None, rate: Some((9, 20)) };
        let rules: Vec<_> = [
            ("192.0.2.0/24", Action::Deny, Some(Duration::from_millis(599_500)), false),
            ("2001:db8::/32", Action::Allow, None, false),
            ("100.64.0.0/10", Action::Limit(own), None, true),
        ]
        .into_iter()
        .map(|(cidr, action, left, from_file)| {
            let expires = left.map(|_| SystemTime::UNIX_EPOCH + Duration::from_millis(1_999_999_999_999));
            let rule = Rule { expires, ..Rule::new(cidr.parse().unwrap(), action) };
            Row::new(&RuleInForce { rule, left, from_file })
        })
        .collect();
        let expected = "\
CIDR           ACTION  PER SOURCE  PER WIDE SOURCE  RATE             LEFT  FROM
192.0.2.0/24   deny             -                -  -                10m   command
2001:db8::/32  allow            -                -  -                -     command
100.64.0.0/10  limit          500                -  9/s, 20 at once  -     file
";
        assert_eq!(text(&rules), expected);
        let document = serde_json::to_value(Document { rules }).unwrap();
        assert_eq!(document["rules"][0]["seconds_left"], 600);
        assert_eq!(document["rules"][0]["expires"], "2033-05-18T03:33:20Z");
        assert_eq!(document["rules"][1]["expires"], serde_json::Value::Null);
        assert_eq!(document["rules"][1]["connections_per_source"], serde_json::Value::Null);
        assert_eq!(document["rules"][2]["connection_rate"], 9);
    }

    #[test]
    fn a_time_needs_a_unit_and_a_bound() {
        assert_eq!(parse_time("10m"), Ok(Duration::from_mins(10)));
        for text in ["10", "0s", "", "400days"] {
            assert!(parse_time(text).is_err(), "{text}");
        }
    }
}
