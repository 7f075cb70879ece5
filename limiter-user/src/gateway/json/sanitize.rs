//! Strings of a JSON text, without what must not be in them. All else stays as it is written: numbers, spaces, and every string
//! with nothing to take out.

use serde::de::IgnoredAny;

use super::strict::DEEPEST;
use crate::config::Sanitize;

/// A text that is no JSON, or nested too deeply.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NotJson;

/// What passes in the place of `text`; `None`: it may stay as it is. Keys are strings, too.
///
/// What was sanitised once is not changed again.
pub(super) fn sanitize(text: &str, how: Sanitize) -> Result<Option<String>, NotJson> {
    if how == Sanitize::None {
        return Ok(None);
    }
    // From here on every string ends, and every escape is whole.
    serde_json::from_str::<IgnoredAny>(text).map_err(|_| NotJson)?;
    let mut made = String::new();
    // Up to here `text` is in `made`.
    let mut copied = 0;
    let mut depth = 0;
    let mut at = 0;
    let bytes = text.as_bytes();
    while let Some(&byte) = bytes.get(at) {
        at += 1;
        match byte {
            b'{' | b'[' => {
                depth += 1;
                if depth > DEEPEST {
                    return Err(NotJson);
                }
            }
            b'}' | b']' => depth -= 1,
            b'"' => {
                let end = at + end_of_string(&bytes[at..]);
                if let Some(clean) = clean(&text[at..end], how) {
                    made.push_str(&text[copied..at]);
                    made.push_str(&clean);
                    copied = end;
                }
                at = end + 1;
            }
            _ => {}
        }
    }
    if copied == 0 {
        return Ok(None);
    }
    made.push_str(&text[copied..]);
    Ok(Some(made))
}

/// Where the quote is that ends a string.
fn end_of_string(bytes: &[u8]) -> usize {
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        match byte {
            b'"' => break,
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
    at.min(bytes.len())
}

/// What is between the quotes, written anew; `None`: it may stay.
fn clean(raw: &str, how: Sanitize) -> Option<String> {
    let html = how == Sanitize::Html;
    // Most strings have nothing that needs a closer look.
    if !raw.bytes().any(|byte| matches!(byte, b'\\' | 0x7f..) || (html && matches!(byte, b'<' | b'>' | b'&' | b'\''))) {
        return None;
    }
    let mut changed = false;
    let mut plain = String::with_capacity(raw.len());
    for char in Decoded(raw.chars()) {
        match char.filter(|char| !is_forbidden(*char)) {
            Some(char) => plain.push(char),
            None => changed = true,
        }
    }
    if html && let Some(escaped) = html_escaped(&plain) {
        plain = escaped;
        changed = true;
    }
    changed.then(|| {
        // A string is always to be written as JSON.
        let quoted = serde_json::Value::String(plain).to_string();
        quoted[1..quoted.len() - 1].to_owned()
    })
}

/// Control characters (C0 but for tab and line ends, DEL, C1), and those that turn the direction of text around.
pub(in crate::gateway) fn is_forbidden(char: char) -> bool {
    match char {
        '\t' | '\n' | '\r' => false,
        '\0'..='\u{1f}' | '\u{7f}'..='\u{9f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => true,
        _ => false,
    }
}

/// The characters of a JSON string; `None` for half of a surrogate pair, which is no character.
struct Decoded<'a>(std::str::Chars<'a>);

impl Iterator for Decoded<'_> {
    type Item = Option<char>;

    fn next(&mut self) -> Option<Self::Item> {
        let char = self.0.next()?;
        if char != '\\' {
            return Some(Some(char));
        }
        Some(match self.0.next()? {
            'b' => Some('\u{8}'),
            'f' => Some('\u{c}'),
            'n' => Some('\n'),
            'r' => Some('\r'),
            't' => Some('\t'),
            'u' => self.unit().and_then(|unit| self.escaped(unit)),
            other => Some(other),
        })
    }
}

impl Decoded<'_> {
    /// The four digits of a `\u`.
    fn unit(&mut self) -> Option<u16> {
        let digits = self.0.as_str().get(..4)?;
        let unit = u16::from_str_radix(digits, 16).ok()?;
        self.0 = self.0.as_str()[4..].chars();
        Some(unit)
    }

    fn escaped(&mut self, unit: u16) -> Option<char> {
        if !matches!(unit, 0xd800..=0xdbff) {
            return char::from_u32(unit.into());
        }
        let mut ahead = Self(self.0.as_str().strip_prefix("\\u")?.chars());
        let low = ahead.unit().filter(|low| matches!(low, 0xdc00..=0xdfff))?;
        // Only then it is part of this character.
        self.0 = self.0.as_str()[6..].chars();
        char::from_u32(0x1_0000 + (u32::from(unit & 0x3ff) << 10) + u32::from(low & 0x3ff))
    }
}

/// What each character with a meaning in HTML is written as.
const ENTITIES: [(char, &str); 5] = [('<', "&lt;"), ('>', "&gt;"), ('&', "&amp;"), ('"', "&quot;"), ('\'', "&#39;")];

/// `None`: there is nothing to escape. What is escaped already stays: a message that comes by here twice is escaped once.
fn html_escaped(plain: &str) -> Option<String> {
    let mut escaped = String::new();
    let mut copied = 0;
    for (at, char) in plain.char_indices() {
        let Some((_, entity)) = ENTITIES.iter().find(|(special, _)| *special == char) else { continue };
        if char == '&' && ENTITIES.iter().any(|(_, entity)| plain[at..].starts_with(entity)) {
            continue;
        }
        escaped.push_str(&plain[copied..at]);
        escaped.push_str(entity);
        copied = at + char.len_utf8();
    }
    if copied == 0 {
        return None;
    }
    escaped.push_str(&plain[copied..]);
    Some(escaped)
}

#[cfg(test)]
#[path = "sanitize_tests.rs"]
mod tests;
