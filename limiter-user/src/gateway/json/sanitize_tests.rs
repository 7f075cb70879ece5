use proptest::prelude::*;

use super::*;

fn of(text: &str, how: Sanitize) -> String {
    sanitize(text, how).unwrap().unwrap_or_else(|| text.to_owned())
}

#[test]
fn what_must_not_be_in_a_string_is_taken_out_however_it_is_written() {
    for (text, control, html) in [
        (r#""plain""#, r#""plain""#, r#""plain""#),
        (
            r#"  { "a" : 1.0e+2 , "b" : [ true ] }  "#,
            r#"  { "a" : 1.0e+2 , "b" : [ true ] }  "#,
            r#"  { "a" : 1.0e+2 , "b" : [ true ] }  "#,
        ),
        (r#""\u0000a\u001fb\u007f\u009f\u0008\b\f""#, r#""ab""#, r#""ab""#),
        ("\"\u{7f}\u{80}\u{9f}\u{a0}\"", "\"\u{a0}\"", "\"\u{a0}\""),
        ("\"\u{202a}a\u{202e}\u{2066}\u{2069}\u{206a}\"", "\"a\u{206a}\"", "\"a\u{206a}\""),
        (r#""a\u202Eb\u2067""#, r#""ab""#, r#""ab""#),
        (
            r#""\t\n\r stay as written \/ \u0041""#,
            r#""\t\n\r stay as written \/ \u0041""#,
            r#""\t\n\r stay as written \/ \u0041""#,
        ),
        (r#"{"k\u0001":"v"}"#, r#"{"k":"v"}"#, r#"{"k":"v"}"#),
        (r#""\ud83d\ude00""#, r#""\ud83d\ude00""#, r#""\ud83d\ude00""#),
        // Halves of a pair don't come together when what is between them goes.
        (r#""\ud83d\u0001\ude00""#, r#""""#, r#""""#),
        (r#""\ud83d\ud83d\ude00""#, "\"\u{1f600}\"", "\"\u{1f600}\""),
        (r#""\ude00\ud83dx""#, r#""x""#, r#""x""#),
        (r#""<b a='1'>\"&\u003c""#, r#""<b a='1'>\"&\u003c""#, r#""&lt;b a=&#39;1&#39;&gt;&quot;&amp;&lt;""#),
        (
            r#""&lt; &amp;lt; &am\u0001p; &nbsp;""#,
            r#""&lt; &amp;lt; &amp; &nbsp;""#,
            r#""&lt; &amp;lt; &amp; &amp;nbsp;""#,
        ),
        (r#"["\\", "\\\"", "<"]"#, r#"["\\", "\\\"", "<"]"#, r#"["\\", "\\&quot;", "&lt;"]"#),
        ("12345678901234567890.10e400", "12345678901234567890.10e400", "12345678901234567890.10e400"),
    ] {
        assert_eq!(of(text, Sanitize::Control), control, "{text}");
        assert_eq!(of(text, Sanitize::Html), html, "{text}");
        assert_eq!(sanitize(text, Sanitize::None), Ok(None));
    }
}

#[test]
fn a_text_that_is_no_json_or_too_deep_is_told() {
    let nested = |deep: usize| format!("{}{}", "[".repeat(deep), "]".repeat(deep));
    for text in ["", "a", "{", "\"a", "\"a\u{1}\"", "'a'", "{} {}", "\"\\x\"", &nested(DEEPEST + 1), &nested(100_000)] {
        assert_eq!(sanitize(text, Sanitize::Control), Err(NotJson), "{text:.20}");
    }
    assert_eq!(sanitize(&nested(DEEPEST), Sanitize::Control), Ok(None));
}

/// A JSON text as somebody might write it, with its strings written in many ways.
fn json() -> impl Strategy<Value = String> {
    let unit = prop_oneof![
        (0..0x300_u32).prop_map(|unit| format!("\\u{unit:04x}")),
        (0xd700..0xe100_u32).prop_map(|unit| format!("\\u{unit:04X}")),
        (0x2020..0x2070_u32).prop_map(|unit| format!("\\u{unit:04x}")),
    ];
    let piece = prop_oneof![
        3 => "[ -!#-\\[\\]-\u{10ffff}]{0,4}",
        3 => unit,
        2 => prop::sample::select(vec!["\\\\", "\\\"", "\\b", "\\f", "\\n", "\\/", "<", ">", "&", "'", "&amp;", "&lt;", "amp;", "#39;", "\u{7f}", "\u{85}", "\u{202e}"])
            .prop_map(str::to_owned),
    ];
    let string = proptest::collection::vec(piece, 0..8).prop_map(|pieces| format!("\"{}\"", pieces.concat()));
    let leaf = prop_oneof![
        string.clone(),
        "-?(0|[1-9][0-9]{0,30})(\\.[0-9]{1,20})?([eE][+-]?[0-9]{1,4})?",
        prop::sample::select(vec!["null", "true", "false", "{}", "[ ]"]).prop_map(str::to_owned),
    ];
    leaf.prop_recursive(4, 40, 5, move |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..5).prop_map(|items| format!("[{}]", items.join(" , "))),
            proptest::collection::vec((string.clone(), inner), 0..5).prop_map(|items| {
                let items: Vec<_> = items.into_iter().map(|(key, value)| format!("{key} :{value}")).collect();
                format!("{{{}\n}}", items.join(","))
            }),
        ]
    })
}

/// The text with nothing in its strings, and the strings.
fn taken_apart(text: &str) -> (String, Vec<&str>) {
    let (mut rest, mut around, mut strings) = (text, String::new(), Vec::new());
    while let Some((before, from)) = rest.split_once('"') {
        let end = end_of_string(from.as_bytes());
        around.push_str(before);
        around.push_str("\"\"");
        strings.push(&from[..end]);
        rest = &from[end + 1..];
    }
    around.push_str(rest);
    (around, strings)
}

proptest! {
    #[test]
    fn what_comes_out_is_of_the_same_shape_clean_and_is_not_changed_again(text in json(), html in any::<bool>()) {
        let how = if html { Sanitize::Html } else { Sanitize::Control };
        let made = of(&text, how);
        prop_assert_eq!(sanitize(&made, how), Ok(None), "it changes again: {}", made);
        let (around, before) = taken_apart(&text);
        let (around_made, after) = taken_apart(&made);
        prop_assert_eq!(around_made, around);
        prop_assert_eq!(before.len(), after.len());
        for (before, after) in before.into_iter().zip(after) {
            let plain: String = serde_json::from_str(&format!("\"{after}\"")).unwrap();
            prop_assert!(!plain.chars().any(is_forbidden), "{plain:?}");
            prop_assert!(!html || !plain.contains(['<', '>', '"', '\'']), "{plain:?}");
            let kept: String = Decoded(before.chars()).flatten().filter(|char| !is_forbidden(*char)).collect();
            if !html {
                prop_assert_eq!(&plain, &kept);
            }
            if before == after {
                continue;
            }
            prop_assert!(kept != plain || Decoded(before.chars()).any(|char| char.is_none_or(is_forbidden)));
        }
    }

    #[test]
    fn no_text_makes_it_panic(text in "\\PC{0,60}", cut in any::<prop::sample::Index>(), json in json()) {
        _ = sanitize(&text, Sanitize::Html);
        let mut cut = cut.index(json.len() + 1);
        while !json.is_char_boundary(cut) {
            cut -= 1;
        }
        _ = sanitize(&json[..cut], Sanitize::Html);
    }
}
