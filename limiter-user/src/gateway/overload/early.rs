//! Who is turned away before its request is read.

use std::time::Duration;

use tokio::time::timeout;

use super::Level;
use crate::gateway::{Shared, answer::Refusal, connection::refused, socket::Socket};

/// How long a client may take to begin its request, and to read the answer: each costs a descriptor meanwhile.
const PATIENCE: Duration = Duration::from_secs(1);

/// A TLS record with a fatal alert, `internal_error`: RFC 8446 has none that would say more.
const ALERT: [u8; 7] = [21, 3, 3, 0, 2, 2, 80];

/// Turns a client away, if that is possible before it has said what it wants; or gives it back.
///
/// With an exempt route it is not: this may be a client for it. In TLS there is no way to say "later", so as long as some get in, who
/// does not is told in HTTP. When nobody gets in, the handshake is what can be saved.
pub(in crate::gateway) async fn turn_away(socket: Socket, shared: &Shared) -> Option<Socket> {
    let overload = &shared.metrics.overload;
    let is_tls = shared.tls.is_some();
    if shared.routes.has_exempt() || (is_tls && overload.level() < Level::ALL) {
        return Some(socket);
    }
    refused(shared, socket.connection().remote.ip(), &Refusal::Overloaded);
    if is_tls {
        shared.metrics.tls_failed("overloaded");
    }
    let _telling = overload.telling()?;
    // An answer that is there before the question is none to many clients.
    let mut first = [0];
    if !matches!(timeout(PATIENCE, socket.wire().peek(&mut first)).await, Ok(Ok(1))) {
        return None;
    }
    // Behind a PROXY header is TLS, too; what begins with the letter of a method is not.
    let answer = if is_tls && (shared.config.proxy_protocol || !first[0].is_ascii_uppercase()) {
        ALERT.to_vec()
    } else {
        Refusal::Overloaded.raw(overload)
    };
    socket.end_with(&answer, PATIENCE).await;
    None
}
