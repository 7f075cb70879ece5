//! Changing limits in the file, with its comments and its order kept.

use std::{
    fs,
    io::{self, Write},
    os::unix::fs::{MetadataExt, fchown},
    path::{Path, PathBuf},
};

use tempfile::NamedTempFile;
use toml_edit::{DocumentMut, InlineTable, Item, Table, TableLike, Value};

use super::{ConfigError, DEFAULT_SERVICE, parse, resolve};
use crate::policy::Limits;

/// Largest rate and burst of new connections; far above what one host can do.
pub(crate) const GREATEST_CONNECTION_RATE: u32 = 1_000_000;

/// A limit that can be changed while the limiter runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LimitKey {
    /// Connections that one source may hold.
    ConnectionsPerSource,
    /// Connections that one source of the wider tier may hold.
    ConnectionsPerWideSource,
    /// Connections that the service may hold in all.
    ConnectionsTotal,
    /// Connections that all services may hold together.
    ConnectionsTotalAll,
    /// New connections per second that one source may open.
    ConnectionRate,
    /// How many of them it may open at once.
    ConnectionBurst,
    /// New connections per second that the service takes.
    ServiceConnectionRate,
    /// How many of them it takes at once.
    ServiceConnectionBurst,
    /// Length of the prefix that makes a source of an IPv4 address.
    Ipv4Prefix,
    /// Length of the prefix that makes a source of an IPv6 address.
    Ipv6Prefix,
    /// Length of the prefix that makes a wider source of an IPv4 address; 0: there is none.
    WideIpv4Prefix,
    /// Length of the prefix that makes a wider source of an IPv6 address; 0: there is none.
    WideIpv6Prefix,
}

impl LimitKey {
    /// All of them, in the order of the documentation.
    pub const ALL: [Self; 12] = [
        Self::ConnectionsPerSource,
        Self::ConnectionsPerWideSource,
        Self::ConnectionsTotal,
        Self::ConnectionsTotalAll,
        Self::ConnectionRate,
        Self::ConnectionBurst,
        Self::ServiceConnectionRate,
        Self::ServiceConnectionBurst,
        Self::Ipv4Prefix,
        Self::Ipv6Prefix,
        Self::WideIpv4Prefix,
        Self::WideIpv6Prefix,
    ];

    /// Its name in the file, on the command line and in `--json`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ConnectionsPerSource => "connections_per_source",
            Self::ConnectionsPerWideSource => "connections_per_wide_source",
            Self::ConnectionsTotal => "connections_total",
            Self::ConnectionsTotalAll => "connections_total_all",
            Self::ConnectionRate => "connection_rate",
            Self::ConnectionBurst => "connection_burst",
            Self::ServiceConnectionRate => "service_connection_rate",
            Self::ServiceConnectionBurst => "service_connection_burst",
            Self::Ipv4Prefix => "ipv4_prefix",
            Self::Ipv6Prefix => "ipv6_prefix",
            Self::WideIpv4Prefix => "wide_ipv4_prefix",
            Self::WideIpv6Prefix => "wide_ipv6_prefix",
        }
    }

    /// Whether it is one number for all services.
    pub const fn is_of_all_services(self) -> bool {
        matches!(self, Self::ConnectionsTotalAll)
    }

    /// Least and greatest value.
    pub const fn range(self) -> (u32, u32) {
        match self {
            Self::ConnectionsPerSource
            | Self::ConnectionsPerWideSource
            | Self::ConnectionsTotal
            | Self::ConnectionsTotalAll => (0, u32::MAX),
            Self::ConnectionRate | Self::ServiceConnectionRate => (0, GREATEST_CONNECTION_RATE),
            Self::ConnectionBurst | Self::ServiceConnectionBurst => (1, GREATEST_CONNECTION_RATE),
            Self::Ipv4Prefix => (1, 32),
            Self::Ipv6Prefix => (1, 128),
            Self::WideIpv4Prefix => (0, 31),
            Self::WideIpv6Prefix => (0, 127),
        }
    }

    /// The value in `limits`.
    pub fn get(self, limits: &Limits) -> u32 {
        match self {
            Self::ConnectionsPerSource => limits.connections_per_source,
            Self::ConnectionsPerWideSource => limits.connections_per_wide_source,
            Self::ConnectionsTotal => limits.connections_total,
            Self::ConnectionsTotalAll => limits.connections_total_all,
            Self::ConnectionRate => limits.connection_rate,
            Self::ConnectionBurst => limits.connection_burst,
            Self::ServiceConnectionRate => limits.service_connection_rate,
            Self::ServiceConnectionBurst => limits.service_connection_burst,
            Self::Ipv4Prefix => limits.ipv4_prefix.into(),
            Self::Ipv6Prefix => limits.ipv6_prefix.into(),
            Self::WideIpv4Prefix => limits.wide_ipv4_prefix.into(),
            Self::WideIpv6Prefix => limits.wide_ipv6_prefix.into(),
        }
    }

    /// Puts a value into `limits`; `None` if it is out of [`Self::range`].
    pub fn set(self, limits: &mut Limits, value: u32) -> Option<()> {
        let (least, greatest) = self.range();
        if value < least || value > greatest {
            return None;
        }
        match self {
            Self::ConnectionsPerSource => limits.connections_per_source = value,
            Self::ConnectionsPerWideSource => limits.connections_per_wide_source = value,
            Self::ConnectionsTotal => limits.connections_total = value,
            Self::ConnectionsTotalAll => limits.connections_total_all = value,
            Self::ConnectionRate => limits.connection_rate = value,
            Self::ConnectionBurst => limits.connection_burst = value,
            Self::ServiceConnectionRate => limits.service_connection_rate = value,
            Self::ServiceConnectionBurst => limits.service_connection_burst = value,
            Self::Ipv4Prefix => limits.ipv4_prefix = u8::try_from(value).ok()?,
            Self::Ipv6Prefix => limits.ipv6_prefix = u8::try_from(value).ok()?,
            Self::WideIpv4Prefix => limits.wide_ipv4_prefix = u8::try_from(value).ok()?,
            Self::WideIpv6Prefix => limits.wide_ipv6_prefix = u8::try_from(value).ok()?,
        }
        Some(())
    }
}

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

