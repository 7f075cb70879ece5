//! Frames of a server, made once for everybody who gets them.

use bytes::Bytes;

/// Longest header of a server's frame: it has no mask.
pub(in crate::gateway) const LONGEST_HEADER: usize = 10;

/// What a whole message is, or a control frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::gateway) enum Kind {
    Text,
    Binary,
    Pong,
}

/// The frame that is all of a message.
pub(in crate::gateway) fn frame(kind: Kind, payload: &[u8]) -> Bytes {
    let (header, from) = header(kind, payload.len());
    [&header[from..], payload].concat().into()
}

/// The header of such a frame, as the end of what is returned, and where in that it begins. So it can be put right in front of a
/// payload for which that much room was left.
pub(in crate::gateway) fn header(kind: Kind, length: usize) -> ([u8; LONGEST_HEADER], usize) {
    let first = match kind {
        Kind::Text => 0x81,
        Kind::Binary => 0x82,
        Kind::Pong => 0x8a,
    };
    let mut header = [0; LONGEST_HEADER];
    let from = match length {
        ..126 => LONGEST_HEADER - 2,
        126..0x1_0000 => LONGEST_HEADER - 4,
        _ => 0,
    };
    let [opcode, short, long @ ..] = &mut header[from..] else { unreachable!("a header has two bytes at least") };
    *opcode = first;
    #[expect(clippy::cast_possible_truncation, reason = "each arm is for lengths that fit")]
    match long.len() {
        0 => *short = length as u8,
        2 => {
            *short = 126;
            long.copy_from_slice(&(length as u16).to_be_bytes());
        }
        _ => {
            *short = 127;
            long.copy_from_slice(&(length as u64).to_be_bytes());
        }
    }
    (header, from)
}

/// Length of the payload of such a frame.
pub(super) fn payload_length(frame: &[u8]) -> usize {
    let header = match frame.get(1) {
        Some(126) => 4,
        Some(127) => LONGEST_HEADER,
        _ => 2,
    };
    frame.len().saturating_sub(header)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gateway::relay::{Header, Opcode, Sender};

    #[test]
    fn a_frame_is_read_as_what_it_was_made_of() {
        for length in [0, 1, 125, 126, 127, 0xffff, 0x1_0000, 100_000] {
            let payload = vec![7; length];
            let made = frame(Kind::Binary, &payload);
            let header = Header::parse(&made, Sender::Server).unwrap().unwrap();
            assert_eq!((header.fin, header.opcode, header.payload), (true, Opcode::Binary, length as u64));
            assert_eq!(&made[header.length..], payload);
            assert_eq!(payload_length(&made), length);
        }
        assert_eq!(frame(Kind::Text, b"a")[..], [0x81, 1, b'a']);
        assert_eq!(frame(Kind::Pong, b"")[..], [0x8a, 0]);
    }
}
