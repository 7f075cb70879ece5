//! Changes of the policy under traffic: whatever a packet meets, it is the old policy or the new one.

use std::{
    net::SocketAddr,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use anyhow::{Context, Result, ensure};
use aya::programs::links::{FdLink, PinnedLink};
use limiter::{
    config::{OnDeny, OnFull, Service},
    kernel::Pinned,
    policy::{Action, OwnLimits, Rule},
};
use limiter_tests::{bpf::Attached, frame::Frame, lab::Lab, limiter::Limiter};

const PASS: u32 = 2;
const DROP: u32 = 1;

/// How often each policy takes the place of the other.
const CHANGES: usize = 60;

fn service(name: &str, port: u16, on_deny: OnDeny) -> Service {
    Service { on_deny, ..Service::new(name, [port]) }
}

fn rule(cidr: &str, action: Action) -> Rule {
    Rule::new(cidr.parse().expect("a prefix"), action)
}

/// Two policies under which some SYNs always pass and others never do, while any mixture of them does otherwise.
fn policies() -> [(Vec<Service>, Vec<Rule>); 2] {
    let limits = Action::Limit(OwnLimits { connections_per_source: Some(3), ..OwnLimits::default() });
    [
        // Who is denied here comes to a service that only observes.
        (
            vec![
                service("lenient", 8080, OnDeny::Observe),
                service("strict", 8081, OnDeny::Drop),
                service("other", 8083, OnDeny::Observe),
            ],
            vec![
                rule("192.0.2.0/24", Action::Deny),
                rule("198.51.100.7/32", Action::Deny),
                rule("2001:db8::/32", Action::Deny),
            ],
        ),
        // The services have changed places, and whoever passed is not denied.
        (
            vec![
                service("lenient", 8081, OnDeny::Observe),
                service("strict", 8080, OnDeny::Drop),
                service("other", 8083, OnDeny::Drop),
            ],
            vec![rule("192.0.2.0/25", limits), rule("198.51.100.0/24", Action::Deny)],
        ),
    ]
}

/// What is sent, and what becomes of it under either policy.
fn packets() -> Vec<(Vec<u8>, &'static [u32])> {
    let syn = |source: &str, destination: &str| -> Vec<u8> {
        let source: SocketAddr = source.parse().expect("an address");
        Frame::syn(source, destination.parse().expect("an address")).to_bytes()
    };
    vec![
        (syn("192.0.2.7:40000", "203.0.113.1:8080"), &[PASS]),
        (syn("[2001:db8::7]:40000", "[2001:db8:1::1]:8080"), &[PASS]),
        // To the port that is strict in the first policy, and lenient in the second.
        (syn("198.51.100.7:40000", "203.0.113.1:8081"), &[DROP, PASS]),
        (syn("198.51.100.8:40000", "203.0.113.1:8081"), &[PASS]),
        // To a service that has other limits in each.
        (syn("192.0.2.8:40000", "203.0.113.1:8083"), &[PASS]),
        // Nobody's port, ever.
        (syn("198.51.100.7:40000", "203.0.113.1:8082"), &[PASS]),
    ]
}

/// The program that is attached to the lab's first interface.
fn attached_program(pin_path: &Path) -> Result<Attached> {
    let links = std::fs::read_dir(pin_path.join(format!("v{}/links", limiter_common::abi::ABI_VERSION)))?;
    let link = links
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"native-")))
        .context("an XDP link is pinned")?;
    let link = FdLink::from(PinnedLink::from_pin(link)?);
    Attached::open(link.info()?.program_id())
}

#[test]
fn no_packet_meets_half_a_policy() -> Result<()> {
    let lab = Lab::new(1)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 20, &[])?;
    let pinned = Pinned::open(limiter.pin_path())?;
    let program = attached_program(limiter.pin_path())?;
    let [first, second] = policies();
    let put = |(services, rules): &(Vec<Service>, Vec<Rule>)| pinned.put(services, rules, OnFull::Open);

    // Each by itself does as is meant.
    for (policy, place) in [(&second, 1), (&first, 0)] {
        put(policy)?;
        for (packet, answers) in packets() {
            assert_eq!(program.run(&packet)?, answers[place.min(answers.len() - 1)], "policy {place}: {packet:02x?}");
        }
    }

    let done = AtomicBool::new(false);
    thread::scope(|scope| -> Result<()> {
        let senders: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| -> Result<u64> {
                    let packets = packets();
                    let mut sent = 0;
                    while !done.load(Ordering::Relaxed) {
                        for (packet, answers) in &packets {
                            let answer = program.run(packet)?;
                            ensure!(answers.contains(&answer), "after {sent}: {answer} to {packet:02x?}");
                            sent += 1;
                        }
                    }
                    Ok(sent)
                })
            })
            .collect();
        let changed = (0..CHANGES).try_for_each(|_| put(&second).and_then(|_| put(&first)).map(|_| ()));
        done.store(true, Ordering::Relaxed);
        for sender in senders {
            let sent = sender.join().expect("a sender does not panic")?;
            assert!(sent > CHANGES as u64, "too little was sent to prove anything: {sent}");
        }
        Ok(changed?)
    })
}

/// What reads the policy by several system calls reads one policy, too.
#[test]
fn no_reader_sees_half_a_policy() -> Result<()> {
    let lab = Lab::new(1)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 20, &[])?;
    let pinned = Pinned::open(limiter.pin_path())?;
    let [first, second] = policies();
    pinned.put(&first.0, &first.1, OnFull::Open)?;
    let done = AtomicBool::new(false);
    thread::scope(|scope| -> Result<()> {
        let reader = scope.spawn(|| -> Result<()> {
            while !done.load(Ordering::Relaxed) {
                let rules = pinned.rules()?.all()?.len();
                ensure!(rules == first.1.len() || rules == second.1.len(), "{rules} rules");
                let services = pinned.services()?;
                ensure!(services.len() == 3, "{services:?}");
            }
            Ok(())
        });
        let changed = (0..CHANGES / 3).try_for_each(|_| {
            pinned.put(&second.0, &second.1, OnFull::Open)?;
            pinned.put(&first.0, &first.1, OnFull::Open).map(|_| ())
        });
        done.store(true, Ordering::Relaxed);
        reader.join().expect("the reader does not panic")?;
        Ok(changed?)
    })
}
