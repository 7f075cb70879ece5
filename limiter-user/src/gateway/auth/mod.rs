//! Who a client is, by what it shows in its handshake; and for how long that holds.

mod api_keys;
mod credential;
mod forward;
#[cfg(test)]
pub(in crate::gateway) mod signing;
#[cfg(any(test, limiter_fuzz))]
pub(in crate::gateway) mod token;
#[cfg(not(any(test, limiter_fuzz)))]
mod token;
mod users;

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use hyper::http::{HeaderValue, request::Parts};
use tokio::time::{Instant, sleep};

use super::{answer::Refusal, close::End, handshake::Handshake, metrics::Metrics, together::Whose};
use crate::config::{self, API_KEY_PREFIX, AuthError, user_name};
use api_keys::KeyFile;
use credential::Credential;
use forward::{Forward, Question, Verdict};
use token::Tokens;
use users::{Account, Users};

pub(super) use forward::Visitor;
pub(super) use users::{Crowded, Seat};

/// The wall clock may be set while a session sleeps, so it is looked at this often at least.
const LONGEST_SLEEP: Duration = Duration::from_mins(1);

/// What `[gateway.auth]` asks of clients.
pub(super) struct Auth {
    config: config::Auth,
    tokens: Option<Arc<Tokens>>,
    keys: Option<Arc<KeyFile>>,
    forward: Option<Forward>,
    users: Arc<Users>,
}

/// A client that has shown who it is.
pub(super) struct Authenticated {
    account: Account,
    limits: config::UserLimits,
    /// Messages per window, where that differs from other users'.
    rate: Option<u32>,
    basis: Basis,
}

/// A client with its place among the sessions of its user.
pub(super) struct Member {
    authenticated: Authenticated,
    seat: Seat,
}

/// What a session's right to go on rests on.
enum Basis {
    /// A token. It is not kept: which key signed it, and until when, is all there is to check again.
    Token { key: [u8; 32], expires: SystemTime },
    /// An API key, by its hash.
    Key([u8; 32]),
    /// The word of a service, with what it was asked.
    Forward(Question),
}

