//! JSON Web Tokens.

use std::{
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{dangerous::insecure_decode_claims, decode_header};
use serde_json::{Map, Value};

use super::{super::watch::FileWatch, Rejection, user_name};
use crate::config::{Jwt, TokenKeyError, TokenKeys};

/// Longest token that is looked at, in bytes. Most have some hundred.
const LONGEST_TOKEN: usize = 8 * 1024;

/// A date that no clock of ours will see, in seconds: what is beyond it would overflow elsewhere.
const NEVER_SECONDS: f64 = 1e11;

/// Checks tokens.
pub(in crate::gateway) struct Tokens {
    config: Jwt,
    keys: RwLock<Arc<TokenKeys>>,
    watch: FileWatch,
}

/// What a good token says.
#[derive(Debug)]
pub(in crate::gateway) struct Token {
    pub(in crate::gateway) user: Arc<str>,
    /// The [id](crate::config::TokenKey::id) of the key that signed it.
    pub(super) key: [u8; 32],
    /// From when on it is not taken any more: its own time, and the leeway.
    pub(super) expires: SystemTime,
}

impl Tokens {
    pub(in crate::gateway) fn new(config: &Jwt) -> Result<Self, TokenKeyError> {
        let watch = FileWatch::new(config.files().cloned());
        let keys = RwLock::new(Arc::new(TokenKeys::load(config)?));
        Ok(Self { config: config.clone(), keys, watch })
    }

    /// Reads the keys again. If they are no good, the old ones stay.
    pub(super) fn reload(&self) -> Result<(), TokenKeyError> {
        let keys = Arc::new(TokenKeys::load(&self.config)?);
        *self.keys.write().unwrap_or_else(PoisonError::into_inner) = keys;
        Ok(())
    }

    pub(super) fn watch(&self) -> FileWatch {
        self.watch.clone()
    }

    fn keys(&self) -> Arc<TokenKeys> {
        Arc::clone(&self.keys.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether the key with this id is still in force.
    pub(super) fn knows(&self, key: &[u8; 32]) -> bool {
        self.keys().has(key)
    }

    /// Whether a token is good at that time.
    ///
    /// The library's own `decode` is not used: it takes its cryptography from a setting of the whole process, which is not
    /// a library's to make, and lets claims pass that have the wrong type.
    pub(in crate::gateway) fn verify(&self, token: &str, now: SystemTime) -> Result<Token, Rejection> {
        if token.len() > LONGEST_TOKEN {
            return Err(Rejection::Malformed);
        }
        let (message, signature) = token.rsplit_once('.').ok_or(Rejection::Malformed)?;
        let signature = URL_SAFE_NO_PAD.decode(signature).map_err(|_| Rejection::Malformed)?;
        // It knows no "none", nor tokens in more or fewer than three parts.
        let head = decode_header(token).map_err(|_| Rejection::Malformed)?;
        // Whoever does not understand all that is named there must not take the token (RFC 7515, 4.1.11).
        if head.crit.is_some() {
            return Err(Rejection::Malformed);
        }
        let keys = self.keys();
        let key = keys
            .candidates(head.alg, head.kid.as_deref())
            .find(|key| key.verifies(message.as_bytes(), &signature))
            .ok_or(Rejection::Signature)?;
        // Its signature is good, so what it says was said by who has the key.
        let claims: Map<String, Value> = insecure_decode_claims(token).map_err(|_| Rejection::Malformed)?;
        let (user, expires) = self.check(&claims, now)?;
        Ok(Token { user, key: key.id(), expires })
    }

    /// What a token says must be meant for us and now (RFC 7519, 4.1); with its user and when it expires.
    fn check(&self, claims: &Map<String, Value>, now: SystemTime) -> Result<(Arc<str>, SystemTime), Rejection> {
        let leeway = self.config.leeway;
        let expires = claims.get("exp").and_then(time).ok_or(Rejection::Expired)? + leeway;
        if expires <= now {
            return Err(Rejection::Expired);
        }
        if let Some(from) = claims.get("nbf")
            && time(from).ok_or(Rejection::NotYet)? > now + leeway
        {
            return Err(Rejection::NotYet);
        }
        let is_one_of =
            |value: &Value, known: &[String]| value.as_str().is_some_and(|value| known.iter().any(|k| k == value));
        let Jwt { issuers, audiences, user_claim, .. } = &self.config;
        if !issuers.is_empty() && !claims.get("iss").is_some_and(|issuer| is_one_of(issuer, issuers)) {
            return Err(Rejection::Issuer);
        }
        let is_for_us = match claims.get("aud") {
            None => audiences.is_empty(),
            Some(Value::Array(list)) => list.iter().any(|audience| is_one_of(audience, audiences)),
            Some(audience) => is_one_of(audience, audiences),
        };
        if !is_for_us {
            return Err(Rejection::Audience);
        }
        let user = match claims.get(user_claim) {
            Some(Value::String(name)) => user_name(name),
            Some(Value::Number(number)) if number.is_u64() => user_name(&number.to_string()),
            _ => None,
        };
        Ok((user.ok_or(Rejection::User)?, expires))
    }
}

/// A `NumericDate`: seconds, which may have a fraction.
fn time(value: &Value) -> Option<SystemTime> {
    let seconds = value.as_f64().filter(|seconds| *seconds >= 0.0)?;
    Some(UNIX_EPOCH + Duration::from_secs_f64(seconds.min(NEVER_SECONDS)))
}

#[cfg(test)]
#[path = "token_tests.rs"]
mod tests;
