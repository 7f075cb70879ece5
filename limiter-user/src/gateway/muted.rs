//! The client's socket as the HTTP library has it, which is not to answer on its own.
//!
//! What it can't parse it refuses with a status and no body. Here that is held back, and the status kept: the client gets an
//! answer of ours, with a body as every other refusal has one.

use std::{
    io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};

use hyper::StatusCode;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{connection::Answered, socket::Socket};

/// Where the status begins and ends in `HTTP/1.1 400 Bad Request`.
const STATUS: std::ops::Range<usize> = 9..12;

/// Takes what is written until the request is answered by us, and sends what is written after.
pub(super) struct Muted {
    socket: Socket,
    answered: Arc<Mutex<Answered>>,
    /// Of the answer that was held back.
    status: Option<StatusCode>,
}

impl Muted {
    pub(super) fn new(socket: Socket, answered: Arc<Mutex<Answered>>) -> Self {
        Self { socket, answered, status: None }
    }

    /// The socket, and the status that the library would have answered with, if it would have.
    pub(super) fn into_parts(self) -> (Socket, Option<StatusCode>) {
        (self.socket, self.status)
    }

    fn is_muted(&self) -> bool {
        matches!(*self.answered.lock().unwrap_or_else(PoisonError::into_inner), Answered::Nothing)
    }
}

impl AsyncRead for Muted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_read(cx, buf)
    }
}

impl AsyncWrite for Muted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.is_muted() {
            if self.status.is_none() {
                self.status = buf.get(STATUS).and_then(|digits| StatusCode::from_bytes(digits).ok());
            }
            return Poll::Ready(Ok(buf.len()));
        }
        Pin::new(&mut self.socket).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}
