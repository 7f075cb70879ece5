//! What one side sends, looked at on its way to the other: headers alone, but for text, whose UTF-8 is checked, and
//! control frames.
//!
//! No I/O here. Bytes come in as they were read, in any pieces, and what may pass is at the front of the buffer after.

use tokio::time::Instant;
use tokio_tungstenite::tungstenite::{
    Utf8Bytes,
    protocol::{CloseFrame, frame::coding::CloseCode},
};

use super::{
    super::messages::Violation,
    header::{CONTROL_MAX, Header, Opcode, Sender},
    utf8::Utf8,
};

/// What the gateway's own pings carry, so that their answers can be told from those to the application's.
pub(super) const PING_PAYLOAD: &[u8; 7] = b"limiter";

/// What a message may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::gateway) enum Verdict {
    Pass,
    /// It is left out, whole, and nobody is told.
    Drop,
    /// The connection is closed for it.
    Close(Violation),
}

/// What a whole message may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::gateway) enum Whole {
    Pass,
    /// This text passes in its place.
    Instead(String),
    /// It is left out, and nobody is told.
    Drop,
    /// The connection is closed for it.
    Close(Violation),
}

/// Who says what may pass. `now` is when the bytes were read.
pub(in crate::gateway) trait Judge {
    /// A message begins, with a frame of `length` bytes.
    fn begins(&mut self, is_text: bool, length: u64, now: Instant) -> Verdict;

    /// A message goes on, with its frame number `fragments` (the first is 1), which makes `total` bytes with those before.
    fn goes_on(&mut self, length: u64, total: u64, fragments: u32, now: Instant) -> Result<(), Violation>;

    /// A message of `total` bytes has passed whole.
    fn passed(&mut self, total: u64, now: Instant);

    /// Whether text is to be looked at whole before any of it passes. Control frames that come inside of it pass at once.
    fn screens(&self) -> bool {
        false
    }

    /// A text is there whole. It has passed every other rule.
    fn whole(&mut self, text: &str) -> Whole {
        let _ = text;
        Whole::Pass
    }

    /// A ping or pong came.
    fn control(&mut self, now: Instant) -> Result<(), Violation>;
}

/// Why nothing more is looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::gateway) enum Stop {
    /// A Close frame, which is the last of what passes.
    Close(Option<CloseFrame>),
    /// The protocol is broken: with what the other side of it is told.
    Malformed(CloseCode, &'static str),
    /// A limit is.
    Violation(Violation),
}

/// What came of the bytes.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::gateway) struct Seen {
    /// So many bytes at the front of the buffer may pass.
    pub(super) passed: usize,
    /// The last place in them where one frame has ended and the next has not begun.
    pub(super) boundary: Option<usize>,
    /// The last place in them where no message has begun that has not ended.
    pub(super) gap: Option<usize>,
    /// So many of the bytes that came are done with. The others begin a header or a control frame, and must come again
    /// with more behind them.
    pub(in crate::gateway) consumed: usize,
    /// What may pass, where the buffer has no room for it: where whole messages are looked at.
    spill: Option<Vec<u8>>,
    pub(in crate::gateway) stop: Option<Stop>,
}

impl Seen {
    /// What may pass of the `buffer` that was looked at, or has come earlier.
    pub(in crate::gateway) fn bytes<'a>(&'a self, buffer: &'a [u8]) -> &'a [u8] {
        match &self.spill {
            Some(spill) => spill,
            None => &buffer[..self.passed],
        }
    }
}

/// Where in what one side sends we are.
#[derive(Debug)]
pub(in crate::gateway) struct Inspector {
    /// The message, where it is to be looked at whole before it passes.
    held: Option<Box<Held>>,
    /// Bytes that are still to come of the frame's payload.
    left: u64,
    /// Length of the message so far, with the whole of the frame that has begun.
    total: u64,
    /// Frames of the message so far; 0: no message has begun.
    fragments: u32,
    /// Of the next byte of the payload.
    mask: [u8; 4],
    utf8: Utf8,
    sender: Sender,
    is_text: bool,
    /// Whether the message is left out.
    dropped: bool,
    /// Whether the frame ends its message.
    fin: bool,
}

