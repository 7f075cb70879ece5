//! Whether a client is still there, and has still something to say.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, sleep_until};
use tokio_tungstenite::tungstenite::Message;

use super::{
    close::End,
    peer::{Peer, SendError},
    socket::Socket,
};
use crate::config;

/// How far to look when nothing is due, and no deadline can be told.
const FAR: Duration = Duration::from_hours(24);

/// Pings a quiet client; completes when it does not answer, or has been idle for too long.
pub(super) async fn watch(client: &Peer<Socket>, config: &config::Gateway) -> End {
    let mut pinged: Option<Instant> = None;
    loop {
        let now = Instant::now();
        let heard = client.transport(Socket::last_read);
        // Any byte after the ping shows that the client is there.
        pinged = pinged.filter(|at| heard < *at);

        let idle_at = after(client.last_message(), config.idle_timeout);
        if idle_at.is_some_and(|at| now >= at) {
            return End::Idle;
        }
        let next = match pinged {
            Some(at) if now >= at + config.pong_timeout => return End::NoPong,
            // Whether the answer has come is also looked at when the next ping would be due.
            Some(at) => [after(at, config.ping_interval).filter(|due| *due > now), Some(at + config.pong_timeout)]
                .into_iter()
                .flatten()
                .min(),
            None => match after(heard, config.ping_interval) {
                Some(due) if now >= due => {
                    match client.send(Message::Ping(Bytes::new())).await {
                        // From here on: a ping that waits behind a long message can't be answered yet.
                        Ok(()) => pinged = Some(Instant::now()),
                        Err(SendError::Slow) => return End::SlowConsumer,
                        // Whoever reads finds out how it broke, and ends the session.
                        Err(SendError::Broken) => std::future::pending().await,
                    }
                    continue;
                }
                due => due,
            },
        };
        let wake = [idle_at, next].into_iter().flatten().min().unwrap_or(now + FAR);
        sleep_until(wake).await;
    }
}

/// `period` after `from`; zero: never.
fn after(from: Instant, period: Duration) -> Option<Instant> {
    if period.is_zero() { None } else { from.checked_add(period) }
}
