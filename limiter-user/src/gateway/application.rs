//! What stands behind the gateway.

use hyper::{header::HeaderValue, http::request::Parts};
use tokio::time::Instant;

use super::{
    answer::Refusal,
    handshake::Handshake,
    push::LONGEST_ROOM,
    route::{self, Route},
    upstream::{Client, Connected, Reach, Upstreams},
};
use crate::config;

/// Who answers the clients.
pub(super) enum Application {
    /// The gateway itself, which sends each message back.
    Echo,
    /// The gateway itself, which sends each message to the others in the room.
    Broadcast,
    /// One of some WebSocket servers.
    Relay(Upstreams),
}

/// The application's side of one session.
pub(super) enum Opened {
    Echo,
    /// With the name of the room.
    Broadcast(String),
    Relay(Connected),
}

impl Application {
    pub(super) fn new(upstream: &config::Upstream, reach: &Reach) -> Self {
        match upstream {
            config::Upstream::Echo => Self::Echo,
            config::Upstream::Broadcast => Self::Broadcast,
            config::Upstream::Relay(targets) => Self::Relay(Upstreams::new(targets, reach)),
        }
    }

    /// Makes the application's side ready before the client is told that it is in; with the subprotocol it chose.
    ///
    /// `route` is the one that it is on.
    pub(super) async fn open(
        &self,
        route: &Route,
        head: &Parts,
        handshake: &Handshake,
        client: Client,
        deadline: Instant,
    ) -> Result<(Opened, Option<HeaderValue>), Refusal> {
        match self {
            Self::Echo => Ok((Opened::Echo, None)),
            Self::Broadcast => Ok((Opened::Broadcast(room(route, head.uri.path())?), None)),
            Self::Relay(upstreams) => {
                let (connected, protocol) = upstreams.connect(head, handshake, client, deadline).await?;
                Ok((Opened::Relay(connected), protocol))
            }
        }
    }
}

/// The name of a room as clients ask for it, from how somebody writes it: "/path", or "host/path" where a route is for one host.
/// `None`: no room can have that name.
pub fn room_name(text: &str) -> Option<String> {
    let (host, path) = text.split_at(text.find('/')?);
    let name = format!("{}{}", host.to_ascii_lowercase(), route::plain(path)?);
    (name.len() <= LONGEST_ROOM).then_some(name)
}

/// The room of a path: there must not be two ways to ask for the same one. Where a route is for one host only, so are its rooms.
fn room(route: &Route, path: &str) -> Result<String, Refusal> {
    let path = route::plain(path).ok_or(Refusal::Bad("the path can be read in more than one way"))?;
    let room = format!("{}{path}", route.host().unwrap_or_default());
    if room.len() > LONGEST_ROOM {
        return Err(Refusal::Bad("the path is longer than the name of a room may be"));
    }
    Ok(room)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_room_is_named_as_clients_ask_for_it() {
        for (text, name) in [
            ("/", Some("/")),
            ("/caf%C3%A9", Some("/café")),
            ("/café/", Some("/café/")),
            ("Chat.example/a", Some("chat.example/a")),
            ("", None),
            ("lobby", None),
            ("/a/../b", None),
            ("/a%2fb", None),
        ] {
            assert_eq!(room_name(text).as_deref(), name, "{text}");
        }
        assert!(room_name(&format!("/{}", "x".repeat(LONGEST_ROOM))).is_none());
    }
}
