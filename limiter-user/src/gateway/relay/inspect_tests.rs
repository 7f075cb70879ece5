//! The inspector against tungstenite, which decodes everything: what the one accepts, refuses and delivers, the other
//! accepts, refuses and passes on, however the bytes are cut.

use std::io::{self, Cursor, Read, Write};

use proptest::prelude::*;
use tokio::time::Instant;
use tokio_tungstenite::tungstenite::{
    Error, Message, WebSocket,
    error::ProtocolError,
    protocol::{Role, WebSocketConfig, frame::coding::CloseCode},
};

use super::{
    super::messages::Violation,
    header::Sender,
    inspect::{Inspector, Judge, PING_PAYLOAD, Stop, Verdict, Whole},
};

/// Small enough that random messages are over it now and then.
const MAX_SIZE: u64 = 300;

/// A limit on size alone, as tungstenite has it; and messages that are to be left out, by their number.
#[derive(Default)]
struct Limit {
    leave_out: Vec<usize>,
    begun: usize,
    counted: Vec<u64>,
    /// Whether texts are to be whole, and what becomes of them.
    screens: Option<fn(&str) -> Whole>,
}

impl Judge for Limit {
    fn begins(&mut self, _: bool, length: u64, _: Instant) -> Verdict {
        self.begun += 1;
        if length > MAX_SIZE {
            Verdict::Close(Violation::TooBig)
        } else if self.leave_out.contains(&(self.begun - 1)) {
            Verdict::Drop
        } else {
            Verdict::Pass
        }
    }

    fn goes_on(&mut self, _: u64, total: u64, _: u32, _: Instant) -> Result<(), Violation> {
        if total > MAX_SIZE { Err(Violation::TooBig) } else { Ok(()) }
    }

    fn screens(&self) -> bool {
        self.screens.is_some()
    }

    fn whole(&mut self, text: &str) -> Whole {
        self.screens.map_or(Whole::Pass, |screen| screen(text))
    }

    fn passed(&mut self, total: u64, _: Instant) {
        self.counted.push(total);
    }

    fn control(&mut self, _: Instant) -> Result<(), Violation> {
        Ok(())
    }
}

/// What a look at all the bytes comes to.
#[derive(Debug)]
struct Looked {
    passed: Vec<u8>,
    stop: Option<Stop>,
    unfinished: u64,
    /// Every place in `passed` that was given as lying between two frames.
    boundaries: Vec<usize>,
}

/// Hands over the bytes in pieces of those lengths, and the rest in one.
fn look(sender: Sender, bytes: &[u8], cuts: &[usize], judge: &mut Limit) -> Looked {
    let mut inspector = Inspector::new(sender);
    let mut looked = Looked { passed: Vec::new(), stop: None, unfinished: 0, boundaries: Vec::new() };
    let mut rest = bytes;
    let mut carried = Vec::new();
    let mut cuts = cuts.iter().copied().chain([usize::MAX]);
    while let (false, Some(cut)) = (rest.is_empty(), cuts.next()) {
        let (now, later) = rest.split_at(cut.min(rest.len()));
        rest = later;
        let mut buffer = [&carried, now].concat();
        let seen = inspector.look(&mut buffer, judge, Instant::now());
        looked.boundaries.extend(seen.boundary.map(|at| looked.passed.len() + at));
        looked.passed.extend_from_slice(seen.bytes(&buffer));
        looked.unfinished = inspector.unfinished();
        if seen.stop.is_some() {
            looked.stop = seen.stop;
            return looked;
        }
        carried = buffer[seen.consumed..].to_vec();
        assert!(carried.len() < 139, "{} bytes wait, more than any header or control frame", carried.len());
    }
    looked
}

/// A connection that brings those bytes and takes what is written.
struct Wire(Cursor<Vec<u8>>);

