//! What stands behind the gateway, from its text.

use std::str::FromStr;

use hyper::http::Uri;

use super::Upstream;

/// A text that names no upstream.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(r#"{found:?} is no upstream: {why}; expected "echo", "broadcast" or a URL such as "ws://127.0.0.1:9000""#)]
pub struct InvalidUpstream {
    found: String,
    why: &'static str,
}

impl FromStr for Upstream {
    type Err = InvalidUpstream;

    fn from_str(text: &str) -> Result<Self, InvalidUpstream> {
        // What may be a password is not repeated.
        let found = text.rsplit_once('@').map_or_else(|| text.to_owned(), |(_, host)| format!("…@{host}"));
        let invalid = |why| InvalidUpstream { found: found.clone(), why };
        match text {
            "echo" => return Ok(Self::Echo),
            "broadcast" => return Ok(Self::Broadcast),
            _ => {}
        }
        let uri: Uri = text.parse().map_err(|_| invalid("it is not a URL"))?;
        match uri.scheme_str() {
            Some("ws") => {}
            Some("wss") => return Err(invalid("TLS towards the upstream is not supported")),
            _ => return Err(invalid("it does not begin with ws://")),
        }
        let authority = uri.authority().map_or("", |authority| authority.as_str());
        if authority.contains('@') {
            return Err(invalid("it carries a user name"));
        }
        if uri.host().is_none_or(str::is_empty) {
            return Err(invalid("it names no host"));
        }
        if text.contains('#') {
            return Err(invalid("it has a fragment"));
        }
        let has_port =
            authority.rsplit_once(':').is_some_and(|(host, _)| !host.starts_with('[') || host.ends_with(']'));
        if has_port && uri.port_u16().is_none_or(|port| port == 0) {
            return Err(invalid("its port is not a number from 1 to 65535"));
        }
        Ok(Self::Relay(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_built_in_and_websocket_urls_are_taken() {
        assert_eq!("echo".parse(), Ok(Upstream::Echo));
        assert_eq!("broadcast".parse(), Ok(Upstream::Broadcast));
        for url in ["ws://127.0.0.1:9000", "ws://app.internal/chat?x=1", "ws://[::1]:9000/", "ws://[::1]"] {
            assert_eq!(url.parse(), Ok(Upstream::Relay(url.to_owned())), "{url}");
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
            "wss://example.org",
            "WS://example.org",
            "ws://",
            "ws:///path",
            "ws://:9000",
            "ws://user:secret@host",
            "ws://host/#top",
            "ws://host:0",
            "ws://host:70000",
            "ws://host:",
            "ws://[::1]:x",
            "ws://ho st",
        ] {
            assert!(text.parse::<Upstream>().is_err(), "{text}");
        }
    }
}
