use std::{fs, time::UNIX_EPOCH};

use super::*;
use crate::config::parse;

fn cidr(text: &str) -> Cidr {
    text.parse().unwrap()
}

fn deny(text: &str) -> Rule {
    Rule::new(cidr(text), Action::Deny)
}

fn limit(text: &str, connections: u32) -> Rule {
    let own = OwnLimits { connections_per_source: Some(connections), ..OwnLimits::default() };
    Rule::new(cidr(text), Action::Limit(own))
}

fn without(text: &str, prefix: &str) -> Option<String> {
    let mut document = document(text).unwrap();
    remove(&mut document, cidr(prefix)).then(|| document.to_string())
}

/// The rules that a text has, and that it is right.
fn parsed(text: &str) -> Vec<Rule> {
    parse::parse(Path::new("f"), text).unwrap().config.rules
}

const TWO: &str = "\
# mine
[limits]
connections_total = 7 # lucky

# Rules of the house.

# the office
[[rule]]
cidr = \"192.0.2.0/24\"   # all of it
connections_per_source  =  9 # many

# them
[[rule]]
cidr = \"198.51.100.7\"
action = 'allow' # ours

[log]
level = \"info\"
";

#[test]
fn a_new_rule_comes_after_the_others() {
    let new = with_rule(TWO, &deny("203.0.113.0/24")).unwrap();
    let rule = "\n[[rule]]\ncidr = \"203.0.113.0/24\"\naction = \"deny\"\n";
    assert_eq!(new, TWO.replace("# ours\n", &format!("# ours\n{rule}")));
    assert_eq!(parsed(&new)[2], deny("203.0.113.0/24"));
    assert_eq!(with_rule("", &deny("::/0")).unwrap(), "[[rule]]\ncidr = \"::/0\"\naction = \"deny\"\n");
    let text = "[gateway]\nlisten = []\n\n[log]\n\n[gateway.messages]\nrate = 5\n";
    assert_eq!(parsed(&with_rule(&text.replace("listen = []\n", ""), &deny("::/0")).unwrap()), [deny("::/0")]);
}

#[test]
fn a_rule_for_the_same_prefix_is_changed_where_it_stands() {
    let new = with_rule(TWO, &deny("198.51.100.7/32")).unwrap();
    assert_eq!(new, TWO.replace("'allow'", "\"deny\""));
    let new = with_rule(TWO, &limit("192.0.2.0/24", 5)).unwrap();
    assert_eq!(new, TWO.replace("=  9 ", "=  5 "));
    let new = with_rule(TWO, &deny("192.0.2.0/24")).unwrap();
    assert_eq!(new, TWO.replace("connections_per_source  =  9 # many", "action = \"deny\""));
    assert_eq!(parsed(&new)[0], deny("192.0.2.0/24"));
}

#[test]
fn an_end_is_written_and_taken_out() {
    let ends = Rule { expires: Some(UNIX_EPOCH + Duration::from_millis(1_999_999_999_001)), ..deny("198.51.100.7") };
    let new = with_rule(TWO, &ends).unwrap();
    assert_eq!(new, TWO.replace("'allow' # ours\n", "\"deny\" # ours\nexpires = 2033-05-18T03:33:20Z\n"));
    assert_eq!(parsed(&new)[1].expires, Some(UNIX_EPOCH + Duration::from_secs(2_000_000_000)));
    assert_eq!(with_rule(&new, &deny("198.51.100.7")).unwrap(), TWO.replace("'allow'", "\"deny\""));
    let limited = TWO.replace("# many\n", "# many\nexpires = 2030-01-31T00:00:00+01:00 # then\n");
    assert_eq!(with_rule(&limited, &limit("192.0.2.0/24", 5)).unwrap(), limited.replace("=  9 ", "=  5 "));
}

#[test]
fn limits_do_not_take_the_place_of_a_decision() {
    let error = with_rule(TWO, &limit("198.51.100.7", 5)).unwrap_err().to_string();
    assert!(error.contains("198.51.100.7/32 whose action is allow"), "{error}");
}

