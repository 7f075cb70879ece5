//! SYN cookies of the programs for XDP and TC, byte by byte; with listeners of its own, since the kernel makes the cookie for them.
#![expect(clippy::unwrap_used, reason = "the helpers of tests, which clippy takes for more than that")]

use std::{
    ffi::c_int,
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd,
};

use limiter::kernel::Hook;
use limiter_common::{
    Counter, ServicePolicy, SourceKey,
    challenge::Challenge,
    model::{self, Grants},
    policy::OnFull,
    source::SOURCE_GONE,
};
use limiter_tests::{
    fixture::{self, PORT},
    frame::{Extension, Frame},
    info::Info,
    kernel::{Feature, lacks},
    netns::Namespace,
    program::{Action, Program, now_ns},
    segment::flags::{ACK, SYN},
    tcp::{listener_of, set_tcp_option},
};
use socket2::Socket;

const HOOKS: [Hook; 2] = [Hook::Xdp, Hook::Tc];

fn v4() -> Frame {
    Frame { tcp_options: options(), ..fixture::v4() }
}

fn v6() -> Frame {
    Frame { tcp_options: options(), ..fixture::v6() }
}

/// The options of a Linux client: MSS, SACK, timestamps, window scale.
fn options() -> Vec<u8> {
    vec![2, 4, 5, 0xb4, 4, 2, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0, 1, 3, 3, 7]
}

/// A namespace that takes cookies, with a listener for both families.
fn host() -> (Namespace, TcpListener) {
    let host = Namespace::new().unwrap();
    host.set_sysctl("net/ipv4/tcp_syncookies", "2").unwrap();
    let address: SocketAddr = (std::net::Ipv6Addr::UNSPECIFIED, PORT).into();
    let listener = host.enter(|| TcpListener::bind(address)).unwrap();
    (host, listener)
}

fn program(threshold: u32) -> Program {
    program_for(Hook::Xdp, threshold)
}

fn program_for(hook: Hook, threshold: u32) -> Program {
    let mut program = Program::load_for(hook).unwrap();
    let policy = ServicePolicy { ipv4_prefix: 32, ipv6_prefix: 64, ..ServicePolicy::default() };
    program.set_service(0, PORT, &policy).unwrap();
    program.set_challenge(0, threshold).unwrap();
    program
}

/// What a host grants by itself: a loopback device takes 65536 bytes, and a listener has room for more than the first window.
const GRANTS: Grants = Grants {
    mtu: 65_536,
    max_segment: 0,
    window: 32_768,
    timestamps: false,
    sack: true,
    window_scale: None,
    ecn: true,
};

/// The unit of timestamps that hide options.
const STEP_MS: u64 = 64;

/// Has a frame answered by a program in a namespace, and checks that the answer is what the model makes of it. Returns the
/// answer's cookie.
fn answered(host: &Namespace, program: &mut Program, description: &str, question: &Frame, grants: &Grants) -> u32 {
    let bytes = question.to_bytes();
    let before_ms = now_ns() / 1_000_000;
    let (action, answer) = host.enter(|| program.run(&bytes).map(|(action, out)| (action, out.to_vec()))).unwrap();
    assert_eq!(action, Action::Transmit, "{description}");
    let tcp_at = 14 + 4 * question.vlan_tags.len() + if question.source.is_ipv4() { 20 } else { 40 };
    let cookie = u32::from_be_bytes(answer[tcp_at + 4..tcp_at + 8].try_into().unwrap());
    let after_ms = now_ns() / 1_000_000;
    let times = (before_ms..after_ms).step_by(usize::try_from(STEP_MS).unwrap()).chain([after_ms]);
    let expected: Vec<_> = times.map(|now_ms| model::syn_ack(&bytes, grants, cookie, now_ms).unwrap()).collect();
    assert!(expected.contains(&answer), "{description}\nanswer   {answer:02x?}\nexpected {:02x?}", expected[0]);
    assert!(answer.len() <= bytes.len().max(60), "{description}: longer than what it answers");
    cookie
}

#[test]
fn a_syn_is_answered_by_a_cookie_byte_by_byte() {
    HOOKS.into_iter().for_each(a_syn_is_answered_by_a_cookie_byte_by_byte_on);
}

