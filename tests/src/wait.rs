//! Waiting for a condition instead of for a time.

use std::{
    env,
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// Long enough for anything that happens at once on an idle host to happen on a busy one.
pub const SOON: Duration = Duration::from_secs(10);

/// How long an answer that should not come is waited for.
pub const NO_ANSWER: Duration = Duration::from_millis(300);

/// Between two looks at the condition.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// How many times as long as elsewhere things take on this machine, whose processor is emulated (`cargo xtask test --kernel`).
pub fn slowness() -> u32 {
    static SLOWNESS: OnceLock<u32> = OnceLock::new();
    *SLOWNESS.get_or_init(|| env::var("LIMITER_TEST_SLOW").ok().and_then(|times| times.parse().ok()).unwrap_or(1))
}

/// Waits until `condition` holds, at most for `limit`, or [so many times](slowness) as long. `what` completes the sentence "timed out waiting until …".
pub fn eventually(limit: Duration, what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let limit = limit * slowness();
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
