//! Where the gateway listens, from its text.

use std::{fmt, net::SocketAddr, path::PathBuf, str::FromStr};

/// Longest path of a unix socket, in bytes: the kernel's `sun_path` with its final zero.
const LONGEST_UNIX_PATH: usize = 107;

/// One entry of `gateway.listen`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Listen {
    /// An address and a port of this host.
    Tcp(SocketAddr),
    /// `unix:PATH`: a socket in the file system.
    Unix(PathBuf),
    /// `systemd`: every socket that the service manager hands over and that no other entry names.
    Systemd,
    /// `fd:NAME`: the sockets that the service manager hands over under that name (`FileDescriptorName=`).
    Named(String),
}

/// A text that says nowhere to listen.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    r#"{found:?} is nowhere to listen: {why}; expected an address and a port, such as "0.0.0.0:8080" or "[::]:8080", a socket such as "unix:/run/limiter/ws.sock", "systemd", or "fd:NAME""#
)]
pub struct InvalidListen {
    found: String,
    why: &'static str,
}

impl Listen {
    /// Its address, if it is one of TCP that is known before the start.
    pub fn tcp(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(address) => Some(*address),
            _ => None,
        }
    }
}

impl From<SocketAddr> for Listen {
    fn from(address: SocketAddr) -> Self {
        Self::Tcp(address)
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Systemd => f.write_str("systemd"),
            Self::Named(name) => write!(f, "fd:{name}"),
        }
    }
}

impl FromStr for Listen {
    type Err = InvalidListen;

    fn from_str(text: &str) -> Result<Self, InvalidListen> {
        let invalid = |why| InvalidListen { found: text.to_owned(), why };
        if text == "systemd" {
            return Ok(Self::Systemd);
        }
        if let Some(path) = text.strip_prefix("unix:") {
            return match path {
                path if !path.starts_with('/') => Err(invalid("its path is not an absolute one")),
                path if path.ends_with('/') => Err(invalid("its path is that of a folder")),
                path if path.len() > LONGEST_UNIX_PATH => Err(invalid("its path is longer than 107 bytes")),
                path if path.contains('\0') => Err(invalid("its path has a zero byte in it")),
                path => Ok(Self::Unix(path.into())),
            };
        }
        if let Some(name) = text.strip_prefix("fd:") {
            // As systemd has it (`fdname_is_valid`).
            let is_name =
                (1..=255).contains(&name.len()) && name.bytes().all(|b| (b' '..0x7f).contains(&b) && b != b':');
            return if is_name {
                Ok(Self::Named(name.to_owned()))
            } else {
                Err(invalid("that is no name of a descriptor"))
            };
        }
        text.parse().map(Self::Tcp).map_err(|_| invalid("it is no IP address with a port"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_what_is_read() {
        for text in ["0.0.0.0:8080", "[::]:8080", "unix:/run/limiter/ws.sock", "systemd", "fd:web sockets"] {
            assert_eq!(text.parse::<Listen>().unwrap().to_string(), text);
        }
        assert_eq!("unix:/a".parse(), Ok(Listen::Unix("/a".into())));
        assert_eq!("fd:ws".parse(), Ok(Listen::Named("ws".into())));
    }

    #[test]
    fn what_is_nowhere_is_refused_with_its_reason() {
        let long = format!("unix:/{}", "x".repeat(LONGEST_UNIX_PATH));
        for (text, why) in [
            ("8080", "no IP address"),
            ("localhost:8080", "no IP address"),
            ("", "no IP address"),
            ("unix:ws.sock", "not an absolute one"),
            ("unix:", "not an absolute one"),
            ("unix:/run/", "a folder"),
            (&long, "longer than 107 bytes"),
            ("fd:", "no name"),
            ("fd:a:b", "no name"),
            ("fd:\n", "no name"),
        ] {
            let error = text.parse::<Listen>().unwrap_err().to_string();
            assert!(error.contains(why), "{text:?}: {error}");
        }
        let just = format!("unix:/{}", "x".repeat(LONGEST_UNIX_PATH - 1));
        assert!(just.parse::<Listen>().is_ok());
    }
}
