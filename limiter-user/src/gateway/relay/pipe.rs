//! One direction of a relay: from the socket of one side to that of the other.

use std::{
    cell::RefCell,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Instant,
};

use super::{
    super::messages::Violation,
    header::Sender,
    inspect::{Inspector, Judge, PING_PAYLOAD, Stop, Verdict},
};

/// Most that is read at once. Large, so that a busy connection takes few system calls; there is one buffer per thread.
const BUFFER: usize = 64 * 1024;

/// Least speed at which a side must take what it is sent, in bytes per second; on top of the time that holds for any amount.
const MIN_SPEED: f64 = 16.0 * 1024.0;

thread_local! {
    /// What is read goes through here, and none of it stays when the poll ends: a quiet connection holds no buffer.
    static SHARED: RefCell<Box<[u8]>> = RefCell::new(vec![0; BUFFER].into());
}

/// Why a direction ends.
#[derive(Debug)]
pub(super) enum Ended {
    Stop(Stop),
    /// The sender's connection ended or broke.
    Gone,
}

/// One direction.
pub(super) struct Pipe {
    pub(super) intake: Intake,
    pub(super) outlet: Outlet,
    /// Whether a ping of ours is to go between two of the frames.
    wants_ping: bool,
}

/// The side that sends.
pub(super) struct Intake {
    inspector: Inspector,
    /// Bytes that were read and not yet passed: the beginning of a header or a control frame.
    carried: Vec<u8>,
    /// Whether what is carried has to be looked at before more is read.
    fresh: bool,
}

/// The side that receives.
pub(super) struct Outlet {
    /// What it did not take at once.
    held: Vec<u8>,
    /// So many bytes of `held` are gone.
    taken: usize,
    /// Whether what was written may have to be flushed.
    dirty: bool,
    /// Writing failed: nothing more gets there.
    broken: bool,
    /// When it must have taken what is held.
    due: Option<Instant>,
    timeout: Duration,
}

impl Pipe {
    /// `early` came together with the handshake. The receiver may take `timeout`, and a little more for a long message, to
    /// take what it is sent.
    pub(super) fn new(sender: Sender, early: Vec<u8>, timeout: Duration) -> Self {
        let fresh = !early.is_empty();
        Self {
            intake: Intake { inspector: Inspector::new(sender), carried: early, fresh },
            outlet: Outlet { held: Vec::new(), taken: 0, dirty: false, broken: false, due: None, timeout },
            wants_ping: false,
        }
    }

    /// Passes on what there is. `turn` is how many bytes it may read before others get theirs: at 0 there may be more, and
    /// nobody will wake the task for it.
    pub(super) fn poll_pass(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut (impl AsyncRead + Unpin),
        sink: &mut (impl AsyncWrite + Unpin),
        judge: &mut impl Judge,
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
            let looked = intake.poll_look(cx, source, judge, now, BUFFER, |cx, bytes, boundary| match boundary {
                Some(at) if *wants_ping => {
                    let (before, after) = bytes.split_at(at);
                    outlet.send(cx, sink, before, now);
                    outlet.send(cx, sink, &ping_frame(), now);
                    outlet.send(cx, sink, after, now);
                    *wants_ping = false;
                }
                _ => outlet.send(cx, sink, bytes, now),
            });
            match ready!(looked) {
                Ok(read) => *turn = turn.saturating_sub(read),
                Err(ended) => return Poll::Ready(ended),
            }
        }
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
    /// How many bytes are missing of a frame that has passed in part.
    pub(super) fn unfinished(&self) -> u64 {
        self.inspector.unfinished()
    }

    /// Reads `most` bytes at most, looks at them and hands over what may pass, with the last place between two frames.
    /// Gives how many were read.
    fn poll_look(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut (impl AsyncRead + Unpin),
        judge: &mut impl Judge,
        now: Instant,
        most: usize,
        pass: impl FnOnce(&mut Context<'_>, &[u8], Option<usize>),
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
            self.carried = buffer[seen.consumed..end].to_vec();
            self.fresh = seen.stop.is_some();
            if seen.passed > 0 {
                pass(cx, &buffer[..seen.passed], seen.boundary);
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
                Err(Ended::Stop(_)) => return Poll::Ready(false),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl Outlet {
    /// Sends, and holds what is not taken at once.
    pub(super) fn send(
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

    /// Holds what is to go out at the next chance.
    pub(super) fn hold(&mut self, bytes: &[u8], now: Instant) {
        self.held.extend_from_slice(bytes);
        #[expect(clippy::cast_precision_loss, reason = "a length in bytes is far below 2^53")]
        let allowance = Duration::from_secs_f64(self.held.len() as f64 / MIN_SPEED);
        self.due.get_or_insert(now + self.timeout + allowance);
    }

    /// Completes when nothing is held any more, because it is sent or because it never will be.
    pub(super) fn poll_drain(
        &mut self,
        cx: &mut Context<'_>,
        sink: &mut (impl AsyncWrite + Unpin),
        now: Instant,
    ) -> Poll<()> {
        while self.taken < self.held.len() {
            match ready!(Pin::new(&mut *sink).poll_write(cx, &self.held[self.taken..])) {
                Ok(written) if written > 0 => {
                    self.taken += written;
                    self.dirty = true;
                }
                _ => {
                    self.break_off();
                    return Poll::Ready(());
                }
            }
        }
        if self.taken > 0 {
            self.held = Vec::new();
            self.taken = 0;
        }
        if self.dirty {
            match Pin::new(&mut *sink).poll_flush(cx) {
                Poll::Ready(Ok(())) => self.dirty = false,
                Poll::Ready(Err(_)) => self.break_off(),
                Poll::Pending => {
                    self.due.get_or_insert(now + self.timeout);
                    return Poll::Pending;
                }
            }
        }
        self.due = None;
        Poll::Ready(())
    }

    fn break_off(&mut self) {
        self.broken = true;
        self.held = Vec::new();
        self.taken = 0;
        self.dirty = false;
        self.due = None;
    }

    /// When the receiver must have taken what it was sent; `None`: it has.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    pub(super) fn is_broken(&self) -> bool {
        self.broken
    }
}

/// Unmasked, as a server sends it.
fn ping_frame() -> [u8; 2 + PING_PAYLOAD.len()] {
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