/// Why a client is not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rejection {
    /// It shows nothing.
    Missing,
    /// It shows what is no token at all, or one with an algorithm that no key is for.
    Malformed,
    /// No key of ours has signed the token.
    Signature,
    /// The API key is not in the file.
    Key,
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
            Self::Key => "key_unknown",
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
            Self::Key => "this server does not know the API key",
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
    pub(super) fn new(config: &config::Auth) -> Result<Self, AuthError> {
        let tokens = config.jwt.as_ref().map(Tokens::new).transpose()?.map(Arc::new);
        let keys = config.api_keys.as_deref().map(KeyFile::new).transpose()?.map(Arc::new);
        Ok(Self {
            config: config.clone(),
            tokens,
            keys,
            forward: config.forward.as_ref().map(Forward::new),
            users: Arc::default(),
        })
    }

    /// With the sessions of users counted together with another's: the same gateway's, before its settings changed.
    #[must_use]
    pub(super) fn counting_with(self, other: &Self) -> Self {
        Self { users: Arc::clone(&other.users), ..self }
    }

    /// Who the client is. What it shows is taken out of the request that the application will see, unless that is wanted.
    pub(super) async fn authenticate(
        &self,
        head: &mut Parts,
        handshake: &mut Handshake,
        visitor: Visitor<'_>,
    ) -> Result<Authenticated, Refusal> {
        if let Some(forward) = &self.forward {
            let question = Question::new(head, visitor);
            let user = match forward.ask(&question).await {
                Verdict::Allowed(user) => user,
                Verdict::Refused(status, headers) => return Err(Refusal::ForwardRefused(status, headers)),
                Verdict::Unavailable(why) => return Err(Refusal::ForwardUnavailable(why)),
            };
            let account = Account { user, key: None };
            let basis = Basis::Forward(question);
            return Ok(Authenticated { account, limits: self.config.users, rate: None, basis });
        }
        let shown = credential::find(head, handshake, &self.config.places)?;
        let checked = shown.ok_or(Rejection::Missing).and_then(|shown| self.check(&shown));
        let authenticated = checked.map_err(Refusal::Unauthenticated)?;
        credential::take_out(head, handshake, &self.config.places, self.config.pass_on);
        Ok(authenticated)
    }

    fn check(&self, shown: &Credential) -> Result<Authenticated, Rejection> {
        let limits = self.config.users;
        if let Some(keys) = &self.keys
            && shown.text().starts_with(API_KEY_PREFIX)
        {
            let key = keys.find(shown.text()).ok_or(Rejection::Key)?;
            let limits = config::UserLimits {
                connections: key.connections.unwrap_or(limits.connections),
                attempts_per_minute: key.attempts_per_minute.unwrap_or(limits.attempts_per_minute),
                ..limits
            };
            let account = Account { user: Arc::clone(&key.user), key: Some(key.id()) };
            return Ok(Authenticated { account, limits, rate: key.rate, basis: Basis::Key(key.id()) });
        }
        let tokens = self.tokens.as_ref().ok_or(Rejection::Malformed)?;
        let token = tokens.verify(shown.text(), SystemTime::now())?;
        let account = Account { user: token.user, key: None };
        let basis = Basis::Token { key: token.key, expires: token.expires };
        Ok(Authenticated { account, limits, rate: None, basis })
    }

    /// Takes a place for the client among the sessions of its user.
    ///
    /// `exempt`: whatever the limits of users are.
    pub(super) fn enter(
        &self,
        authenticated: Authenticated,
        exempt: bool,
        metrics: &Metrics,
    ) -> Result<Member, Refusal> {
        let limits = authenticated.limits;
        let rate = authenticated.rate.map(|rate| if exempt { 0 } else { rate });
        let authenticated = Authenticated { rate, ..authenticated };
        let limits =
            if exempt { config::UserLimits { connections: 0, attempts_per_minute: 0, ..limits } } else { limits };
        let seat = self
            .users
            .enter(authenticated.account.clone(), limits, metrics.users.clone(), Instant::now())
            .map_err(Refusal::Crowded)?;
        Ok(Member { authenticated, seat })
    }

    /// Completes when a session may not go on, with what ends it.
    pub(super) async fn lapse(&self, client: &Member) -> End {
        tokio::select! {
            () = client.seat.replaced() => End::Replaced,
            end = self.outlive(&client.authenticated) => end,
        }
    }

    async fn outlive(&self, Authenticated { account, basis, .. }: &Authenticated) -> End {
        let mut next_check = self.next_check();
        loop {
            let left = match basis {
                Basis::Token { expires, .. } => expires.duration_since(SystemTime::now()).unwrap_or_default(),
                Basis::Key(_) | Basis::Forward(_) => Duration::MAX,
            };
            if left.is_zero() {
                return End::Expired;
            }
            let now = Instant::now();
            let until_check = next_check.map_or(Duration::MAX, |at| at.saturating_duration_since(now));
            if until_check.is_zero() {
                if !self.holds(&account.user, basis).await {
                    return End::Revoked;
                }
                next_check = self.next_check();
                continue;
            }
            sleep(left.min(until_check).min(LONGEST_SLEEP)).await;
        }
    }

    /// Whether what the client has shown would be taken again.
    async fn holds(&self, user: &str, basis: &Basis) -> bool {
        match basis {
            Basis::Token { key, .. } => self.tokens.as_ref().is_some_and(|tokens| tokens.knows(key)),
            Basis::Key(digest) => self.keys.as_ref().is_some_and(|keys| keys.knows(digest)),
            Basis::Forward(question) => match &self.forward {
                Some(forward) => match forward.ask(question).await {
                    Verdict::Allowed(now) => *now == *user,
                    Verdict::Refused(..) => false,
                    // A service that is down must not take the sessions down that it has let in.
                    Verdict::Unavailable(why) => {
                        tracing::warn!(
                            user,
                            why,
                            "can't ask again whether a client may stay; it stays until the next time"
                        );
                        true
                    }
                },
                None => false,
            },
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
        let tell = |reloaded: Result<(), AuthError>| match reloaded {
            Ok(()) => {
                metrics.keys_reloaded("ok");
                tracing::info!("the keys of clients have changed: the new ones are in use");
            }
            Err(error) => {
                metrics.keys_reloaded("failed");
                tracing::error!(%error, "the keys of clients have changed and can't be used: the old ones stay in use");
            }
        };
        let tokens = async {
            if let Some(tokens) = self.tokens.clone() {
                tokens.watch().run(move || tokens.reload().map_err(AuthError::from), tell).await;
            }
        };
        let keys = async {
            if let Some(keys) = self.keys.clone() {
                keys.watch().run(move || keys.reload().map_err(AuthError::from), tell).await;
            }
        };
        tokio::join!(tokens, keys);
    }
}

impl Member {
    /// The user's name.
    pub(super) fn user(&self) -> &str {
        &self.authenticated.account.user
    }

    /// Whose messages are counted together with its own.
    pub(super) fn whose(&self) -> Whose {
        let Account { user, key } = &self.authenticated.account;
        Whose::User(Arc::clone(user), *key)
    }

    /// How many messages per window its user may send over all connections; 0: any number.
    pub(super) fn rate(&self, limits: &config::Messages) -> u32 {
        self.authenticated.rate.unwrap_or(limits.rate_per_user)
    }

    /// Has those of the user's older sessions leave that are too many. Called when this one is sure to begin.
    pub(super) fn take_over(&self) {
        self.seat.take_over();
    }
}
