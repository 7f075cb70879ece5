//! Writing rules into the file, with its comments and its order kept.

use std::{
    path::Path,
    time::{Duration, SystemTime},
};

use toml_edit::{Array, ArrayOfTables, Datetime, DocumentMut, InlineTable, Item, Table, TableLike, Value};

use super::{
    ConfigError,
    edit::{PreparedFile, document, prepare, put, tables},
};
use crate::policy::{Action, Cidr, OwnLimits, Rule};

/// What a rule says as limits of its own.
const OWN: [&str; 4] = ["connections_per_source", "connections_per_wide_source", "connection_rate", "connection_burst"];

/// Writes the file anew with this rule, beside the old one: in the place of that for the same prefix, or after the others. Of
/// one with limits of its own, what it doesn't say stays as the file has it, and so does its end.
///
/// # Errors
/// Among others where the file allows or denies whom the rule gives limits: it would be lost.
pub fn prepare_rule(path: &Path, rule: &Rule) -> Result<PreparedFile, ConfigError> {
    prepare(path, |text| with_rule(text, rule))
}

/// Writes the file anew without the rule for this very prefix, beside the old one. `None`: it has none.
pub fn prepare_without_rule(path: &Path, cidr: Cidr) -> Result<Option<PreparedFile>, ConfigError> {
    let mut found = false;
    let prepared = prepare(path, |text| {
        let mut document = document(text)?;
        found = remove(&mut document, cidr);
        Ok(if found { document.to_string() } else { text.to_owned() })
    })?;
    Ok(found.then_some(prepared))
}

fn with_rule(text: &str, rule: &Rule) -> Result<String, ConfigError> {
    let mut document = document(text)?;
    if let Some(table) = tables(&mut document, "rule").into_iter().find(|table| is_for(*table, rule.cidr)) {
        match rule.action {
            Action::Limit(own) => {
                if let Some(action) = table.get("action").and_then(Item::as_str) {
                    return Err(ConfigError::invalid(format!(
                        "the file has a [[rule]] for {} whose action is {action}: take it out first (`limiter forget {} --save`)",
                        rule.cidr, rule.cidr
                    )));
                }
                put_own(table, &own);
            }
            Action::Allow | Action::Deny => {
                for key in OWN {
                    table.remove(key);
                }
                put(table, "action", rule.action.name().into());
                match rule.expires.map(end).transpose()? {
                    Some(end) => put(table, "expires", end.into()),
                    None => _ = table.remove("expires"),
                }
            }
        }
        return Ok(document.to_string());
    }
    match document.entry("rule").or_insert_with(|| Item::ArrayOfTables(ArrayOfTables::new())) {
        Item::ArrayOfTables(tables) => {
            let mut table = Table::new();
            fill(&mut table, rule)?;
            tables.push(table);
        }
        Item::Value(Value::Array(array)) => {
            let mut table = InlineTable::new();
            fill(&mut table, rule)?;
            push(array, table);
        }
        _ => return Err(ConfigError::invalid("rule is no array of tables")),
    }
    Ok(document.to_string())
}

/// Whether a rule is for that prefix, however it is written.
fn is_for(table: &dyn TableLike, cidr: Cidr) -> bool {
    let written = table.get("cidr").and_then(Item::as_str);
    written.and_then(|written| written.parse().ok()) == Some(cidr)
}

fn fill(table: &mut dyn TableLike, rule: &Rule) -> Result<(), ConfigError> {
    put(table, "cidr", rule.cidr.to_string().into());
    match rule.action {
        Action::Limit(own) => put_own(table, &own),
        Action::Allow | Action::Deny => put(table, "action", rule.action.name().into()),
    }
    if let Some(expires) = rule.expires {
        put(table, "expires", end(expires)?.into());
    }
    Ok(())
}

fn put_own(table: &mut dyn TableLike, own: &OwnLimits) {
    let (rate, burst) = own.rate.unzip();
    let values = [own.connections_per_source, own.connections_per_wide_source, rate, burst];
    for (key, value) in OWN.into_iter().zip(values) {
        if let Some(value) = value {
            put(table, key, i64::from(value).into());
        }
    }
}

