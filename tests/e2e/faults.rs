//! Bad input and bad hosts: one clear error that says what to do, the right exit status, and a host as it was.

use std::{
    fs, io,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    process::Command,
};

use anyhow::{Context, Result};
use limiter_tests::{
    bare::{Answer, BareXdp},
    bpf,
    lab::{Family, Lab, PORT},
    limiter::Limiter,
    process::{Ended, Process},
    tcp::PlainServer,
    wait::SOON,
};

/// Exit statuses.
const FAILED: i32 = 1;
const BAD_USAGE: i32 = 2;
const NOTHING_THERE: i32 = 3;
const NO_PRIVILEGE: i32 = 4;

#[test]
fn nothing_attached_is_said_by_every_command() -> Result<()> {
    let lab = Lab::new(0)?;
    let limiter = Limiter::new(&lab.server)?;
    for verb in [
        &["status"][..],
        &["status", "--json"],
        &["sources"],
        &["connections"],
        &["kick", "192.0.2.7"],
        &["limit", "show"],
        &["limit", "set", "connections_per_source=5"],
        &["detach"],
    ] {
        assert_error(&limiter.outcome(verb)?, NOTHING_THERE, &["nothing is attached", "limiter attach"]);
    }
    assert_nothing_pinned(&limiter);
    Ok(())
}

#[test]
fn no_such_interface() -> Result<()> {
    let lab = Lab::new(1)?;
    let limiter = Limiter::new(&lab.server)?;
    for verb in ["attach", "run"] {
        // The first one exists, and must not stay attached.
        let outcome = limiter.outcome([verb, "--interface", "client1", "--interface", "eth7", "--port", "8080"])?;
        assert_error(&outcome, FAILED, &["eth7"]);
        assert_untouched(&lab, &limiter)?;
    }
    Ok(())
}

#[test]
fn an_interface_whose_xdp_is_taken() -> Result<()> {
    let lab = Lab::new(2)?;
    let limiter = Limiter::new(&lab.server)?;
    let taken = lab.clients[1].server_interface();
    let _foreign = BareXdp::load(Answer::Pass)?.attach(&lab.server, &taken)?;
    let before = lab.server.link(&taken)?["xdp"].clone();
    for verb in ["attach", "run"] {
        let outcome = limiter.outcome(
            [verb, "--port", "8080", "--attach-mode", "native"]
                .map(str::to_owned)
                .into_iter()
                .chain(lab.interface_flags()),
        )?;
        assert_error(&outcome, FAILED, &[&taken, "XDP"]);
        assert_eq!(lab.server.link(&taken)?["xdp"], before, "the other program is still there, and alone");
        lab.server.wait_xdp_free(&lab.clients[0].server_interface())?;
        assert_nothing_pinned(&limiter);
    }
    Ok(())
}

#[test]
fn a_port_in_use() -> Result<()> {
    let lab = Lab::new(1)?;
    let _server = PlainServer::start(&lab.server, Family::V4)?;
    let limiter = Limiter::new(&lab.server)?;
    let outcome = limiter.outcome(["run", "--interface", "client1", "--listen", "0.0.0.0:8080"])?;
    assert_error(&outcome, FAILED, &["8080", "in use"]);
    assert_untouched(&lab, &limiter)
}

#[test]
fn a_take_over_that_fails_leaves_what_was_in_force() -> Result<()> {
    let lab = Lab::new(2)?;
    let _server = PlainServer::start(&lab.server, Family::V4)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.attach(["--interface", "client1", "--port", "8080", "--connections-per-source", "5"])?;
    let before = limiter.json("status")?;

    let _foreign = BareXdp::load(Answer::Pass)?.attach(&lab.server, "client2")?;
    let both = ["--interface", "client1", "--interface", "client2"];
    for (arguments, said) in [
        (&["run", "--interface", "client1", "--listen", "0.0.0.0:8080"][..], "in use"),
        (&["run", "--interface", "client1", "--listen", "0.0.0.0:9000", "--admin", "192.0.2.1:1"], "192.0.2.1:1"),
        (&["attach", both[0], both[1], both[2], both[3], "--port", "9000"], "client2"),
        (&["attach", "--interface", "eth7", "--port", "9000"], "eth7"),
    ] {
        let more = ["--connections-per-source", "9", "--attach-mode", "native"];
        let outcome = limiter.outcome(arguments.iter().copied().chain(more))?;
        assert_error(&outcome, FAILED, &[said]);
        let after = limiter.json("status")?;
        for what in ["services", "interfaces", "daemon"] {
            assert_eq!(after[what], before[what], "after {arguments:?}");
        }
    }
    Ok(())
}

