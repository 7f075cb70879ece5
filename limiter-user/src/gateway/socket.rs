//! An accepted socket, which tells the policy when it is gone.

use std::{
    future::poll_fn,
    io,
    mem::MaybeUninit,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf},
    time::{Instant, timeout},
};
use tokio_rustls::{
    TlsAcceptor,
    server::{FallibleAccept, TlsStream},
};

use super::wire::Wire;
use crate::policy::{Accepted, Connection, Policy};

/// The socket of a client. Whoever drops it, for whatever reason, ends the connection: the policy is told and then the
/// descriptor is closed. So it can't be told twice, nor forgotten.
pub(super) struct Socket {
    // Before `transport`: fields are dropped in this order.
    accepted: Accepted,
    transport: Transport,
    last_read: Instant,
}

/// What the bytes go through. Boxed where it is large: most of the room of a TLS session is elsewhere anyway.
enum Transport {
    Plain(Wire),
    /// What is written is the last.
    Ending(Wire),
    /// In the TLS handshake; nothing is read or written meanwhile.
    Handshake(Box<FallibleAccept<Wire>>),
    Tls(Box<TlsStream<Wire>>),
    /// Between two of the others.
    Gone,
}

impl Socket {
    /// Takes over what was accepted from `remote` by the listener at `listener`.
    pub(super) fn new(wire: Wire, remote: SocketAddr, listener: SocketAddr, policy: Arc<dyn Policy>) -> Self {
        let accepted = match &wire {
            Wire::Tcp(stream) => Accepted::new(stream, remote, listener, policy),
            Wire::Unix(stream) => Accepted::local(stream, listener, policy),
        };
        Self { accepted, transport: Transport::Plain(wire), last_read: Instant::now() }
    }

    pub(super) fn connection(&self) -> &Connection {
        self.accepted.connection()
    }

    /// The connection below whatever is spoken on it.
    ///
    /// # Panics
    /// During the TLS handshake.
    pub(super) fn wire(&self) -> &Wire {
        match &self.transport {
            Transport::Plain(stream) | Transport::Ending(stream) => stream,
            Transport::Tls(stream) => stream.get_ref().0,
            Transport::Handshake(_) | Transport::Gone => unreachable!("`secure` has the socket to itself"),
        }
    }

    /// Makes the TLS handshake, in place: whoever gives up on it still ends the connection in the right order. After a
    /// failure the socket is a plain one again.
    pub(super) async fn secure(&mut self, acceptor: &TlsAcceptor) -> io::Result<()> {
        match std::mem::replace(&mut self.transport, Transport::Gone) {
            Transport::Plain(stream) => {
                self.transport = Transport::Handshake(Box::new(acceptor.accept(stream).into_fallible()));
            }
            other => {
                self.transport = other;
                return Err(io::Error::other("the socket speaks TLS already"));
            }
        }
        let shaken = poll_fn(|cx| match &mut self.transport {
            Transport::Handshake(accept) => Pin::new(accept.as_mut()).poll(cx),
            _ => unreachable!("it was put there above, and nobody else has the socket"),
        });
        match shaken.await {
            Ok(stream) => {
                self.transport = Transport::Tls(Box::new(stream));
                self.last_read = Instant::now();
                Ok(())
            }
            Err((error, stream)) => {
                self.transport = Transport::Plain(stream);
                Err(error)
            }
        }
    }

    /// Says in TLS, if that is spoken, that nothing more comes; a client could else take the end for an attack.
    pub(super) async fn end_tls(&mut self) -> io::Result<()> {
        match &mut self.transport {
            Transport::Tls(stream) => stream.shutdown().await,
            _ => Ok(()),
        }
    }

    /// From here on whatever is written is soon followed by the end of the connection: it leaves together with that, or when a fifth
    /// of a second is over.
    pub(super) fn ends_soon(&mut self) {
        self.transport = match std::mem::replace(&mut self.transport, Transport::Gone) {
            Transport::Plain(wire) => Transport::Ending(wire),
            Transport::Tls(stream) => {
                // TLS writes by itself, its own end among it, so the kernel is told once for all of it.
                stream.get_ref().0.hold_back();
                Transport::Tls(stream)
            }
            other => other,
        };
    }

