//! A new binary takes over: no gap in the limits, and no count lost; and what it can't take over stays in force.

use std::{
    fs,
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use limiter_tests::{
    bpf::{Kind, objects_below},
    lab::{Family, Lab},
    limiter::Limiter,
    process::Process,
    tcp::{Crowd, PlainServer, Seen, connect_served},
    wait::{NO_ANSWER, SOON, eventually_equal},
};

#[test]
fn an_upgrade_under_traffic_leaves_no_gap() -> Result<()> {
    upgrade_under_traffic("native", "")
}

#[test]
fn an_upgrade_under_traffic_leaves_no_gap_in_tc_mode() -> Result<()> {
    upgrade_under_traffic("tc", "")
}

#[test]
fn an_upgrade_under_traffic_leaves_no_gap_by_a_filter() -> Result<()> {
    upgrade_under_traffic("tc", "tcx")
}

/// One client holds its five and tries for more all the while; another opens and closes connections as fast as it can. Five
/// times, another copy of the binary takes over.
fn upgrade_under_traffic(mode: &str, without: &'static str) -> Result<()> {
    let lab = Lab::new(2)?;
    let [greedy, busy] = [&lab.clients[0], &lab.clients[1]];
    let server = PlainServer::start(&lab.server, Family::V4)?;
    let limiter = Limiter::new(&lab.server)?.without(without);
    limiter.protect(&lab, 5, &["--attach-mode", mode])?;
    let before = maps_and_programs(&limiter)?;
    let folder = tempfile::tempdir()?;
    let next = folder.path().join("limiter");
    fs::copy(limiter.binary(), &next)?;

    let held = Crowd::connect(&greedy.namespace, greedy.service(Family::V4), 5, SOON)?;
    assert_eq!(held.served.len(), 5);
    let done = AtomicBool::new(false);
    let churned = thread::scope(|scope| -> Result<u32> {
        let more = scope.spawn(|| -> Result<usize> {
            let mut served = 0;
            while !done.load(Ordering::Relaxed) {
                let service = greedy.service(Family::V4);
                served += Crowd::connect(&greedy.namespace, service, 10, Duration::from_millis(20))?.served.len();
            }
            Ok(served)
        });
        let churn = scope.spawn(|| -> Result<u32> {
            let mut opened = 0;
            while !done.load(Ordering::Relaxed) {
                connect_served(&busy.namespace, busy.service(Family::V4), SOON)?;
                opened += 1;
            }
            Ok(opened)
        });
        let upgraded = (0..5).try_for_each(|_| upgrade(&limiter, &lab, &next, mode));
        done.store(true, Ordering::Relaxed);
        let more = more.join().expect("no panic")?;
        let churned = churn.join().expect("no panic")?;
        upgraded?;
        assert_eq!(more, 0, "served past the limit");
        Ok(churned)
    })?;

    assert!(churned > 0);
    assert_eq!(server.seen(greedy.address(Family::V4)), Seen { accepted: 5, open: 5, peak: 5 });
    assert_eq!(server.seen(busy.address(Family::V4)).accepted, churned, "nobody was refused that had room");
    limiter.wait_held(busy.address(Family::V4), 0)?;
    assert_eq!(limiter.held_by(greedy.address(Family::V4))?, 5);
    assert_eq!(limiter.counter("opened_unseen")?, 0, "no handshake got past the program");
    assert_eq!(limiter.counter("opened_reserved")?, u64::from(churned) + 5);
    eventually_equal(SOON, "each end was told", &u64::from(churned), || limiter.counter("closed_socket"))?;
    let after = maps_and_programs(&limiter)?;
    for (kind, same) in [(Kind::Map, true), (Kind::Program, false)] {
        let of_kind = |objects: &[limiter_tests::bpf::Object]| -> Vec<u32> {
            objects.iter().filter(|object| object.kind == kind).map(|object| object.id).collect()
        };
        assert_eq!(of_kind(&before) == of_kind(&after), same, "{kind:?}: {before:?}, {after:?}");
    }
    drop(held);
    limiter.wait_empty()
}

fn upgrade(limiter: &Limiter<'_>, lab: &Lab, binary: &std::path::Path, mode: &str) -> Result<()> {
    let mut arguments: Vec<String> =
        ["attach", "--port", "8080", "--connections-per-source", "5"].map(Into::into).into();
    arguments.extend(["--connection-rate", "0", "--attach-mode", mode].map(Into::into));
    arguments.extend(lab.interface_flags());
    let ended = Process::start(&mut limiter.command_of(binary, &arguments))?.wait(Duration::from_mins(1))?;
    anyhow::ensure!(ended.status.success(), "{}", ended.stderr);
    assert!(ended.stdout.contains("taken over: client1"), "{}", ended.stdout);
    Ok(())
}

fn maps_and_programs(limiter: &Limiter<'_>) -> Result<Vec<limiter_tests::bpf::Object>> {
    let mut objects = objects_below(limiter.pin_path())?;
    objects.retain(|object| object.kind != Kind::Link);
    Ok(objects)
}

/// What an older or a newer layout has pinned is not understood. It stays in force, and the error says what to do: which works.
#[test]
fn another_layout_stays_in_force_until_the_instructions_are_followed() -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let server = PlainServer::start(&lab.server, Family::V4)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 5, &[])?;
    let version: PathBuf = fs::read_dir(limiter.pin_path())?.next().context("a folder for the version")??.path();
    fs::rename(&version, limiter.pin_path().join("v0")).context("cannot rename a folder on the bpffs")?;
    let mut crowd = Crowd::connect(&client.namespace, client.service(Family::V4), 8, NO_ANSWER)?;
    assert_eq!(crowd.served.len(), 5);
    // They would get in while nothing is attached.
    crowd.unanswered.clear();

    let arguments = ["attach", "--interface", "client1", "--port", "8080", "--connections-per-source", "7"];
    let mut instructions = String::new();
    for verb in [&arguments[..], &["run", "--interface", "client1", "--listen", "0.0.0.0:8081"], &["status"]] {
        let outcome = limiter.outcome(verb)?;
        assert_eq!(outcome.status.code(), Some(1), "{verb:?}: {}", outcome.stderr);
        assert!(outcome.stderr.contains("it is v0"), "{}", outcome.stderr);
        instructions = outcome.stderr;
    }
    let refused = Crowd::connect(&client.namespace, client.service(Family::V4), 3, NO_ANSWER)?.served;
    assert_eq!(refused.len(), 0, "the old limits are in force");
    assert_eq!(server.seen(client.address(Family::V4)).open, 5, "and nobody was cut");

    // To the letter: the command between the first two backticks, with the same pin path; then attach again.
    let command = instructions.split('`').nth(1).context("a command in backticks")?;
    let words: Vec<&str> = command.split(' ').collect();
    assert_eq!(words[0], "limiter", "{instructions}");
    limiter.output(&words[1..])?;
    limiter.output(arguments)?;
    limiter.wait_held(client.address(Family::V4), 5)?;
    let more = Crowd::connect(&client.namespace, client.service(Family::V4), 5, NO_ANSWER)?;
    assert_eq!(more.served.len(), 2, "seven in all: those that were open count");
    Ok(())
}
