//! Which web pages may connect: origins (RFC 6454) and patterns of them.

use std::{fmt, net::Ipv6Addr, str::FromStr};

/// An origin that may connect, or a pattern of such.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum AllowedOrigin {
    /// `"null"`: pages that have none of their own, such as files and sandboxed frames.
    Null,
    /// `"https://example.com"`: this one.
    Exact(Origin),
    /// `"https://*.example.com"`: the subdomains of a name, of any depth, and not the name itself. Without a scheme
    /// (`"*.example.com"`): by http and by https.
    Subdomains {
        /// `None`: http and https.
        scheme: Option<String>,
        /// The name, with the dot before it.
        suffix: String,
        /// `None`: the scheme's own.
        port: Option<u16>,
    },
}

/// Where a page comes from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Origin {
    scheme: String,
    host: String,
    /// `None`: the scheme's own.
    port: Option<u16>,
}

/// A text that is no origin, nor a pattern of them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(r#"{found:?} is no origin: {why}; expected one such as "https://example.com", "*.example.com" or "null""#)]
pub struct InvalidOrigin {
    found: String,
    why: &'static str,
}

impl AllowedOrigin {
    /// Whether pages of `origin` may connect.
    pub fn allows(&self, origin: &Origin) -> bool {
        match self {
            Self::Null => false,
            Self::Exact(exact) => exact == origin,
            Self::Subdomains { scheme, suffix, port } => {
                let scheme_fits = match scheme {
                    Some(scheme) => *scheme == origin.scheme,
                    None => matches!(origin.scheme.as_str(), "http" | "https"),
                };
                scheme_fits && *port == origin.port && origin.host.len() > suffix.len() && origin.host.ends_with(suffix)
            }
        }
    }
}

impl FromStr for AllowedOrigin {
    type Err = InvalidOrigin;

    fn from_str(text: &str) -> Result<Self, InvalidOrigin> {
        let invalid = |why| InvalidOrigin { found: text.to_owned(), why };
        if text == "null" {
            return Ok(Self::Null);
        }
        if text == "*" {
            return Err(invalid("to let every origin in, leave the list empty"));
        }
        let (scheme, rest) = match text.split_once("://") {
            Some((scheme, rest)) => (Some(scheme), rest),
            None => (None, text),
        };
        let Some(name) = rest.strip_prefix("*.") else {
            if scheme.is_none() {
                return Err(invalid("it has no scheme"));
            }
            return text.parse().map(Self::Exact);
        };
        // The name must be good as a host, whatever stands before it.
        let Origin { scheme: checked, host, port } =
            format!("{}://{name}", scheme.unwrap_or("https")).parse().map_err(|e: InvalidOrigin| invalid(e.why))?;
        if host.starts_with('[') {
            return Err(invalid("an address has no subdomains"));
        }
        Ok(Self::Subdomains { scheme: scheme.map(|_| checked), suffix: format!(".{host}"), port })
    }
}

/// As a browser writes it into the Origin header.
impl FromStr for Origin {
    type Err = InvalidOrigin;

    fn from_str(text: &str) -> Result<Self, InvalidOrigin> {
        let invalid = |why| InvalidOrigin { found: text.to_owned(), why };
        let (scheme, authority) = text.split_once("://").ok_or_else(|| invalid("it has no scheme"))?;
        let scheme = scheme.to_ascii_lowercase();
        let begins_well = scheme.starts_with(|first: char| first.is_ascii_lowercase());
        if !begins_well || !scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b)) {
            return Err(invalid("its scheme is not one"));
        }
        if authority.contains(['/', '?', '#']) {
            return Err(invalid("an origin ends with the host or the port: nothing follows, not even a slash"));
        }
        if !authority.is_ascii() {
            return Err(invalid("a name with other letters than a to z is written as in DNS (xn--…)"));
        }
        let authority = authority.to_ascii_lowercase();
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => {
                let port = port.parse().ok().filter(|port| *port != 0 && port_is_plain(&authority));
                (host, Some(port.ok_or_else(|| invalid("its port is not a number from 1 to 65535"))?))
            }
            _ => (authority.as_str(), None),
        };
        if !is_host(host) {
            return Err(invalid("it names no host"));
        }
        let own = match scheme.as_str() {
            "http" | "ws" => Some(80),
            "https" | "wss" => Some(443),
            _ => None,
        };
        Ok(Self { host: host.to_owned(), port: port.filter(|port| Some(*port) != own), scheme })
    }
}

/// Whether the port has digits alone: Rust takes a sign for a part of a number.
fn port_is_plain(authority: &str) -> bool {
    authority.rsplit(':').next().is_some_and(|port| port.bytes().all(|b| b.is_ascii_digit()))
}

fn is_host(host: &str) -> bool {
    match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(address) => address.parse::<Ipv6Addr>().is_ok(),
        None => host.split('.').all(|label| {
            !label.is_empty() && label.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
        }),
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme, self.host)?;
        self.port.map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn allows(pattern: &str, origin: &str) -> bool {
        pattern.parse::<AllowedOrigin>().unwrap().allows(&origin.parse().unwrap())
    }

    #[test]
    fn an_exact_origin_is_scheme_host_and_port() {
        assert!(allows("https://example.com", "https://example.com"));
        assert!(allows("https://Example.com:443", "https://example.com"));
        assert!(allows("http://[::1]:8080", "http://[::1]:8080"));
        assert!(allows("chrome-extension://abcdef", "chrome-extension://abcdef"));
        for other in [
            "http://example.com",
            "https://example.com:8443",
            "https://www.example.com",
            "https://example.com.evil.org",
            "https://evilexample.com",
        ] {
            assert!(!allows("https://example.com", other), "{other}");
        }
    }

    #[test]
    fn a_pattern_is_the_subdomains_and_not_the_name() {
        assert!(allows("https://*.example.com", "https://a.example.com"));
        assert!(allows("https://*.example.com:8443", "https://a.b.example.com:8443"));
        assert!(allows("*.example.com", "http://a.example.com"));
        assert!(allows("*.example.com", "https://a.example.com"));
        for (pattern, other) in [
            ("https://*.example.com", "https://example.com"),
            ("https://*.example.com", "http://a.example.com"),
            ("https://*.example.com", "https://a.example.com:8443"),
            ("*.example.com", "https://evilexample.com"),
            ("*.example.com", "https://a.example.com.evil.org"),
            ("*.example.com", "https://a.example.com:8443"),
            ("*.example.com", "ftp://a.example.com"),
            ("null", "https://example.com"),
        ] {
            assert!(!allows(pattern, other), "{pattern} {other}");
        }
    }

    #[test]
    fn what_is_no_origin_is_refused() {
        for text in [
            "",
            "*",
            "example.com",
            "https://",
            "https://*",
            "https://*.",
            "https://a.*.com",
            "https://example.com/",
            "https://user@example.com",
            "https://example.com:0",
            "https://example.com:+1",
            "https://example.com:",
            "https://ex ample.com",
            "https://bücher.example",
            "https://*.[::1]",
            "https://[::1",
            "1http://x",
            "Null",
            "https://a..b",
        ] {
            assert!(text.parse::<AllowedOrigin>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(text in "\\PC{0,60}") {
            _ = text.parse::<AllowedOrigin>();
            _ = text.parse::<Origin>();
        }

        #[test]
        fn an_origin_is_read_as_it_is_shown(text in "[a-z]{1,5}://[a-z0-9.-]{1,12}(:[1-9][0-9]{0,3})?") {
            if let Ok(origin) = text.parse::<Origin>() {
                prop_assert_eq!(origin.to_string().parse(), Ok(origin));
            }
        }
    }
}
