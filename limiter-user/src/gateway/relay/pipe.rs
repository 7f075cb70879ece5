//! One direction of a relay: from the socket of one side to that of the other.

use std::{
    cell::RefCell,
    collections::VecDeque,
    io::IoSlice,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Instant,
};

use super::{
    super::{close::End, messages::Violation, push::Mailbox, turns::TURN},
    header::Sender,
    inspect::{Inspector, Judge, PING_PAYLOAD, Seen, Stop, Verdict},
};

/// Most that is read at once: a turn's worth, so that a busy connection takes few system calls. There is one buffer per thread.
pub(in crate::gateway) const BUFFER: usize = TURN;

/// Most pieces that are written by one system call.
const MOST_PIECES: usize = 32;

/// Least speed at which a side must take what it is sent, in bytes per second; on top of the time that holds for any amount.
const MIN_SPEED: f64 = 16.0 * 1024.0;

thread_local! {
    /// What is read goes through here, and none of it stays when the poll ends: a quiet connection holds no buffer.
    static SHARED: RefCell<Box<[u8]>> = RefCell::new(vec![0; BUFFER].into());
}

/// Why a direction ends.
#[derive(Debug)]
pub(in crate::gateway) enum Ended {
    Stop(Stop),
    /// The sender's connection ended or broke.
    Gone,
    /// What is put in between its messages says so.
    Told(End),
}

/// One direction.
pub(super) struct Pipe {
    pub(super) intake: Intake,
    pub(super) outlet: Outlet,
    /// Whether a ping of ours is to go between two of the frames.
    wants_ping: bool,
}

/// The side that sends.
pub(in crate::gateway) struct Intake {
    inspector: Inspector,
    /// Bytes that were read and not yet passed: the beginning of a header or a control frame.
    carried: Box<[u8]>,
    /// Whether what is carried has to be looked at before more is read.
    fresh: bool,
}

/// The side that receives.
pub(in crate::gateway) struct Outlet {
    /// What it did not take at once. A frame for many is the same piece of memory for all of them.
    held: Pieces,
    /// Whether what was written may have to be flushed.
    dirty: bool,
    /// Writing failed: nothing more gets there.
    broken: bool,
    /// When it must have taken what is held.
    due: Option<Instant>,
    /// How long it may take, in milliseconds.
    timeout: u32,
}

impl Pipe {
    /// `early` came together with the handshake. The receiver may take `timeout`, and a little more for a long message, to
    /// take what it is sent.
    pub(super) fn new(sender: Sender, early: Vec<u8>, timeout: Duration) -> Self {
        Self { intake: Intake::new(sender, early), outlet: Outlet::new(timeout), wants_ping: false }
    }

    /// Passes on what there is, and what `mail` there is between two messages. `turn` is how many bytes it may read before
    /// others get theirs: at 0 there may be more, and nobody will wake the task for it.
    #[expect(clippy::too_many_arguments, reason = "two sides, whoever judges, and the turn")]
    pub(super) fn poll_pass(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut (impl AsyncRead + Unpin),
        sink: &mut (impl AsyncWrite + Unpin),
        judge: &mut impl Judge,
        mut mail: Option<&mut Mailbox>,
        now: Instant,
        turn: &mut usize,
    ) -> Poll<Ended> {
        let Self { intake, outlet, wants_ping } = self;
        loop {
            ready!(outlet.poll_drain(cx, sink, now));
            // The receiver's own direction finds out how it broke, and has perhaps messages to bring before.
            if outlet.broken || *turn == 0 {
                return Poll::Pending;
            }
            let mut told = None;
            let looked = intake.poll_look(cx, source, judge, now, BUFFER.min(*turn), |cx, mut bytes, seen| {
                let mut sent = 0;
                if let (Some(gap), Some(mail)) = (seen.gap, mail.as_deref_mut().filter(|mail| mail.has_news())) {
                    outlet.send(cx, sink, &bytes[..gap], now);
                    (bytes, sent) = (&bytes[gap..], gap);
                    match mail.poll_take(cx, now) {
                        Poll::Ready(Ok(frames)) => outlet.send_frames(cx, sink, frames, now),
                        Poll::Ready(Err(end)) => told = Some(end),
                        Poll::Pending => {}
                    }
                }
                match seen.boundary {
                    Some(boundary) if *wants_ping => {
                        let (before, after) = bytes.split_at(boundary - sent);
                        outlet.send(cx, sink, before, now);
                        outlet.send(cx, sink, &ping_frame(), now);
                        outlet.send(cx, sink, after, now);
                        *wants_ping = false;
                    }
                    _ => outlet.send(cx, sink, bytes, now),
                }
            });
            let looked = ready!(looked);
            match (looked, told) {
                (Err(ended), _) => return Poll::Ready(ended),
                (Ok(_), Some(end)) => return Poll::Ready(Ended::Told(end)),
                (Ok(read), None) => *turn = turn.saturating_sub(read),
            }
        }
    }