#[test]
fn a_second_instance_on_the_same_pin_path() -> Result<()> {
    let lab = Lab::new(1)?;
    let limiter = Limiter::new(&lab.server)?;
    let first = limiter.run(["--interface", "client1", "--listen", "0.0.0.0:8080", "--connections-per-source", "5"])?;
    let before = bpf::objects_below(limiter.pin_path())?;

    let arguments = ["run", "--interface", "client1", "--listen", "0.0.0.0:8081", "--admin", "127.0.0.1:9181"];
    for arguments in [&arguments[..], &["attach", "--interface", "client1", "--port", "8081"], &["detach"]] {
        let outcome = limiter.outcome(arguments)?;
        assert_error(&outcome, FAILED, &[&limiter.pin_path().display().to_string(), &first.id().to_string()]);
    }

    assert_eq!(bpf::objects_below(limiter.pin_path())?, before, "what is pinned is the first instance's");
    assert_eq!(limiter.json("status")?["daemon"], first.id());
    assert_eq!(first.http_status("/readyz"), Some(200));
    let ports = limiter.json("status")?["services"][0]["ports"].clone();
    assert_eq!(ports, serde_json::json!([PORT]), "the service is the first instance's");
    Ok(())
}

#[test]
fn a_pin_path_that_is_on_no_bpffs() -> Result<()> {
    let lab = Lab::new(1)?;
    let limiter = Limiter::new(&lab.server)?;
    let folder = tempfile::tempdir()?;
    let pin_path = folder.path().join("pins");
    for verb in ["attach", "run"] {
        let mut command = lab.server.command(limiter.binary());
        command.args([verb, "--interface", "client1", "--port", "8080", "--pin-path"]).arg(&pin_path);
        let outcome = Process::start(&mut command)?.wait(SOON)?;
        assert_error(&outcome, FAILED, &[&pin_path.display().to_string(), "BPF file system"]);
        assert!(!pin_path.exists(), "{verb} has made {}", pin_path.display());
        assert_untouched(&lab, &limiter)?;
    }
    Ok(())
}

#[test]
fn a_host_without_cgroup_v2() -> Result<()> {
    let lab = Lab::new(1)?;
    let limiter = Limiter::new(&lab.server)?;
    let mut command = limiter.command(["attach", "--interface", "client1", "--port", "8080"]);
    hide_mounts(&mut command, "cgroup2")?;
    let outcome = Process::start(&mut command)?.wait(SOON)?;
    assert_error(&outcome, FAILED, &["cgroup v2", "mount"]);
    assert_untouched(&lab, &limiter)
}

#[test]
fn a_host_without_bpffs() -> Result<()> {
    let lab = Lab::new(1)?;
    let limiter = Limiter::new(&lab.server)?;
    let mut command = limiter.command(["attach", "--interface", "client1", "--port", "8080"]);
    hide_mounts(&mut command, "bpf")?;
    let outcome = Process::start(&mut command)?.wait(SOON)?;
    assert_error(&outcome, FAILED, &["BPF file system", "mount -t bpf"]);
    assert_untouched(&lab, &limiter)
}

