//! JSON that can be read in one way only.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{DeserializeSeed, Error, MapAccess, SeqAccess, Visitor},
};
use serde_json::{Map, Value};

/// Most arrays and objects inside one another, which is what the parser takes.
pub(super) const DEEPEST: usize = 127;

/// A value none of whose objects has a key twice: which of the two holds is something that programs don't agree on, and what was
/// checked here must be what the application sees.
pub(super) struct Strict(pub(super) Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(Reader).map(Self)
    }
}

struct Reader;

impl<'de> DeserializeSeed<'de> for Reader {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Value, D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Reader {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut array = Vec::new();
        while let Some(item) = items.next_element_seed(Reader)? {
            array.push(item);
        }
        Ok(Value::Array(array))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            let value = entries.next_value_seed(Reader)?;
            if object.insert(key, value).is_some() {
                return Err(A::Error::custom("a key twice"));
            }
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(text: &str) -> Option<Value> {
        serde_json::from_str::<Strict>(text).ok().map(|strict| strict.0)
    }

    #[test]
    fn a_key_is_there_once_however_it_is_written() {
        assert!(read(r#"{"a": {"b": 1}, "b": [{"a": 1}, {"a": 2}]}"#).is_some());
        for text in [r#"{"a": 1, "a": 1}"#, r#"[{"x": {"a": 1, "\u0061": 2}}]"#, "{\"a\": 1", ""] {
            assert_eq!(read(text), None, "{text}");
        }
    }

    #[test]
    fn it_takes_what_is_nested_as_deeply_as_may_be_and_no_deeper() {
        let nested = |deep: usize| format!("{}{}", "[".repeat(deep), "]".repeat(deep));
        assert!(read(&nested(DEEPEST)).is_some());
        assert!(read(&nested(DEEPEST + 1)).is_none());
        assert!(read(&nested(1_000_000)).is_none());
    }

    proptest! {
        #[test]
        fn it_reads_what_the_parser_reads(text in r#"(\[|\{|\}|\]|,|:|"a"|"b"|1|-2|1e5|0\.5|99999999999999999999|1e999|null|true| ){0,12}"#) {
            let plain = serde_json::from_str::<Value>(&text).ok();
            match read(&text) {
                Some(value) => prop_assert_eq!(plain, Some(value)),
                None => prop_assert!(plain.is_none() || text.contains('{'), "{text}"),
            }
        }
    }
}
