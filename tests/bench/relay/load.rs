//! Clients and upstream. They write frames that were made before and count the bytes of what comes back, so that two of
//! them keep a proxy busy from one CPU.

use std::{io, net::SocketAddr};

use anyhow::{Context as _, Result, ensure};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
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

/// Keeps this thread, and those that it starts from now on, to one CPU.
pub fn pin_to(cpu: usize) -> Result<()> {
    // SAFETY: a set of CPUs is bits, for which zero is a value; CPU_SET checks the index, and the size is that of the set.
    let done = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set) == 0
    };
    ensure!(done, "cannot keep to CPU {cpu}, and the proxies take another: {}", io::Error::last_os_error());
    Ok(())
}

/// A client after its handshake.
pub struct Client(pub TcpStream);

impl Client {
    pub async fn connect(proxy: SocketAddr) -> Result<Self> {
        let mut stream = TcpStream::connect(proxy).await?;
        stream.set_nodelay(true)?;
        let request = format!(
            "GET / HTTP/1.1\r\nHost: bench\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: \
             13\r\nSec-WebSocket-Key: {KEY}\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).await?;
        let head = read_head(&mut stream).await?;
        ensure!(head.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&head));
        Ok(Self(stream))
    }

    /// Sends a message and waits until it is back.
    pub async fn echo(&mut self, message: &Message) -> Result<()> {
        self.0.write_all(&message.sent).await?;
        let mut left = message.returned;
        let mut buffer = vec![0; left.min(32 * 1024)];
        while left > 0 {
            let most = left.min(buffer.len());
            let read = self.0.read(&mut buffer[..most]).await?;
            ensure!(read > 0, "the connection ended before the message was back");
            left -= read;
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

async fn echo_one(mut stream: TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    let head = read_head(&mut stream).await?;
    let head = String::from_utf8_lossy(&head);
    let key = head
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("sec-websocket-key"))
        .map(|(_, key)| key.trim())
        .context("no key in the handshake")?;
    let answer = format!(
        "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: {}\r\n\r\n",
        derive_accept_key(key.as_bytes())
    );
    stream.write_all(answer.as_bytes()).await?;
    let mut received = Vec::new();
    loop {
        // Grown while there is something to read, so that thousands of quiet connections need little.
        stream.readable().await?;
        let before = received.len();
        received.reserve(64 * 1024);
        match stream.try_read_buf(&mut received) {
            Ok(0) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
            Ok(_) => {}
        }
        if received.len() == before {
            continue;
        }
        let mut answer = Vec::with_capacity(received.len());
        let mut at = 0;
        let mut closes = false;
        while let Some((length, closing)) = answer_frame(&received[at..], &mut answer) {
            at += length;
            closes |= closing;
        }
        received.drain(..at);
        if received.is_empty() {
            received = Vec::new();
        }
        stream.write_all(&answer).await?;
        if closes {
            return Ok(());
        }
    }
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
        answer.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
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
