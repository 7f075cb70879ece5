//! What stands behind the gateway.

use hyper::{header::HeaderValue, http::request::Parts};
use tokio::{net::TcpStream, time::Instant};
use tokio_tungstenite::WebSocketStream;

use super::{
    answer::Refusal,
    handshake::Handshake,
    listen::BindError,
    messages,
    relay::{Client, Relay},
};
use crate::config::{self, Upstream};

/// Who answers the clients.
pub(super) enum Application {
    /// The gateway itself, which sends each message back.
    Echo,
    /// A WebSocket server.
    Relay(Relay),
}

/// The application's side of one session.
pub(super) enum Opened {
    Echo,
    Relay(Box<WebSocketStream<TcpStream>>),
}

impl Application {
    pub(super) fn new(upstream: &Upstream) -> Result<Self, BindError> {
        match upstream {
            Upstream::Echo => Ok(Self::Echo),
            Upstream::Relay(url) => match Relay::new(url) {
                Ok(relay) => Ok(Self::Relay(relay)),
                Err(problem) => Err(BindError::Upstream { url: url.clone(), problem }),
            },
        }
    }

    pub(super) fn is_relay(&self) -> bool {
        matches!(self, Self::Relay(_))
    }

    /// Makes the application's side ready before the client is told that it is in; with the subprotocol it chose.
    pub(super) async fn open(
        &self,
        head: &Parts,
        handshake: &Handshake,
        client: Client,
        limits: &config::Messages,
        deadline: Instant,
    ) -> Result<(Opened, Option<HeaderValue>), Refusal> {
        match self {
            Self::Echo => Ok((Opened::Echo, None)),
            Self::Relay(relay) => {
                let config = messages::upstream_config(limits);
                let (socket, protocol) = relay.connect(head, handshake, client, config, deadline).await?;
                Ok((Opened::Relay(Box::new(socket)), protocol))
            }
        }
    }
}
