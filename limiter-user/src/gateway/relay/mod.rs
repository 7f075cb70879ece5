//! The relay: frames of the client to the upstream and back, byte for byte.
//!
//! Nothing is decoded that need not be. What a client sends is masked, as an upstream expects it from its clients, and what
//! the upstream sends is as a client expects it from a server; so the gateway reads headers, holds them against the limits,
//! and passes the bytes on. A session that is quiet has no buffer, and one that is busy no more than its slower side
//! makes it wait for.

mod closing;
mod header;
mod inspect;
mod pipe;
mod utf8;

#[cfg(test)]
mod inspect_tests;

pub(super) use closing::{close, close_client};
pub(super) use header::{CONTROL_MAX, Header, Opcode, Sender};
#[cfg(any(test, limiter_fuzz))]
pub(super) use inspect::Inspector;
pub(super) use inspect::{Judge, Stop, Verdict, Whole};
pub(super) use pipe::{BUFFER, Ended, Intake, Outlet, ping_frame};

use std::{
    net::SocketAddr,
    task::{Context, Poll},
};

use tokio::time::Instant;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;

use super::{
    Shared,
    close::End,
    liveness::{Due, Liveness, earliest},
    messages::{Inbound, Violation},
    metrics::Metrics,
    push::Mailbox,
    socket::Socket,
    turns::{TURN, Turns, Way},
    upstream::{Connected, Seat, Stream},
};
use crate::config;
use pipe::Pipe;

/// Both sides of a session.
pub(super) struct Relay<'a> {
    client: Socket,
    upstream: Stream,
    /// From the client to the upstream.
    up: Pipe,
    /// From the upstream to the client.
    down: Pipe,
    inbound: Inbound<'a>,
    outbound: Outbound<'a>,
    liveness: Liveness,
    /// What others have for the client, where they can have something.
    mail: Option<Box<Mailbox>>,
    config: &'a config::Gateway,
    /// Among the sessions of the upstream, to the end.
    _seat: Seat,
}

impl<'a> Relay<'a> {
    /// `early`: what the client sent right after its handshake. `config`: that of its route.
    pub(super) fn new(
        client: Socket,
        early: Vec<u8>,
        upstream: Connected,
        mail: Option<Box<Mailbox>>,
        inbound: Inbound<'a>,
        config: &'a config::Gateway,
        shared: &'a Shared,
    ) -> Self {
        // Where clients are never asked, there may be no later.
        if config.ping_interval.is_zero() {
            upstream.stream.give_up_after(config.ping_interval, config.pong_timeout);
        }
        Self {
            client,
            upstream: upstream.stream,
            up: Pipe::new(Sender::Client, early, config.pong_timeout),
            down: Pipe::new(Sender::Server, upstream.early, config.pong_timeout),
            inbound,
            outbound: Outbound { metrics: &shared.metrics, last: Instant::now() },
            liveness: Liveness::new(config.max_lifetime),
            mail,
            config,
            _seat: upstream.seat,
        }
    }
}

