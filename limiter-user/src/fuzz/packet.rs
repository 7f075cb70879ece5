//! The model of what the kernel programs make of a packet. The programs themselves are compared with it.

use limiter_common::model::{Frame, Segment};

/// A VLAN tag, priority and number at zero.
const TAG: [u8; 4] = [0x81, 0, 0, 0];

/// Longest header of TCP.
const LONGEST_TCP: usize = 60;

/// A segment lies in its frame, and a tag before it or padding behind changes nothing.
pub fn packet(frame: &[u8]) {
    let parsed = Frame::parse(frame);
    let Frame::Segment(segment) = parsed else { return };
    let Segment { network_at, tcp_at, fast_open, remote, local, acknowledgement, .. } = segment;
    assert!((14..tcp_at).contains(&network_at), "{segment:?}");
    let tcp = &frame[tcp_at..];
    assert!(tcp.len() >= 20, "{segment:?}");
    assert_eq!(tcp[..2], remote.port().to_be_bytes());
    assert_eq!(tcp[2..4], local.port().to_be_bytes());
    assert_eq!(tcp[8..12], acknowledgement.to_be_bytes());
    assert_eq!(tcp[13], segment.flags);
    if let Some(option) = fast_open {
        assert_eq!(option.tcp, tcp_at);
        assert!((tcp_at + 20..tcp_at + LONGEST_TCP).contains(&option.option), "{segment:?}");
        assert!(option.option + 2 <= frame.len(), "{segment:?}");
    }
    assert!(!(segment.asks() && segment.continues()));

    // Of a header that goes on behind the end of the frame, more would be read.
    if tcp.len() >= LONGEST_TCP {
        assert_eq!(Frame::parse(&[frame, &[0; 8]].concat()), parsed);
    }
    let (addresses, rest) = frame.split_at(12);
    let tagged = Frame::parse(&[addresses, &TAG, rest].concat());
    let moved = Segment {
        network_at: network_at + TAG.len(),
        tcp_at: tcp_at + TAG.len(),
        fast_open: fast_open.map(|mut option| {
            option.option += TAG.len();
            option.tcp += TAG.len();
            option
        }),
        ..segment
    };
    // With more tags than are looked behind, nobody can know.
    assert!(matches!(tagged, Frame::Hidden(None)) || tagged == Frame::Segment(moved), "{tagged:?}");
}