#[test]
fn a_rule_goes_with_what_stands_right_above_it_and_nothing_else() {
    let new = without(TWO, "198.51.100.7/32").unwrap();
    assert_eq!(new, TWO.replace("\n# them\n[[rule]]\ncidr = \"198.51.100.7\"\naction = 'allow' # ours\n", ""));
    let new = without(TWO, "192.0.2.0/24").unwrap();
    assert!(!new.contains("the office") && !new.contains("192.0.2.0"), "{new}");
    assert!(new.contains("# Rules of the house.\n\n# them\n[[rule]]\n"), "{new}");
    let none = without(&new, "198.51.100.7").unwrap();
    assert!(none.contains("lucky\n\n# Rules of the house.\n\n[log]\nlevel"), "{none}");
    assert_eq!(parsed(&none), []);
    let last = "# a\n\n# b\n[[rule]]\ncidr = \"::/0\"\naction = \"deny\"\n# end\n";
    assert_eq!(without(last, "::/0").unwrap(), "# a\n# end\n");
    assert_eq!(without(TWO, "192.0.2.0/25"), None);
}

#[test]
fn inline_rules_stay_inline() {
    let inline = "rule = [{ cidr = \"192.0.2.0/24\", action = \"deny\" }, { cidr = \"::/0\", action = \"allow\" }]\n";
    let new = with_rule(inline, &deny("203.0.113.0/24")).unwrap();
    assert_eq!(new, inline.replace(" }]", " }, { cidr = \"203.0.113.0/24\", action = \"deny\" }]"));
    assert_eq!(parsed(&without(&new, "::/0").unwrap()), [deny("192.0.2.0/24"), deny("203.0.113.0/24")]);
    assert_eq!(with_rule(inline, &deny("::/0")).unwrap(), inline.replace("allow", "deny"));
}

#[test]
fn a_file_is_written_only_if_it_is_right_before_and_after() {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("limiter.toml");
    fs::write(&file, TWO).unwrap();
    assert!(prepare_without_rule(&file, cidr("::/0")).unwrap().is_none());
    prepare_without_rule(&file, cidr("198.51.100.7")).unwrap().unwrap().commit().unwrap();
    prepare_rule(&file, &deny("::/0")).unwrap().commit().unwrap();
    let text = fs::read_to_string(&file).unwrap();
    assert_eq!(parsed(&text).len(), 2, "{text}");
    assert_eq!(fs::read_dir(place.path()).unwrap().count(), 1, "no temporary file is left");
    fs::write(&file, "[limit]\n").unwrap();
    assert!(matches!(prepare_rule(&file, &deny("::/0")), Err(ConfigError::Invalid(_))));
}

proptest::proptest! {
    /// Whatever was done to the rules before, each step leaves the others as they were.
    #[test]
    fn one_rule_changes_and_the_others_stay(steps in proptest::collection::vec((0..6_u8, 0..4_u8), 0..12)) {
        let mut text = TWO.to_owned();
        for (place, what) in steps {
            let prefix = format!("192.0.{place}.0/24");
            let mut expected = parsed(&text);
            expected.retain(|rule| rule.cidr != cidr(&prefix));
            let action = match what {
                0 => None,
                1 => Some(Action::Allow),
                2 => Some(Action::Deny),
                _ => Some(limit(&prefix, 3).action),
            };
            let new = match action {
                None => without(&text, &prefix),
                // `Err`: a decision stands there.
                Some(action) => with_rule(&text, &Rule::new(cidr(&prefix), action)).ok(),
            };
            let Some(new) = new else { continue };
            if let Some(action) = action {
                proptest::prop_assert!(parsed(&new).iter().any(|rule| rule.cidr == cidr(&prefix) && rule.action == action));
            }
            let mut others = parsed(&new);
            others.retain(|rule| rule.cidr != cidr(&prefix));
            proptest::prop_assert_eq!(others, expected);
            proptest::prop_assert!(new.starts_with("# mine\n") && new.contains("# lucky\n") && new.contains("# Rules of the house.\n"));
            text = new;
        }
    }
}
