//! Changing what the file says, with its comments and its order kept.

use std::{
    fs,
    io::{self, Write},
    os::unix::fs::{MetadataExt, fchown},
    path::{Path, PathBuf},
};

use tempfile::NamedTempFile;
use toml_edit::{DocumentMut, InlineTable, Item, Table, TableLike, Value};

use super::{ConfigError, DEFAULT_SERVICE, Setting, parse, resolve};

/// The new text of a file, beside the file, on its way to take its place. Dropped, it leaves no trace.
#[derive(Debug)]
pub struct PreparedFile {
    target: PathBuf,
    new: NamedTempFile,
}

impl PreparedFile {
    /// Puts the new text in the place of the old, at once.
    pub fn commit(self) -> Result<(), ConfigError> {
        let Self { target, new } = self;
        if let Err(error) = new.persist(&target) {
            return Err(ConfigError::Unwritable { path: target, source: error.error });
        }
        // The rename outlives a power cut only when its directory is on disk. The new text is in force either way.
        if let Err(error) = fs::File::open(directory(&target)).and_then(|directory| directory.sync_all()) {
            tracing::warn!(file = %target.display(), %error, "the saved configuration may not outlive a power cut");
        }
        Ok(())
    }
}

/// Writes the file anew with these settings, beside the old one. `service`: the one that they are for, or all of them; then
/// they go into `[limits]` or `[kernel]`, and into every service that has its own value. The file must be right, before and
/// after.
pub fn prepare_settings(path: &Path, service: Option<&str>, settings: &[Setting]) -> Result<PreparedFile, ConfigError> {
    prepare(path, |text| with_settings(text, service, settings))
}

/// Writes the file anew as `edit` has its text, beside the old one.
pub(super) fn prepare(
    path: &Path,
    edit: impl FnOnce(&str) -> Result<String, ConfigError>,
) -> Result<PreparedFile, ConfigError> {
    let unwritable = |source| ConfigError::Unwritable { path: path.to_owned(), source };
    // A link stays a link: what it leads to is replaced.
    let target = fs::canonicalize(path).map_err(|source| ConfigError::Unreadable { path: path.to_owned(), source })?;
    let text = resolve::read_text(path)?;
    parse::parse(path, &text)?;
    let text = edit(&text)?;
    parse::parse(path, &text)?;
    write_beside(&target, &text).map(|new| PreparedFile { target, new }).map_err(unwritable)
}

fn write_beside(target: &Path, text: &str) -> io::Result<NamedTempFile> {
    let old = fs::metadata(target)?;
    let mut new = tempfile::Builder::new().prefix(".limiter-config-").tempfile_in(directory(target))?;
    new.write_all(text.as_bytes())?;
    let made = new.as_file().metadata()?;
    if (made.uid(), made.gid()) != (old.uid(), old.gid()) {
        fchown(new.as_file(), Some(old.uid()), Some(old.gid()))?;
    }
    new.as_file().set_permissions(old.permissions())?;
    new.as_file().sync_all()?;
    Ok(new)
}

fn directory(file: &Path) -> &Path {
    // A canonical path of a file has a parent.
    file.parent().unwrap_or(Path::new("/"))
}

/// A text as a document that keeps its comments and its order.
pub(super) fn document(text: &str) -> Result<DocumentMut, ConfigError> {
    text.parse().map_err(|error: toml_edit::TomlError| ConfigError::invalid(error.message()))
}

fn with_settings(text: &str, service: Option<&str>, settings: &[Setting]) -> Result<String, ConfigError> {
    let mut document = document(text)?;
    let mut services = tables(&mut document, "service");
    match service {
        Some(name) if !(services.is_empty() && name == DEFAULT_SERVICE) => {
            let named = |table: &&mut dyn TableLike| table.get("name").and_then(Item::as_str) == Some(name);
            let table = services.into_iter().find(named).ok_or_else(|| {
                ConfigError::invalid(format!("the file has no [[service]] of the name {name:?} to save this in"))
            })?;
            put_all(table, settings);
        }
        _ => {
            for table in &mut services {
                let own: Vec<_> =
                    settings.iter().filter(|setting| table.contains_key(setting.name())).copied().collect();
                put_all(*table, &own);
            }
            for setting in settings {
                let section = document.entry(setting.section()).or_insert_with(|| Item::Table(Table::new()));
                let table = section
                    .as_table_like_mut()
                    .ok_or_else(|| ConfigError::invalid(format!("{} is not a table", setting.section())))?;
                put(table, setting.name(), setting.value());
            }
        }
    }
    Ok(document.to_string())
}

/// The tables of that name, however the file writes them: `[[service]]`, or an array of inline tables.
pub(super) fn tables<'d>(document: &'d mut DocumentMut, name: &str) -> Vec<&'d mut dyn TableLike> {
    match document.get_mut(name) {
        Some(Item::ArrayOfTables(tables)) => tables.iter_mut().map(|table| table as &mut dyn TableLike).collect(),
        Some(Item::Value(Value::Array(array))) => array
            .iter_mut()
            .filter_map(Value::as_inline_table_mut)
            .map(|table: &mut InlineTable| table as &mut dyn TableLike)
            .collect(),
        _ => Vec::new(),
    }
}

fn put_all(table: &mut dyn TableLike, settings: &[Setting]) {
    for setting in settings {
        put(table, setting.name(), setting.value());
    }
}

/// Sets a value; the spaces and the comment around an old one stay.
pub(super) fn put(table: &mut dyn TableLike, key: &str, mut new: Value) {
    if let Some(Item::Value(old)) = table.get_mut(key) {
        *new.decor_mut() = old.decor().clone();
        *old = new;
    } else {
        table.insert(key, Item::Value(new));
    }
}

#[cfg(test)]
#[path = "edit_tests.rs"]
mod tests;
