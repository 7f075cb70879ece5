//! A WebSocket session: messages one way and the other, until something ends it.

use std::{
    future::poll_fn,
    net::{IpAddr, SocketAddr},
    pin::pin,
    sync::Arc,
    task::Poll,
    time::Duration,
};

use tokio::time::Instant;

use super::{
    Shared,
    admission::Permit,
    application::Opened,
    auth::Member,
    builtin::{self, BuiltIn},
    close::End,
    connection::Accepted,
    drain::Witness,
    messages::Inbound,
    metrics::OpenSession,
    relay::{self, Relay},
    route::OnRoute,
    socket::Socket,
    turns::{self, Turns, Way},
};

/// What a session begins with. Boxed, and taken apart by a function that ends before the session waits for anything: what is moved
/// out of a future's variable still takes room in it, and a box that is moved out of is kept to the end of its scope.
pub(super) struct Established {
    pub(super) socket: Socket,
    /// What the client sent right after its handshake.
    pub(super) early: Vec<u8>,
    pub(super) accepted: Accepted,
    /// When the connection was accepted.
    pub(super) since: Instant,
}

/// What a session gives back at its end.
struct Held<'a> {
    who: Who,
    permit: Permit,
    open: OpenSession<'a>,
    witness: Witness<'a>,
    place: OnRoute,
}

impl Held<'_> {
    /// The client's socket is closed: whoever gets the slot doesn't find it still taken in the kernel.
    fn release(self, agreed: bool) {
        let Self { who, permit, open, mut witness, place } = self;
        if agreed {
            witness.closed();
        }
        drop((witness, open, permit, place, who));
    }
}

/// All that a quiet session keeps, in one piece.
pub(super) struct Session<T, H> {
    pub(super) turns: T,
    /// What is given back at its end.
    pub(super) held: H,
}

enum Begun<'a> {
    Relay(Box<Session<Relay<'a>, Held<'a>>>),
    BuiltIn(Box<Session<BuiltIn<'a>, Held<'a>>>),
}

/// Serves a client to the end of the session and closes both sides.
pub(super) async fn run(established: Box<Established>, shared: &Arc<Shared>) {
    match begin(established, shared) {
        Begun::Relay(mut session) => {
            let end = last(&mut session, shared).await;
            // Boxed, because the room is needed only now.
            Box::pin(relay::close(session, &end, shared.config.drain_timeout, Held::release)).await;
        }
        Begun::BuiltIn(mut session) => {
            let end = last(&mut session, shared).await;
            Box::pin(async move {
                let Session { turns: built_in, held } = *session;
                let agreed = built_in.close(&end, shared.config.drain_timeout).await;
                held.release(agreed);
            })
            .await;
        }
    }
}

fn begin(established: Box<Established>, shared: &Shared) -> Begun<'_> {
    let Established { socket, early, accepted, since } = *established;
    let Accepted { client: address, permit, user, application, mail, place } = accepted;
    let config = shared.routes.settings_of(&place);
    let open = shared.metrics.session_opened(since.elapsed());
    let inbound = Inbound::new(shared, &place, address, user.as_deref());
    let who = Who { address, user };
    let held = Held { who, permit, open, witness: shared.drain.session(), place };
    let built_in = match application {
        Opened::Relay(upstream) => {
            let turns = Relay::new(socket, early, upstream, mail, inbound, config, shared);
            return Begun::Relay(Box::new(Session { turns, held }));
        }
        Opened::Echo => builtin::Application::Echo,
        Opened::Broadcast(_) => builtin::Application::Room,
    };
    let turns = BuiltIn::new(built_in, socket, early, mail, inbound, config, shared);
    Begun::BuiltIn(Box::new(Session { turns, held }))
}

/// How long it goes on, and why it ends. What waits here is all that a quiet session has beside [`Session`], and `select!` would
/// keep some of it twice.
async fn last<T: Turns>(session: &mut Session<T, Held<'_>>, shared: &Shared) -> End {
    let Session { turns, held } = session;
    let end = {
        let mut drain = pin!(shared.drain.turn());
        let mut alarm = pin!(turns::alarm());
        let mut way = Way::default();
        // Boxed, so that it takes no room in the sessions of those who need not show who they are.
        let mut lapse = match (held.who.user.as_deref(), &shared.auth) {
            (Some(user), Some(auth)) => Some(Box::pin(auth.lapse(user))),
            _ => None,
        };
        poll_fn(|cx| {
            if drain.as_mut().poll(cx).is_ready() {
                return Poll::Ready(End::Draining);
            }
            match lapse.as_mut().map(|lapse| lapse.as_mut().poll(cx)) {
                Some(Poll::Ready(end)) => Poll::Ready(end),
                Some(Poll::Pending) | None => turns::poll(turns, cx, &mut way, alarm.as_mut()),
            }
        })
        .await
    };
    ends(&end, held, turns.remote(), shared);
    end
}

fn ends(end: &End, held: &mut Held<'_>, remote: SocketAddr, shared: &Shared) {
    held.open.ends(end.label());
    log(end, &held.who, remote, held.open.lasted(), shared);
}

/// Who is at the other end of a session.
struct Who {
    address: IpAddr,
    /// `None` where anybody may connect. Boxed, because there it should take no room.
    user: Option<Box<Member>>,
}

fn log(end: &End, who: &Who, remote: SocketAddr, lasted: Duration, shared: &Shared) {
    let reason = end.label();
    let Who { address, user } = who;
    let user = user.as_deref().map(Member::user);
    tracing::debug!(client = %address, %remote, user, reason, ?lasted, "session ends");
    if end.is_abuse()
        && let Some(left_out) = shared.log.admit(reason)
    {
        tracing::info!(client = %address, %remote, user, reason, left_out, "session closed for what its client does");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// It is what thousands of quiet connections need; docs/benchmarks.md has the whole.
    #[test]
    fn a_relayed_session_is_small() {
        let size = size_of::<Session<Relay<'_>, Held<'_>>>();
        assert!(size <= 816, "{size} bytes");
    }
}
