use std::os::unix::fs::{PermissionsExt, symlink};

use super::*;

const FIVE: &[(LimitKey, u32)] = &[(LimitKey::ConnectionsPerSource, 5)];

#[test]
fn a_value_changes_and_everything_else_stays() {
    let text = "# mine\n[limits]\nconnections_per_source   = 20   # why twenty\n\n[admin]\nlisten = \"\"\n";
    let new = with_limits(text, None, FIVE).unwrap();
    assert_eq!(new, text.replace("= 20 ", "= 5 "));
}

#[test]
fn a_missing_table_or_key_is_added() {
    assert_eq!(with_limits("", None, FIVE).unwrap(), "[limits]\nconnections_per_source = 5\n");
    let text = "[limits]\n# total\nconnections_total = 7\n";
    assert_eq!(with_limits(text, None, FIVE).unwrap(), format!("{text}connections_per_source = 5\n"));
    let inline = "limits = { connections_total = 7 }\n";
    let new = with_limits(inline, None, FIVE).unwrap();
    let config = parse::parse(Path::new("f"), &new).unwrap().config;
    assert_eq!((config.limits.connections_per_source, config.limits.connections_total), (5, 7));
}

const TWO: &str = "\
[[service]]
name = \"a\"
port = 1
connections_per_source = 9 # own

[[service]]
name = \"b\"
port = 2
";

#[test]
fn without_a_service_those_with_a_value_of_their_own_change_too() {
    let new = with_limits(TWO, None, FIVE).unwrap();
    assert!(new.starts_with(&TWO.replace("= 9 ", "= 5 ")), "{new}");
    assert!(new.ends_with("[limits]\nconnections_per_source = 5\n"), "{new}");
    let config = parse::parse(Path::new("f"), &new).unwrap().config;
    assert!(config.services.iter().all(|service| service.limits.connections_per_source == 5));
}

#[test]
fn with_a_service_only_that_one_changes() {
    for text in
        [TWO, "service = [{ name = \"a\", port = 1, connections_per_source = 9 }, { name = \"b\", port = 2 }]\n"]
    {
        let config = |text: &str| parse::parse(Path::new("f"), text).unwrap().config;
        let mut expected = config(text);
        expected.services[1].limits.connections_per_source = 5;
        assert_eq!(config(&with_limits(text, Some("b"), FIVE).unwrap()), expected);
    }
}

#[test]
fn an_unknown_service_is_refused_but_default_without_services_is_the_limits_table() {
    assert!(with_limits(TWO, Some("c"), FIVE).unwrap_err().to_string().contains("no [[service]] of the name \"c\""));
    assert!(with_limits(TWO, Some(DEFAULT_SERVICE), FIVE).is_err());
    assert_eq!(with_limits("", Some(DEFAULT_SERVICE), FIVE).unwrap(), with_limits("", None, FIVE).unwrap());
}

#[test]
fn saving_replaces_the_file_behind_a_link_and_keeps_its_mode() {
    let place = tempfile::tempdir().unwrap();
    let (file, link) = (place.path().join("real.toml"), place.path().join("link.toml"));
    fs::write(&file, "[limits]\nconnections_per_source = 20\n").unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
    symlink(&file, &link).unwrap();

    let prepared = prepare_limits(&link, None, FIVE).unwrap();
    assert!(fs::read_to_string(&file).unwrap().contains("= 20"), "nothing changes before the commit");
    prepared.commit().unwrap();

    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_eq!(fs::read_to_string(&file).unwrap(), "[limits]\nconnections_per_source = 5\n");
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o640);
    assert_eq!(fs::read_dir(place.path()).unwrap().count(), 2, "no temporary file is left");
}

#[test]
fn a_prepared_file_that_is_dropped_leaves_no_trace() {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("limiter.toml");
    fs::write(&file, "").unwrap();
    drop(prepare_limits(&file, None, FIVE).unwrap());
    assert_eq!(fs::read_to_string(&file).unwrap(), "");
    assert_eq!(fs::read_dir(place.path()).unwrap().count(), 1);
}

#[test]
fn a_file_that_is_wrong_is_not_written() {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("limiter.toml");
    fs::write(&file, "[limit]\n").unwrap();
    assert!(matches!(prepare_limits(&file, None, FIVE), Err(ConfigError::Invalid(_))));
    assert!(matches!(prepare_limits(&place.path().join("none"), None, FIVE), Err(ConfigError::Unreadable { .. })));
}

#[test]
fn limit_keys_know_their_ranges() {
    let mut limits = Limits::default();
    for key in LimitKey::ALL {
        let (least, greatest) = key.range();
        for value in [least, greatest] {
            assert_eq!(key.set(&mut limits, value), Some(()));
            assert_eq!(key.get(&limits), value);
        }
        assert_eq!(greatest.checked_add(1).and_then(|value| key.set(&mut limits, value)), None);
    }
}
