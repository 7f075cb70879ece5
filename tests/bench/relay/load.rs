//! Clients and upstream. They write frames that were made before and count the bytes of what comes back, and read into memory
//! that they share: together, on one CPU, they need less of it than a proxy between them. One that waits for them would be charged
//! for going to sleep and waking up.

use std::{
    cell::RefCell,
    future::poll_fn,
    io,
    net::SocketAddr,
    pin::Pin,
    task::{Poll, ready},
};

use anyhow::{Context as _, Result, ensure};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadBuf},
    net::{TcpListener, TcpStream},
    task::{JoinHandle, yield_now},
};
use tungstenite::handshake::derive_accept_key;

const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";

/// Lets this process have as many descriptors as it may.
pub fn raise_descriptor_limit() -> Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a whole rlimit, valid for both calls.
    let done = unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 && {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) == 0
        }
    };
    ensure!(done, "cannot raise the limit of descriptors: {}", io::Error::last_os_error());
    Ok(())
}

/// Keeps this thread from going to sleep until it is dropped. On a virtual machine a proxy would else be charged with
/// microseconds for each time that it wakes the CPU of its clients, and the more often, the longer they have to wait for it. In
/// earnest they are on other machines.
pub struct Awake(JoinHandle<()>);

impl Awake {
    pub fn keep() -> Self {
        Self(tokio::spawn(async {
            loop {
                yield_now().await;
            }
        }))
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A client after its handshake.
pub struct Client(TcpStream);

impl Client {
    pub async fn connect(proxy: SocketAddr) -> Result<Self> {
        Self::connect_to(proxy, "/").await
    }

    pub async fn connect_to(proxy: SocketAddr, path: &str) -> Result<Self> {
        let mut stream = TcpStream::connect(proxy).await?;
        stream.set_nodelay(true)?;
        stream.write_all(request(path).as_bytes()).await?;
        let head = read_head(&mut stream).await?;
        ensure!(head.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&head));
        Ok(Self(stream))
    }

    /// Sends a message.
    pub async fn send(&mut self, message: &Message) -> Result<()> {
        Ok(self.0.write_all(&message.sent).await?)
    }

    /// Sends a message and waits until it is back.
    pub async fn echo(&mut self, message: &Message) -> Result<()> {
        self.0.write_all(&message.sent).await?;
        let mut left = message.returned;
        while left > 0 {
            let read = read_some(&mut self.0, <[u8]>::len).await?;
            ensure!(read > 0, "the connection ended before the message was back");
            // A ping of the proxy may have come along.
            left = left.saturating_sub(read);
        }
        Ok(())
    }

    /// Sends so many messages, a few of which are on their way at any time, and waits until all are back.
    pub async fn stream(&mut self, message: &Message, count: usize, on_their_way: usize) -> Result<()> {
        let mut sent = 0;
        let mut back = 0;
        while back < count * message.returned {
            // What is on its way finds room in the buffers between, so whoever is written to always takes it.
            while sent < count && sent < back / message.returned + on_their_way {
                self.0.write_all(&message.sent).await?;
                sent += 1;
            }
            let read = read_some(&mut self.0, <[u8]>::len).await?;
            ensure!(read > 0, "the connection ended before the messages were back");
            back += read;
        }
        Ok(())
    }

    /// Ends the connection in good order.
    pub async fn close(mut self) -> Result<()> {
        self.0.write_all(&[0x88, 0x82, 0, 0, 0, 0, 0x03, 0xe8]).await?;
        let mut answer = [0; 64];
        // Until the end; the Close frame of the answer comes before.
        while self.0.read(&mut answer).await? > 0 {}
        Ok(())
    }
}

/// A client's handshake.
fn request(path: &str) -> String {
    format!(
        "GET {path} HTTP/1.1\r\nHost: bench\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: \
         13\r\nSec-WebSocket-Key: {KEY}\r\n\r\n"
    )
}

/// A server's answer to one.
fn answer(head: &[u8]) -> Result<String> {
    let head = String::from_utf8_lossy(head);
    let key = head
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("sec-websocket-key"))
        .map(|(_, key)| key.trim())
        .context("no key in the handshake")?;
    let accept = derive_accept_key(key.as_bytes());
    Ok(format!(
        "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: {accept}\r\n\r\n"
    ))
}

/// A binary message, as it is sent, and how long it is when it comes back.
pub struct Message {
    pub sent: Vec<u8>,
    returned: usize,
}

