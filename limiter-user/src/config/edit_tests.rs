use std::os::unix::fs::{PermissionsExt, symlink};

use super::*;
use crate::config::{LimitKey, OnDeny};

const FIVE: &[Setting] = &[Setting::Limit(LimitKey::ConnectionsPerSource, 5)];
const OBSERVE: &[Setting] = &[Setting::OnDeny(OnDeny::Observe)];

#[test]
fn a_value_changes_and_everything_else_stays() {
    let text = "# mine\n[limits]\nconnections_per_source   = 20   # why twenty\n\n[admin]\nlisten = \"\"\n";
    let new = with_settings(text, None, FIVE).unwrap();
    assert_eq!(new, text.replace("= 20 ", "= 5 "));
}

#[test]
fn a_missing_table_or_key_is_added() {
    assert_eq!(with_settings("", None, FIVE).unwrap(), "[limits]\nconnections_per_source = 5\n");
    let text = "[limits]\n# total\nconnections_total = 7\n";
    assert_eq!(with_settings(text, None, FIVE).unwrap(), format!("{text}connections_per_source = 5\n"));
    let inline = "limits = { connections_total = 7 }\n";
    let new = with_settings(inline, None, FIVE).unwrap();
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
    let new = with_settings(TWO, None, FIVE).unwrap();
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
        assert_eq!(config(&with_settings(text, Some("b"), FIVE).unwrap()), expected);
    }
}

#[test]
fn an_unknown_service_is_refused_but_default_without_services_is_the_limits_table() {
    assert!(with_settings(TWO, Some("c"), FIVE).unwrap_err().to_string().contains("no [[service]] of the name \"c\""));
    assert!(with_settings(TWO, Some(DEFAULT_SERVICE), FIVE).is_err());
    assert_eq!(with_settings("", Some(DEFAULT_SERVICE), FIVE).unwrap(), with_settings("", None, FIVE).unwrap());
}

#[test]
fn saving_replaces_the_file_behind_a_link_and_keeps_its_mode() {
    let place = tempfile::tempdir().unwrap();
    let (file, link) = (place.path().join("real.toml"), place.path().join("link.toml"));
    fs::write(&file, "[limits]\nconnections_per_source = 20\n").unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
    symlink(&file, &link).unwrap();

    let prepared = prepare_settings(&link, None, FIVE).unwrap();
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
    drop(prepare_settings(&file, None, FIVE).unwrap());
    assert_eq!(fs::read_to_string(&file).unwrap(), "");
    assert_eq!(fs::read_dir(place.path()).unwrap().count(), 1);
}

#[test]
fn a_file_that_is_wrong_is_not_written() {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("limiter.toml");
    fs::write(&file, "[limit]\n").unwrap();
    assert!(matches!(prepare_settings(&file, None, FIVE), Err(ConfigError::Invalid(_))));
    assert!(matches!(prepare_settings(&place.path().join("none"), None, FIVE), Err(ConfigError::Unreadable { .. })));
}

#[test]
fn what_a_refused_syn_gets_goes_into_kernel_and_to_those_who_have_their_own() {
    let text = "[[service]]\nname = \"a\"\nport = 1\non_deny = 'reset' # told\n\n[[service]]\nname = \"b\"\nport = 2\n\n[kernel]\non_deny  =  \"drop\"  # all\n";
    let all = with_settings(text, None, OBSERVE).unwrap();
    assert_eq!(all, text.replace("'reset'", "\"observe\"").replace("\"drop\"", "\"observe\""));
    let one = with_settings(text, Some("b"), OBSERVE).unwrap();
    assert_eq!(one, text.replace("port = 2\n", "port = 2\non_deny = \"observe\"\n"));
    let both = [OBSERVE[0], FIVE[0]];
    let new = with_settings("", None, &both).unwrap();
    assert_eq!(new, "[kernel]\non_deny = \"observe\"\n\n[limits]\nconnections_per_source = 5\n");
    assert_eq!(with_settings("", Some(DEFAULT_SERVICE), OBSERVE).unwrap(), "[kernel]\non_deny = \"observe\"\n");
}