#[test]
fn an_old_pin_with_another_layout() -> Result<()> {
    let lab = Lab::new(1)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 5, &[])?;
    let pins = bpf::pins_below(limiter.pin_path())?;
    let ledger = pins.iter().find(|pin| pin.ends_with("LEDGER")).context("the ledger is pinned under its name")?;
    bpf::replace_pin(ledger, 3)?;
    let arguments = |verb| [verb, "--interface", "client1", "--port", "8080"];
    for outcome in [
        limiter.outcome(arguments("attach"))?,
        limiter.outcome(arguments("run"))?,
        limiter.outcome(["status"])?,
        limiter.outcome(["connections"])?,
    ] {
        assert_error(&outcome, FAILED, &["LEDGER", "limiter detach"]);
    }
    limiter.detach()?;
    assert_untouched(&lab, &limiter)
}

#[test]
fn a_user_without_privilege() -> Result<()> {
    let lab = Lab::new(1)?;
    let limiter = Limiter::new(&lab.server)?;
    // Where nobody may read it.
    let folder = tempfile::tempdir()?;
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
    let binary = folder.path().join("limiter");
    fs::copy(limiter.binary(), &binary)?;
    let as_nobody = |arguments: &[&str]| -> Result<Ended> {
        let mut command = limiter.command_of(&binary, arguments);
        drop_privilege(command.current_dir("/"));
        Process::start(&mut command)?.wait(SOON)
    };
    for verb in ["attach", "run"] {
        let outcome = as_nobody(&[verb, "--interface", "client1", "--port", "8080"])?;
        assert_error(&outcome, NO_PRIVILEGE, &["root"]);
        assert_untouched(&lab, &limiter)?;
    }

    limiter.protect(&lab, 5, &[])?;
    let before = bpf::objects_below(limiter.pin_path())?;
    for arguments in [&["detach"][..], &["status"], &["limit", "set", "connections_per_source=6"]] {
        assert_error(&as_nobody(arguments)?, NO_PRIVILEGE, &["root"]);
    }
    assert_eq!(bpf::objects_below(limiter.pin_path())?, before);
    assert_eq!(limiter.json("status")?["services"][0]["connections_per_source"], 5);
    Ok(())
}

#[test]
fn a_bad_configuration_file() -> Result<()> {
    let lab = Lab::new(1)?;
    let limiter = Limiter::new(&lab.server)?;
    for (text, place, said) in [
        ("[kernel]\ninterfacs = [\"client1\"]\n", "2:1", "interfacs"),
        ("[limits]\nconnections_per_source = -1\n", "2:26", "connections_per_source"),
        ("[limits]\nconnections_per_source = \"many\"\n", "2:26", "connections_per_source"),
        ("[gateway]\nping_interval = \"soon\"\n", "2:17", "soon"),
        ("[limits\n", "1:8", ""),
        ("[[service]]\nname = \"a\"\nport = 80\n[[service]]\nname = \"b\"\nport = 80\n", "6:8", "80"),
    ] {
        let file = Limiter::config_file(text)?;
        let path = file.path().display().to_string();
        for verb in [&["attach", "--config", &path][..], &["run", "--config", &path], &["config", "check", &path]] {
            let outcome = limiter.outcome(verb)?;
            assert_error(&outcome, BAD_USAGE, &[&format!("{path}:{place}"), said]);
        }
        assert_untouched(&lab, &limiter)?;
    }
    Ok(())
}

#[test]
fn bad_usage() -> Result<()> {
    let lab = Lab::new(1)?;
    let limiter = Limiter::new(&lab.server)?;
    for (arguments, said) in [
        (&["attach", "--interface", "client1", "--port", "70000"][..], "70000"),
        (&["attach", "--interface", "client1", "--connections-per-source", "-1"], "-1"),
        (&["attach", "--interface", "client1", "--attach-mode", "sideways"], "sideways"),
        (&["attach", "--no-such-flag"], "--no-such-flag"),
        (&["run", "--listen", "nowhere"], "nowhere"),
        (&["attach", "--config", "/does/not/exist.toml"], "/does/not/exist.toml"),
    ] {
        assert_error(&limiter.outcome(arguments)?, BAD_USAGE, &[said]);
        assert_untouched(&lab, &limiter)?;
    }

    limiter.protect(&lab, 5, &[])?;
    for (setting, said) in [
        ("connections_per_source=-1", "-1"),
        ("connections_per_source=many", "many"),
        ("connections_per_sauce=1", "connections_per_sauce"),
        ("connections_per_source", "connections_per_source"),
        ("ipv4_prefix=33", "33"),
    ] {
        assert_error(&limiter.outcome(["limit", "set", setting])?, BAD_USAGE, &[said]);
    }
    let outcome = limiter.outcome(["limit", "set", "connections_per_source=9", "connections_total=many"])?;
    assert_error(&outcome, BAD_USAGE, &["many"]);
    let outcome = limiter.outcome(["limit", "set", "connections_per_source=9", "--service", "nope"])?;
    assert_error(&outcome, BAD_USAGE, &["nope"]);
    assert_eq!(limiter.json("status")?["services"][0]["connections_per_source"], 5, "all or nothing");
    Ok(())
}