/// A text that is not there whole, as its frames came.
#[derive(Debug, Default)]
struct Held {
    frames: Vec<u8>,
}

impl Held {
    /// What the frames carry, when they are there whole.
    fn text(&self) -> Option<String> {
        let mut text = Vec::with_capacity(self.frames.len());
        let mut rest = self.frames.as_slice();
        while let Ok(Some(header)) = Header::parse(rest, Sender::Client) {
            let end = header.length + usize::try_from(header.payload).ok()?;
            let payload = rest.get(header.length..end)?;
            text.extend(payload.iter().zip(header.mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
            rest = &rest[end..];
        }
        String::from_utf8(text).ok()
    }
}

/// How a look at the next piece ends.
enum Next {
    /// There is another.
    More,
    /// More bytes are needed.
    Wait,
}

/// A buffer that is read at one place and closed up at another.
struct Cursor<'a> {
    buffer: &'a mut [u8],
    read: usize,
    written: usize,
    /// What is written goes here, if it is there, and not to the front of the buffer.
    spill: Option<Vec<u8>>,
    boundary: Option<usize>,
    gap: Option<usize>,
}

impl Cursor<'_> {
    fn rest(&self) -> &[u8] {
        &self.buffer[self.read..]
    }

    fn skip(&mut self, length: usize) {
        self.read += length;
    }

    fn pass(&mut self, length: usize) {
        if let Some(spill) = &mut self.spill {
            spill.extend_from_slice(&self.buffer[self.read..self.read + length]);
        } else if self.written != self.read {
            self.buffer.copy_within(self.read..self.read + length, self.written);
        }
        self.read += length;
        self.written += length;
    }

    /// Has something pass that is not in the buffer.
    fn put(&mut self, bytes: &[u8]) {
        if let Some(spill) = &mut self.spill {
            spill.extend_from_slice(bytes);
            self.written += bytes.len();
        }
    }
}

impl Inspector {
    pub(in crate::gateway) fn new(sender: Sender) -> Self {
        Self {
            held: None,
            left: 0,
            total: 0,
            fragments: 0,
            mask: [0; 4],
            utf8: Utf8::default(),
            sender,
            is_text: false,
            dropped: false,
            fin: true,
        }
    }

    /// How many bytes are still to come of a frame that has passed in part; 0: another frame may be put in here.
    pub(super) fn unfinished(&self) -> u64 {
        if self.dropped || self.held.is_some() { 0 } else { self.left }
    }

    /// Whether no message has begun that has not ended. Only then may another message be put in: one is never inside another
    /// (RFC 6455, 5.4).
    pub(super) fn between_messages(&self) -> bool {
        self.fragments == 0
    }

    /// Looks at the bytes that came: those that were not `consumed` last time, and what was read since.
    pub(in crate::gateway) fn look(&mut self, buffer: &mut [u8], judge: &mut impl Judge, now: Instant) -> Seen {
        if !judge.screens() && self.held.take().is_some() {
            // Whoever judges now would not see it whole.
            self.dropped = true;
        }
        let at_boundary = self.unfinished() == 0;
        let gap = self.between_messages().then_some(0);
        let spill = judge.screens().then(Vec::new);
        let mut cursor = Cursor { buffer, read: 0, written: 0, spill, boundary: at_boundary.then_some(0), gap };
        let stop = loop {
            let next = if self.left > 0 {
                self.payload(&mut cursor, judge, now)
            } else {
                self.header(&mut cursor, judge, now)
            };
            match next {
                Ok(Next::More) => {}
                Ok(Next::Wait) => break None,
                Err(stop) => break Some(stop),
            }
        };
        let Cursor { read: consumed, written: passed, mut spill, boundary, gap, .. } = cursor;
        if let Some(spill) = &mut spill {
            // Some may have been taken back.
            spill.truncate(passed);
        }
        Seen { passed, boundary, gap, consumed, spill, stop }
    }

