//! A JSON Schema in a file.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

use jsonschema::{PatternOptions, Validator};
use serde_json::Value;

use super::bounded;

/// Longest file that is read.
const LONGEST_FILE_BYTES: u64 = 1 << 20;

/// A schema, ready for use.
pub struct Schema(Validator);

/// Why a schema can't be used.
#[derive(Debug, thiserror::Error)]
pub enum SchemaError {
    /// The file can't be read.
    #[error("cannot read {}: {error}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the kernel said; part of the text.
        error: io::Error,
    },
    /// It is no JSON Schema, or one that can't be used here.
    #[error("{}: {problem}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

impl Schema {
    /// Reads a schema. What it refers to must be in it: nothing else is read, from disk or from the network.
    ///
    /// # Errors
    /// [`SchemaError`] says what is wrong with the file.
    pub fn load(path: &Path) -> Result<Self, SchemaError> {
        let bytes = bounded::read(path, LONGEST_FILE_BYTES)
            .map_err(|error| SchemaError::Unreadable { path: path.to_owned(), error })?;
        Self::of(&bytes).map_err(|problem| SchemaError::Invalid { path: path.to_owned(), problem })
    }

    fn of(bytes: &[u8]) -> Result<Self, String> {
        let schema: Value = serde_json::from_slice(bytes).map_err(|error| format!("it is no JSON: {error}"))?;
        // Patterns in linear time, whatever a client sends: those with look-around or back-references are refused.
        let built = jsonschema::options().offline().with_pattern_options(PatternOptions::regex()).build(&schema);
        built.map(Self).map_err(|error| match error.instance_path().as_str() {
            "" => format!("it is no schema: {error}"),
            place => format!("it is no schema: {place}: {error}"),
        })
    }

    /// Whether a value fits.
    pub fn fits(&self, value: &Value) -> bool {
        self.0.is_valid(value)
    }
}

impl fmt::Debug for Schema {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Schema").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_fits_fits() {
        let schema = json!({
            "type": "object",
            "properties": { "to": { "$ref": "#/$defs/name" }, "n": { "maximum": 10 } },
            "required": ["to"],
            "additionalProperties": false,
            "$defs": { "name": { "type": "string", "pattern": "^(a+)+$" } }
        });
        let schema = Schema::of(schema.to_string().as_bytes()).unwrap();
        for (value, fits) in [
            (json!({ "to": "aaa" }), true),
            (json!({ "to": "aaa", "n": 10.0 }), true),
            (json!({ "to": "aaa", "n": 1e300 }), false),
            (json!({ "to": "b" }), false),
            (json!({}), false),
            (json!({ "to": "a", "x": 1 }), false),
            // With backtracking this would take for ever.
            (json!({ "to": format!("{}b", "a".repeat(50_000)) }), false),
        ] {
            assert_eq!(schema.fits(&value), fits, "{value:.60}");
        }
    }

    #[test]
    fn what_is_no_schema_or_reaches_outside_is_refused() {
        for (text, problem) in [
            ("{", "it is no JSON"),
            (r#"{"type": "text"}"#, "it is no schema: /type"),
            (r#"{"pattern": "("}"#, "it is no schema: /pattern"),
            (r#"{"pattern": "(?<!a)b"}"#, "it is no schema"),
            (r#"{"pattern": "(a)\\1"}"#, "it is no schema"),
            (r##"{"$ref": "#/$defs/none"}"##, "it is no schema"),
            (r#"{"$ref": "file:///etc/passwd"}"#, "it is no schema"),
            (r#"{"$ref": "http://127.0.0.1:1/schema.json"}"#, "it is no schema"),
            (r#"{"$ref": "other.json"}"#, "it is no schema"),
        ] {
            let said = Schema::of(text.as_bytes()).unwrap_err();
            assert!(said.contains(problem), "{text}: {said}");
        }
    }

    #[test]
    fn a_schema_that_refers_to_itself_is_bounded_by_what_it_is_held_against() {
        let schema =
            Schema::of(br##"{"anyOf": [{"type": "integer"}, {"items": {"$ref": "#"}, "type": "array"}]}"##).unwrap();
        let text = format!("{}1{}", "[".repeat(127), "]".repeat(127));
        assert!(schema.fits(&serde_json::from_str(&text).unwrap()));
        assert!(!schema.fits(&serde_json::from_str(&text.replace('1', "\"\"")).unwrap()));
    }
}
