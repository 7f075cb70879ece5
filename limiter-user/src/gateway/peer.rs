//! One end of a session, the client or the upstream, as several futures of one task use it.

use std::{
    future::poll_fn,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::{SinkExt, StreamExt};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{Instant, timeout},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Error, Message, protocol::CloseFrame},
};

/// Least speed at which a peer must take a message, in bytes per second; on top of the timeout that holds for every
/// message. Below it a peer is a slow consumer.
const MIN_SPEED: f64 = 16.0 * 1024.0;

/// A WebSocket that one future reads while another writes. Both are of the same task, so the lock is always free.
pub(super) struct Peer<S> {
    inner: Mutex<Inner<S>>,
    send_timeout: Duration,
}

struct Inner<S> {
    socket: WebSocketStream<S>,
    /// When a message last went either way.
    last_message: Instant,
}

/// What a peer sends, but for pings and pongs.
pub(super) enum Received {
    /// Text or binary.
    Message(Message),
    /// It closes.
    Close(Option<CloseFrame>),
}

/// Why nothing more is received.
pub(super) enum ReceiveError {
    /// The peer sends pings and does not take the pongs.
    Slow,
    /// The connection ended, or what it carries is no WebSocket.
    Broken(Error),
}

/// Why a peer can't be sent to.
pub(super) enum SendError {
    /// It does not take what it is sent.
    Slow,
    /// The connection is closed or broken; the reading side says how.
    Broken,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Peer<S> {
    /// A peer that may take `send_timeout`, and a little more for a long one, to take a message.
    pub(super) fn new(socket: WebSocketStream<S>, send_timeout: Duration) -> Self {
        Self { inner: Mutex::new(Inner { socket, last_message: Instant::now() }), send_timeout }
    }

    /// The next message, or the peer's Close. Pings are answered on the way, and no faster than the peer takes the answers:
    /// one that pings without reading would else fill our memory with pongs.
    pub(super) async fn receive(&self) -> Result<Received, ReceiveError> {
        loop {
            match poll_fn(|cx| self.lock().socket.poll_next_unpin(cx)).await {
                Some(Ok(message @ (Message::Text(_) | Message::Binary(_)))) => {
                    self.lock().last_message = Instant::now();
                    return Ok(Received::Message(message));
                }
                Some(Ok(Message::Close(frame))) => return Ok(Received::Close(frame)),
                Some(Ok(Message::Ping(_))) => {
                    // Any other failure is found by the next read, with its cause.
                    if timeout(self.send_timeout, self.flush()).await.is_err() {
                        return Err(ReceiveError::Slow);
                    }
                }
                Some(Ok(Message::Pong(_) | Message::Frame(_))) => {}
                Some(Err(e)) => return Err(ReceiveError::Broken(e)),
                None => return Err(ReceiveError::Broken(Error::ConnectionClosed)),
            }
        }
    }

    /// Sends a message and waits until the kernel has it.
    pub(super) async fn send(&self, message: Message) -> Result<(), SendError> {
        #[expect(clippy::cast_precision_loss, reason = "a length in bytes is far below 2^53")]
        let allowance = Duration::from_secs_f64(message.len() as f64 / MIN_SPEED);
        let sending = async {
            // Empty the buffer first, so that it always has room for a whole message.
            self.flush().await?;
            self.enqueue(message)?;
            self.flush().await
        };
        match timeout(self.send_timeout + allowance, sending).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(SendError::Broken),
            Err(_) => Err(SendError::Slow),
        }
    }

    fn enqueue(&self, message: Message) -> Result<(), Error> {
        let mut inner = self.lock();
        if message.is_text() || message.is_binary() {
            inner.last_message = Instant::now();
        }
        inner.socket.start_send_unpin(message)
    }

    async fn flush(&self) -> Result<(), Error> {
        poll_fn(|cx| self.lock().socket.poll_flush_unpin(cx)).await
    }

    /// When a message last went either way.
    pub(super) fn last_message(&self) -> Instant {
        self.lock().last_message
    }

    /// Looks at the transport.
    pub(super) fn transport<T>(&self, look: impl FnOnce(&S) -> T) -> T {
        look(self.lock().socket.get_ref())
    }

    pub(super) fn into_socket(self) -> WebSocketStream<S> {
        self.inner.into_inner().unwrap_or_else(PoisonError::into_inner).socket
    }

    fn lock(&self) -> MutexGuard<'_, Inner<S>> {
        // A panic in the middle of a frame ends the task, and with it all users of the lock.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