fn a_syn_is_answered_by_a_cookie_byte_by_byte_on(hook: Hook) {
    let (host, listener) = host();
    let scale = stack_scale(&host, &listener);
    let mut program = program_for(hook, 1);
    let tagged = vec![0x88a8, 0x8100];
    let rows = [
        ("IPv4", v4()),
        ("IPv6", v6()),
        ("IPv4, the last sequence number", Frame { sequence: u32::MAX, ..v4() }),
        ("IPv4, only the MSS", Frame { tcp_options: vec![2, 4, 5, 0xb4], ..v4() }),
        ("IPv4, forty bytes of options", Frame { tcp_options: [options(), vec![1; 20]].concat(), ..v4() }),
        ("IPv4, no options, and so no room for any", Frame { tcp_options: Vec::new(), ..v4() }),
        ("IPv4, with data, which is not taken", Frame { payload: vec![7; 100], ..v4() }),
        ("IPv4, asking for ECN", v4().with_flags(SYN | 0xc0)),
        ("IPv6, asking for ECN", v6().with_flags(SYN | 0xc0)),
        ("IPv4, with half of what asks for ECN", v4().with_flags(SYN | 0x40)),
        ("IPv4, two VLAN tags", Frame { vlan_tags: tagged.clone(), ..v4() }),
        ("IPv4, with options of its own", Frame { ipv4_option_words: 10, ..v4() }),
        ("IPv6, two VLAN tags", Frame { vlan_tags: tagged, ..v6() }),
        ("IPv6, behind an extension header", Frame { extensions: vec![Extension::Plain(60, 1)], ..v6() }),
        ("no timestamps", with_options(&[2, 4, 5, 0xb4, 1, 1, 4, 2, 1, 3, 3, 7])),
        ("timestamps alone", with_options(&[8, 10, 0, 0, 0, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1])),
        ("less room than the answer would take", with_options(&[4, 2, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0, 1, 3, 3, 7])),
        ("no window scale", with_options(&[2, 4, 5, 0xb4, 4, 2, 8, 10, 9, 8, 7, 6, 0, 0, 0, 0, 1, 1, 1, 1])),
        ("just enough room", with_options(&[2, 4, 5, 0xb4, 4, 2, 8, 10, 9, 8, 7, 6, 0, 0, 0, 0])),
        ("too great a window scale", with_options(&[2, 4, 5, 0xb4, 4, 2, 8, 10, 9, 8, 7, 6, 0, 0, 0, 0, 1, 3, 3, 15])),
        ("no SACK", with_options(&[2, 4, 5, 0xb4, 1, 1, 8, 10, 9, 8, 7, 6, 0, 0, 0, 0, 1, 3, 3, 0])),
        (
            "options twice",
            with_options(&[[8, 10, 1, 1, 1, 1, 0, 0, 0, 0, 3, 3, 2, 1].repeat(2), vec![4, 2, 0, 0]].concat()),
        ),
        ("an end before the rest", with_options(&[2, 4, 5, 0xb4, 0, 0, 8, 10, 9, 8, 7, 6, 0, 0, 0, 0, 1, 3, 3, 0])),
        ("wrong lengths", with_options(&[8, 9, 9, 8, 7, 6, 0, 0, 0, 4, 3, 0, 3, 4, 7, 0, 8, 10, 1, 1, 1, 1, 2, 2])),
        ("an option past the end", with_options(&[1, 1, 4, 2, 1, 3, 3, 7, 2, 4, 5, 0xb4, 1, 1, 8, 10, 1, 1, 1, 1])),
        ("an option without a length", with_options(&[8, 10, 1, 1, 1, 1, 0, 0, 0, 0, 4, 2, 2, 4, 5, 0xb4, 1, 1, 1, 3])),
        ("an option of length 0", with_options(&[2, 4, 5, 0xb4, 4, 2, 77, 0, 8, 10, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1])),
    ];
    let mut challenged = 0;
    for timestamps in ["1", "2", "0"] {
        host.set_sysctl("net/ipv4/tcp_timestamps", timestamps).unwrap();
        let grants = Grants { timestamps: timestamps == "2", window_scale: Some(scale), ..GRANTS };
        let cookies: Vec<_> = rows
            .iter()
            .map(|(row, question)| answered(&host, &mut program, &format!("{row}, {timestamps}"), question, &grants))
            .collect();
        challenged += rows.len() as u64;
        assert_eq!(program.counters().unwrap(), [((0, Counter::SynChallenged), challenged)].into());
        assert_ne!(cookies[0], cookies[1]);
        assert_eq!(cookies[0], cookies[6], "the same question");
    }
}

fn with_options(options: &[u8]) -> Frame {
    Frame { tcp_options: options.to_vec(), ..v4() }
}

/// By how much the stack itself shifts the windows of a connection that is opened by a cookie of its own: what a cookie of the
/// program has to promise.
fn stack_scale(host: &Namespace, listener: &TcpListener) -> u8 {
    let address = SocketAddr::from((std::net::Ipv4Addr::LOCALHOST, PORT));
    let _client = host.enter(|| TcpStream::connect(address)).unwrap();
    let (served, _) = listener.accept().unwrap();
    Info::of(&served).unwrap().window_scales.unwrap().1
}