    /// When the client was last heard of: any byte counts.
    pub(super) fn last_read(&self) -> Instant {
        self.last_read
    }

    /// Sends all of it.
    pub(super) async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write_all(bytes).await?;
        self.flush().await
    }

    /// Says the last that there is to say, and ends the connection so that it arrives. Either may take `patience`.
    pub(super) async fn end_with(mut self, last: &[u8], patience: Duration) {
        self.ends_soon();
        if let Ok(Ok(())) = timeout(patience, self.send(last)).await {
            self.linger(patience).await;
        }
    }

    /// Ends the connection so that what was written arrives: closing a socket with unread data would make the kernel
    /// send RST, at which the client forgets the Close frame or HTTP answer that it has not read yet. So our side is shut,
    /// and what the client still sends is read and thrown away until it closes too, or `patience` is over.
    pub(super) async fn linger(mut self, patience: Duration) {
        _ = timeout(patience, async {
            self.shutdown().await?;
            // Whatever it is, it need not be decrypted.
            let stream = match &mut self.transport {
                Transport::Plain(stream) | Transport::Ending(stream) => stream,
                Transport::Tls(stream) => stream.get_mut().0,
                Transport::Handshake(_) | Transport::Gone => return Err(not_ready()),
            };
            poll_fn(|cx| poll_discard(stream, cx)).await
        })
        .await;
    }
}

/// Reads to the end and throws it away. The buffer is on the stack: in the future it would be there for each of thousands that are
/// closed together.
fn poll_discard(stream: &mut Wire, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
    let mut buffer = [const { MaybeUninit::uninit() }; 4096];
    loop {
        let mut discarded = ReadBuf::uninit(&mut buffer);
        ready!(Pin::new(&mut *stream).poll_read(cx, &mut discarded))?;
        if discarded.filled().is_empty() {
            return Poll::Ready(Ok(()));
        }
    }
}

fn not_ready() -> io::Error {
    io::Error::new(io::ErrorKind::NotConnected, "in the TLS handshake")
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = match &mut self.transport {
            Transport::Plain(stream) | Transport::Ending(stream) => Pin::new(stream).poll_read(cx, buf),
            Transport::Tls(stream) => match Pin::new(stream.as_mut()).poll_read(cx, buf) {
                // Without TLS having said so. Many clients end like that, and WebSocket has an end of its own, the Close frame,
                // whose lack is noticed.
                Poll::Ready(Err(e)) if e.kind() == io::ErrorKind::UnexpectedEof => Poll::Ready(Ok(())),
                polled => polled,
            },
            Transport::Handshake(_) | Transport::Gone => Poll::Ready(Err(not_ready())),
        };
        if buf.filled().len() > before {
            self.last_read = Instant::now();
        }
        polled
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.transport {
            Transport::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Transport::Ending(stream) => stream.poll_write_last(cx, &[io::IoSlice::new(buf)]),
            Transport::Tls(stream) => Pin::new(stream.as_mut()).poll_write(cx, buf),
            Transport::Handshake(_) | Transport::Gone => Poll::Ready(Err(not_ready())),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.transport {
            Transport::Plain(stream) | Transport::Ending(stream) => Pin::new(stream).poll_flush(cx),
            Transport::Tls(stream) => Pin::new(stream.as_mut()).poll_flush(cx),
            Transport::Handshake(_) | Transport::Gone => Poll::Ready(Err(not_ready())),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.transport {
            Transport::Plain(stream) | Transport::Ending(stream) => Pin::new(stream).poll_shutdown(cx),
            Transport::Tls(stream) => Pin::new(stream.as_mut()).poll_shutdown(cx),
            Transport::Handshake(_) | Transport::Gone => Poll::Ready(Err(not_ready())),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.transport {
            Transport::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Transport::Ending(stream) => stream.poll_write_last(cx, bufs),
            Transport::Tls(stream) => Pin::new(stream.as_mut()).poll_write_vectored(cx, bufs),
            Transport::Handshake(_) | Transport::Gone => Poll::Ready(Err(not_ready())),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.transport {
            Transport::Plain(stream) => stream.is_write_vectored(),
            Transport::Ending(_) => true,
            Transport::Tls(stream) => stream.is_write_vectored(),
            Transport::Handshake(_) | Transport::Gone => false,
        }
    }
}
