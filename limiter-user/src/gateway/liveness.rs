//! Whether a client is still there, and has still something to say.

use std::time::Duration;

use tokio::time::Instant;

use super::close::End;
use crate::config;

/// How far to look when nothing is due, and no deadline can be told.
pub(super) const FAR: Duration = Duration::from_hours(24);

/// What is known of a client's life.
pub(super) struct Liveness {
    /// When the last ping went out that nothing has come after.
    pinged: Option<Instant>,
    /// When it is too old.
    expires: Option<Instant>,
}

/// What is to be done about a client.
pub(super) enum Due {
    /// Nothing before this.
    Later(Instant),
    /// A ping, now.
    Ping,
    /// It is over.
    End(End),
}

impl Liveness {
    /// Zero: it never grows too old. Up to a tenth of its time is taken away, by chance: those that came together, after a
    /// restart perhaps, are not to come back together.
    pub(super) fn new(max_lifetime: Duration) -> Self {
        let lifetime = max_lifetime.mul_f64(1.0 - fastrand::f64() / 10.0);
        Self { pinged: None, expires: after(Instant::now(), lifetime) }
    }

    /// Looks at a client of whom something was last `heard` then, and who last took part in a message then.
    pub(super) fn due(&mut self, now: Instant, heard: Instant, last_message: Instant, config: &config::Gateway) -> Due {
        // Any byte after the ping shows that the client is there.
        self.pinged = self.pinged.filter(|at| heard < *at);
        let idle_at = after(last_message, config.idle_timeout);
        if idle_at.is_some_and(|at| now >= at) {
            return Due::End(End::Idle);
        }
        if self.expires.is_some_and(|at| now >= at) {
            return Due::End(End::TooOld);
        }
        let next = match self.pinged {
            Some(at) if now >= at + config.pong_timeout => return Due::End(End::NoPong),
            // Whether the answer has come is also looked at when the next ping would be due.
            Some(at) => {
                earliest([after(at, config.ping_interval).filter(|due| *due > now), Some(at + config.pong_timeout)])
            }
            None => match after(heard, config.ping_interval) {
                Some(due) if now >= due => return Due::Ping,
                due => due,
            },
        };
        Due::Later(earliest([idle_at, self.expires, next]).unwrap_or(now + FAR))
    }

    /// A ping went out.
    pub(super) fn pinged(&mut self, now: Instant) {
        self.pinged = Some(now);
    }
}

/// The earliest of those that there are.
pub(super) fn earliest<const N: usize>(instants: [Option<Instant>; N]) -> Option<Instant> {
    instants.into_iter().flatten().min()
}

/// `period` after `from`; zero: never.
fn after(from: Instant, period: Duration) -> Option<Instant> {
    if period.is_zero() { None } else { from.checked_add(period) }
}
