//! What can be changed while the limiter runs.

use clap::ValueEnum as _;
use toml_edit::Value;

use super::OnDeny;
use crate::policy::Limits;

/// Largest rate and burst of new connections; far above what one host can do.
pub(super) const GREATEST_CONNECTION_RATE: u32 = 1_000_000;

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

/// A key that can be changed while the limiter runs, and what it becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Setting {
    /// A limit, of that number.
    Limit(LimitKey, u32),
    /// What a refused SYN gets.
    OnDeny(OnDeny),
}

/// The name of the one that is no limit.
const ON_DENY: &str = "on_deny";

impl Setting {
    /// The names of all.
    pub fn names() -> impl Iterator<Item = &'static str> {
        LimitKey::ALL.into_iter().map(LimitKey::name).chain([ON_DENY])
    }

    /// From `KEY=VALUE`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (name, value) = text.split_once('=').ok_or("expected KEY=VALUE, such as connections_per_source=20")?;
        if name == ON_DENY {
            let on_deny = OnDeny::from_str(value, false);
            return on_deny
                .map(Self::OnDeny)
                .map_err(|_| format!("{name}: found {value:?}, expected drop, reset or observe"));
        }
        let key = LimitKey::ALL.into_iter().find(|key| key.name() == name).ok_or_else(|| {
            let names: Vec<_> = Self::names().collect();
            format!("{name:?} can't be changed while it runs; what can is {}", names.join(", "))
        })?;
        let (least, greatest) = key.range();
        value
            .parse()
            .ok()
            .filter(|value| (least..=greatest).contains(value))
            .map(|value| Self::Limit(key, value))
            .ok_or_else(|| format!("{name}: found {value:?}, expected a whole number from {least} to {greatest}"))
    }

    /// The name of its key in the file, on the command line and in `--json`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Limit(key, _) => key.name(),
            Self::OnDeny(_) => ON_DENY,
        }
    }

    /// Whether it is one value for all services.
    pub const fn is_of_all_services(self) -> bool {
        match self {
            Self::Limit(key, _) => key.is_of_all_services(),
            Self::OnDeny(_) => false,
        }
    }

    /// The section of the file that has it for every service which doesn't say otherwise.
    pub(super) const fn section(self) -> &'static str {
        match self {
            Self::Limit(..) => "limits",
            Self::OnDeny(_) => "kernel",
        }
    }

    /// What stands in the file.
    pub(super) fn value(self) -> Value {
        match self {
            Self::Limit(_, value) => i64::from(value).into(),
            Self::OnDeny(on_deny) => on_deny.name().into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn assignments_are_checked() {
        assert_eq!(Setting::parse("connections_per_source=0"), Ok(Setting::Limit(LimitKey::ConnectionsPerSource, 0)));
        assert_eq!(Setting::parse("ipv6_prefix=48"), Ok(Setting::Limit(LimitKey::Ipv6Prefix, 48)));
        assert_eq!(Setting::parse("on_deny=observe"), Ok(Setting::OnDeny(OnDeny::Observe)));
        for (text, complaint) in [
            ("connections_per_source", "expected KEY=VALUE"),
            (
                "burst=1",
                "\"burst\" can't be changed while it runs; what can is connections_per_source, connections_per",
            ),
            ("connections_total=-1", "found \"-1\", expected a whole number from 0 to 4294967295"),
            ("connections_total=", "found \"\""),
            ("ipv4_prefix=0", "from 1 to 32"),
            ("ipv4_prefix=33", "from 1 to 32"),
            ("ipv6_prefix=129", "from 1 to 128"),
            ("wide_ipv4_prefix=32", "from 0 to 31"),
            ("ipv6_prefix=64=64", "found \"64=64\""),
            ("on_deny=Reset", "on_deny: found \"Reset\", expected drop, reset or observe"),
            ("on_deny=", "found \"\""),
        ] {
            let error = Setting::parse(text).unwrap_err();
            assert!(error.contains(complaint), "{text}: {error}");
        }
    }

    #[test]
    fn limit_keys_know_their_ranges() {
        let mut limits = Limits::default();
        for key in LimitKey::ALL {
            let (least, greatest) = key.range();
            for value in [least, greatest] {
                assert_eq!(key.set(&mut limits, value), Some(()));
                assert_eq!(key.get(&limits), value);
            }
            assert_eq!(greatest.checked_add(1).and_then(|value| key.set(&mut limits, value)), None);
        }
    }
}
