//! The configuration file.

use std::path::Path;

use crate::config::{ConfigError, fuzz::parse};

/// What is wrong is told at places that the text has; and comments and empty lines, which mean nothing, change nothing.
pub fn config(text: &[u8]) {
    let Ok(text) = str::from_utf8(text) else { return };
    let path = Path::new("limiter.toml");
    let parsed = parse(path, text);
    match &parsed {
        Ok(config) => {
            let again = parse(path, &format!("# a comment\n\n{text}\n# another\n"));
            assert_eq!(again.as_ref().ok(), Some(config), "{again:?}");
        }
        Err(ConfigError::Invalid(problems)) => {
            assert!(!problems.is_empty());
            let mut last = (0, 0);
            for problem in problems {
                assert!(!problem.message.is_empty());
                let Some(place) = &problem.place else { continue };
                assert_eq!(place.file, path);
                // An error at the end of the text is behind its last character.
                let line = text.split('\n').nth(place.line - 1).unwrap_or_else(|| panic!("no such line: {problem}"));
                assert!(place.column <= line.chars().count() + 1, "no such column: {problem}");
                assert!(last <= (place.line, place.column), "not in the order of the file: {problems:?}");
                last = (place.line, place.column);
            }
        }
        Err(error) => panic!("neither good nor bad: {error}"),
    }
}