impl Turns for Relay<'_> {
    fn remote(&self) -> SocketAddr {
        self.client.connection().remote
    }

    fn settle(&mut self, now: Instant) {
        // The kernel goes by when it last heard of a host, so this is early enough; and many sessions are over by then.
        self.upstream.give_up_after(self.config.ping_interval, self.config.pong_timeout);
        self.inbound.settle(now);
    }

    fn poll_pass(&mut self, cx: &mut Context<'_>, now: Instant, way: &mut Way) -> Poll<End> {
        let Self { client, upstream, up, down, inbound, outbound, mail, .. } = self;
        let (mut turn_up, mut turn_down) = (TURN, TURN);
        if let Poll::Ready(ended) = up.poll_pass(cx, client, upstream, inbound, None, now, &mut turn_up) {
            return Poll::Ready(of_client(ended, inbound));
        }
        let pinged = down.wants_ping();
        let mut mail = mail.as_deref_mut();
        if let Poll::Ready(ended) =
            down.poll_pass(cx, upstream, client, outbound, mail.as_deref_mut(), now, &mut turn_down)
        {
            return Poll::Ready(of_upstream(ended));
        }
        if let Some(mail) = mail
            && let Err(end) = down.deliver(cx, client, mail, now, &mut turn_down)
        {
            return Poll::Ready(end);
        }
        if pinged && !down.wants_ping() {
            self.liveness.pinged(now);
        }
        if turn_up == 0 || turn_down == 0 {
            way.give(cx);
        }
        Poll::Pending
    }

    /// When to look again; an error is why it is over.
    fn due(&mut self, cx: &mut Context<'_>, now: Instant) -> Result<Instant, End> {
        let (up, down) = (self.up.outlet.due(), self.down.outlet.due());
        if down.is_some_and(|due| now >= due) {
            return Err(End::SlowConsumer);
        }
        if up.is_some_and(|due| now >= due) {
            return Err(End::UpstreamGone);
        }
        let last_mail = self.mail.as_ref().and_then(|mail| mail.last());
        let last_message = self.inbound.last().max(self.outbound.last).max(last_mail.unwrap_or(self.outbound.last));
        let alive = loop {
            match self.liveness.due(now, self.client.last_read(), last_message, self.config) {
                Due::Later(at) => break at,
                Due::End(end) => return Err(end),
                // It goes out between two frames; what holds the frame up has a deadline of its own, or keeps coming.
                Due::Ping if self.down.wants_ping() => break now + self.config.pong_timeout,
                Due::Ping => {
                    self.down.ping(cx, &mut self.client, now);
                    if !self.down.wants_ping() {
                        self.liveness.pinged(now);
                    }
                }
            }
        };
        // Sending the ping may have set one.
        Ok(earliest([up, self.down.outlet.due()]).map_or(alive, |due| due.min(alive)))
    }
}

pub(super) fn of_client(ended: Ended, inbound: &mut Inbound) -> End {
    match ended {
        Ended::Gone => End::Lost,
        Ended::Told(end) => end,
        Ended::Stop(Stop::Close(frame)) => End::Client(frame),
        Ended::Stop(Stop::Malformed(code, reason)) => {
            inbound.malformed();
            End::Malformed(code, reason)
        }
        Ended::Stop(Stop::Violation(violation)) => End::Violation(violation),
    }
}

fn of_upstream(ended: Ended) -> End {
    match ended {
        Ended::Gone => End::UpstreamGone,
        Ended::Told(end) => end,
        Ended::Stop(Stop::Close(frame)) => End::Upstream(frame),
        Ended::Stop(Stop::Malformed(..) | Stop::Violation(_)) => End::UpstreamMalformed,
    }
}

/// What the upstream sends is counted and held against no limit.
struct Outbound<'a> {
    metrics: &'a Metrics,
    last: Instant,
}

impl Judge for Outbound<'_> {
    fn begins(&mut self, _: bool, _: u64, now: Instant) -> Verdict {
        self.last = now;
        Verdict::Pass
    }

    fn goes_on(&mut self, _: u64, _: u64, _: u32, now: Instant) -> Result<(), Violation> {
        self.last = now;
        Ok(())
    }

    fn passed(&mut self, total: u64, now: Instant) {
        self.last = now;
        self.metrics.sent.count(total);
    }

    fn control(&mut self, _: Instant) -> Result<(), Violation> {
        Ok(())
    }
}

/// A Close frame; a client's has a mask.
fn close_frame(close: Option<&CloseFrame>, sender: Sender) -> Vec<u8> {
    let mut payload = Vec::new();
    if let Some(CloseFrame { code, reason }) = close {
        payload.extend_from_slice(&u16::from(*code).to_be_bytes());
        payload.extend_from_slice(reason.as_bytes());
    }
    // Our own reasons are short, and those of others came in such a frame.
    let length = u8::try_from(payload.len()).ok().filter(|length| *length <= 125).unwrap_or_else(|| {
        payload.truncate(2);
        2
    });
    match sender {
        Sender::Server => [&[0x88, length], &payload[..]].concat(),
        Sender::Client => {
            let mask = fastrand::u32(..).to_ne_bytes();
            for (byte, mask) in payload.iter_mut().zip(mask.iter().cycle()) {
                *byte ^= mask;
            }
            [&[0x88, 0x80 | length], &mask[..], &payload[..]].concat()
        }
    }
}
