//! The bytes' way to a client: TCP, or a unix socket.

use std::{
    io,
    mem::MaybeUninit,
    pin::Pin,
    task::{Context, Poll, ready},
};

use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::{TcpStream, UnixStream},
};

/// An accepted connection of either kind.
#[derive(Debug)]
pub(super) enum Wire {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Wire {
    /// What comes next, without taking it; 0: the end.
    pub(super) async fn peek(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let unix = match self {
            Self::Tcp(stream) => return stream.peek(buffer).await,
            Self::Unix(unix) => unix,
        };
        // A read of the kernel writes initialised bytes only, so these stay what they are.
        let mut seen = vec![MaybeUninit::uninit(); buffer.len()];
        loop {
            unix.readable().await?;
            match unix.try_io(Interest::READABLE, || SockRef::from(unix).peek(&mut seen)) {
                Ok(length) => {
                    for (byte, seen) in buffer.iter_mut().zip(&seen[..length]) {
                        // SAFETY: the kernel has written the first `length` bytes.
                        *byte = unsafe { seen.assume_init() };
                    }
                    return Ok(length);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Takes what is there.
    pub(super) fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.try_read(buffer),
            Self::Unix(stream) => stream.try_read(buffer),
        }
    }

    /// Has TCP hold back what is written until a packet is full, the connection ends or a fifth of a second is over.
    pub(super) fn hold_back(&self) {
        if let Self::Tcp(stream) = self {
            // It only saves packets.
            _ = SockRef::from(stream).set_tcp_cork(true);
        }
    }

    /// Writes what is followed by the end of the connection at once, so that TCP has both in one packet.
    pub(super) fn poll_write_last(&self, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let send = |socket: SockRef<'_>| socket.send_vectored_with_flags(bufs, libc::MSG_MORE | libc::MSG_NOSIGNAL);
        loop {
            let written = match self {
                Self::Tcp(stream) => {
                    ready!(stream.poll_write_ready(cx))?;
                    stream.try_io(Interest::WRITABLE, || send(stream.into()))
                }
                Self::Unix(stream) => {
                    ready!(stream.poll_write_ready(cx))?;
                    stream.try_io(Interest::WRITABLE, || send(stream.into()))
                }
            };
            match written {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                written => return Poll::Ready(written),
            }
        }
    }
}

impl From<TcpStream> for Wire {
    fn from(stream: TcpStream) -> Self {
        Self::Tcp(stream)
    }
}

impl AsyncRead for Wire {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Wire {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Self::Unix(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Self::Unix(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Tcp(stream) => stream.is_write_vectored(),
            Self::Unix(stream) => stream.is_write_vectored(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::poll_fn,
        time::{Duration, Instant},
    };

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn what_is_peeked_at_is_there_still() {
        let (mut client, server) = UnixStream::pair().unwrap();
        let mut wire = Wire::Unix(server);
        client.write_all(b"PROXY").await.unwrap();
        let mut seen = [0; 3];
        assert_eq!(wire.peek(&mut seen).await.unwrap(), 3);
        assert_eq!(&seen, b"PRO");
        assert_eq!(wire.try_read(&mut seen[..2]).unwrap(), 2);
        let mut rest = [0; 3];
        wire.read_exact(&mut rest).await.unwrap();
        assert_eq!(&rest, b"OXY");
        drop(client);
        assert_eq!(wire.peek(&mut seen).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn what_is_written_last_leaves_with_the_end() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let wire = Wire::Tcp(listener.accept().await.unwrap().0);
        let began = Instant::now();
        for part in [b"so", b"ng"] {
            let written = poll_fn(|cx| wire.poll_write_last(cx, &[io::IoSlice::new(part)])).await;
            assert_eq!(written.unwrap(), 2);
        }
        let early = SockRef::from(&client).peek(&mut [MaybeUninit::uninit(); 4]);
        // It waits for a fifth of a second at most.
        assert!(early.is_err() || began.elapsed() > Duration::from_millis(100), "{early:?}");
        drop(wire);
        let mut all = String::new();
        client.read_to_string(&mut all).await.unwrap();
        assert_eq!(all, "song");
    }
}