    fn payload(&mut self, cursor: &mut Cursor, judge: &mut impl Judge, now: Instant) -> Result<Next, Stop> {
        let rest = cursor.rest();
        let length = usize::try_from(self.left).unwrap_or(usize::MAX).min(rest.len());
        if length == 0 {
            return Ok(Next::Wait);
        }
        if self.dropped {
            cursor.skip(length);
            self.left -= length as u64;
        } else {
            let valid = !self.is_text || self.utf8.push(&rest[..length], self.mask);
            let ends = self.left == length as u64;
            if !valid || (ends && self.fin && !self.utf8.is_complete()) {
                return Err(self.not_utf8(cursor));
            }
            if let Some(held) = &mut self.held {
                held.frames.extend_from_slice(&cursor.rest()[..length]);
                cursor.skip(length);
            } else {
                cursor.pass(length);
            }
            self.left -= length as u64;
            self.mask.rotate_left(length % 4);
        }
        if self.left == 0 {
            self.frame_ends(cursor, judge, now)?;
        }
        Ok(Next::More)
    }

    fn header(&mut self, cursor: &mut Cursor, judge: &mut impl Judge, now: Instant) -> Result<Next, Stop> {
        let header = match Header::parse(cursor.rest(), self.sender) {
            Ok(Some(header)) => header,
            Ok(None) => return Ok(Next::Wait),
            Err(reason) => return Err(protocol(reason)),
        };
        if header.opcode.is_control() {
            return self.control(&header, cursor, judge, now);
        }
        let goes_on = self.fragments > 0;
        match (header.opcode == Opcode::Continuation, goes_on) {
            (true, false) => return Err(protocol("continuation of nothing")),
            (false, true) => return Err(protocol("a message inside a message")),
            (true, true) | (false, false) => {}
        }
        // Not a mere saturation: past this the length is one that no frame may have.
        let total = self.total.checked_add(header.payload).filter(|total| i64::try_from(*total).is_ok());
        let impossible = Stop::Violation(Violation::TooBig);
        if goes_on {
            self.fragments = self.fragments.saturating_add(1);
            let length = total.unwrap_or(u64::MAX);
            judge.goes_on(header.payload, length, self.fragments, now).map_err(Stop::Violation)?;
            self.total = total.ok_or(impossible)?;
        } else {
            self.is_text = header.opcode == Opcode::Text;
            self.utf8 = Utf8::default();
            self.dropped = match judge.begins(self.is_text, header.payload, now) {
                Verdict::Pass => false,
                Verdict::Drop => true,
                Verdict::Close(violation) => return Err(Stop::Violation(violation)),
            };
            self.total = total.ok_or(impossible)?;
            self.fragments = 1;
            self.held = (self.is_text && !self.dropped && judge.screens()).then(Box::default);
        }
        self.left = header.payload;
        self.mask = header.mask;
        self.fin = header.fin;
        if self.dropped {
            cursor.skip(header.length);
        } else {
            if self.left == 0 && self.fin && self.is_text && !self.utf8.is_complete() {
                return Err(self.not_utf8(cursor));
            }
            if let Some(held) = &mut self.held {
                held.frames.extend_from_slice(&cursor.rest()[..header.length]);
                cursor.skip(header.length);
            } else {
                cursor.pass(header.length);
            }
        }
        if self.left == 0 {
            self.frame_ends(cursor, judge, now)?;
        }
        Ok(Next::More)
    }

    fn frame_ends(&mut self, cursor: &mut Cursor, judge: &mut impl Judge, now: Instant) -> Result<(), Stop> {
        if self.fin
            && let Some(held) = self.held.take()
        {
            let Some(text) = held.text() else { return Err(self.not_utf8(cursor)) };
            match judge.whole(&text) {
                Whole::Pass => cursor.put(&held.frames),
                Whole::Instead(text) => cursor.put(&text_frame(text)),
                Whole::Drop => self.dropped = true,
                Whole::Close(violation) => return Err(Stop::Violation(violation)),
            }
        }
        cursor.boundary = Some(cursor.written);
        if self.fin {
            if !self.dropped {
                judge.passed(self.total, now);
            }
            self.fragments = 0;
            self.total = 0;
            self.dropped = false;
            cursor.gap = cursor.boundary;
        }
        Ok(())
    }