impl Message {
    pub fn new(length: usize) -> Self {
        let payload = vec![b'x'; length];
        let (form, extended) = match length {
            0..=125 => (u8::try_from(length).unwrap_or(125), Vec::new()),
            126..=0xffff => (126, u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes().to_vec()),
            _ => (127, (length as u64).to_be_bytes().to_vec()),
        };
        let sent = [&[0x82, 0x80 | form][..], &extended, &[0; 4], &payload].concat();
        Self { returned: 2 + extended.len() + length, sent }
    }
}

/// An upstream: sends each frame back, until the process ends.
pub async fn echo(listener: TcpListener) {
    loop {
        if let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                // One that breaks is the affair of its client.
                _ = echo_one(stream).await;
            });
        }
    }
}

/// Makes the handshake of a server.
pub async fn accept(mut stream: TcpStream) -> Result<TcpStream> {
    stream.set_nodelay(true)?;
    let head = read_head(&mut stream).await?;
    stream.write_all(answer(&head)?.as_bytes()).await?;
    Ok(stream)
}

async fn echo_one(stream: TcpStream) -> Result<()> {
    let mut stream = accept(stream).await?;
    // The beginning of a frame whose rest has not come yet; none most of the time, so thousands of quiet connections need little.
    let mut begun = Vec::new();
    let mut answer = Vec::new();
    loop {
        let closes = read_some(&mut stream, |bytes| {
            if bytes.is_empty() {
                return true;
            }
            let mut at = 0;
            let mut closes = false;
            let all = if begun.is_empty() {
                bytes
            } else {
                begun.extend_from_slice(bytes);
                &begun
            };
            while let Some((length, closing)) = answer_frame(&all[at..], &mut answer) {
                at += length;
                closes |= closing;
            }
            begun = all[at..].to_vec();
            closes
        });
        let closes = closes.await?;
        if !answer.is_empty() {
            stream.write_all(&answer).await?;
            answer = Vec::new();
        }
        if closes {
            return Ok(());
        }
    }
}

thread_local! {
    static SHARED: RefCell<Box<[u8]>> = RefCell::new(vec![0; 64 * 1024].into());
}

/// Waits until something has come, and looks at it; nothing is the end.
async fn read_some<T>(stream: &mut TcpStream, mut look: impl FnMut(&[u8]) -> T) -> Result<T> {
    poll_fn(|cx| {
        SHARED.with_borrow_mut(|buffer| {
            let mut read = ReadBuf::new(buffer);
            ready!(Pin::new(&mut *stream).poll_read(cx, &mut read))?;
            Poll::Ready(Ok(look(read.filled())))
        })
    })
    .await
}

/// Appends the answer to the frame that `bytes` begin with. Gives its length, and whether it was a Close frame; `None` if it
/// is not there whole.
fn answer_frame(bytes: &[u8], answer: &mut Vec<u8>) -> Option<(usize, bool)> {
    let (first, second) = (*bytes.first()?, *bytes.get(1)?);
    let (extended, length) = match second & 0x7f {
        126 => (2, usize::from(u16::from_be_bytes(*bytes.get(2..)?.first_chunk()?))),
        127 => (8, usize::try_from(u64::from_be_bytes(*bytes.get(2..)?.first_chunk()?)).ok()?),
        short => (0, usize::from(short)),
    };
    let start = 2 + extended + 4;
    let payload = bytes.get(start..start + length)?;
    let mask = &bytes[start - 4..start];
    if first & 0x0f != 0x0a {
        let opcode = if first & 0x0f == 0x09 { 0x8a } else { first };
        answer.extend_from_slice(&[opcode, second & 0x7f]);
        answer.extend_from_slice(&bytes[2..2 + extended]);
        let unmasked = answer.len();
        answer.extend_from_slice(payload);
        if *mask != [0; 4] {
            answer[unmasked..].iter_mut().zip(mask.iter().cycle()).for_each(|(byte, mask)| *byte ^= mask);
        }
    }
    Some((start + length, first & 0x0f == 0x08))
}

/// Reads up to the empty line, and no byte of what follows.
async fn read_head(stream: &mut TcpStream) -> Result<Vec<u8>> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut peeked = vec![0; 4096];
        let there = stream.peek(&mut peeked).await?;
        ensure!(there > 0, "the connection ended in its handshake");
        let seen = [&head, &peeked[..there]].concat();
        let whole = seen.windows(4).position(|window| window == b"\r\n\r\n").map(|at| at + 4 - head.len());
        let taken = whole.unwrap_or(there);
        stream.read_exact(&mut peeked[..taken]).await?;
        head.extend_from_slice(&peeked[..taken]);
    }
    Ok(head)
}
