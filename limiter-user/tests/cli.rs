//! The binary as a user meets it: exit statuses and messages. Nothing here needs root, and nothing is attached.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    io::Read as _,
    path::PathBuf,
    process::{Command, Stdio},
};

use tempfile::TempDir;

/// What the binary answered.
struct Answer {
    status: Option<i32>,
    stdout: String,
    stderr: String,
}

/// The binary, with an environment in which nothing is set.
fn limiter() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_limiter"));
    command.env_clear().stdin(Stdio::null());
    command
}

fn answer(command: &mut Command) -> Answer {
    let output = command.output().unwrap();
    Answer {
        status: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

fn run(arguments: &[&str]) -> Answer {
    answer(limiter().args(arguments))
}

/// A file in a folder that goes away with the first of the pair.
fn file(text: &str) -> (TempDir, PathBuf) {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("limiter.toml");
    fs::write(&path, text).unwrap();
    (place, path)
}

/// Each line of stderr is a message of limiter's own.
fn assert_messages(answer: &Answer, complaints: &[&str]) {
    let lines: Vec<&str> = answer.stderr.lines().collect();
    assert_eq!(lines.len(), complaints.len(), "{}", answer.stderr);
    for (line, complaint) in lines.iter().zip(complaints) {
        assert!(line.starts_with("limiter: ") && line.contains(complaint), "{line:?} lacks {complaint:?}");
    }
}

#[test]
fn help_and_version_are_no_error() {
    let help = run(&["--help"]);
    assert_eq!((help.status, help.stderr.as_str()), (Some(0), ""));
    for verb in [
        "run",
        "attach",
        "detach",
        "status",
        "sources",
        "connections",
        "explain",
        "kick",
        "publish",
        "key",
        "limit",
        "config",
        "doctor",
    ] {
        assert!(help.stdout.contains(&format!("\n  {verb} ")), "{verb} is not in the help");
    }
    assert!(help.stdout.ends_with(".\n"));
    let nothing = run(&[]);
    assert_eq!((nothing.status, nothing.stdout.as_str()), (Some(2), ""));
    assert!(nothing.stderr.contains("Usage: limiter"), "{}", nothing.stderr);
    let version = run(&["--version"]);
    assert_eq!(version.stdout, format!("limiter {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn bad_usage_exits_with_2_and_says_what_was_wrong() {
    for (arguments, complaint) in [
        (&["bogus"][..], "unrecognized subcommand 'bogus'"),
        (&["run", "--prot", "80"], "unexpected argument '--prot'"),
        (&["run", "--port", "0"], "invalid value '0' for '--port <PORT>'"),
        (&["run", "--port", "65536"], "invalid value '65536'"),
        (&["run", "--on-deny", "dorp"], "a similar value exists: 'drop'"),
        (&["run", "--attach-mode", "skb"], "possible values: auto, native, generic, tc"),
        (&["run", "--connections-per-source", "-1"], "invalid value '-1'"),
        (&["run", "--connections-per-source=-1"], "invalid value '-1'"),
        (&["run", "--listen", "8080"], "invalid value '8080' for '--listen <ADDRESS>'"),
        (&["run", "--upstream", "http://x"], "it does not begin with ws://"),
        (&["run", "--admin", "here"], "expected an address and a port"),
        (&["run", "--port", "80", "--port", "80"], "the port 80 is given twice"),
        (&["run", "--pin-path", "bpf"], "the pin path bpf is not an absolute path"),
        (&["run", "--interface", "no/such"], "can't be the name of a network interface"),
        (&["attach", "--interface", "lo"], "name it with --port"),
        (&["attach", "--port", "80"], "name it with --interface"),
        (&["sources", "--top", "many"], "invalid value 'many'"),
        (&["connections", "--source", "192.0.2.0/33"], "expected an address or a prefix"),
        (&["explain", "192.0.2.0/24"], "invalid value '192.0.2.0/24' for '<IP>'"),
        (&["limit", "set"], "KEY=VALUE"),
        (&["limit", "set", "burst=1"], "\"burst\" can't be changed while it runs"),
        (&["limit", "set", "ipv4_prefix=33"], "expected a whole number from 1 to 32"),
        (&["limit", "set", "ipv4_prefix=8", "ipv4_prefix=9"], "ipv4_prefix is given twice"),
        (&["limit", "set", "ipv4_prefix=8", "--save"], "--save needs --config"),
        (&["status", "--pin-path", "bpf"], "not an absolute path"),
    ] {
        let answer = run(arguments);
        assert_eq!(answer.status, Some(2), "{arguments:?}: {}", answer.stderr);
        assert_eq!(answer.stdout, "", "{arguments:?}");
        assert!(
            answer.stderr.starts_with("limiter: ") && answer.stderr.contains(complaint),
            "{arguments:?}: {:?} lacks {complaint:?}",
            answer.stderr
        );
    }
}

#[test]
fn a_bad_environment_is_refused_and_a_flag_goes_before_it() {
    let bad = answer(limiter().env("LIMITER_PORT", "http").arg("run"));
    assert_eq!(bad.status, Some(2));
    assert!(bad.stderr.contains("invalid value 'http'"), "{}", bad.stderr);

    let mut command = limiter();
    command.env("LIMITER_PIN_PATH", "/from/environment").args(["doctor", "--json"]);
    assert!(answer(&mut command).stdout.contains("/from/environment"));
    let flag = answer(command.args(["--pin-path", "/from/flag"])).stdout;
    assert!(flag.contains("/from/flag") && !flag.contains("/from/environment"), "{flag}");
}

#[test]
fn a_bad_file_exits_with_2_and_tells_every_problem_with_its_place() {
    let (_place, path) = file("[kernel]\ninterface = [\"lo\"]\n[limits]\nipv4_prefix = 64\n");
    let path = path.to_str().unwrap();
    let complaints = [
        format!("{path}:2:1: unknown key kernel.interface; did you mean interfaces?"),
        format!("{path}:4:15: limits.ipv4_prefix: found the number 64, expected a whole number from 1 to 32 (bits)"),
    ];
    let complaints = complaints.each_ref().map(String::as_str);
    for arguments in [
        &["config", "check", path][..],
        &["--config", path, "run"],
        &["attach", "--config", path],
        &["status", "--config", path],
        &["doctor", "--config", path],
    ] {
        let answer = run(arguments);
        assert_eq!((answer.status, answer.stdout.as_str()), (Some(2), ""), "{arguments:?}");
        assert_messages(&answer, &complaints);
    }
    let answer = answer(limiter().env("LIMITER_CONFIG", path).arg("status"));
    assert_messages(&answer, &complaints);
}

#[test]
fn a_missing_file_is_one_line_with_the_cause() {
    let answer = run(&["config", "check", "/no/such/file.toml"]);
    assert_eq!((answer.status, answer.stdout.as_str()), (Some(2), ""));
    assert_messages(&answer, &["can't read the configuration /no/such/file.toml: No such file or directory"]);
}

#[test]
fn the_example_passes_the_check() {
    let example = run(&["config", "example"]);
    assert_eq!((example.status, example.stderr.as_str()), (Some(0), ""));
    let (_place, path) = file(&example.stdout);
    let check = run(&["config", "check", path.to_str().unwrap()]);
    assert_eq!((check.status, check.stderr.as_str()), (Some(0), ""));
    assert_eq!(check.stdout, format!("{}: ok\n", path.display()));
}

#[test]
fn a_reader_who_has_gone_is_no_error() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut child = limiter().args(["config", "example"]).stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
    let mut stderr = String::new();
    child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert_eq!((child.wait().unwrap().code(), stderr.as_str()), (Some(0), ""));
}

#[test]
fn completions_are_made_for_every_common_shell() {
    for shell in ["bash", "zsh", "fish"] {
        let answer = run(&["completions", shell]);
        assert_eq!(answer.status, Some(0));
        assert!(answer.stdout.contains("limiter") && answer.stdout.contains("connections-per-source"), "{shell}");
    }
}

#[test]
fn every_command_has_a_manual_page() {
    let answer = run(&["man"]);
    assert_eq!((answer.status, answer.stderr.as_str()), (Some(0), ""));
    assert!(answer.stdout.contains(".TH limiter 1") && answer.stdout.contains("limiter\\-run(1)"), "{}", answer.stdout);
    let answer = run(&["man", "limit", "set"]);
    assert!(
        answer.stdout.contains("connections_per_source") && answer.stdout.contains("\\-\\-save"),
        "{}",
        answer.stdout
    );
    let answer = run(&["man", "limit", "sit"]);
    assert_eq!((answer.status, answer.stdout.as_str()), (Some(2), ""));
    assert_messages(&answer, &["limit has no command \"sit\"; it has: show, set"]);

    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("man1");
    let answer = run(&["man", "--dir", dir.to_str().unwrap()]);
    assert_eq!((answer.status, answer.stdout.as_str(), answer.stderr.as_str()), (Some(0), "", ""));
    for page in ["limiter.1", "limiter-run.1", "limiter-limit-set.1", "limiter-events.1"] {
        assert!(dir.join(page).is_file(), "{page}");
    }
}

#[test]
fn doctor_prints_one_document_and_fails_on_a_missing_interface() {
    let answer = run(&["doctor", "--json", "--interface", "no-such-dev"]);
    assert_eq!(answer.status, Some(1));
    assert_messages(&answer, &["checks failed"]);
    let document: serde_json::Value = serde_json::from_str(&answer.stdout).unwrap();
    assert_eq!(document["ok"], false);
    let checks = document["checks"].as_array().unwrap();
    let of = |name: &str| checks.iter().find(|check| check["check"] == name).unwrap_or_else(|| panic!("no {name}"));
    assert_eq!(of("interface no-such-dev")["state"], "fail");
    assert_eq!(of("kernel")["found"], fs::read_to_string("/proc/sys/kernel/osrelease").unwrap().trim());
}

#[test]
fn config_check_reads_the_certificates_and_says_where_a_bad_one_is_named() {
    let (place, path) = file("");
    let [certificate, key] = ["cert.pem", "key.pem"].map(|name| place.path().join(name));
    let text = format!("[gateway.tls]\ncertificate = {certificate:?}\nkey = {key:?}\n");
    fs::write(&path, text).unwrap();
    let check = || run(&["config", "check", path.to_str().unwrap()]);
    let told_at = format!("{}:2:15: gateway.tls: ", path.display());

    let answer = check();
    assert_eq!(answer.status, Some(2));
    assert_messages(&answer, &[&format!("{told_at}cannot read {}: No such file", certificate.display())]);

    let made =
        ["a.example.com", "b.example.com"].map(|name| rcgen::generate_simple_self_signed([name.into()]).unwrap());
    fs::write(&certificate, made[0].cert.pem()).unwrap();
    fs::write(&key, made[1].signing_key.serialize_pem()).unwrap();
    let answer = check();
    assert_eq!(answer.status, Some(2));
    assert_messages(&answer, &[&format!("{told_at}the private key in {} does not belong", key.display())]);

    fs::write(&key, made[0].signing_key.serialize_pem()).unwrap();
    let answer = check();
    assert_eq!((answer.status, answer.stderr.as_str()), (Some(0), ""));
}
