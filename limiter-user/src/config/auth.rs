//! `[gateway.auth]`: who may connect.

use std::{path::PathBuf, time::Duration};

/// `[gateway.auth]`: every client must show a credential.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Auth {
    /// Where in the request the credential stands.
    pub places: Places,
    /// Whether the application gets to see the credential; it is taken out of the request otherwise.
    pub pass_on: bool,
    /// How often a session's right to go on is looked at again; zero: only when the token expires.
    pub reauth_interval: Duration,
    /// `[gateway.auth.jwt]`: JSON Web Tokens; `None`: not taken.
    pub jwt: Option<Jwt>,
}

/// Where in a request a credential may stand; each is off by default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Places {
    /// `Authorization: Bearer …`.
    pub authorization: bool,
    /// The cookie of this name.
    pub cookie: Option<String>,
    /// The parameter of this name in the URL's query.
    pub query: Option<String>,
    /// The offered subprotocol of this name, and the credential is the one that is offered right after it.
    pub subprotocol: Option<String>,
}

impl Places {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// `[gateway.auth.jwt]`: which tokens are taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Jwt {
    /// Files with a public key in PEM each.
    pub public_keys: Vec<PathBuf>,
    /// Files with a shared secret each (HS256).
    pub secrets: Vec<PathBuf>,
    /// A file with a JSON Web Key Set (RFC 7517).
    pub jwks: Option<PathBuf>,
    /// Who may have issued a token (`iss`); none: anybody who has a key.
    pub issuers: Vec<String>,
    /// For whom a token may be (`aud`); none: only tokens that are for nobody in particular.
    pub audiences: Vec<String>,
    /// How far the issuer's clock and ours may be apart.
    pub leeway: Duration,
    /// The claim that names the user.
    pub user_claim: String,
}

impl Default for Auth {
    fn default() -> Self {
        Self { places: Places::default(), pass_on: false, reauth_interval: Duration::from_mins(15), jwt: None }
    }
}

impl Default for Jwt {
    fn default() -> Self {
        Self {
            public_keys: Vec::new(),
            secrets: Vec::new(),
            jwks: None,
            issuers: Vec::new(),
            audiences: Vec::new(),
            leeway: Duration::from_secs(30),
            user_claim: "sub".into(),
        }
    }
}

impl Jwt {
    /// The files that the keys are in.
    pub fn files(&self) -> impl Iterator<Item = &PathBuf> {
        self.public_keys.iter().chain(&self.secrets).chain(&self.jwks)
    }
}