    /// Sends what mail there is, if a message may begin now. Called when nothing more passes for the moment; the task is woken
    /// for what comes later. An error ends the session.
    pub(super) fn deliver(
        &mut self,
        cx: &mut Context<'_>,
        sink: &mut (impl AsyncWrite + Unpin),
        mail: &mut Mailbox,
        now: Instant,
        turn: &mut usize,
    ) -> Result<(), End> {
        let Self { intake, outlet, .. } = self;
        while intake.inspector.between_messages() && outlet.poll_drain(cx, sink, now).is_ready() {
            if *turn == 0 {
                return mail.watch(cx, false);
            }
            match mail.poll_take(cx, now) {
                Poll::Ready(frames) => {
                    let frames = frames?;
                    *turn = turn.saturating_sub(frames.iter().map(Bytes::len).sum());
                    outlet.send_frames(cx, sink, frames, now);
                }
                Poll::Pending => return Ok(()),
            }
        }
        mail.watch(cx, true)
    }

    /// Puts a ping between two frames, as soon as there is such a place.
    pub(super) fn ping(&mut self, cx: &mut Context<'_>, sink: &mut (impl AsyncWrite + Unpin), now: Instant) {
        if self.intake.unfinished() == 0 {
            self.outlet.send(cx, sink, &ping_frame(), now);
        } else {
            self.wants_ping = true;
        }
    }

    /// Whether a ping waits for its place.
    pub(super) fn wants_ping(&self) -> bool {
        self.wants_ping
    }

    /// Passes on the rest of a frame that has begun, and nothing behind it. False: that won't come.
    pub(super) fn poll_finish_frame(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut (impl AsyncRead + Unpin),
        sink: &mut (impl AsyncWrite + Unpin),
        judge: &mut impl Judge,
    ) -> Poll<bool> {
        let now = Instant::now();
        let Self { intake, outlet, .. } = self;
        loop {
            ready!(outlet.poll_drain(cx, sink, now));
            if outlet.broken {
                return Poll::Ready(false);
            }
            let left = intake.unfinished();
            if left == 0 {
                return Poll::Ready(true);
            }
            let most = usize::try_from(left).unwrap_or(BUFFER).min(BUFFER);
            let looked =
                intake.poll_look(cx, source, judge, now, most, |cx, bytes, _| outlet.send(cx, sink, bytes, now));
            if ready!(looked).is_err() {
                return Poll::Ready(false);
            }
        }
    }
}

impl Intake {
    /// `early` came together with the handshake.
    pub(in crate::gateway) fn new(sender: Sender, early: Vec<u8>) -> Self {
        let fresh = !early.is_empty();
        Self { inspector: Inspector::new(sender), carried: early.into(), fresh }
    }

    /// How many bytes are missing of a frame that has passed in part.
    pub(super) fn unfinished(&self) -> u64 {
        self.inspector.unfinished()
    }

