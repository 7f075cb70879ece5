//! The configuration: the file, the environment, the flags.
//!
//! A key has one value: that of its flag, else of its environment variable, else of the file, else its default
//! ([`Config::resolve`]).

mod admin_token;
mod api_keys;
mod auth;
mod auth_parse;
mod bounded;
mod certificate;
mod edit;
mod edit_rules;
mod error;
mod json_schema;
mod listen;
mod messages;
mod origin;
mod overload;
mod parse;
mod read;
mod resolve;
mod route;
mod schema;
mod setting;
mod tls;
mod token_keys;
mod upstream;
mod upstream_parse;
mod value;

pub use admin_token::{AdminToken, AdminTokenError};
pub use api_keys::{API_KEY_PREFIX, ApiKey, ApiKeyError, ApiKeys, new_api_key};
pub use auth::{Auth, AuthError, Forward, HttpUrl, Jwt, OnExcess, Places, UserLimits, user_name};
pub use certificate::{CertificateError, CertificateFiles, Tls, TlsHost};
pub use edit::{PreparedFile, prepare_settings};
pub use edit_rules::{prepare_rule, prepare_without_rule};
pub use error::{ConfigError, Problem};
pub use json_schema::{Schema, SchemaError};
pub use listen::{InvalidListen, Listen};
pub use messages::{Algorithm, Kinds, Messages, OnViolation, Sanitize};
pub use origin::{AllowedOrigin, InvalidOrigin, Origin};
pub use overload::Overload;
pub use resolve::{DEFAULT_SERVICE, Overrides, Purpose};
pub use route::Route;
pub use schema::*;
pub use setting::{LimitKey, Setting};
pub use token_keys::{TokenKey, TokenKeyError, TokenKeys};
pub(crate) use upstream::Place;
pub use upstream::{InvalidUpstream, Target};

#[cfg(any(test, limiter_fuzz))]
pub(crate) mod fuzz {
    //! See [`crate::fuzz`].

    use std::path::Path;

    use super::{Config, ConfigError};

    /// A file by itself: what it names is not looked at.
    pub(crate) fn parse(path: &Path, text: &str) -> Result<Config, ConfigError> {
        super::parse::parse(path, text).map(|file| file.config)
    }
}

/// A commented file with every key at its default.
pub const EXAMPLE: &str = include_str!("example.toml");