#[test]
fn a_cookie_promises_what_the_listener_and_its_namespace_grant() {
    const RCVBUF: c_int = -1;
    // Settings of the namespace, options of the listener, and what comes of it.
    type Row = (&'static str, &'static [(&'static str, &'static str)], &'static [(c_int, c_int)], Grants);
    let rows: [Row; 13] = [
        ("as it is", &[], &[], GRANTS),
        ("no SACK", &[("tcp_sack", "0")], &[], Grants { sack: false, ..GRANTS }),
        ("no ECN", &[("tcp_ecn", "0")], &[], Grants { ecn: false, ..GRANTS }),
        ("ECN", &[("tcp_ecn", "1")], &[], GRANTS),
        ("small buffers", &[("tcp_rmem", "4096 8192 16384")], &[], Grants { window: 4096, ..GRANTS }),
        ("middling buffers", &[("tcp_rmem", "4096 131072 1000000")], &[], GRANTS),
        ("large buffers", &[("tcp_rmem", "4096 131072 500000000")], &[], GRANTS),
        ("the largest buffers", &[("tcp_rmem", "4096 131072 2147483647")], &[], GRANTS),
        ("its own buffer", &[], &[(RCVBUF, 1_000_000)], GRANTS),
        ("its own small buffer", &[], &[(RCVBUF, 20_000)], Grants { window: 20_000, ..GRANTS }),
        ("its own large buffer", &[("tcp_rmem", "4096 131072 200000")], &[(RCVBUF, 4_000_000)], GRANTS),
        ("a window of at most", &[], &[(libc::TCP_WINDOW_CLAMP, 300_000)], GRANTS),
        ("segments of at most", &[], &[(libc::TCP_MAXSEG, 700)], Grants { max_segment: 700, ..GRANTS }),
    ];
    let is_space_unknown = lacks(Feature::ScalingRatio).unwrap();
    let mut program = program(1);
    for (description, sysctls, options, grants) in rows {
        let host = Namespace::new().unwrap();
        for (name, value) in [("tcp_syncookies", "2"), ("tcp_timestamps", "2")].iter().chain(sysctls) {
            host.set_sysctl(&format!("net/ipv4/{name}"), value).unwrap();
        }
        let address: SocketAddr = (std::net::Ipv6Addr::UNSPECIFIED, PORT).into();
        let listener = listener_of(&host, address, 16, None, |socket| {
            options.iter().try_for_each(|&(option, value)| match option {
                // Past net.core.rmem_max, too.
                RCVBUF => force_receive_buffer(socket, value),
                option => set_tcp_option(socket, option, value),
            })
        })
        .unwrap();
        let of_stack = stack_scale(&host, &listener);
        let mut grants = Grants { timestamps: true, window_scale: Some(of_stack), ..grants };
        // Then the window is that which is meant for everybody, and of a buffer that somebody has set the scale can't be known.
        if is_space_unknown {
            grants.window = GRANTS.window;
            if options.iter().any(|(option, _)| *option == RCVBUF) {
                grants.window_scale = None;
            }
        }
        for (family, question) in [("IPv4", v4()), ("IPv6", v6())] {
            let question = question.with_flags(SYN | 0xc0);
            answered(&host, &mut program, &format!("{description}, {family}, {grants:?}"), &question, &grants);
        }
    }
    // Where it can't be known, no window is scaled.
    let (host, _listener) = host();
    host.set_sysctl("net/ipv4/tcp_timestamps", "2").unwrap();
    let challenge = program.challenge(0).unwrap();
    program.put_challenge(0, Challenge { largest_buffer: 0, ..challenge }).unwrap();
    answered(&host, &mut program, "buffers of nobody knows what size", &v4(), &Grants { timestamps: true, ..GRANTS });
    program.put_challenge(0, challenge).unwrap();
    host.set_sysctl("net/ipv4/tcp_window_scaling", "0").unwrap();
    answered(&host, &mut program, "no window scaling", &v4(), &Grants { timestamps: true, ..GRANTS });
}

fn force_receive_buffer(socket: &Socket, bytes: c_int) -> std::io::Result<()> {
    // SAFETY: the descriptor is open, and the length is that of the value.
    let outcome = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVBUFFORCE,
            (&raw const bytes).cast(),
            u32::try_from(size_of_val(&bytes)).unwrap(),
        )
    };
    if outcome == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

#[test]
fn what_the_stack_has_to_see_to_passes_as_it_is() {
    HOOKS.into_iter().for_each(what_the_stack_has_to_see_to_passes_as_it_is_on);
}

