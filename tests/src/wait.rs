//! Waiting for a condition instead of for a time.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// Long enough for anything that happens at once on an idle host to happen on a busy one.
pub const SOON: Duration = Duration::from_secs(10);

/// Between two looks at the condition.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Waits until `condition` holds, at most for `limit`. `what` completes the sentence "timed out waiting until …".
pub fn eventually(limit: Duration, what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + limit;
    loop {
        if condition()? {
            return Ok(());
        }
        if Instant::now() >= deadline {
            bail!("timed out after {limit:?} waiting until {what}");
        }
        thread::sleep(POLL_INTERVAL);
    }
}

/// Waits until `value` gives `expected`; the error says what it gave last.
pub fn eventually_equal<T: PartialEq + std::fmt::Debug>(
    limit: Duration,
    what: &str,
    expected: &T,
    mut value: impl FnMut() -> Result<T>,
) -> Result<()> {
    let mut last = None;
    let outcome = eventually(limit, what, || {
        let now = value()?;
        let done = now == *expected;
        last = Some(now);
        Ok(done)
    });
    match (outcome, last) {
        (Err(error), Some(last)) => Err(error.context(format!("{what}: expected {expected:?}, last seen {last:?}"))),
        (outcome, _) => outcome,
    }
}