/// Adds an element, laid out like the one before it.
fn push(array: &mut Array, table: InlineTable) {
    let prefix = array.iter().last().and_then(|last| last.decor().prefix()?.as_str()).map(str::to_owned);
    let is_first = array.is_empty();
    array.push(table);
    if let (Some(prefix), false, Some(new)) = (prefix, is_first, array.iter_mut().last()) {
        // The first of those on one line has nothing before it.
        let space = if prefix.is_empty() { " " } else { prefix.as_str() };
        // A comment above the one before it is not about this one.
        if !space.contains('#') {
            new.decor_mut().set_prefix(space);
        }
    }
}

/// A point in time as the file has it, in whole seconds and not too early.
fn end(expires: SystemTime) -> Result<Datetime, ConfigError> {
    let later = expires.checked_add(Duration::from_nanos(999_999_999));
    let text = later.map(|later| humantime::format_rfc3339_seconds(later).to_string()).unwrap_or_default();
    text.parse().map_err(|_| ConfigError::invalid("the end of the rule is too far away to be written"))
}

/// Takes the rule for that prefix out. What stands right above it goes with it; what a blank line keeps apart stays.
fn remove(document: &mut DocumentMut, cidr: Cidr) -> bool {
    match document.get_mut("rule") {
        Some(Item::ArrayOfTables(tables)) => {
            let Some(place) = tables.iter().position(|table| is_for(table, cidr)) else { return false };
            let gone = tables.get(place).map(|table| (table.position(), apart(table).to_owned()));
            tables.remove(place);
            if tables.is_empty() {
                document.remove("rule");
            }
            if let Some((position, above)) = gone
                && !above.is_empty()
            {
                keep(document, position, &above);
            }
            true
        }
        Some(Item::Value(Value::Array(array))) => {
            let is_it = |value: &Value| value.as_inline_table().is_some_and(|table| is_for(table, cidr));
            let Some(place) = array.iter().position(is_it) else { return false };
            array.remove(place);
            true
        }
        _ => false,
    }
}

/// What stands above a table up to the last blank line.
fn apart(table: &Table) -> &str {
    let above = table.decor().prefix().and_then(|prefix| prefix.as_str()).unwrap_or_default();
    // A blank line before any comment only keeps the tables apart.
    match above.rfind("\n\n") {
        Some(end) if above[..end].contains('#') => &above[..=end],
        _ => "",
    }
}

/// Puts what stood above a table that is gone above the one that followed it, or at the end.
fn keep(document: &mut DocumentMut, gone: Option<isize>, above: &str) {
    let after = |position: isize| gone.is_some_and(|gone| position > gone);
    let mut next: Option<isize> = None;
    visit(document.as_table_mut(), &mut |table| {
        if let Some(position) = table.position().filter(|position| after(*position)) {
            next = Some(next.map_or(position, |next| next.min(position)));
        }
    });
    let Some(next) = next else {
        let end = document.trailing().as_str().unwrap_or_default().to_owned();
        document.set_trailing(format!("{above}{end}"));
        return;
    };
    visit(document.as_table_mut(), &mut |table| {
        if table.position() == Some(next) {
            let own = table.decor().prefix().and_then(|prefix| prefix.as_str()).unwrap_or_default().to_owned();
            table.decor_mut().set_prefix(format!("{above}{own}"));
        }
    });
}

/// Every table below one that has a header of its own.
fn visit(table: &mut Table, look: &mut impl FnMut(&mut Table)) {
    for (_, item) in table.iter_mut() {
        match item {
            Item::Table(table) => {
                look(table);
                visit(table, look);
            }
            Item::ArrayOfTables(tables) => {
                for table in tables.iter_mut() {
                    look(table);
                    visit(table, look);
                }
            }
            Item::None | Item::Value(_) => {}
        }
    }
}

#[cfg(test)]
#[path = "edit_rules_tests.rs"]
mod tests;