    /// Takes back what passed of this frame just now: what went before ends where a Close frame can follow.
    fn not_utf8(&mut self, cursor: &mut Cursor) -> Stop {
        if self.held.take().is_some() {
            self.left = 0;
        } else if let Some(boundary) = cursor.boundary {
            cursor.written = boundary;
            self.left = 0;
        }
        Stop::Malformed(CloseCode::Invalid, "invalid UTF-8")
    }

    /// A control frame, once it is there whole.
    fn control(
        &mut self,
        header: &Header,
        cursor: &mut Cursor,
        judge: &mut impl Judge,
        now: Instant,
    ) -> Result<Next, Stop> {
        // No more than 125 bytes, as the header was checked.
        let length = header.length + usize::try_from(header.payload).unwrap_or(usize::MAX);
        let Some(masked) = cursor.rest().get(header.length..length) else { return Ok(Next::Wait) };
        let mut payload = [0; CONTROL_MAX];
        let payload = &mut payload[..masked.len()];
        for (plain, (byte, mask)) in payload.iter_mut().zip(masked.iter().zip(header.mask.iter().cycle())) {
            *plain = byte ^ mask;
        }
        let close = match header.opcode {
            Opcode::Close => Some(parse_close(payload)?),
            _ => None,
        };
        if close.is_none() {
            judge.control(now).map_err(Stop::Violation)?;
        }
        if header.opcode == Opcode::Pong && payload == PING_PAYLOAD && self.sender == Sender::Client {
            // The answer to our own ping, which the application has not asked for.
            cursor.skip(length);
        } else {
            cursor.pass(length);
            // Between two frames of a message just as well as between two messages.
            cursor.boundary = Some(cursor.written);
        }
        match close {
            Some(frame) => Err(Stop::Close(frame)),
            None => Ok(Next::More),
        }
    }
}

/// A text in one frame, as a client sends it.
fn text_frame(text: String) -> Vec<u8> {
    let mut payload = text.into_bytes();
    let mut frame = vec![0x81];
    match u64::try_from(payload.len()).unwrap_or(u64::MAX) {
        length @ 0..=125 => frame.push(0x80 | u8::try_from(length).unwrap_or(125)),
        length => {
            if let Ok(length) = u16::try_from(length) {
                frame.push(0xfe);
                frame.extend_from_slice(&length.to_be_bytes());
            } else {
                frame.push(0xff);
                frame.extend_from_slice(&length.to_be_bytes());
            }
        }
    }
    // A client must not be able to tell what its text looks like on the wire (RFC 6455, 10.3).
    let mask = getrandom::u32().unwrap_or_else(|_| fastrand::u32(..)).to_ne_bytes();
    frame.extend_from_slice(&mask);
    for (byte, mask) in payload.iter_mut().zip(mask.iter().cycle()) {
        *byte ^= mask;
    }
    frame.append(&mut payload);
    frame
}

fn protocol(reason: &'static str) -> Stop {
    Stop::Malformed(CloseCode::Protocol, reason)
}

/// What a Close frame says (RFC 6455, 5.5.1 and 7.4).
fn parse_close(payload: &[u8]) -> Result<Option<CloseFrame>, Stop> {
    let Some((code, reason)) = payload.split_first_chunk() else {
        return if payload.is_empty() { Ok(None) } else { Err(protocol("half a close code")) };
    };
    let reason = str::from_utf8(reason).map_err(|_| Stop::Malformed(CloseCode::Invalid, "invalid UTF-8"))?;
    let code = u16::from_be_bytes(*code);
    if !matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999) {
        return Err(protocol("close code out of range"));
    }
    Ok(Some(CloseFrame { code: code.into(), reason: Utf8Bytes::from(reason) }))
}