/// What most systems call nobody and nogroup.
const NOBODY: u32 = 65_534;

/// One clear error: a message on stderr that says each of `said`, no panic, no page of it.
fn assert_error(outcome: &Ended, status: i32, said: &[&str]) {
    let stderr = outcome.stderr.trim();
    assert_eq!(outcome.status.code(), Some(status), "exit status; it said: {stderr}");
    for said in said {
        assert!(stderr.contains(said), "`{said}` is not in: {stderr}");
    }
    assert!(!stderr.contains("panicked") && !stderr.contains("RUST_BACKTRACE"), "{stderr}");
    assert!(stderr.lines().count() <= 12, "too long for one clear error: {stderr}");
    assert_eq!(stderr.lines().filter(|line| line.starts_with("limiter: ")).count(), 1, "one error: {stderr}");
    assert_eq!(outcome.stdout, "", "nothing that looks like an answer");
}

/// Nothing attached, nothing pinned.
fn assert_untouched(lab: &Lab, limiter: &Limiter<'_>) -> Result<()> {
    for client in &lab.clients {
        lab.server.wait_xdp_free(&client.server_interface())?;
    }
    assert_nothing_pinned(limiter);
    Ok(())
}

fn assert_nothing_pinned(limiter: &Limiter<'_>) {
    assert!(!limiter.pin_path().exists(), "{} was left behind", limiter.pin_path().display());
}

/// Has the command run as [`NOBODY`], once it is in its namespace.
fn drop_privilege(command: &mut Command) {
    // SAFETY: between fork and exec only system calls are made.
    unsafe {
        command.pre_exec(|| {
            if libc::setgroups(0, std::ptr::null()) != 0 || libc::setgid(NOBODY) != 0 || libc::setuid(NOBODY) != 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
}

/// Has the command see no mount of a kind, while the host keeps it.
fn hide_mounts(command: &mut Command, kind: &str) -> Result<()> {
    let mut hidden = Vec::new();
    for line in fs::read_to_string("/proc/self/mountinfo")?.lines() {
        // 36 35 0:30 / /sys/fs/cgroup rw … - cgroup2 …
        let (mount, file_system) = line.split_once(" - ").context("a line of mountinfo has two halves")?;
        if file_system.split(' ').next() == Some(kind) {
            let place = mount.split(' ').nth(4).context("the fifth field of mountinfo is the place")?;
            hidden.push(std::ffi::CString::new(place)?);
        }
    }
    assert!(!hidden.is_empty(), "this host has no {kind} mounted");
    // SAFETY: between fork and exec only system calls are made, on strings that were made before.
    unsafe {
        command.pre_exec(move || {
            if libc::unshare(libc::CLONE_NEWNS) != 0 {
                return Err(io::Error::last_os_error());
            }
            let private = libc::MS_REC | libc::MS_PRIVATE;
            if libc::mount(c"none".as_ptr(), c"/".as_ptr(), std::ptr::null(), private, std::ptr::null()) != 0 {
                return Err(io::Error::last_os_error());
            }
            for place in &hidden {
                if libc::umount2(place.as_ptr(), libc::MNT_DETACH) != 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    Ok(())
}
