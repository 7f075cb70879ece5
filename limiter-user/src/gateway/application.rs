//! What stands behind the gateway.

use hyper::{header::HeaderValue, http::request::Parts};
use tokio::time::Instant;

use super::{
    answer::Refusal,
    handshake::Handshake,
    listen::BindError,
    upstream::{Client, Connected, Upstream},
};
use crate::config;

/// Who answers the clients.
pub(super) enum Application {
    /// The gateway itself, which sends each message back.
    Echo,
    /// A WebSocket server.
    Relay(Upstream),
}

/// The application's side of one session.
pub(super) enum Opened {
    Echo,
    Relay(Connected),
}

impl Application {
    pub(super) fn new(upstream: &config::Upstream) -> Result<Self, BindError> {
        match upstream {
            config::Upstream::Echo => Ok(Self::Echo),
            config::Upstream::Relay(url) => match Upstream::new(url) {
                Ok(upstream) => Ok(Self::Relay(upstream)),
                Err(problem) => Err(BindError::Upstream { url: url.clone(), problem }),
            },
        }
    }

    /// Makes the application's side ready before the client is told that it is in; with the subprotocol it chose.
    pub(super) async fn open(
        &self,
        head: &Parts,
        handshake: &Handshake,
        client: Client,
        deadline: Instant,
    ) -> Result<(Opened, Option<HeaderValue>), Refusal> {
        match self {
            Self::Echo => Ok((Opened::Echo, None)),
            Self::Relay(upstream) => {
                let (connected, protocol) = upstream.connect(head, handshake, client, deadline).await?;
                Ok((Opened::Relay(connected), protocol))
            }
        }
    }
}
