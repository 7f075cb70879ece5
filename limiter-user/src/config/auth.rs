//! `[gateway.auth]`: who may connect.

use std::{path::PathBuf, str::FromStr, sync::Arc, time::Duration};

use hyper::http::{Uri, uri::PathAndQuery};

use super::{ApiKeyError, TokenKeyError};

/// Longest name of a user, in bytes.
const LONGEST_USER: usize = 128;

/// `[gateway.auth]`: every client must show a credential.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Auth {
    /// Where in the request the credential stands.
    pub places: Places,
    /// Whether the application gets to see the credential; it is taken out of the request otherwise.
    pub pass_on: bool,
    /// How often a session's right to go on is looked at again; zero: only when the token expires.
    pub reauth_interval: Duration,
    /// `[gateway.auth.users]`: how many connections each user may have.
    pub users: UserLimits,
    /// The file of API keys; `None`: none are taken.
    pub api_keys: Option<PathBuf>,
    /// `[gateway.auth.jwt]`: JSON Web Tokens; `None`: not taken.
    pub jwt: Option<Jwt>,
    /// `[gateway.auth.forward]`: an HTTP service that is asked about every client, in the place of all else.
    pub forward: Option<Forward>,
}

/// `[gateway.auth.forward]`: who is asked whether a client may connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forward {
    /// Where it is asked.
    pub url: HttpUrl,
    /// How long it may take to answer.
    pub timeout: Duration,
    /// The header of its answer that names the user.
    pub user_header: String,
}

/// A URL of an HTTP service without TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpUrl {
    /// A name or an address, without brackets.
    pub host: String,
    /// The port.
    pub port: u16,
    /// Host and port as the URL has them.
    pub authority: String,
    /// Path and query.
    pub path: String,
}

/// `[gateway.auth.users]`: what each user may do. An API key may say otherwise of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UserLimits {
    /// Connections that a user may have at a time; 0: any number.
    pub connections: u32,
    /// What one more does.
    pub on_excess: OnExcess,
    /// Connection attempts per minute; 0: any number.
    pub attempts_per_minute: u32,
}

/// What a user's connection too many does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum OnExcess {
    /// The user's oldest connection is closed (4409).
    Replace,
    /// It is refused (429).
    Refuse,
}

/// Why clients can't be told who they are: a file that is no good.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    /// The keys of tokens.
    #[error("gateway.auth.jwt: {0}")]
    Tokens(#[from] TokenKeyError),
    /// The file of API keys.
    #[error("gateway.auth.api_keys: {0}")]
    ApiKeys(#[from] ApiKeyError),
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
        Self {
            places: Places::default(),
            pass_on: false,
            reauth_interval: Duration::from_mins(15),
            users: UserLimits::default(),
            api_keys: None,
            jwt: None,
            forward: None,
        }
    }
}

impl Default for UserLimits {
    fn default() -> Self {
        Self { connections: 1, on_excess: OnExcess::Replace, attempts_per_minute: 5 }
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

impl FromStr for HttpUrl {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let uri: Uri = text.parse().map_err(|_| "it is not a URL")?;
        if uri.scheme_str() != Some("http") {
            return Err(
                "it does not begin with http:// (a service on another host: reach it through a tunnel, or a proxy here)",
            );
        }
        let authority = uri.authority().ok_or("it names no host")?;
        if authority.as_str().contains('@') {
            return Err("it carries a user name");
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        let has_port = authority.as_str().len() > authority.host().len();
        let port = if has_port { authority.port_u16().filter(|port| *port != 0) } else { Some(80) };
        match port {
            _ if host.is_empty() => Err("it names no host"),
            None => Err("its port is not a number from 1 to 65535"),
            Some(port) => Ok(Self {
                host: host.to_owned(),
                port,
                authority: authority.to_string(),
                path: uri.path_and_query().map_or("/", PathAndQuery::as_str).to_owned(),
            }),
        }
    }
}

impl Jwt {
    /// The files that the keys are in.
    pub fn files(&self) -> impl Iterator<Item = &PathBuf> {
        self.public_keys.iter().chain(&self.secrets).chain(&self.jwks)
    }
}

/// A user's name, if `text` can be one: it goes into logs and headers, so it has no control characters, and no space at
/// either end, which a header would lose.
pub fn user_name(text: &str) -> Option<Arc<str>> {
    let is_good =
        !text.is_empty() && text.len() <= LONGEST_USER && text.trim() == text && !text.chars().any(char::is_control);
    is_good.then(|| text.into())
}
