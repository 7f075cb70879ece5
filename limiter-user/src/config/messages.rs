//! `[gateway.messages]`: what one client may send.

use std::time::Duration;

use super::{read::Section, value};

/// Largest message that may be allowed: the built-in application holds it in memory whole.
const LARGEST_MESSAGE_BYTES: u64 = 1 << 30;

/// Most bytes per second that a limit can be about.
const GREATEST_SPEED: u64 = 1 << 40;

/// `[gateway.messages]`: limits on what a client sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Messages {
    /// Longest message, in bytes, summed over its fragments.
    pub max_size: usize,
    /// Most fragments that a message may come in; 0: any number.
    pub max_fragments: u32,
    /// The kind of messages that is taken.
    pub allow: Kinds,
    /// Messages per window per connection; 0: any number.
    pub rate: u32,
    /// The window.
    pub window: Duration,
    /// How messages are counted against the rate.
    pub algorithm: Algorithm,
    /// For the token bucket, how many messages may come at once; 0: as many as in a window.
    pub burst: u32,
    /// Payload per second per connection, in bytes; 0: any amount. A second's worth, or the longest message if that is more,
    /// may come at once.
    pub bytes_per_second: u64,
    /// What becomes of a message that is over `rate` or `bytes_per_second`, or of the wrong kind.
    pub on_violation: OnViolation,
    /// So many violations deny the source for `deny_for`; 0: none ever does.
    pub deny_after: u32,
    /// How long a source is denied, and also for how long without another a violation is remembered.
    pub deny_for: Duration,
}

impl Default for Messages {
    fn default() -> Self {
        Self {
            max_size: 64 * 1024,
            max_fragments: 1024,
            allow: Kinds::Any,
            rate: 60,
            window: Duration::from_mins(1),
            algorithm: Algorithm::SlidingWindow,
            burst: 0,
            bytes_per_second: 0,
            on_violation: OnViolation::Close,
            deny_after: 0,
            deny_for: Duration::from_mins(10),
        }
    }
}

/// Kinds of messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Kinds {
    /// Text and binary.
    Any,
    /// Text alone.
    Text,
    /// Binary alone.
    Binary,
}

/// How messages are counted against a rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Algorithm {
    /// No window, wherever it begins, holds more than the rate.
    SlidingWindow,
    /// `burst` at once, and then as many as the rate has come back for.
    TokenBucket,
}

/// What happens on a message too many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum OnViolation {
    /// The connection is closed.
    Close,
    /// The message is dropped.
    Drop,
}

pub(super) fn parse(mut section: Section, messages: &mut Messages) {
    section.read("max_size", &mut messages.max_size, |item| value::size(item, 1..=LARGEST_MESSAGE_BYTES));
    section.read("max_fragments", &mut messages.max_fragments, |item| {
        value::integer(item, 0..=u32::MAX, "fragments; 0: any number")
    });
    section.read("allow", &mut messages.allow, value::choice);
    section.read("rate", &mut messages.rate, |item| {
        value::integer(item, 0..=u32::MAX, "messages per window; 0: any number")
    });
    section.read("window", &mut messages.window, |item| {
        value::duration(item, Duration::from_millis(1), Duration::from_hours(24))
    });
    section.read("algorithm", &mut messages.algorithm, value::choice);
    let burst = section.read("burst", &mut messages.burst, |item| {
        value::integer(item, 0..=u32::MAX, "messages at once; 0: as many as in a window")
    });
    section.read("bytes_per_second", &mut messages.bytes_per_second, |item| {
        value::size(item, 0..=GREATEST_SPEED).map(|bytes| bytes as u64)
    });
    section.read("on_violation", &mut messages.on_violation, value::choice);
    section.read("deny_after", &mut messages.deny_after, |item| {
        value::integer(item, 0..=u32::MAX, "violations; 0: never")
    });
    section
        .read("deny_for", &mut messages.deny_for, |item| value::duration(item, Duration::from_secs(1), value::LONGEST));
    if let Some(span) = burst
        && messages.burst != 0
        && messages.algorithm == Algorithm::SlidingWindow
    {
        section.complain(&span, "burst", r#"it goes with algorithm = "token-bucket"; a window has no burst"#);
    }
    section.finish();
}
