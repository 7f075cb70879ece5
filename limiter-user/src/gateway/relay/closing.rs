//! The end of a relayed session: each side gets its Close frame where a frame may be, and is waited for, but not for long.

use std::{
    future::poll_fn,
    task::{Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{Instant, timeout},
};

use super::{
    Relay, TURN, close_frame,
    header::Sender,
    inspect::Stop,
    pipe::{Ended, Intake, Outlet},
};
use crate::gateway::{
    close::{CLOSE_TIMEOUT, End, FLUSH_TIMEOUT},
    overload::Overload,
    session::Session,
    socket::Socket,
    turns::Way,
    upstream::Stream,
};

/// Closes both sides, and `release`s what else the session holds when the client's socket is closed, with whether the client agreed,
/// or was cut off. That does not wait for the upstream.
///
/// The session stays where it is, but for its sockets: to move all of it from hand to hand would take longer than to close it.
pub(in crate::gateway) async fn close<H>(
    mut session: Box<Session<Relay<'_>, H>>,
    end: &End,
    drain_timeout: Duration,
    release: impl FnOnce(H, bool),
) {
    let agreed = {
        let relay = &mut session.turns;
        // From here on it takes nothing, and nobody must wait for it.
        relay.mail = None;
        settle(relay, end).await
    };
    let Session { turns: Relay { client, upstream, ref mut up, ref mut down, ref outbound, .. }, held } = *session;
    let may_write_down = down.intake.unfinished() == 0;
    let may_write_up = up.intake.unfinished() == 0;
    // One that has answered, or has been answered, needs no frame of ours; one that is gone gets none.
    let to_client = match end {
        End::Lost => Vec::new(),
        _ if agreed => Vec::new(),
        end => close_frame(end.for_client(&outbound.metrics.overload).as_ref(), Sender::Server),
    };
    let to_upstream = match end {
        End::UpstreamGone => Vec::new(),
        _ if agreed => Vec::new(),
        end => close_frame(end.for_upstream().as_ref(), Sender::Client),
    };
    let of_client =
        Closing { intake: &mut up.intake, outlet: &mut down.outlet, may_write: may_write_down, frame: to_client };
    let of_upstream =
        Closing { intake: &mut down.intake, outlet: &mut up.outlet, may_write: may_write_up, frame: to_upstream };
    let close_client = async { release(held, of_client.client(client, end, agreed, drain_timeout).await) };
    let close_upstream = of_upstream.upstream(upstream, end);
    tokio::join!(close_client, close_upstream);
}

/// Closes a client that has no upstream. What it is sent are whole frames, so that its Close frame can go behind any of them.
/// Says whether the client agreed to the end.
pub(in crate::gateway) async fn close_client(
    client: Socket,
    mut intake: Intake,
    mut outlet: Outlet,
    end: &End,
    drain_timeout: Duration,
    overload: &Overload,
) -> bool {
    let frame = match end {
        End::Lost => Vec::new(),
        end => close_frame(end.for_client(overload).as_ref(), Sender::Server),
    };
    if matches!(end, End::SlowConsumer | End::NoPong | End::Kicked(_)) {
        outlet.keep_first();
    }
    let closing = Closing { intake: &mut intake, outlet: &mut outlet, may_write: true, frame };
    closing.client(client, end, false, drain_timeout).await
}

/// Where one side closes: passes its Close frame on, and the answer of the other. True: there is one, and all is said.
/// Otherwise: brings frames that have passed in part to their end, since nothing can be put into a frame.
async fn settle(relay: &mut Relay<'_>, end: &End) -> bool {
    let Relay { client, upstream, up, down, inbound, outbound, .. } = relay;
    match end {
        End::Client(_) => {
            // The answer is the last that it gets.
            client.ends_soon();
            let mut way = Way::default();
            let answered = poll_fn(|cx| {
                ready!(way.poll(cx));
                let (now, mut turn) = (Instant::now(), TURN);
                _ = up.outlet.poll_drain(cx, upstream, now);
                match down.poll_pass(cx, upstream, client, outbound, None, now, &mut turn) {
                    Poll::Ready(ended) => return Poll::Ready(is_close(&ended)),
                    Poll::Pending if down.outlet.is_broken() => return Poll::Ready(true),
                    Poll::Pending => {}
                }
                if turn == 0 {
                    way.give(cx);
                }
                Poll::Pending
            });
            timeout(CLOSE_TIMEOUT, answered).await.unwrap_or(false)
        }
        End::Upstream(_) => {
            let mut way = Way::default();
            let answered = poll_fn(|cx| {
                ready!(way.poll(cx));
                let (now, mut turn) = (Instant::now(), TURN);
                _ = down.outlet.poll_drain(cx, client, now);
                match up.poll_pass(cx, client, upstream, inbound, None, now, &mut turn) {
                    Poll::Ready(ended) => return Poll::Ready(is_close(&ended)),
                    Poll::Pending => {}
                }
                if turn == 0 {
                    way.give(cx);
                }
                Poll::Pending
            });
            timeout(CLOSE_TIMEOUT, answered).await.unwrap_or(false)
        }
        _ => {
            let (mut up_done, mut down_done) = (false, false);
            let finished = poll_fn(|cx| {
                // A frame whose sender is gone, or breaks the protocol, has no end: its receiver is cut off.
                up_done |= matches!(end, End::Lost | End::Malformed(..))
                    || up.poll_finish_frame(cx, client, upstream, inbound).is_ready();
                down_done |= matches!(end, End::Lost | End::UpstreamGone | End::UpstreamMalformed)
                    || down.poll_finish_frame(cx, upstream, client, outbound).is_ready();
                if up_done && down_done { Poll::Ready(()) } else { Poll::Pending }
            });
            _ = timeout(FLUSH_TIMEOUT, finished).await;
            false
        }
    }
}

fn is_close(ended: &Ended) -> bool {
    matches!(ended, Ended::Stop(Stop::Close(_)))
}

/// One side's end.
struct Closing<'a> {
    /// What comes from it.
    intake: &'a mut Intake,
    /// What goes to it.
    outlet: &'a mut Outlet,
    /// Whether it has all of every frame that has begun.
    may_write: bool,
    /// The Close frame that it has still to get, if any.
    frame: Vec<u8>,
}

