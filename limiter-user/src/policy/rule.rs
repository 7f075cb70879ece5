//! Rules: what holds for a prefix of addresses, whatever the limits of the services are.

use std::{fmt, net::IpAddr, str::FromStr, time::SystemTime};

use ipnet::{IpNet, Ipv4Net};

/// A rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// For whom. Of two rules for an address, that with the longer prefix holds.
    pub cidr: Cidr,
    /// What holds for them.
    pub action: Action,
    /// When it ends; `None`: never.
    pub expires: Option<SystemTime>,
}

impl Rule {
    /// One without an end.
    pub const fn new(cidr: Cidr, action: Action) -> Self {
        Self { cidr, action, expires: None }
    }

    /// Whether it holds no more at that time.
    pub fn has_ended(&self, now: SystemTime) -> bool {
        self.expires.is_some_and(|expires| expires <= now)
    }
}

/// What a rule does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// No limit holds. Connections are counted all the same.
    Allow,
    /// Nobody gets in.
    Deny,
    /// These limits take the place of those of every service.
    Limit(OwnLimits),
}

impl Action {
    /// The names of all.
    pub const NAMES: [&'static str; 3] = ["allow", "deny", "limit"];

    /// Its name in `--json`.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
            Self::Limit(_) => "limit",
        }
    }
}

/// Limits of a rule; what is `None` stays as the service has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OwnLimits {
    /// Connections that one source may hold; 0: any number.
    pub connections_per_source: Option<u32>,
    /// Connections that one source of the wider tier may hold; 0: any number.
    pub connections_per_wide_source: Option<u32>,
    /// New connections per second that one source may open (0: any number), and how many at once.
    pub rate: Option<(u32, u32)>,
}

/// A prefix of addresses, with no bits after it; IPv4-mapped ones are IPv4.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Cidr(IpNet);

impl Cidr {
    /// `None` if the prefix is longer than the address.
    pub fn new(address: IpAddr, prefix: u8) -> Option<Self> {
        let net = IpNet::new(address, prefix).ok()?.trunc();
        let IpNet::V6(v6) = net else { return Some(Self(net)) };
        // Shorter ones have all of IPv4 in them only because it can be written so.
        let mapped = v6.prefix_len().checked_sub(limiter_common::rule::MAPPED_BITS);
        match (v6.addr().to_ipv4_mapped(), mapped) {
            (Some(v4), Some(prefix)) => Ipv4Net::new(v4, prefix).ok().map(|net| Self(net.into())),
            _ => Some(Self(net)),
        }
    }

    /// As a network.
    pub fn network(&self) -> IpNet {
        self.0
    }

    /// The first address.
    pub fn address(&self) -> IpAddr {
        self.0.addr()
    }

    /// Whether another prefix lies in this one, or is this one.
    pub fn contains(&self, other: Self) -> bool {
        self.0.contains(&other.0)
    }

    /// How many bits of an address of this family count.
    pub fn prefix(&self) -> u8 {
        self.0.prefix_len()
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What is not a prefix of addresses.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidCidr {
    /// Neither an address nor a prefix.
    #[error("expected an address or a prefix, such as 192.0.2.7 or 2001:db8::/32")]
    Malformed,
    /// It has bits after its prefix, and so may be meant otherwise.
    #[error("there are bits after the prefix; did you mean {0}?")]
    Bits(Cidr),
}

impl FromStr for Cidr {
    type Err = InvalidCidr;

    /// A prefix, or an address by itself.
    fn from_str(text: &str) -> Result<Self, InvalidCidr> {
        let address = text.parse::<IpAddr>().map(IpNet::from);
        let net = address.or_else(|_| text.parse::<IpNet>()).map_err(|_| InvalidCidr::Malformed)?;
        let cidr = Self::new(net.addr(), net.prefix_len()).ok_or(InvalidCidr::Malformed)?;
        if net.trunc() == net { Ok(cidr) } else { Err(InvalidCidr::Bits(cidr)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_action_has_its_name_in_the_list() {
        let actions = [Action::Allow, Action::Deny, Action::Limit(OwnLimits::default())];
        assert_eq!(actions.map(|action| action.name()), Action::NAMES);
    }

    #[test]
    fn a_prefix_is_taken_as_it_is_meant() {
        for (text, meant) in [
            ("192.0.2.7", "192.0.2.7/32"),
            ("192.0.2.0/24", "192.0.2.0/24"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("2001:db8::1", "2001:db8::1/128"),
            ("2001:DB8:0::/32", "2001:db8::/32"),
            ("::/0", "::/0"),
            ("::ffff:192.0.2.7", "192.0.2.7/32"),
            ("::ffff:192.0.2.0/120", "192.0.2.0/24"),
            ("::ffff:0:0/96", "0.0.0.0/0"),
        ] {
            assert_eq!(text.parse::<Cidr>().unwrap().to_string(), meant, "{text}");
        }
        for text in ["", "x", "192.0.2.0/33", "192.0.2/24", "2001:db8::/129", "192.0.2.7/-1"] {
            assert_eq!(text.parse::<Cidr>(), Err(InvalidCidr::Malformed), "{text}");
        }
        let error = "192.0.2.7/24".parse::<Cidr>().unwrap_err().to_string();
        assert_eq!(error, "there are bits after the prefix; did you mean 192.0.2.0/24?");
    }
}