impl Read for Wire {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Wire {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How a reader that decodes everything takes it: the messages, and why there are no more.
fn decode(sender: Sender, bytes: &[u8]) -> (Vec<Message>, Option<Error>) {
    let role = if sender == Sender::Client { Role::Server } else { Role::Client };
    let max = Some(usize::try_from(MAX_SIZE).unwrap());
    let config = WebSocketConfig::default().max_message_size(max).max_frame_size(max);
    let mut socket = WebSocket::from_raw_socket(Wire(Cursor::new(bytes.to_vec())), role, Some(config));
    let mut messages = Vec::new();
    loop {
        match socket.read() {
            Ok(message @ Message::Close(_)) => {
                messages.push(message);
                return (messages, None);
            }
            Ok(message) => messages.push(message),
            Err(error) => return (messages, Some(error)),
        }
    }
}

/// A frame as somebody might send it.
#[derive(Clone, Debug)]
struct Frame {
    first: u8,
    masked: bool,
    mask: [u8; 4],
    payload: Vec<u8>,
}

impl Frame {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![self.first];
        let bit = if self.masked { 0x80 } else { 0 };
        match self.payload.len() {
            length @ 0..=125 => bytes.push(bit | u8::try_from(length).unwrap()),
            length => {
                bytes.push(bit | 0x7e);
                bytes.extend_from_slice(&u16::try_from(length).unwrap().to_be_bytes());
            }
        }
        if self.masked {
            bytes.extend_from_slice(&self.mask);
            bytes.extend(self.payload.iter().zip(self.mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
        } else {
            bytes.extend_from_slice(&self.payload);
        }
        bytes
    }
}

fn payload() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        4 => "[ -~]{0,60}".prop_map(String::into_bytes),
        2 => "\\PC{0,40}".prop_map(String::into_bytes),
        // Half a character, and its other half.
        1 => Just(vec![b'a', 0xe2, 0x82]),
        1 => Just(vec![0xac, b'b']),
        1 => proptest::collection::vec(any::<u8>(), 0..320),
    ]
}

fn close_payload() -> impl Strategy<Value = Vec<u8>> {
    let code = prop_oneof![
        6 => prop_oneof![Just(1000u16), Just(1001), Just(1003), Just(1007), Just(1011), 3000..5000u16],
        1 => prop_oneof![Just(0u16), Just(999), Just(1004), Just(1005), Just(1006), Just(1015), 1016..3000u16, 5000u16..],
    ];
    prop_oneof![
        1 => Just(Vec::new()),
        1 => Just(vec![3]),
        6 => (code, payload().prop_map(|mut reason| { reason.truncate(100); reason }))
            .prop_map(|(code, reason)| [&code.to_be_bytes()[..], &reason].concat()),
    ]
}

/// Mostly what a sane peer sends; `stray` frames break a rule more often than not.
fn frame(sender: Sender) -> impl Strategy<Value = Frame> {
    let masked = sender == Sender::Client;
    let sane = prop_oneof![
        6 => (prop_oneof![Just(0x81u8), Just(0x82)], payload()),
        3 => (prop_oneof![Just(0x01u8), Just(0x02), Just(0x00), Just(0x80)], payload()),
        2 => (prop_oneof![Just(0x89u8), Just(0x8a)], payload().prop_map(|mut p| { p.truncate(125); p })),
        1 => Just((0x8au8, PING_PAYLOAD.to_vec())),
        1 => (Just(0x88u8), close_payload()),
    ];
    let stray = (any::<u8>(), payload());
    (prop_oneof![40 => sane, 1 => stray], any::<[u8; 4]>(), prop::bool::weighted(0.98))
        .prop_map(move |((first, payload), mask, right)| Frame { first, masked: masked == right, mask, payload })
}

/// A sequence of frames, in which most continuations continue something.
fn frames(sender: Sender) -> impl Strategy<Value = Vec<Frame>> {
    (proptest::collection::vec(frame(sender), 1..12), prop::bool::weighted(0.9)).prop_map(|(mut frames, mend)| {
        let mut open = false;
        for frame in frames.iter_mut().filter(|frame| mend && frame.first & 0x78 == 0) {
            let (fin, opcode) = (frame.first & 0x80, frame.first & 0x0f);
            frame.first = fin | if open { 0 } else { opcode.max(1) };
            open = fin == 0;
        }
        frames
    })
}

/// What is between sender and receiver must not change what arrives.
fn agrees(sender: Sender, frames: &[Frame], cuts: &[usize], cut_off: usize) -> Result<(), TestCaseError> {
    let mut bytes: Vec<u8> = frames.iter().flat_map(Frame::bytes).collect();
    bytes.truncate(bytes.len().saturating_sub(cut_off));
    let mut judge = Limit::default();
    let looked = look(sender, &bytes, cuts, &mut judge);
    let (mut sent, error) = decode(sender, &bytes);
    let (arrived, _) = decode(sender, &looked.passed);

    if sender == Sender::Client {
        sent.retain(|message| *message != Message::Pong(PING_PAYLOAD.to_vec().into()));
    }
    let is_bad_close = matches!(&looked.stop, Some(Stop::Malformed(..)))
        && matches!(sent.last(), Some(Message::Close(_)))
        && error.is_none();
    if is_bad_close {
        // The library answers a code out of range with 1002 itself, and still hands the frame over.
        sent.pop();
    }
    prop_assert_eq!(&arrived, &sent, "{:?}", looked);
    match (&looked.stop, &error) {
        (Some(Stop::Close(frame)), None) => prop_assert_eq!(sent.last(), Some(&Message::Close(frame.clone()))),
        // A frame that is too long and breaks the protocol as well: which of the two is said first is a matter of taste.
        (
            Some(Stop::Violation(Violation::TooBig) | Stop::Malformed(CloseCode::Protocol, _)),
            Some(Error::Capacity(_)),
        )
        | (Some(Stop::Malformed(CloseCode::Invalid, _)), Some(Error::Utf8(_))) => {}
        (Some(Stop::Malformed(CloseCode::Protocol, _)), Some(Error::Protocol(problem)))
            if *problem != ProtocolError::ResetWithoutClosingHandshake => {}
        (Some(Stop::Malformed(CloseCode::Protocol, _)), None) if is_bad_close => {}
        (None, Some(Error::Protocol(ProtocolError::ResetWithoutClosingHandshake))) => {
            prop_assert!(bytes.starts_with(&looked.passed) || sender == Sender::Client);
        }
        // The library waits for the end of a frame, where we see what is wrong with its beginning.
        (
            Some(Stop::Malformed(..) | Stop::Violation(_)),
            Some(Error::Protocol(ProtocolError::ResetWithoutClosingHandshake)),
        ) if cut_off > 0 => {}
        _ => prop_assert!(false, "{:?} where the library has {:?}", looked, error),
    }

    // A Close frame of ours could be put at each of these places, and would be found there.
    for at in looked.boundaries {
        let close = super::close_frame(None, sender);
        let (_, ends) = decode(sender, &[&looked.passed[..at], &close[..]].concat());
        prop_assert!(ends.is_none(), "no frame ends at {at} of {:?}: {ends:?}", looked.passed);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn what_a_client_sends_is_taken_as_a_full_decoder_takes_it(
        frames in frames(Sender::Client),
        cuts in proptest::collection::vec(0..50usize, 0..20),
        cut_off in prop_oneof![3 => Just(0usize), 1 => 0..40usize],
    ) {
        agrees(Sender::Client, &frames, &cuts, cut_off)?;
    }

    #[test]
    fn what_a_server_sends_is_taken_as_a_full_decoder_takes_it(
        frames in frames(Sender::Server),
        cuts in proptest::collection::vec(0..50usize, 0..20),
        cut_off in prop_oneof![3 => Just(0usize), 1 => 0..40usize],
    ) {
        agrees(Sender::Server, &frames, &cuts, cut_off)?;
    }

    #[test]
    fn every_cut_gives_the_same(
        frames in frames(Sender::Client),
        cuts in proptest::collection::vec(0..9usize, 0..200),
    ) {
        let bytes: Vec<u8> = frames.iter().flat_map(Frame::bytes).collect();
        let whole = look(Sender::Client, &bytes, &[], &mut Limit::default());
        let cut = look(Sender::Client, &bytes, &cuts, &mut Limit::default());
        prop_assert_eq!(&whole.stop, &cut.stop);
        // Of text that turns out to be none, more may have passed before that was seen.
        if whole.stop.as_ref().is_none_or(|stop| !matches!(stop, Stop::Malformed(CloseCode::Invalid, _))) {
            prop_assert_eq!(whole.passed, cut.passed);
        } else {
            prop_assert!(cut.passed.starts_with(&whole.passed));
        }
    }

    #[test]
    fn what_is_left_out_is_missing_whole_and_nothing_else_is(
        sizes in proptest::collection::vec((0..200usize, 1..4usize, any::<bool>()), 1..12),
        leave_out in proptest::collection::vec(0..12usize, 0..6),
        cuts in proptest::collection::vec(0..50usize, 0..20),
    ) {
        // Messages of so many fragments, with a ping inside some of them.
        let mut bytes = Vec::new();
        for (n, (size, parts, ping)) in sizes.iter().enumerate() {
            let payload = vec![u8::try_from(n).unwrap(); *size];
            let each = size.div_ceil(*parts).max(1);
            let mut chunks: Vec<&[u8]> = payload.chunks(each).collect();
            if chunks.is_empty() {
                chunks.push(&[]);
            }
            for (i, chunk) in chunks.iter().enumerate() {
                let fin = if i + 1 == chunks.len() { 0x80 } else { 0 };
                let first = fin | if i == 0 { 2 } else { 0 };
                let frame = Frame { first, masked: true, mask: [7, 1, 3, 9], payload: chunk.to_vec() };
                bytes.extend(frame.bytes());
                if *ping {
                    bytes.extend(Frame { first: 0x89, payload: vec![b'p'], ..frame }.bytes());
                }
            }
        }
        let mut judge = Limit { leave_out: leave_out.clone(), ..Limit::default() };
        let looked = look(Sender::Client, &bytes, &cuts, &mut judge);
        prop_assert_eq!(looked.stop, None);
        let (all, _) = decode(Sender::Client, &bytes);
        let (arrived, _) = decode(Sender::Client, &looked.passed);
        let mut number = 0;
        let expected: Vec<Message> = all
            .into_iter()
            .filter(|message| {
                if message.is_ping() {
                    return true;
                }
                number += 1;
                !leave_out.contains(&(number - 1))
            })
            .collect();
        let sizes: Vec<u64> = expected.iter().filter(|m| !m.is_ping()).map(|m| m.len() as u64).collect();
        prop_assert_eq!(arrived, expected);
        prop_assert_eq!(judge.counted, sizes);
    }

    #[test]
    fn texts_that_are_looked_at_whole_pass_as_they_came_and_control_frames_go_before(
        frames in frames(Sender::Client),
        cuts in proptest::collection::vec(0..50usize, 0..20),
    ) {
        let bytes: Vec<u8> = frames.iter().flat_map(Frame::bytes).collect();
        let streamed = look(Sender::Client, &bytes, &cuts, &mut Limit::default());
        let mut judge = Limit { screens: Some(|_| Whole::Pass), ..Limit::default() };
        let whole = look(Sender::Client, &bytes, &cuts, &mut judge);
        prop_assert_eq!(&whole.stop, &streamed.stop);
        let (all, _) = decode(Sender::Client, &streamed.passed);
        let (arrived, broken) = decode(Sender::Client, &whole.passed);
        for control in [false, true] {
            let of = |messages: &[Message]| -> Vec<Message> {
                let is = |message: &&Message| (message.is_text() || message.is_binary()) != control;
                messages.iter().filter(is).cloned().collect()
            };
            prop_assert_eq!(of(&arrived), of(&all));
        }
        // A text of which only a part has come has not begun to pass.
        prop_assert!(!matches!(broken, Some(Error::Utf8(_))));
        if whole.stop.is_none() && !frames.iter().any(|frame| frame.first & 0x08 != 0) {
            prop_assert!(bytes.starts_with(&whole.passed));
        }
        for at in whole.boundaries {
            let close = super::close_frame(None, Sender::Client);
            let (_, ends) = decode(Sender::Client, &[&whole.passed[..at], &close[..]].concat());
            prop_assert!(ends.is_none(), "no frame ends at {at}: {ends:?}");
        }
    }

    #[test]
    fn what_takes_the_place_of_a_text_is_one_frame(
        lengths in proptest::collection::vec(prop_oneof![0..200usize, 0..70_000usize], 1..4),
        cuts in proptest::collection::vec(0..5000usize, 0..20),
    ) {
        let max = Some(usize::MAX);
        for length in lengths {
            let sent = Frame { first: 0x01, masked: true, mask: [5, 6, 7, 8], payload: length.to_string().into_bytes() };
            let end = Frame { first: 0x80, payload: Vec::new(), ..sent.clone() };
            let mut judge = Limit {
                screens: Some(|length| Whole::Instead("x".repeat(length.parse().unwrap()))),
                ..Limit::default()
            };
            let looked = look(Sender::Client, &[sent.bytes(), end.bytes()].concat(), &cuts, &mut judge);
            prop_assert_eq!(looked.passed[0], 0x81);
            let config = WebSocketConfig::default().max_message_size(max).max_frame_size(max);
            let mut socket = WebSocket::from_raw_socket(Wire(Cursor::new(looked.passed)), Role::Server, Some(config));
            prop_assert_eq!(socket.read().unwrap(), Message::text("x".repeat(length)));
        }
    }

    #[test]
    fn no_bytes_make_it_panic_or_hold_more_than_a_control_frame(
        bytes in proptest::collection::vec(any::<u8>(), 0..400),
        cuts in proptest::collection::vec(0..20usize, 0..40),
        from_client in any::<bool>(),
    ) {
        let sender = if from_client { Sender::Client } else { Sender::Server };
        let looked = look(sender, &bytes, &cuts, &mut Limit::default());
        prop_assert!(looked.passed.len() <= bytes.len());
    }
}

#[test]
fn text_that_breaks_in_its_first_piece_leaves_room_for_a_close_frame() {
    let bytes = Frame { first: 0x81, masked: true, mask: [1, 2, 3, 4], payload: vec![b'a', 0xff] }.bytes();
    let looked = look(Sender::Client, &bytes, &[], &mut Limit::default());
    assert_eq!((looked.passed, looked.unfinished), (Vec::new(), 0));

    // Of this one, the upstream has a part already.
    let looked = look(Sender::Client, &bytes, &[7], &mut Limit::default());
    assert_eq!((looked.passed.len(), looked.unfinished), (7, 1));
}

#[test]
fn a_length_that_no_frame_may_have_is_too_big_also_in_pieces() {
    for first in [0x82u8, 0x02] {
        let whole = [&[first, 0xff][..], &(1u64 << 63).to_be_bytes(), &[0; 4]].concat();
        let looked = look(Sender::Client, &whole, &[], &mut Limit::default());
        assert_eq!(looked.stop, Some(Stop::Violation(Violation::TooBig)));
    }
    // Two that add up to more than a number can hold.
    let begin = Frame { first: 0x02, masked: true, mask: [0; 4], payload: vec![0; 200] }.bytes();
    let rest = [&[0x80, 0xff][..], &u64::MAX.to_be_bytes(), &[0; 4]].concat();
    let looked = look(Sender::Client, &[begin, rest].concat(), &[], &mut Limit::default());
    assert_eq!(looked.stop, Some(Stop::Violation(Violation::TooBig)));
}

#[test]
fn texts_that_are_left_out_or_close_leave_the_others_as_they_are() {
    let text = |text: &str| Frame { first: 0x81, masked: true, mask: [9; 4], payload: text.into() }.bytes();
    let bytes = [text("a"), text("drop"), text("b"), text("close"), text("c")].concat();
    let mut judge = Limit {
        screens: Some(|text| match text {
            "drop" => Whole::Drop,
            "close" => Whole::Close(Violation::Unfit),
            _ => Whole::Pass,
        }),
        ..Limit::default()
    };
    let looked = look(Sender::Client, &bytes, &[1, 2, 3], &mut judge);
    assert_eq!(looked.passed, [text("a"), text("b")].concat());
    assert_eq!((looked.stop, looked.unfinished), (Some(Stop::Violation(Violation::Unfit)), 0));
    assert_eq!(judge.counted, [1, 1]);
}
