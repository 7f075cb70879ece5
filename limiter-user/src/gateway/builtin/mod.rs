//! Sessions with the applications that are built in: `echo`, which sends each message back, and `broadcast`, which sends it to
//! everybody else in the room.
//!
//! Frames are read as those of a relay are, by the same rules and through the same buffer, and a message is unmasked and put
//! together only when it has passed. A session that is quiet keeps nothing of a message.

mod assembly;

use std::{
    collections::VecDeque,
    net::SocketAddr,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use tokio::time::Instant;

use super::{
    Shared,
    close::End,
    liveness::{Due, Liveness},
    messages::Inbound,
    metrics::Metrics,
    push::{Kind, Mailbox},
    relay::{self, BUFFER, Intake, Outlet, Sender},
    socket::Socket,
    turns::{TURN, Turns, Way},
};
use crate::config;
use assembly::Assembly;

/// Most that is read at once for a room. Short messages make many entries of its log, so that more than this could push out
/// what nobody has had time to take.
const ROOM_BUFFER: usize = 16 * 1024;

/// What becomes of a client's messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Application {
    /// They come back.
    Echo,
    /// They go to the others in the room of its mailbox.
    Room,
}

/// A session without an upstream.
pub(super) struct BuiltIn<'a> {
    application: Application,
    client: Socket,
    intake: Intake,
    outlet: Outlet,
    inbound: Inbound<'a>,
    assembly: Assembly,
    /// Messages that are yet to be published.
    unpublished: VecDeque<Bytes>,
    mail: Option<Box<Mailbox>>,
    liveness: Liveness,
    metrics: &'a Metrics,
    config: &'a config::Gateway,
}

impl<'a> BuiltIn<'a> {
    /// `early`: what the client sent right after its handshake. `config`: that of its route.
    pub(super) fn new(
        application: Application,
        client: Socket,
        early: Vec<u8>,
        mail: Option<Box<Mailbox>>,
        inbound: Inbound<'a>,
        config: &'a config::Gateway,
        shared: &'a Shared,
    ) -> Self {
        Self {
            application,
            client,
            intake: Intake::new(Sender::Client, early),
            outlet: Outlet::new(config.pong_timeout),
            inbound,
            assembly: Assembly::default(),
            unpublished: VecDeque::new(),
            mail,
            liveness: Liveness::new(config.max_lifetime),
            metrics: &shared.metrics,
            config,
        }
    }

    /// Closes the client's side, and says whether the client agreed to the end, or was cut off.
    pub(super) async fn close(self, end: &End, drain_timeout: Duration) -> bool {
        let Self { client, intake, outlet, mail, metrics, .. } = self;
        // From here on it has no turns, and nobody must wait for one.
        drop(mail);
        relay::close_client(client, intake, outlet, end, drain_timeout, &metrics.overload).await
    }

    /// Sends what others have for the client, as long as it takes it; ready: that is all for now.
    fn poll_deliver(&mut self, cx: &mut Context<'_>, now: Instant, turn: &mut usize) -> Poll<Result<(), End>> {
        let Self { client, outlet, mail, .. } = self;
        let Some(mail) = mail else { return outlet.poll_drain(cx, client, now).map(Ok) };
        while outlet.poll_drain(cx, client, now).is_ready() {
            if *turn == 0 {
                return Poll::Ready(mail.watch(cx, false));
            }
            match mail.poll_take(cx, now) {
                Poll::Ready(frames) => {
                    let frames = frames?;
                    *turn = turn.saturating_sub(frames.iter().map(Bytes::len).sum());
                    outlet.send_frames(cx, client, frames, now);
                }
                Poll::Pending => return Poll::Ready(Ok(())),
            }
        }
        match mail.watch(cx, true) {
            Ok(()) => Poll::Pending,
            Err(end) => Poll::Ready(Err(end)),
        }
    }

    /// Reads from the client, once.
    fn poll_read(&mut self, cx: &mut Context<'_>, now: Instant, turn: &mut usize) -> Poll<Result<(), End>> {
        let Self { application, client, intake, outlet, inbound, assembly, unpublished, metrics, .. } = self;
        let most = match application {
            Application::Echo => BUFFER,
            Application::Room => ROOM_BUFFER,
        };
        let mut answers = VecDeque::new();
        let looked = intake.poll_look(cx, client, inbound, now, most, |_, bytes, _| {
            assembly.push(bytes, |kind, frame, length| match (*application, kind) {
                (Application::Room, Kind::Text | Kind::Binary) => unpublished.push_back(frame),
                (_, kind) => {
                    if kind != Kind::Pong {
                        metrics.sent.count(length as u64);
                    }
                    answers.push_back(frame);
                }
            });
        });
        let Poll::Ready(looked) = looked else { return Poll::Pending };
        if !answers.is_empty() {
            outlet.send_frames(cx, client, answers, now);
        }
        Poll::Ready(match looked {
            Ok(read) => {
                *turn = turn.saturating_sub(read);
                Ok(())
            }
            Err(ended) => {
                // What came before the end has passed.
                if let Some(mail) = &mut self.mail {
                    mail.publish(unpublished);
                }
                Err(relay::of_client(ended, inbound))
            }
        })
    }

    /// Whether nothing is left to be published.
    fn poll_publish(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.unpublished.is_empty() {
            return Poll::Ready(());
        }
        if let Some(mail) = &mut self.mail
            && mail.poll_publish(cx, &mut self.unpublished).is_pending()
        {
            return Poll::Pending;
        }
        self.unpublished = VecDeque::new();
        Poll::Ready(())
    }
}

impl Turns for BuiltIn<'_> {
    fn remote(&self) -> SocketAddr {
        self.client.connection().remote
    }

    fn settle(&mut self, now: Instant) {
        self.inbound.settle(now);
    }

    fn poll_pass(&mut self, cx: &mut Context<'_>, now: Instant, way: &mut Way) -> Poll<End> {
        let (mut turn_up, mut turn_down) = (TURN, TURN);
        loop {
            match self.poll_deliver(cx, now, &mut turn_down) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(end)) => return Poll::Ready(end),
                // What it sends is read when it has taken what it is sent.
                Poll::Pending => break,
            }
            if turn_up == 0 || turn_down == 0 {
                way.give(cx);
                break;
            }
            if self.poll_publish(cx).is_pending() {
                break;
            }
            match self.poll_read(cx, now, &mut turn_up) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(end)) => return Poll::Ready(end),
                Poll::Pending => break,
            }
        }
        Poll::Pending
    }

    fn due(&mut self, cx: &mut Context<'_>, now: Instant) -> Result<Instant, End> {
        let last = self
            .mail
            .as_ref()
            .and_then(|mail| mail.last())
            .map_or(self.inbound.last(), |at| at.max(self.inbound.last()));
        let alive = loop {
            if self.outlet.due().is_some_and(|due| now >= due) {
                return Err(End::SlowConsumer);
            }
            match self.liveness.due(now, self.client.last_read(), last, self.config) {
                Due::Later(at) => break at,
                Due::End(end) => return Err(end),
                Due::Ping => {
                    self.outlet.send(cx, &mut self.client, &relay::ping_frame(), now);
                    self.liveness.pinged(now);
                }
            }
        };
        Ok(self.outlet.due().map_or(alive, |due| due.min(alive)))
    }
}