/// Writes the file anew with these limits, beside the old one. `service`: the one that they are for, or all of them; then
/// they go into `[limits]` and into every service that has its own value. The file must be right, before and after.
pub fn prepare_limits(
    path: &Path,
    service: Option<&str>,
    values: &[(LimitKey, u32)],
) -> Result<PreparedFile, ConfigError> {
    let unwritable = |source| ConfigError::Unwritable { path: path.to_owned(), source };
    // A link stays a link: what it leads to is replaced.
    let target = fs::canonicalize(path).map_err(|source| ConfigError::Unreadable { path: path.to_owned(), source })?;
    let text = resolve::read_text(path)?;
    parse::parse(path, &text)?;
    let text = with_limits(&text, service, values)?;
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

fn with_limits(text: &str, service: Option<&str>, values: &[(LimitKey, u32)]) -> Result<String, ConfigError> {
    let mut document: DocumentMut =
        text.parse().map_err(|error: toml_edit::TomlError| ConfigError::invalid(error.message()))?;
    let mut services = services(&mut document);
    match service {
        Some(name) if !(services.is_empty() && name == DEFAULT_SERVICE) => {
            let named = |table: &&mut dyn TableLike| table.get("name").and_then(Item::as_str) == Some(name);
            let table = services.into_iter().find(named).ok_or_else(|| {
                ConfigError::invalid(format!("the file has no [[service]] of the name {name:?} to save the limits in"))
            })?;
            put_all(table, values);
        }
        _ => {
            for table in &mut services {
                let own: Vec<_> = values.iter().filter(|(key, _)| table.contains_key(key.name())).copied().collect();
                put_all(*table, &own);
            }
            let limits = document.entry("limits").or_insert_with(|| Item::Table(Table::new()));
            let table = limits.as_table_like_mut().ok_or_else(|| ConfigError::invalid("limits is not a table"))?;
            put_all(table, values);
        }
    }
    Ok(document.to_string())
}

/// The services of the file, however it writes them: `[[service]]`, or an array of inline tables.
fn services(document: &mut DocumentMut) -> Vec<&mut dyn TableLike> {
    match document.get_mut("service") {
        Some(Item::ArrayOfTables(tables)) => tables.iter_mut().map(|table| table as &mut dyn TableLike).collect(),
        Some(Item::Value(Value::Array(array))) => array
            .iter_mut()
            .filter_map(Value::as_inline_table_mut)
            .map(|table: &mut InlineTable| table as &mut dyn TableLike)
            .collect(),
        _ => Vec::new(),
    }
}

fn put_all(table: &mut dyn TableLike, values: &[(LimitKey, u32)]) {
    for &(key, value) in values {
        put(table, key, value);
    }
}

/// Sets a value; the spaces and the comment around an old one stay.
fn put(table: &mut dyn TableLike, key: LimitKey, value: u32) {
    let mut new = Value::from(i64::from(value));
    if let Some(Item::Value(old)) = table.get_mut(key.name()) {
        *new.decor_mut() = old.decor().clone();
        *old = new;
    } else {
        table.insert(key.name(), Item::Value(new));
    }
}

#[cfg(test)]
#[path = "edit_tests.rs"]
mod tests;
