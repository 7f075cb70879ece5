//! Whether a web page may connect.

use hyper::{HeaderMap, header::ORIGIN};

use super::answer::Refusal;
use crate::config::{AllowedOrigin, Origin};

/// Longest origin that is repeated to the client.
const LONGEST_SHOWN: usize = 100;

/// Checks the Origin header against the list; an empty one allows any.
///
/// A request without the header passes: browsers always send it with a WebSocket handshake, and anything else
/// could send whatever it likes. The list protects users of browsers from other sites' pages, not the service from programs.
pub(super) fn check(headers: &HeaderMap, allowed: &[AllowedOrigin]) -> Result<(), Refusal> {
    if allowed.is_empty() {
        return Ok(());
    }
    let mut lines = headers.get_all(ORIGIN).iter();
    let origin = match (lines.next(), lines.next()) {
        (None, _) => return Ok(()),
        (Some(origin), None) => origin.as_bytes(),
        (Some(_), Some(_)) => return Err(Refusal::Bad("there is more than one Origin header")),
    };
    let is_allowed = if origin == b"null" {
        allowed.contains(&AllowedOrigin::Null)
    } else {
        let origin = str::from_utf8(origin).ok().and_then(|text| text.parse::<Origin>().ok());
        origin.is_some_and(|origin| allowed.iter().any(|pattern| pattern.allows(&origin)))
    };
    if is_allowed {
        return Ok(());
    }
    Err(Refusal::Origin(String::from_utf8_lossy(origin).chars().take(LONGEST_SHOWN).collect()))
}
