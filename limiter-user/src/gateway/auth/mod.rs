//! Who a client is, by what it shows in its handshake; and for how long that holds.

mod credential;
#[cfg(test)]
pub(in crate::gateway) mod signing;
mod token;

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use hyper::http::{HeaderValue, request::Parts};
use tokio::time::{Instant, sleep};

use super::{answer::Refusal, close::End, handshake::Handshake, metrics::Metrics};
use crate::config::{self, TokenKeyError};
use credential::Credential;
use token::Tokens;

/// The wall clock may be set while a session sleeps, so it is looked at this often at least.
const LONGEST_SLEEP: Duration = Duration::from_mins(1);

/// Longest name of a user, in bytes.
const LONGEST_USER: usize = 128;

/// What `[gateway.auth]` asks of clients.
pub(super) struct Auth {
    config: config::Auth,
    tokens: Option<Arc<Tokens>>,
}

/// A client that has shown who it is.
#[derive(Clone, Debug)]
pub(super) struct Authenticated {
    user: Arc<str>,
    basis: Basis,
}

/// What a session's right to go on rests on.
#[derive(Clone, Debug)]
enum Basis {
    /// A token. It is not kept: which key signed it, and until when, is all there is to check again.
    Token { key: [u8; 32], expires: SystemTime },
}

/// Why a client is not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rejection {
    /// It shows nothing.
    Missing,
    /// It shows what is no token at all, or one with an algorithm that no key is for.
    Malformed,
    /// No key of ours has signed the token.
    Signature,
    /// The token has expired, or does not say when it does.
    Expired,
    /// The token is for later.
    NotYet,
    /// Somebody else has issued the token.
    Issuer,
    /// The token is for somebody else.
    Audience,
    /// The token names no user.
    User,
}

impl Rejection {
    /// What metrics and logs call it.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Missing => "no_token",
            Self::Malformed => "token_malformed",
            Self::Signature => "token_signature",
            Self::Expired => "token_expired",
            Self::NotYet => "token_not_yet",
            Self::Issuer => "token_issuer",
            Self::Audience => "token_audience",
            Self::User => "token_user",
        }
    }

    /// What the client is told.
    pub(super) fn detail(self) -> &'static str {
        match self {
            Self::Missing => "this server takes clients with a token only",
            Self::Malformed => "what stands in the place of the token is not one that this server takes",
            Self::Signature => "the token is not signed by a key that this server knows",
            Self::Expired => "the token has expired, or never expires",
            Self::NotYet => "the token is not valid yet",
            Self::Issuer => "the token is not by an issuer that this server knows",
            Self::Audience => "the token is not for this server",
            Self::User => "the token names no user",
        }
    }

    /// The value of WWW-Authenticate (RFC 6750, section 3).
    pub(super) fn challenge(self) -> HeaderValue {
        if self == Self::Missing {
            return HeaderValue::from_static("Bearer realm=\"limiter\"");
        }
        let text =
            format!("Bearer realm=\"limiter\", error=\"invalid_token\", error_description=\"{}\"", self.detail());
        // The details are plain words.
        HeaderValue::from_str(&text).unwrap_or(HeaderValue::from_static("Bearer"))
    }
}

impl Auth {
    /// Reads the keys.
    pub(super) fn new(config: &config::Auth) -> Result<Self, TokenKeyError> {
        let tokens = config.jwt.as_ref().map(Tokens::new).transpose()?.map(Arc::new);
        Ok(Self { config: config.clone(), tokens })
    }

    /// Who the client is. What it shows is taken out of the request that the application will see, unless that is wanted.
    pub(super) fn authenticate(&self, head: &mut Parts, handshake: &mut Handshake) -> Result<Authenticated, Refusal> {
        let shown = credential::find(head, handshake, &self.config.places)?;
        let checked = shown.ok_or(Rejection::Missing).and_then(|shown| self.check(&shown));
        let authenticated = checked.map_err(Refusal::Unauthenticated)?;
        credential::take_out(head, handshake, &self.config.places, self.config.pass_on);
        Ok(authenticated)
    }

    fn check(&self, shown: &Credential) -> Result<Authenticated, Rejection> {
        let tokens = self.tokens.as_ref().ok_or(Rejection::Malformed)?;
        let token = tokens.verify(shown.text(), SystemTime::now())?;
        Ok(Authenticated { user: token.user, basis: Basis::Token { key: token.key, expires: token.expires } })
    }

    /// Completes when a session may not go on, with what ends it.
    pub(super) async fn lapse(&self, client: &Authenticated) -> End {
        let mut next_check = self.next_check();
        loop {
            let Basis::Token { key, expires } = &client.basis;
            let Some(left) = expires.duration_since(SystemTime::now()).ok().filter(|left| !left.is_zero()) else {
                return End::Expired;
            };
            let now = Instant::now();
            let until_check = next_check.map_or(Duration::MAX, |at| at.saturating_duration_since(now));
            if until_check.is_zero() {
                if !self.tokens.as_ref().is_some_and(|tokens| tokens.knows(key)) {
                    return End::Revoked;
                }
                next_check = self.next_check();
                continue;
            }
            sleep(left.min(until_check).min(LONGEST_SLEEP)).await;
        }
    }

    /// When to look again; `None`: never. Spread, so that those who came together are not looked at together.
    fn next_check(&self) -> Option<Instant> {
        let interval = self.config.reauth_interval;
        (!interval.is_zero()).then(|| Instant::now() + interval.mul_f64(0.9 + 0.1 * fastrand::f64()))
    }

    /// Looks at the files with keys for ever, and takes new ones into use. Those that are no good are told, and the old
    /// ones stay.
    pub(super) async fn watch(self: Arc<Self>, metrics: Arc<Metrics>) {
        let Some(tokens) = self.tokens.clone() else { return };
        let tell = |reloaded: Result<(), TokenKeyError>| match reloaded {
            Ok(()) => {
                metrics.keys_reloaded("ok");
                tracing::info!("the keys for tokens have changed: the new ones are in use");
            }
            Err(error) => {
                metrics.keys_reloaded("failed");
                tracing::error!(%error, "the keys for tokens have changed and can't be used: the old ones stay in use");
            }
        };
        tokens.watch().run(move || tokens.reload(), tell).await;
    }
}

impl Authenticated {
    /// The user's name.
    pub(super) fn user(&self) -> &Arc<str> {
        &self.user
    }
}

/// A user's name, if `text` can be one: it goes into logs and headers, so it has no control characters, and no space at
/// either end, which a header would lose.
fn user_name(text: &str) -> Option<Arc<str>> {
    let is_good =
        !text.is_empty() && text.len() <= LONGEST_USER && text.trim() == text && !text.chars().any(char::is_control);
    is_good.then(|| text.into())
}
