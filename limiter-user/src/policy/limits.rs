//! The limits of a service, and the sources that they hold for.

use std::{fmt, net::IpAddr};

use limiter_common::Address;
use serde::{Deserialize, Serialize};

use super::Action;

/// Limits of one service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Connections that one source may hold; 0: any number.
    pub connections_per_source: u32,
    /// Connections that one source of the wider tier may hold; 0: any number.
    pub connections_per_wide_source: u32,
    /// Connections that the service may hold in all; 0: any number.
    pub connections_total: u32,
    /// Connections that all services may hold together; 0: any number. The same for every service.
    pub connections_total_all: u32,
    /// New connections per second that one source may open; 0: any number.
    pub connection_rate: u32,
    /// How many new connections a source that was quiet may open at once, at least 1.
    pub connection_burst: u32,
    /// New connections per second that the service takes from everybody together; 0: any number.
    pub service_connection_rate: u32,
    /// How many new connections the service takes at once after it was quiet, at least 1.
    pub service_connection_burst: u32,
    /// Length of the prefix that makes a source of an IPv4 address, 1 to 32.
    pub ipv4_prefix: u8,
    /// Length of the prefix that makes a source of an IPv6 address, 1 to 128.
    pub ipv6_prefix: u8,
    /// Length of the prefix that makes a source of the wider tier of an IPv4 address, shorter than `ipv4_prefix`; 0: there is
    /// no such tier.
    pub wide_ipv4_prefix: u8,
    /// The same for IPv6.
    pub wide_ipv6_prefix: u8,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections_per_source: 20,
            connections_per_wide_source: 0,
            connections_total: 10_000,
            connections_total_all: 0,
            connection_rate: 10,
            connection_burst: 20,
            ipv4_prefix: 32,
            service_connection_rate: 0,
            service_connection_burst: 100,
            ipv6_prefix: 64,
            wide_ipv4_prefix: 0,
            wide_ipv6_prefix: 0,
        }
    }
}

impl Limits {
    /// The source that `ip` belongs to.
    pub fn source(&self, ip: IpAddr) -> Source {
        let ip = ip.to_canonical();
        let prefix = if ip.is_ipv4() { self.ipv4_prefix } else { self.ipv6_prefix };
        Source { network: Address::from(ip).masked(prefix).into(), prefix }
    }

    /// The source of the wider tier that `ip` belongs to, if there is such a tier.
    pub fn wide_source(&self, ip: IpAddr) -> Option<Source> {
        let ip = ip.to_canonical();
        let prefix = if ip.is_ipv4() { self.wide_ipv4_prefix } else { self.wide_ipv6_prefix };
        (prefix != 0).then(|| Source { network: Address::from(ip).masked(prefix).into(), prefix })
    }

    /// The same prefixes, and no limits.
    pub(crate) fn lifted(self) -> Self {
        Self {
            connections_per_source: 0,
            connections_per_wide_source: 0,
            connections_total: 0,
            connections_total_all: 0,
            connection_rate: 0,
            service_connection_rate: 0,
            ..self
        }
    }

    /// What holds where a rule says `action`. (Whom it denies never gets as far as a limit.)
    pub(crate) fn under(mut self, action: Action) -> Self {
        match action {
            Action::Allow => self.lifted(),
            Action::Deny => self,
            Action::Limit(own) => {
                self.connections_per_source = own.connections_per_source.unwrap_or(self.connections_per_source);
                self.connections_per_wide_source =
                    own.connections_per_wide_source.unwrap_or(self.connections_per_wide_source);
                if let Some((rate, burst)) = own.rate {
                    (self.connection_rate, self.connection_burst) = (rate, burst);
                }
                self
            }
        }
    }

    /// That the limits go together: the key that does not, and why.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        for (key, wide, narrow_key, narrow) in [
            ("wide_ipv4_prefix", self.wide_ipv4_prefix, "ipv4_prefix", self.ipv4_prefix),
            ("wide_ipv6_prefix", self.wide_ipv6_prefix, "ipv6_prefix", self.ipv6_prefix),
        ] {
            if wide != 0 && wide >= narrow {
                return Err((
                    key,
                    format!("a wider source has a shorter prefix: found {wide}, and {narrow_key} is {narrow}"),
                ));
            }
        }
        if self.connections_per_wide_source != 0 && self.wide_ipv4_prefix == 0 && self.wide_ipv6_prefix == 0 {
            let why = "there is no wider source: set wide_ipv4_prefix, wide_ipv6_prefix or both, such as 24 and 48";
            return Err(("connections_per_wide_source", why.to_owned()));
        }
        Ok(())
    }
}

/// A prefix of addresses that connections are counted against. Displayed as CIDR: `192.0.2.7/32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Source {
    /// The first address of the prefix.
    pub network: IpAddr,
    /// Its length in bits.
    pub prefix: u8,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapped_address_has_the_source_of_its_ipv4_address() {
        let limits = Limits { ipv4_prefix: 24, ..Limits::default() };
        let source = limits.source("::ffff:192.0.2.7".parse().unwrap());
        assert_eq!(source, limits.source("192.0.2.7".parse().unwrap()));
        assert_eq!(source.to_string(), "192.0.2.0/24");
    }

    #[test]
    fn a_wider_source_has_a_shorter_prefix_of_its_own() {
        let limits = Limits { wide_ipv4_prefix: 24, connections_per_wide_source: 9, ..Limits::default() };
        assert_eq!(limits.check(), Ok(()));
        let wide = |ip: &str| limits.wide_source(ip.parse().unwrap()).map(|source| source.to_string());
        assert_eq!(wide("::ffff:192.0.2.7"), Some("192.0.2.0/24".to_owned()));
        assert_eq!(wide("2001:db8::7"), None);
        let key = |limits: Limits| limits.check().unwrap_err().0;
        assert_eq!(key(Limits { wide_ipv4_prefix: 32, ..limits }), "wide_ipv4_prefix");
        assert_eq!(key(Limits { wide_ipv6_prefix: 65, ..limits }), "wide_ipv6_prefix");
        assert_eq!(key(Limits { wide_ipv4_prefix: 0, ..limits }), "connections_per_wide_source");
    }

    #[test]
    fn an_ipv6_source_is_its_prefix() {
        let source = Limits::default().source("2001:db8:1:2:3:4:5:6".parse().unwrap());
        assert_eq!(source.to_string(), "2001:db8:1:2::/64");
    }
}
