//! SYN cookies of the XDP program, byte by byte; with listeners of its own, since the kernel makes the cookie for them.
#![expect(clippy::unwrap_used, reason = "the helpers of tests, which clippy takes for more than that")]

use std::net::{SocketAddr, TcpListener};

use limiter_common::{Counter, ServicePolicy, challenge::Challenge};
use limiter_tests::{
    frame::{CLIENT_MAC, Extension, Frame, SERVER_MAC},
    netns::Namespace,
    program::{Action, Program, now_ns},
    segment::{
        checksum,
        flags::{ACK, SYN},
    },
};

const PORT: u16 = 8080;

fn v4() -> Frame {
    let frame = Frame::syn("192.0.2.7:40000".parse().unwrap(), "192.0.2.1:8080".parse().unwrap());
    Frame { tcp_options: options(), ..frame }
}

fn v6() -> Frame {
    let frame = Frame::syn("[2001:db8::7]:40000".parse().unwrap(), "[2001:db8::1]:8080".parse().unwrap());
    Frame { tcp_options: options(), ..frame }
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
    let mut program = Program::load().unwrap();
    let policy = ServicePolicy { ipv4_prefix: 32, ipv6_prefix: 64, ..ServicePolicy::default() };
    program.set_service(0, PORT, &policy).unwrap();
    program.set_challenge(0, threshold).unwrap();
    program
}

/// That an answer to a frame is a right SYN-ACK. Returns the cookie.
fn check(description: &str, question: &Frame, answer: &[u8], mss: Option<u16>) -> u32 {
    let tags = 4 * question.vlan_tags.len();
    let network_at = 14 + tags;
    assert_eq!(answer[..6], CLIENT_MAC, "{description}");
    assert_eq!(answer[6..12], SERVER_MAC, "{description}");
    assert_eq!(answer[12..network_at], question.to_bytes()[12..network_at], "{description}: tags");
    let tcp_length: u8 = if mss.is_some() { 24 } else { 20 };
    let (tcp_at, pseudo) = if question.source.is_ipv4() {
        let header = &answer[network_at..network_at + 20];
        let expected = [0x45, 0, 0, 20 + tcp_length, 0, 0, 0x40, 0, 64, 6];
        assert_eq!(header[..10], expected, "{description}");
        assert_eq!(checksum(&[header]), 0, "{description}: the network header's checksum");
        assert_eq!(header[12..], [192, 0, 2, 1, 192, 0, 2, 7], "{description}");
        (network_at + 20, header[12..].to_vec())
    } else {
        let header = &answer[network_at..network_at + 40];
        assert_eq!(header[..8], [0x60, 0, 0, 0, 0, tcp_length, 6, 64], "{description}");
        assert_eq!((header[23], header[39]), (1, 7), "{description}");
        (network_at + 40, header[8..].to_vec())
    };
    let tcp = &answer[tcp_at..tcp_at + usize::from(tcp_length)];
    assert_eq!(checksum(&[&pseudo[..], &[0, 6, 0, tcp_length], tcp]), 0, "{description}: the checksum");
    assert_eq!(tcp[..4], [0x1f, 0x90, 0x9c, 0x40], "{description}: ports");
    assert_eq!(tcp[8..12], question.sequence.wrapping_add(1).to_be_bytes(), "{description}: acknowledgement");
    assert_eq!((tcp[12] >> 4) * 4, tcp_length, "{description}");
    assert_eq!((tcp[13], &tcp[14..16], &tcp[18..20]), (SYN | ACK, &[0x80, 0][..], &[0, 0][..]), "{description}");
    if let Some(mss) = mss {
        assert_eq!(tcp[20..], [&[2, 4][..], &mss.to_be_bytes()].concat(), "{description}: the largest segment");
    }
    let end = tcp_at + tcp.len();
    assert!(answer[end..].iter().all(|byte| *byte == 0), "{description}: padding");
    assert_eq!(answer.len(), end.max(question.to_bytes().len().min(60)), "{description}: length");
    u32::from_be_bytes(tcp[4..8].try_into().unwrap())
}

#[test]
fn a_syn_is_answered_by_a_cookie_byte_by_byte() {
    let (host, _listener) = host();
    let mut program = program(1);
    // A loopback device takes 65536 bytes.
    let (mss_v4, mss_v6) = (Some(65_496), Some(65_476));
    let tagged = vec![0x88a8, 0x8100];
    let rows = [
        ("IPv4", v4(), mss_v4),
        ("IPv6", v6(), mss_v6),
        ("IPv4, the last sequence number", Frame { sequence: u32::MAX, ..v4() }, mss_v4),
        ("IPv4, only the MSS", Frame { tcp_options: vec![2, 4, 5, 0xb4], ..v4() }, mss_v4),
        ("IPv4, forty bytes of options", Frame { tcp_options: [options(), vec![1; 20]].concat(), ..v4() }, mss_v4),
        (
            "IPv4, no options, and so no room for the MSS",
            Frame { tcp_options: Vec::new(), payload: vec![0; 2], ..v4() },
            None,
        ),
        ("IPv4, with data, which is not taken", Frame { payload: vec![7; 100], ..v4() }, mss_v4),
        ("IPv4, two VLAN tags", Frame { vlan_tags: tagged.clone(), ..v4() }, mss_v4),
        ("IPv4, with options of its own", Frame { ipv4_option_words: 10, ..v4() }, mss_v4),
        ("IPv6, two VLAN tags", Frame { vlan_tags: tagged, ..v6() }, mss_v6),
        ("IPv6, behind an extension header", Frame { extensions: vec![Extension::Plain(60, 1)], ..v6() }, mss_v6),
    ];
    let mut cookies = Vec::new();
    host.enter(|| {
        for (description, question, mss) in &rows {
            let bytes = question.to_bytes();
            let (action, answer) = program.run(&bytes).unwrap();
            assert_eq!(action, Action::Transmit, "{description}");
            if description.contains("no options") {
                assert!(answer.len() <= bytes.len().max(60));
                continue;
            }
            cookies.push(check(description, question, answer, *mss));
        }
    });
    let count = rows.len() as u64;
    assert_eq!(program.counters().unwrap(), [((0, Counter::SynChallenged), count)].into());
    assert_ne!(cookies[0], cookies[1]);
    assert_eq!(cookies[0], cookies[6], "the same question");
}

#[test]
fn what_the_stack_has_to_see_to_passes_as_it_is() {
    let (host, listener) = host();
    let mut program = program(1);
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
    assert_eq!(program.challenge(0).unwrap(), Challenge::default());
}