    /// Reads `most` bytes at most, looks at them and hands over what may pass, with the places in it. Gives how many were
    /// read.
    pub(in crate::gateway) fn poll_look(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut (impl AsyncRead + Unpin),
        judge: &mut impl Judge,
        now: Instant,
        most: usize,
        pass: impl FnOnce(&mut Context<'_>, &[u8], &Seen),
    ) -> Poll<Result<usize, Ended>> {
        SHARED.with_borrow_mut(|buffer| {
            let carried = self.carried.len();
            // Never more than the buffer holds: less than a control frame, but for what came with the handshake, whose own
            // buffer is shorter, and for what was left of this very buffer.
            let end = if self.fresh {
                carried
            } else {
                let space = &mut buffer[carried..];
                let most = most.min(space.len());
                let mut space = ReadBuf::new(&mut space[..most]);
                match ready!(Pin::new(source).poll_read(cx, &mut space)) {
                    Ok(()) if !space.filled().is_empty() => carried + space.filled().len(),
                    _ => return Poll::Ready(Err(Ended::Gone)),
                }
            };
            buffer[..carried].copy_from_slice(&self.carried);
            let seen = self.inspector.look(&mut buffer[..end], judge, now);
            self.carried = Box::from(&buffer[seen.consumed..end]);
            self.fresh = seen.stop.is_some();
            if seen.passed > 0 {
                pass(cx, seen.bytes(buffer), &seen);
            }
            match seen.stop {
                None => Poll::Ready(Ok(end - carried)),
                Some(stop) => Poll::Ready(Err(Ended::Stop(stop))),
            }
        })
    }

    /// Reads and throws away, up to the Close frame. False: the connection broke, or what it carries makes no sense.
    pub(super) fn poll_close(&mut self, cx: &mut Context<'_>, source: &mut (impl AsyncRead + Unpin)) -> Poll<bool> {
        // As many as are there; others get their turn after a few.
        for _ in 0..4 {
            let now = Instant::now();
            match ready!(self.poll_look(cx, source, &mut Anything, now, BUFFER, |_, _, _| {})) {
                Ok(_) => {}
                Err(Ended::Gone | Ended::Stop(Stop::Close(_))) => return Poll::Ready(true),
                Err(Ended::Stop(_) | Ended::Told(_)) => return Poll::Ready(false),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl Outlet {
    /// The receiver may take `timeout`, and a little more for a long message, to take what it is sent.
    pub(in crate::gateway) fn new(timeout: Duration) -> Self {
        let timeout = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
        Self { held: Pieces::default(), dirty: false, broken: false, due: None, timeout }
    }

    /// Sends, and holds what is not taken at once.
    pub(in crate::gateway) fn send(
        &mut self,
        cx: &mut Context<'_>,
        sink: &mut (impl AsyncWrite + Unpin),
        mut bytes: &[u8],
        now: Instant,
    ) {
        while self.held.is_empty() && !bytes.is_empty() && !self.broken {
            match Pin::new(&mut *sink).poll_write(cx, bytes) {
                Poll::Ready(Ok(written)) if written > 0 => {
                    bytes = &bytes[written..];
                    self.dirty = true;
                }
                Poll::Ready(_) => self.break_off(),
                Poll::Pending => break,
            }
        }
        if !bytes.is_empty() && !self.broken {
            self.hold(bytes, now);
        }
    }

    /// Sends frames, many by one system call, and holds those that are not taken at once. None is copied.
    pub(in crate::gateway) fn send_frames(
        &mut self,
        cx: &mut Context<'_>,
        sink: &mut (impl AsyncWrite + Unpin),
        frames: VecDeque<Bytes>,
        now: Instant,
    ) {
        if self.broken {
            return;
        }
        self.held.append(frames);
        _ = self.poll_drain(cx, sink, now);
    }

    /// Holds what is to go out at the next chance.
    pub(in crate::gateway) fn hold(&mut self, bytes: &[u8], now: Instant) {
        // An empty piece would cost a system call.
        if bytes.is_empty() {
            return;
        }
        self.held.push(Bytes::copy_from_slice(bytes));
        self.set_due(now);
    }

    fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout.into())
    }

    fn set_due(&mut self, now: Instant) {
        if self.due.is_none() {
            let held: usize = self.held.iter().map(Bytes::len).sum();
            #[expect(clippy::cast_precision_loss, reason = "a length in bytes is far below 2^53")]
            let allowance = Duration::from_secs_f64(held as f64 / MIN_SPEED);
            self.due = Some(now + self.timeout() + allowance);
        }
    }

    /// Completes when nothing is held any more, because it is sent or because it never will be.
    pub(in crate::gateway) fn poll_drain(
        &mut self,
        cx: &mut Context<'_>,
        sink: &mut (impl AsyncWrite + Unpin),
        now: Instant,
    ) -> Poll<()> {
        while !self.held.is_empty() {
            let mut slices = [IoSlice::new(&[]); MOST_PIECES];
            for (slice, piece) in slices.iter_mut().zip(self.held.iter()) {
                *slice = IoSlice::new(piece);
            }
            let pieces = self.held.len().min(MOST_PIECES);
            match Pin::new(&mut *sink).poll_write_vectored(cx, &slices[..pieces]) {
                Poll::Ready(Ok(written)) if written > 0 => {
                    self.dirty = true;
                    self.gone(written);
                }
                Poll::Ready(_) => {
                    self.break_off();
                    return Poll::Ready(());
                }
                Poll::Pending => {
                    self.set_due(now);
                    return Poll::Pending;
                }
            }
        }
        self.held.clear();
        if self.dirty {
            match Pin::new(&mut *sink).poll_flush(cx) {
                Poll::Ready(Ok(())) => self.dirty = false,
                Poll::Ready(Err(_)) => self.break_off(),
                Poll::Pending => {
                    self.due.get_or_insert(now + self.timeout());
                    return Poll::Pending;
                }
            }
        }
        self.due = None;
        Poll::Ready(())
    }

    /// So many bytes of what is held are written.
    fn gone(&mut self, mut written: usize) {
        while let Some(first) = self.held.first_mut() {
            if written < first.len() {
                first.advance(written);
                break;
            }
            written -= first.len();
            self.held.pop();
        }
    }

    /// Forgets what is held but for the first piece, which may be written in part. Where each piece is a frame, another frame
    /// can follow it.
    pub(in crate::gateway) fn keep_first(&mut self) {
        self.held.truncate(1);
    }

    fn break_off(&mut self) {
        self.broken = true;
        self.held.clear();
        self.dirty = false;
        self.due = None;
    }

    /// When the receiver must have taken what it was sent; `None`: it has.
    pub(in crate::gateway) fn due(&self) -> Option<Instant> {
        self.due
    }

    pub(in crate::gateway) fn is_broken(&self) -> bool {
        self.broken
    }
}

/// What waits to be sent. A quiet connection has nothing, and then it takes one word.
#[derive(Default)]
#[expect(clippy::box_collection, reason = "a deque takes four words, twice in each quiet connection")]
struct Pieces(Option<Box<VecDeque<Bytes>>>);

impl Pieces {
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn len(&self) -> usize {
        self.0.as_ref().map_or(0, |pieces| pieces.len())
    }

    fn iter(&self) -> impl Iterator<Item = &Bytes> {
        self.0.iter().flat_map(|pieces| pieces.iter())
    }

    fn push(&mut self, piece: Bytes) {
        self.0.get_or_insert_default().push_back(piece);
    }

    fn append(&mut self, mut pieces: VecDeque<Bytes>) {
        match &mut self.0 {
            Some(held) => held.append(&mut pieces),
            None => self.0 = (!pieces.is_empty()).then(|| Box::new(pieces)),
        }
    }

    fn first_mut(&mut self) -> Option<&mut Bytes> {
        self.0.as_mut()?.front_mut()
    }

    /// Takes the first away.
    fn pop(&mut self) {
        if let Some(pieces) = &mut self.0 {
            pieces.pop_front();
        }
    }

    fn truncate(&mut self, length: usize) {
        if let Some(pieces) = &mut self.0 {
            pieces.truncate(length);
        }
    }

    /// Forgets them all, and gives their room back.
    fn clear(&mut self) {
        self.0 = None;
    }
}

/// Unmasked, as a server sends it.
pub(in crate::gateway) fn ping_frame() -> [u8; 2 + PING_PAYLOAD.len()] {
    let mut frame = [0; 2 + PING_PAYLOAD.len()];
    frame[..2].copy_from_slice(&[0x89, 7]);
    frame[2..].copy_from_slice(PING_PAYLOAD);
    frame
}

/// Lets everything pass: what is thrown away is held against no limit.
struct Anything;

impl Judge for Anything {
    fn begins(&mut self, _: bool, _: u64, _: Instant) -> Verdict {
        Verdict::Drop
    }

    fn goes_on(&mut self, _: u64, _: u64, _: u32, _: Instant) -> Result<(), Violation> {
        Ok(())
    }

    fn passed(&mut self, _: u64, _: Instant) {}

    fn control(&mut self, _: Instant) -> Result<(), Violation> {
        Ok(())
    }
}
