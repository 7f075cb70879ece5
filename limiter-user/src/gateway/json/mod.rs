//! Text messages as JSON: whether they fit a schema, and what must not be in their strings.
//!
//! Whoever takes messages from clients asks here, whatever stands behind: what is held against the schema is what passes, to the
//! last byte.

mod sanitize;
mod schema;
mod strict;

pub(super) use schema::{SchemaFile, Schemas};

use crate::config::Sanitize;
use sanitize::NotJson;
#[cfg(any(test, limiter_fuzz))]
pub(super) use sanitize::is_forbidden;

/// What is asked of the text messages of a route. There is none where nothing is.
pub(super) struct Screen<'a> {
    pub(super) sanitize: Sanitize,
    pub(super) schema: Option<&'a SchemaFile>,
}

/// What may become of a text message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Screened {
    /// It passes as it is.
    Pass,
    /// This passes in its place.
    Instead(String),
    /// It is no JSON, or nested too deeply.
    NotJson,
    /// It does not fit the schema.
    Unfit,
}

impl Screen<'_> {
    /// Looks at a whole message. What is left out of it is left out first: the schema is for what passes.
    pub(super) fn look(&self, text: &str) -> Screened {
        let instead = match sanitize::sanitize(text, self.sanitize) {
            Ok(instead) => instead,
            Err(NotJson) => return Screened::NotJson,
        };
        if let Some(schema) = self.schema
            && !schema.fits(instead.as_deref().unwrap_or(text))
        {
            return Screened::Unfit;
        }
        instead.map_or(Screened::Pass, Screened::Instead)
    }
}
