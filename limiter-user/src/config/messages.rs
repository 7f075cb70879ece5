//! `[gateway.messages]`: what one client may send.

use std::{ops::Range, path::PathBuf, time::Duration};

use super::{
    read::{Item, Section},
    value,
};

/// Largest message that may be allowed: the built-in application holds it in memory whole.
const LARGEST_MESSAGE_BYTES: u64 = 1 << 30;

/// Most bytes per second that a limit can be about.
const GREATEST_SPEED: u64 = 1 << 40;

/// `[gateway.messages]`: limits on what a client sends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Messages {
    /// Longest message, in bytes, summed over its fragments.
    pub max_size: usize,
    /// Longest frame of a message, in bytes; 0: as long as a message may be.
    pub max_frame_size: usize,
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
    /// Messages per window of one user, over all its connections; 0: any number. An API key may have a limit of its own.
    pub rate_per_user: u32,
    /// The same for a source. The connections of a user count as the user's, where there is a limit for users.
    pub rate_per_source: u32,
    /// Payload per second of one user, over all its connections, in bytes; 0: any amount.
    pub bytes_per_second_per_user: u64,
    /// The same for a source. The connections of a user count as the user's, where there is a limit for users.
    pub bytes_per_second_per_source: u64,
    /// A file with the JSON Schema that every text must fit; there are no binary messages then, unless `allow` has them alone.
    pub schema: Option<PathBuf>,
    /// What is taken out of the strings of texts, which must be JSON then.
    pub sanitize: Sanitize,
    /// What becomes of a message that is over a rate of messages or bytes, of the wrong kind, no JSON, or unfit.
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
            max_frame_size: 0,
            max_fragments: 1024,
            allow: Kinds::Any,
            rate: 60,
            window: Duration::from_mins(1),
            algorithm: Algorithm::SlidingWindow,
            burst: 0,
            bytes_per_second: 0,
            rate_per_user: 0,
            rate_per_source: 0,
            bytes_per_second_per_user: 0,
            bytes_per_second_per_source: 0,
            schema: None,
            sanitize: Sanitize::None,
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

/// What is taken out of JSON strings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Sanitize {
    /// Nothing.
    None,
    /// Control characters but for tabs and line ends, and those that turn the direction of text around.
    Control,
    /// The same; and what has a meaning in HTML is escaped.
    Html,
}

/// How messages are counted against a rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, clap::ValueEnum)]
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

/// Gives the place of a schema.
pub(super) fn parse(mut section: Section, messages: &mut Messages) -> Option<Range<usize>> {
    section.read("max_size", &mut messages.max_size, |item| value::size(item, 1..=LARGEST_MESSAGE_BYTES));
    section.read("max_frame_size", &mut messages.max_frame_size, |item| value::size(item, 0..=LARGEST_MESSAGE_BYTES));
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
    let speed = |item: &Item| value::size(item, 0..=GREATEST_SPEED).map(|bytes| bytes as u64);
    section.read("bytes_per_second", &mut messages.bytes_per_second, speed);
    section.read("rate_per_user", &mut messages.rate_per_user, |item| {
        value::integer(item, 0..=u32::MAX, "messages per window of a user; 0: any number")
    });
    section.read("rate_per_source", &mut messages.rate_per_source, |item| {
        value::integer(item, 0..=u32::MAX, "messages per window of a source; 0: any number")
    });
    section.read("bytes_per_second_per_user", &mut messages.bytes_per_second_per_user, speed);
    section.read("bytes_per_second_per_source", &mut messages.bytes_per_second_per_source, speed);
    let schema = section.read("schema", &mut messages.schema, value::optional_path);
    let sanitize = section.read("sanitize", &mut messages.sanitize, value::choice);
    let screens =
        [("schema", &schema, messages.schema.is_some()), ("sanitize", &sanitize, messages.sanitize != Sanitize::None)];
    for (key, span, given) in screens {
        if let (Some(span), true, Kinds::Binary) = (span, given, messages.allow) {
            section.complain(span, key, r#"it is for text, of which allow = "binary" has none"#);
        }
    }
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
    schema.filter(|_| messages.schema.is_some())
}
