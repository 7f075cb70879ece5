//! The limits of a service, and the sources that they hold for.

use std::{fmt, net::IpAddr};

use limiter_common::Address;
use serde::{Deserialize, Serialize};

/// Limits of one service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Connections that one source may hold; 0: any number.
    pub connections_per_source: u32,
    /// Connections that the service may hold in all; 0: any number.
    pub connections_total: u32,
    /// New connections per second that one source may open; 0: any number.
    pub connection_rate: u32,
    /// How many new connections a source that was quiet may open at once, at least 1.
    pub connection_burst: u32,
    /// Length of the prefix that makes a source of an IPv4 address, 1 to 32.
    pub ipv4_prefix: u8,
    /// Length of the prefix that makes a source of an IPv6 address, 1 to 128.
    pub ipv6_prefix: u8,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections_per_source: 20,
            connections_total: 10_000,
            connection_rate: 10,
            connection_burst: 20,
            ipv4_prefix: 32,
            ipv6_prefix: 64,
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
    fn an_ipv6_source_is_its_prefix() {
        let source = Limits::default().source("2001:db8:1:2:3:4:5:6".parse().unwrap());
        assert_eq!(source.to_string(), "2001:db8:1:2::/64");
    }
}
