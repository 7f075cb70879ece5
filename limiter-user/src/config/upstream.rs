//! What stands behind the gateway, from its text.

use std::{fmt, path::PathBuf, str::FromStr};

use hyper::http::{Uri, uri::PathAndQuery};

use super::Upstream;

/// Longest path of a unix socket, in bytes (unix(7): 108 with the NUL).
const LONGEST_SOCKET_PATH: usize = 107;

/// Where a WebSocket server is: `ws://HOST[:PORT][/PATH]`, `wss://…`, or `unix:/SOCKET[:/PATH]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    /// Where it listens.
    pub(crate) at: Place,
    /// Whether TLS is spoken.
    pub(crate) tls: bool,
    /// Where every client is led, whatever it asked for; `None`: where it asked for.
    pub(crate) path: Option<PathAndQuery>,
}

/// An address that can be connected to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Place {
    /// A name or an address, without brackets, and a port.
    Host(String, u16),
    /// A socket in the file system.
    Unix(PathBuf),
}

/// Without the path, which may carry a secret.
impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "wss" } else { "ws" };
        match &self.at {
            Place::Host(name, port) if name.contains(':') => write!(f, "{scheme}://[{name}]:{port}"),
            Place::Host(name, port) => write!(f, "{scheme}://{name}:{port}"),
            Place::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// A text that names no upstream.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    r#"{found:?} is no upstream: {why}; expected "echo", "broadcast" or a URL such as "ws://127.0.0.1:9000", "wss://app.internal" or "unix:/run/app.sock""#
)]
pub struct InvalidUpstream {
    found: String,
    why: &'static str,
}

impl FromStr for Upstream {
    type Err = InvalidUpstream;

    fn from_str(text: &str) -> Result<Self, InvalidUpstream> {
        match text {
            "echo" => Ok(Self::Echo),
            "broadcast" => Ok(Self::Broadcast),
            url => url.parse().map(|target| Self::Relay(vec![target])),
        }
    }
}

impl FromStr for Target {
    type Err = InvalidUpstream;

    fn from_str(text: &str) -> Result<Self, InvalidUpstream> {
        // What may be a password is not repeated.
        let found = || text.rsplit_once('@').map_or_else(|| text.to_owned(), |(_, host)| format!("…@{host}"));
        parse(text).map_err(|why| InvalidUpstream { found: found(), why })
    }
}

fn parse(text: &str) -> Result<Target, &'static str> {
    if let Some(rest) = text.strip_prefix("unix:") {
        return parse_unix(rest);
    }
    let uri: Uri = text.parse().map_err(|_| "it is not a URL")?;
    let tls = match uri.scheme_str() {
        Some("ws") => false,
        Some("wss") => true,
        _ => return Err("it does not begin with ws://, wss:// or unix:"),
    };
    let authority = uri.authority().map_or("", |authority| authority.as_str());
    if authority.contains('@') {
        return Err("it carries a user name");
    }
    let host = uri.host().filter(|host| !host.is_empty()).ok_or("it names no host")?;
    if text.contains('#') {
        return Err("it has a fragment");
    }
    let has_port = authority.rsplit_once(':').is_some_and(|(host, _)| !host.starts_with('[') || host.ends_with(']'));
    if has_port && uri.port_u16().is_none_or(|port| port == 0) {
        return Err("its port is not a number from 1 to 65535");
    }
    let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    let port = uri.port_u16().unwrap_or(if tls { 443 } else { 80 });
    let path = uri.path_and_query().filter(|path| !matches!(path.as_str(), "" | "/")).cloned();
    Ok(Target { at: Place::Host(host, port), tls, path })
}

fn parse_unix(text: &str) -> Result<Target, &'static str> {
    // A colon begins the path that is asked for, as with nginx.
    let (socket, path) = match text.split_once(':') {
        Some((socket, path)) => (socket, Some(path)),
        None => (text, None),
    };
    if !socket.starts_with('/') {
        return Err("the path of its socket does not begin with /");
    }
    if socket.len() > LONGEST_SOCKET_PATH {
        return Err("the path of its socket is longer than 107 bytes");
    }
    if socket.contains('\0') {
        return Err("the path of its socket has a NUL");
    }
    let path = match path {
        None | Some("" | "/") => None,
        Some(path) if path.starts_with('/') => Some(path.parse().map_err(|_| "what follows its socket is no path")?),
        Some(_) => return Err("what follows its socket does not begin with /"),
    };
    Ok(Target { at: Place::Unix(socket.into()), tls: false, path })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(text: &str) -> Target {
        text.parse().unwrap()
    }

    #[test]
    fn what_is_built_in_is_taken() {
        assert_eq!("echo".parse(), Ok(Upstream::Echo));
        assert_eq!("broadcast".parse(), Ok(Upstream::Broadcast));
    }

    #[test]
    fn urls_are_taken_apart() {
        for (text, shown, path) in [
            ("ws://127.0.0.1:9000", "ws://127.0.0.1:9000", None),
            ("ws://[::1]:9000/", "ws://[::1]:9000", None),
            ("ws://[::1]", "ws://[::1]:80", None),
            ("ws://app.internal/chat?x=1", "ws://app.internal:80", Some("/chat?x=1")),
            ("wss://app.internal", "wss://app.internal:443", None),
            ("wss://app.internal:8443/chat", "wss://app.internal:8443", Some("/chat")),
            ("unix:/run/app.sock", "unix:/run/app.sock", None),
            ("unix:/run/app.sock:/chat?x=1", "unix:/run/app.sock", Some("/chat?x=1")),
        ] {
            let target = target(text);
            assert_eq!(
                (target.to_string().as_str(), target.path.as_ref().map(PathAndQuery::as_str)),
                (shown, path),
                "{text}"
            );
        }
    }

    #[test]
    fn a_password_is_not_repeated() {
        let error = "ws://user:secret@host".parse::<Upstream>().unwrap_err().to_string();
        assert!(error.contains("…@host") && !error.contains("secret"), "{error}");
    }

    #[test]
    fn anything_else_is_refused() {
        for text in [
            "",
            "Echo",
            "Broadcast",
            "localhost:9000",
            "http://127.0.0.1",
            "WS://example.org",
            "ws://",
            "ws:///path",
            "ws://:9000",
            "ws://user:secret@host",
            "wss://user:secret@host",
            "ws://host/#top",
            "ws://host:0",
            "ws://host:70000",
            "ws://host:",
            "ws://[::1]:x",
            "ws://ho st",
            "unix:",
            "unix:app.sock",
            "unix:/run/app.sock:chat",
            "unix:/run/app.sock:/a b",
            &format!("unix:/{}", "a".repeat(107)),
        ] {
            assert!(text.parse::<Upstream>().is_err(), "{text}");
        }
    }
}
