//! What one client that floods does to the others.
//!
//! It and whom it floods run only when nobody else on their CPU has anything to do (`SCHED_IDLE`), so what the others wait for is
//! the proxy.

use std::{
    io::{self, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use futures_util::future::try_join_all;

use super::{
    COLUMNS, KINDS,
    load::{self, Client, Message},
    proxy::{Proxy, Upstreams},
};
use crate::table;

const PACED: usize = 16;
const PACE: Duration = Duration::from_millis(10);
const LASTS: Duration = Duration::from_secs(4);
const ROUNDS: usize = 3;

/// How long echoes took.
#[derive(Clone, Copy)]
struct Latency {
    p50: Duration,
    p99: Duration,
}

/// Of one proxy, in the round with the least rise of the p50.
#[derive(Clone, Copy)]
struct Measured {
    alone: Latency,
    flooded: Latency,
    /// Of the flood, in MB per second.
    passed: f64,
}

pub async fn run(upstream: SocketAddr) -> Result<()> {
    let sink = Sink::start()?;
    let mut best: [Option<Measured>; COLUMNS.len()] = [None; COLUMNS.len()];
    for _ in 0..ROUNDS {
        for (kind, best) in KINDS.into_iter().zip(&mut best) {
            eprintln!("{kind:?} …");
            let proxy = Proxy::start(kind, Upstreams { echo: upstream, flood: Some(sink.addr) })?;
            let alone = paced(&proxy).await?;
            let flood = Flood::start(proxy.addr)?;
            // Once it is under way.
            sink.wait_for(1_000_000).await?;
            let (before, began) = (sink.taken(), Instant::now());
            let flooded = paced(&proxy).await?;
            let passed = (sink.taken() - before) as f64 / began.elapsed().as_secs_f64() / 1e6;
            flood.stop()?;
            let result = Measured { alone, flooded, passed };
            if best.is_none_or(|best| result.times() < best.times()) {
                *best = Some(result);
            }
        }
    }
    let rows: Option<Vec<_>> = COLUMNS.into_iter().zip(best).map(|(name, best)| Some(best?.row(name))).collect();
    table::print(
        "One client floods",
        &format!(
            "{PACED} clients send a message of 128 B every {PACE:?} and have it echoed, for {LASTS:?} without and as long with \
             another client that sends messages of 16 KiB to a server that throws them away, as fast as they are taken. How long the \
             echoes take, in microseconds. The round of {ROUNDS} with the least rise of the p50."
        ),
        &["proxy", "p50 alone", "p50 flooded", "times", "p99 alone", "p99 flooded", "flood, MB/s"],
        &rows.context("no round was made")?,
    );
    Ok(())
}

impl Measured {
    fn times(&self) -> f64 {
        self.flooded.p50.as_secs_f64() / self.alone.p50.as_secs_f64()
    }

    fn row(&self, name: &str) -> Vec<String> {
        let micros = |time: Duration| time.as_micros().to_string();
        vec![
            name.to_owned(),
            micros(self.alone.p50),
            micros(self.flooded.p50),
            format!("{:.2}", self.times()),
            micros(self.alone.p99),
            micros(self.flooded.p99),
            format!("{:.0}", self.passed),
        ]
    }
}

/// A client that sends as fast as it can, in a thread of its own.
struct Flood {
    stops: Arc<AtomicBool>,
    thread: JoinHandle<Result<()>>,
}

impl Flood {
    fn start(proxy: SocketAddr) -> Result<Self> {
        let stops = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stops);
        let thread = thread::Builder::new().name("flood".to_owned()).spawn(move || {
            only_when_idle()?;
            let mut stream = TcpStream::connect(proxy)?;
            stream.write_all(load::request("/flood").as_bytes())?;
            let head = read_head(&mut stream)?;
            ensure!(head.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&head));
            let message = Message::new(16 * 1024);
            while !stopped.load(Ordering::Relaxed) {
                stream.write_all(&message.sent)?;
            }
            Ok(())
        })?;
        Ok(Self { stops, thread })
    }

    fn stop(self) -> Result<()> {
        self.stops.store(true, Ordering::Relaxed);
        self.thread.join().ok().context("the flood panicked")?
    }
}

/// A server that throws away what it gets, in a thread of its own for as long as the process lives.
struct Sink {
    addr: SocketAddr,
    taken: Arc<AtomicU64>,
}

impl Sink {
    fn start() -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let (addr, taken) = (listener.local_addr()?, Arc::new(AtomicU64::new(0)));
        let counter = Arc::clone(&taken);
        thread::Builder::new().name("sink".to_owned()).spawn(move || {
            only_when_idle()?;
            for stream in listener.incoming() {
                let mut stream = stream?;
                let head = read_head(&mut stream)?;
                // One that looks whether somebody is there asks for nothing.
                if !head.is_empty() {
                    stream.write_all(load::answer(&head)?.as_bytes())?;
                    discard(&stream, &counter);
                }
            }
            anyhow::Ok(())
        })?;
        Ok(Self { addr, taken })
    }

    fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }

    async fn wait_for(&self, more: u64) -> Result<()> {
        let before = self.taken();
        for _ in 0..500 {
            if self.taken() - before >= more {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        bail!("the flood does not get through")
    }
}

/// Up to the end of the connection. The kernel does not even copy it.
fn discard(stream: &TcpStream, counter: &AtomicU64) {
    loop {
        // SAFETY: with MSG_TRUNC, TCP writes nothing to the buffer (tcp(7)), so there need be none.
        let taken = unsafe { libc::recv(stream.as_raw_fd(), std::ptr::null_mut(), 1 << 20, libc::MSG_TRUNC) };
        match u64::try_from(taken) {
            Ok(taken) if taken > 0 => counter.fetch_add(taken, Ordering::Relaxed),
            _ => return,
        };
    }
}

/// Up to the empty line; or to the end.
fn read_head(stream: &mut TcpStream) -> Result<Vec<u8>> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte)? > 0 {
        head.extend_from_slice(&byte);
    }
    Ok(head)
}

/// Leaves the CPU of this thread to whoever else wants it.
fn only_when_idle() -> Result<()> {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the kernel only reads the structure.
    let done = unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const parameters) } == 0;
    ensure!(done, "cannot give the flood the lowest priority: {}", io::Error::last_os_error());
    Ok(())
}

async fn paced(proxy: &Proxy) -> Result<Latency> {
    let message = Message::new(128);
    let mut clients = try_join_all((0..PACED).map(|_| Client::connect(proxy.addr))).await?;
    let began = Instant::now();
    let taken = try_join_all(clients.iter_mut().enumerate().map(async |(i, client)| {
        let mut taken = Vec::new();
        // Not all at once.
        tokio::time::sleep(PACE.mul_f64(i as f64 / PACED as f64)).await;
        let mut ticks = tokio::time::interval(PACE);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while began.elapsed() < LASTS {
            ticks.tick().await;
            let sent = Instant::now();
            client.echo(&message).await?;
            taken.push(sent.elapsed());
        }
        anyhow::Ok(taken)
    }))
    .await?;
    let mut taken = taken.concat();
    taken.sort_unstable();
    let at = |percent: usize| taken.get(taken.len() * percent / 100).copied().context("no echo came back");
    Ok(Latency { p50: at(50)?, p99: at(99)? })
}