fn what_the_stack_has_to_see_to_passes_as_it_is_on(hook: Hook) {
    let (host, listener) = host();
    let mut program = program_for(hook, 1);
    let pass = |program: &mut Program, description: &str, frame: &[u8]| {
        let (action, out) = host.enter(|| program.run(frame).map(|(action, out)| (action, out.to_vec()))).unwrap();
        assert_eq!((action, &out[..]), (Action::Pass, frame), "{description}");
    };
    pass(&mut program, "a fragment", &Frame { ipv4_fragment: (true, 0), ..v4() }.to_bytes());
    let mut to_many = v4().to_bytes();
    to_many[0] = 1;
    pass(&mut program, "to many", &to_many);
    host.set_sysctl("net/ipv4/tcp_syncookies", "1").unwrap();
    pass(&mut program, "the stack makes no cookies", &v4().to_bytes());
    host.set_sysctl("net/ipv4/tcp_syncookies", "2").unwrap();
    drop(listener);
    pass(&mut program, "nobody listens", &v6().to_bytes());
    assert_eq!(program.counters().unwrap(), [((0, Counter::SynAdmitted), 4)].into());
}

#[test]
fn a_service_is_flooded_from_the_threshold_on_and_for_a_while() {
    let (host, _listener) = host();
    let mut program = program(1_000_000);
    let syn = |program: &mut Program| host.enter(|| program.run(&v4().to_bytes()).map(|(action, _)| action)).unwrap();
    assert_eq!(syn(&mut program), Action::Pass);
    // As many as that within a window that does not end while this test runs.
    let mut challenge = program.challenge(0).unwrap();
    assert_eq!(challenge.syns, 1);
    (challenge.window_ns, challenge.syns) = (now_ns() + 3_600_000_000_000, 999_999);
    program.put_challenge(0, challenge).unwrap();
    let mut actions = Vec::new();
    for _ in 0..2 {
        actions.push(syn(&mut program));
    }
    assert_eq!(actions, [Action::Transmit; 2]);
    assert!(program.challenge(0).unwrap().until_ns > now_ns());
    // Its time is up, and hardly anybody asks any more.
    program.put_challenge(0, Challenge { until_ns: 1, syns: 0, ..challenge }).unwrap();
    assert_eq!(syn(&mut program), Action::Pass);
}

#[test]
fn without_a_threshold_nothing_is_counted() {
    let (host, _listener) = host();
    let mut program = program(0);
    assert_eq!(host.enter(|| program.run(&v4().to_bytes()).map(|(action, _)| action)).unwrap(), Action::Pass);
    assert_eq!((program.challenge(0).unwrap().syns, program.challenge(0).unwrap().until_ns), (0, 0));
}

#[test]
fn a_handshake_whose_source_is_being_removed_is_left_to_the_stack_and_no_full_ledger() {
    HOOKS.into_iter().for_each(a_handshake_whose_source_is_being_removed_is_left_to_the_stack_and_no_full_ledger_on);
}

fn a_handshake_whose_source_is_being_removed_is_left_to_the_stack_and_no_full_ledger_on(hook: Hook) {
    let (host, _listener) = host();
    for question in [v4(), v6()] {
        let mut program = program_for(hook, 1);
        let policy = ServicePolicy {
            ipv4_prefix: 32,
            ipv6_prefix: 64,
            wide_ipv4_prefix: 24,
            wide_ipv6_prefix: 48,
            on_full: OnFull::Closed as u8,
            ..ServicePolicy::default()
        };
        program.set_service(0, PORT, &policy).unwrap();
        let cookie = answered(&host, &mut program, "the SYN", &question, &GRANTS);
        let ack = Frame {
            sequence: question.sequence.wrapping_add(1),
            acknowledgement: cookie.wrapping_add(1),
            flags: ACK,
            tcp_options: Vec::new(),
            ..question.clone()
        }
        .to_bytes();
        let finish = |program: &mut Program| {
            let (action, out) = host.enter(|| program.run(&ack).map(|(action, out)| (action, out.to_vec()))).unwrap();
            // What is refused passes changed.
            assert_eq!((action, &out), (Action::Pass, &ack), "{question:?}");
            program.counters().unwrap()
        };
        let challenged = ((0, Counter::SynChallenged), 1);
        let remote = question.source.ip().into();
        let narrow = SourceKey::new(0, &remote, policy.ipv4_prefix, policy.ipv6_prefix);
        for busy in [narrow, SourceKey::wide(0, &remote, policy.wide_prefix(&remote))] {
            program.set_source(&busy, SOURCE_GONE).unwrap();
            assert_eq!(finish(&mut program), [challenged].into(), "sock_ops is to count it");
            let held: Vec<_> = program.source(&narrow).unwrap().iter().map(|entry| entry.connections).collect();
            assert!(busy == narrow || held.iter().all(|&connections| connections == 0), "{held:?}");
            assert_eq!(program.state(0).unwrap().connections, 0);
            program.set_source(&busy, 0).unwrap();
        }
        // It was nothing else that kept it out.
        assert_eq!(finish(&mut program), [challenged, ((0, Counter::OpenedReserved), 1)].into());
        assert_eq!(program.source(&narrow).unwrap().map(|entry| entry.connections), Some(1));
    }
}
