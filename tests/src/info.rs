//! What a kernel says of a connection of its own (`TCP_INFO`), and data both ways through one.

use std::{
    io::{self, Read, Write},
    mem,
    net::TcpStream,
    os::fd::AsRawFd,
    panic::resume_unwind,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};

/// What both ends of a connection have agreed on, as one of them sees it, and how it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    /// Timestamps.
    pub timestamps: bool,
    /// Selective acknowledgements.
    pub sack: bool,
    /// Explicit congestion notification.
    pub ecn: bool,
    /// By how much the windows are shifted that it hears of, and those that it tells, if any are.
    pub window_scales: Option<(u8, u8)>,
    /// Largest segment that it sends, without its options.
    pub sends_at_most: u32,
    /// How many segments it has sent again.
    pub sent_again: u32,
}

impl Info {
    /// That of one end.
    pub fn of(stream: &TcpStream) -> Result<Self> {
        // SAFETY: an all-zero tcp_info is a valid one.
        let mut info: libc::tcp_info = unsafe { mem::zeroed() };
        let mut length = libc::socklen_t::try_from(mem::size_of_val(&info))?;
        // SAFETY: the descriptor is open; the pointers are to a tcp_info and its length.
        let outcome = unsafe {
            libc::getsockopt(
                stream.as_raw_fd(),
                libc::IPPROTO_TCP,
                libc::TCP_INFO,
                (&raw mut info).cast(),
                &raw mut length,
            )
        };
        ensure!(outcome == 0, "TCP_INFO: {}", io::Error::last_os_error());
        let has = |option: u8| info.tcpi_options & option != 0;
        let scales = (info.tcpi_snd_rcv_wscale & 0x0f, info.tcpi_snd_rcv_wscale >> 4);
        // TCPI_OPT_TIMESTAMPS, TCPI_OPT_SACK, TCPI_OPT_WSCALE and TCPI_OPT_ECN of linux/tcp.h
        Ok(Self {
            timestamps: has(1),
            sack: has(2),
            ecn: has(8),
            window_scales: has(4).then_some(scales),
            sends_at_most: info.tcpi_snd_mss,
            sent_again: info.tcpi_total_retrans,
        })
    }
}

/// Longest that either end waits for the other one.
const PATIENCE: Duration = Duration::from_secs(20);

/// Sends so many bytes through a connection from either end at the same time, and checks that they arrive as they were sent.
pub fn both_ways(ends: [&TcpStream; 2], bytes: usize) -> Result<()> {
    for end in ends {
        end.set_read_timeout(Some(PATIENCE))?;
        end.set_write_timeout(Some(PATIENCE))?;
    }
    thread::scope(|scope| {
        let workers = [(0, 1), (1, 0)].map(|(from, to)| {
            (scope.spawn(move || send(ends[from], from, bytes)), scope.spawn(move || check(ends[to], from, bytes)))
        });
        for (sender, receiver) in workers {
            sender.join().unwrap_or_else(|panic| resume_unwind(panic)).context("sending")?;
            receiver.join().unwrap_or_else(|panic| resume_unwind(panic)).context("receiving")?;
        }
        Ok(())
    })
}

const CHUNK: usize = 64 * 1024;

/// What one end sends, chunk by chunk: never the same twice.
fn chunks(from: usize, bytes: usize) -> impl Iterator<Item = Vec<u8>> {
    let mut random = fastrand::Rng::with_seed(from as u64);
    (0..bytes).step_by(CHUNK).map(move |start| {
        let mut chunk = vec![0; CHUNK.min(bytes - start)];
        random.fill(&mut chunk);
        chunk
    })
}

fn send(mut stream: &TcpStream, from: usize, bytes: usize) -> io::Result<()> {
    chunks(from, bytes).try_for_each(|chunk| stream.write_all(&chunk))
}

fn check(mut stream: &TcpStream, from: usize, bytes: usize) -> Result<()> {
    let mut received = vec![0; CHUNK];
    for (number, chunk) in chunks(from, bytes).enumerate() {
        let received = &mut received[..chunk.len()];
        stream.read_exact(received)?;
        ensure!(*received == chunk, "chunk {number} is not what was sent");
    }
    Ok(())
}
