//! Who may control: whoever shows the secret, and no web page.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::Instant,
};

use axum::http::{HeaderMap, HeaderValue, StatusCode, Uri, header, uri::Authority};
use limiter_common::bucket::Rate;

use super::problem::Problem;
use crate::{
    config::{AdminToken, AdminTokenError},
    gateway::watch::FileWatch,
};

/// Wrong secrets per second, and at once, that are answered one by one and logged.
const WRONG: Rate = Rate::new(1, 10);

/// The secret, as the file has it now.
#[derive(Debug)]
pub(super) struct Door {
    path: PathBuf,
    token: RwLock<AdminToken>,
    watch: FileWatch,
    began: Instant,
    /// The word of the token bucket of wrong secrets, in nanoseconds since `began`.
    wrong: Mutex<u64>,
}

impl Door {
    pub(super) fn new(path: &Path) -> Result<Self, AdminTokenError> {
        // Before it is read, so that no change is missed.
        let watch = FileWatch::new([path.to_owned()]);
        let token = load(path)?;
        Ok(Self {
            path: path.to_owned(),
            token: RwLock::new(token),
            watch,
            began: Instant::now(),
            wrong: Mutex::new(0),
        })
    }

    /// Reads the file again whenever it changes, for ever. One that is no good is told, and the old secret stays.
    pub(super) async fn watch(self: Arc<Self>) {
        let path = self.path.clone();
        let tell = |reloaded: Result<AdminToken, AdminTokenError>| match reloaded {
            Ok(token) => {
                *self.token.write().unwrap_or_else(PoisonError::into_inner) = token;
                tracing::info!("admin.token_file has changed: the new secret is in use");
            }
            Err(error) => {
                tracing::error!(%error, "admin.token_file has changed and can't be used: the old secret stays in use");
            }
        };
        self.watch.clone().run(move || load(&path), tell).await;
    }

    /// Whether the request shows the secret. `peer` is for the log.
    pub(super) fn check(&self, headers: &HeaderMap, peer: IpAddr) -> Result<(), Problem> {
        let challenge = |text| (header::WWW_AUTHENTICATE, HeaderValue::from_static(text));
        let mut shown = headers.get_all(header::AUTHORIZATION).iter();
        let (Some(shown), None) = (shown.next(), shown.next()) else {
            let (name, value) = challenge("Bearer realm=\"limiter admin\"");
            let detail = "it takes the secret of admin.token_file, once, as \"Authorization: Bearer SECRET\"";
            return Err(Problem::new(StatusCode::UNAUTHORIZED, detail).with(name, value));
        };
        if bearer(shown.as_bytes())
            .is_some_and(|shown| self.token.read().unwrap_or_else(PoisonError::into_inner).is(shown))
        {
            return Ok(());
        }
        // Whoever has the right secret is let in whatever others do, so that nobody can keep them out. What is bounded is what
        // wrong ones cost and write; to guess 32 bytes is hopeless at any rate.
        if !self.spend_wrong(Instant::now()) {
            let wait = (header::RETRY_AFTER, HeaderValue::from_static("1"));
            return Err(Problem::new(StatusCode::TOO_MANY_REQUESTS, "too many wrong secrets").with(wait.0, wait.1));
        }
        tracing::warn!(%peer, "a wrong secret was shown at the admin address");
        let (name, value) = challenge("Bearer realm=\"limiter admin\", error=\"invalid_token\"");
        Err(Problem::new(StatusCode::UNAUTHORIZED, "that is not the secret of admin.token_file").with(name, value))
    }

    fn spend_wrong(&self, now: Instant) -> bool {
        let now = u64::try_from(now.saturating_duration_since(self.began).as_nanos()).unwrap_or(u64::MAX);
        let mut full_at = self.wrong.lock().unwrap_or_else(PoisonError::into_inner);
        let has_token = WRONG.has_token(*full_at, now);
        if has_token {
            *full_at = WRONG.spent(*full_at, now);
        }
        has_token
    }
}

fn load(path: &Path) -> Result<AdminToken, AdminTokenError> {
    let token = AdminToken::load(path)?;
    if token.is_readable_by_others {
        tracing::warn!(path = %path.display(), "everybody on this host can read admin.token_file: chmod o= takes that away");
    }
    Ok(token)
}

/// What is shown by the scheme Bearer.
fn bearer(authorization: &[u8]) -> Option<&[u8]> {
    let (scheme, shown) = authorization.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then(|| shown.trim_ascii())
}

/// That no web page asks: none has the secret, but none should get as far as that either. A page that has its own name lead to this
/// address (DNS rebinding) is told by the name, where the address is a loopback one.
pub(super) fn refuse_pages(headers: &HeaderMap, uri: &Uri, is_loopback: bool) -> Result<(), Problem> {
    if headers.contains_key(header::ORIGIN) || headers.contains_key("sec-fetch-site") {
        return Err(Problem::new(StatusCode::FORBIDDEN, "web pages may not control limiter"));
    }
    let mut hosts = headers.get_all(header::HOST).iter();
    let host = match (hosts.next(), hosts.next()) {
        (Some(host), None) => host.to_str().ok(),
        (None, None) => uri.authority().map(Authority::as_str),
        _ => None,
    };
    let Some(host) = host else { return Err(Problem::new(StatusCode::BAD_REQUEST, "it names no host, or several")) };
    if is_loopback && !is_address(host) {
        let detail = "ask for the address, or for localhost: on a loopback address other names are not taken";
        return Err(Problem::new(StatusCode::FORBIDDEN, detail));
    }
    Ok(())
}

/// Whether a Host header has an address or localhost, with or without a port.
fn is_address(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split_once(']').map_or(rest, |(address, _)| address),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_host_is_an_address_or_a_name() {
        for host in ["127.0.0.1", "127.0.0.1:9180", "[::1]", "[::1]:9180", "localhost", "LocalHost:1"] {
            assert!(is_address(host), "{host}");
        }
        for host in
            ["", "evil.example", "evil.example:9180", "127.0.0.1.evil.example", "localhost.evil.example:1", "[x]"]
        {
            assert!(!is_address(host), "{host}");
        }
    }

    #[test]
    fn wrong_secrets_have_a_rate() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, "x".repeat(32)).unwrap();
        let door = Door::new(file.path()).unwrap();
        let now = door.began;
        assert_eq!((0..100).filter(|_| door.spend_wrong(now)).count(), 10);
        assert!(door.spend_wrong(now + Duration::from_secs(1)));
        assert!(!door.spend_wrong(now + Duration::from_secs(1)));
    }

    #[test]
    fn the_scheme_is_bearer() {
        assert_eq!(bearer(b"Bearer x"), Some(&b"x"[..]));
        assert_eq!(bearer(b"bearer  x "), Some(&b"x"[..]));
        for other in [&b""[..], b"Bearer", b"Basic x", b"Bearerx yz"] {
            assert_eq!(bearer(other), None);
        }
    }
}
