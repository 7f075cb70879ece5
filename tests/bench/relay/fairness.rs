//! What one client that floods does to the others.
//!
//! It and whom it floods are tasks beside the others, in the one thread of the load, and leave it to them after every message: what
//! these wait for is the proxy.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    os::fd::AsRawFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use futures_util::future::try_join_all;
use tokio::{
    io::Interest,
    net::{TcpListener, TcpStream},
    task::{JoinHandle, yield_now},
};

use super::{
    COLUMNS, KINDS,
    load::{self, Awake, Client, Message},
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
    let _awake = Awake::keep();
    let sink = Sink::start().await?;
    let mut best: [Option<Measured>; COLUMNS.len()] = [None; COLUMNS.len()];
    for _ in 0..ROUNDS {
        for (kind, best) in KINDS.into_iter().zip(&mut best) {
            eprintln!("{kind:?} …");
            let proxy = Proxy::start(kind, Upstreams { echo: upstream, flood: Some(sink.addr) })?;
            let alone = paced(&proxy).await?;
            let flood = Flood::start(proxy.addr).await?;
            // Once it is under way.
            sink.wait_for(1_000_000).await?;
            let (before, began) = (sink.taken(), Instant::now());
            let flooded = paced(&proxy).await?;
            let passed = (sink.taken() - before) as f64 / began.elapsed().as_secs_f64() / 1e6;
            drop(flood);
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

/// A client that sends as fast as it can; until it is dropped.
struct Flood(JoinHandle<()>);

impl Flood {
    async fn start(proxy: SocketAddr) -> Result<Self> {
        let mut client = Client::connect_to(proxy, "/flood").await?;
        let message = Message::new(16 * 1024);
        Ok(Self(tokio::spawn(async move {
            // When the proxy takes no more of it, its time is over.
            while client.send(&message).await.is_ok() {
                yield_now().await;
            }
        })))
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A server that throws away what it gets.
struct Sink {
    addr: SocketAddr,
    taken: Arc<AtomicU64>,
}

impl Sink {
    async fn start() -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let (addr, taken) = (listener.local_addr()?, Arc::new(AtomicU64::new(0)));
        let counter = Arc::clone(&taken);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let counter = Arc::clone(&counter);
                tokio::spawn(async move {
                    // One that looks whether somebody is there asks for nothing.
                    if let Ok(stream) = load::accept(stream).await {
                        _ = discard(&stream, &counter).await;
                    }
                });
            }
        });
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
async fn discard(stream: &TcpStream, counter: &AtomicU64) -> io::Result<()> {
    loop {
        let taken = stream.async_io(Interest::READABLE, || {
            // SAFETY: with MSG_TRUNC, TCP writes nothing to the buffer (tcp(7)), so there need be none.
            let taken = unsafe { libc::recv(stream.as_raw_fd(), std::ptr::null_mut(), 1 << 20, libc::MSG_TRUNC) };
            u64::try_from(taken).map_err(|_| io::Error::last_os_error())
        });
        match taken.await? {
            0 => return Ok(()),
            taken => counter.fetch_add(taken, Ordering::Relaxed),
        };
        yield_now().await;
    }
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
