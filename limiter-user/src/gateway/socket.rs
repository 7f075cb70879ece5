//! An accepted socket, which tells the policy when it is gone.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::TcpStream,
    time::{Instant, timeout},
};

use crate::policy::{Connection, Policy};

/// How much the kernel may hold of what was written but not yet sent, in bytes. Without it a slow client has megabytes
/// queued before a ping, and is taken for dead.
const NOT_SENT_LOW_WATER: u32 = 128 * 1024;

/// The socket of a client. Whoever drops it, for whatever reason, ends the connection: the policy is told and then the
/// descriptor is closed. So it can't be told twice, nor forgotten.
pub(super) struct Socket {
    // Before `stream`: fields are dropped in this order.
    over: Over,
    stream: TcpStream,
    last_read: Instant,
}

struct Over {
    policy: Arc<dyn Policy>,
    connection: Connection,
}

impl Drop for Over {
    fn drop(&mut self) {
        self.policy.closed(&self.connection);
    }
}

impl Socket {
    /// Takes over what was accepted from `remote` by the listener at `listener`.
    pub(super) fn new(stream: TcpStream, remote: SocketAddr, listener: SocketAddr, policy: Arc<dyn Policy>) -> Self {
        let options = SockRef::from(&stream);
        let cookie = options.cookie().unwrap_or_else(|e| {
            tracing::warn!(error = %e, "no SO_COOKIE: the ledger entry of this connection waits for the kernel to end it");
            0
        });
        // Both only make things faster or finer; a socket whose client is already gone may refuse them.
        _ = options.set_tcp_nodelay(true);
        _ = options.set_tcp_notsent_lowat(NOT_SENT_LOW_WATER);
        let local = stream.local_addr().unwrap_or(listener);
        let connection = Connection { remote: canonical(remote), local: canonical(local), cookie };
        Self { over: Over { policy, connection }, stream, last_read: Instant::now() }
    }

    pub(super) fn connection(&self) -> &Connection {
        &self.over.connection
    }

    /// The TCP connection, ahead of what is spoken on it.
    pub(super) fn tcp(&self) -> &TcpStream {
        &self.stream
    }

    /// When the client was last heard of: any byte counts.
    pub(super) fn last_read(&self) -> Instant {
        self.last_read
    }

    /// Ends the connection so that what was written arrives: closing a socket with unread data would make the kernel
    /// send RST, at which the client forgets the Close frame or HTTP answer that it has not read yet. So our side is shut,
    /// and what the client still sends is read and thrown away until it closes too, or `patience` is over.
    pub(super) async fn linger(mut self, patience: Duration) {
        _ = timeout(patience, async {
            self.stream.shutdown().await?;
            let mut discarded = [0; 4096];
            while self.stream.read(&mut discarded).await? > 0 {}
            io::Result::Ok(())
        })
        .await;
    }
}

fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        if buf.filled().len() > before {
            self.last_read = Instant::now();
        }
        polled
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