impl Closing<'_> {
    /// Says whether the client agreed to the end.
    async fn client(mut self, mut socket: Socket, end: &End, answered: bool, drain_timeout: Duration) -> bool {
        if matches!(end, End::Client(_)) || end.loses_frames() {
            socket.ends_soon();
        }
        let told = self.tell(&mut socket).await;
        match end {
            End::Lost => true,
            // Nothing more can come from it, so closing after the flush is no RST.
            End::Client(_) => {
                _ = timeout(FLUSH_TIMEOUT, socket.end_tls()).await;
                true
            }
            // Somebody who isn't there isn't waited for: the slot is free once the attempt is made.
            End::NoPong | End::SlowConsumer => false,
            _ if !told => false,
            end if end.loses_frames() => {
                socket.linger(CLOSE_TIMEOUT).await;
                false
            }
            _ => {
                let patience = match end {
                    End::Draining => drain_timeout,
                    // It has had its time.
                    End::Upstream(_) => Duration::ZERO,
                    _ => CLOSE_TIMEOUT,
                };
                if answered || self.is_answered(&mut socket, patience).await {
                    _ = timeout(FLUSH_TIMEOUT, socket.end_tls()).await;
                    true
                } else {
                    socket.linger(FLUSH_TIMEOUT).await;
                    false
                }
            }
        }
    }

    async fn upstream(mut self, mut stream: Stream, end: &End) {
        let said = !self.frame.is_empty();
        let told = self.tell(&mut stream).await;
        // Where one side began, the other has answered or has had its time to.
        if told && said && !matches!(end, End::Client(_) | End::Upstream(_)) {
            self.is_answered(&mut stream, CLOSE_TIMEOUT).await;
        }
        _ = timeout(FLUSH_TIMEOUT, stream.end_tls()).await;
    }

    /// Sends what is held, and the Close frame. False: it could not leave.
    async fn tell(&mut self, socket: &mut (impl AsyncWrite + Unpin)) -> bool {
        let now = Instant::now();
        if self.may_write {
            self.outlet.hold(&self.frame, now);
        }
        let drained = poll_fn(|cx| self.outlet.poll_drain(cx, socket, now));
        timeout(FLUSH_TIMEOUT, drained).await.is_ok() && !self.outlet.is_broken() && self.may_write
    }

    /// Waits for the Close frame that answers ours, or the end of the connection; what was on its way before is dropped.
    async fn is_answered(&mut self, socket: &mut (impl AsyncRead + Unpin), patience: Duration) -> bool {
        timeout(patience, poll_fn(|cx| self.intake.poll_close(cx, socket))).await.unwrap_or(false)
    }
}
