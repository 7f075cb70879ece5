//! What a message, a connection and a quiet connection cost a proxy.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use futures_util::future::try_join_all;

use super::{
    COLUMNS, each,
    load::{Awake, Client, Message},
    proxy::Proxy,
};
use crate::table;

const ROUNDS: usize = 3;

/// Those that are over in half a second.
const SHORT_ROUNDS: usize = 9;

/// Clients that are busy at the same time.
const BUSY: usize = 16;

/// Connections that are held. Each takes two descriptors of the proxy, which has 20,000.
const HELD: usize = 9_500;

/// How long quiet connections are watched: a ping falls due for each.
const QUIET: Duration = Duration::from_secs(35);

pub async fn messages(upstream: SocketAddr) -> Result<()> {
    let _awake = Awake::keep();
    let mut rows = Vec::new();
    for (name, length, echoes, on_their_way) in
        [("128 B", 128, 8_000, 1), ("16 KiB", 16 * 1024, 6_000, 1), ("16 KiB, four on their way", 16 * 1024, 6_000, 4)]
    {
        let mut best = [f64::INFINITY; COLUMNS.len()];
        for _ in 0..ROUNDS {
            for (proxy, best) in each(upstream).zip(&mut best) {
                *best = best.min(per_million(&proxy?, length, echoes, on_their_way).await?);
            }
        }
        rows.push(row(name, best, 2));
    }
    table::print(
        "A relayed message",
        &format!(
            "CPU seconds per million messages, of {BUSY} clients that each send a message and wait for it to come back, or go on \
             sending. The least of {ROUNDS} rounds."
        ),
        &["message", COLUMNS[0], COLUMNS[1], COLUMNS[2], "of HAProxy"],
        &rows,
    );
    Ok(())
}

/// CPU seconds per million messages, each of which passes once.
async fn per_million(proxy: &Proxy, length: usize, echoes: usize, on_their_way: usize) -> Result<f64> {
    let message = Message::new(length);
    let mut clients = try_join_all((0..BUSY).map(|_| Client::connect(proxy.addr))).await?;
    let before = proxy.cpu()?;
    try_join_all(clients.iter_mut().map(|client| client.stream(&message, echoes, on_their_way))).await?;
    let used = proxy.cpu()?.saturating_sub(before);
    Ok(used.as_secs_f64() / (2 * BUSY * echoes) as f64 * 1e6)
}

pub async fn connections(upstream: SocketAddr) -> Result<()> {
    const EACH: usize = 300;
    let _awake = Awake::keep();
    let message = Message::new(128);
    let mut rates = [0.0_f64; COLUMNS.len()];
    let mut costs = [f64::INFINITY; COLUMNS.len()];
    for _ in 0..SHORT_ROUNDS {
        for ((proxy, rate), cost) in each(upstream).zip(&mut rates).zip(&mut costs) {
            let proxy = proxy?;
            let (before, began) = (proxy.cpu()?, Instant::now());
            try_join_all((0..BUSY).map(async |_| {
                for _ in 0..EACH {
                    let mut client = Client::connect(proxy.addr).await?;
                    client.echo(&message).await?;
                    client.close().await?;
                }
                anyhow::Ok(())
            }))
            .await?;
            let all = (BUSY * EACH) as f64;
            *rate = rate.max(all / began.elapsed().as_secs_f64());
            *cost = cost.min(proxy.cpu()?.saturating_sub(before).as_secs_f64() / all * 1e6);
        }
    }
    table::print(
        "A connection: handshake, one echo, close",
        &format!(
            "{BUSY} clients at a time, each with one connection after the other. The best of {SHORT_ROUNDS} rounds."
        ),
        &["", COLUMNS[0], COLUMNS[1], COLUMNS[2], "of HAProxy"],
        &[row("connections per second", rates, 0), row("CPU per connection, µs", costs, 0)],
    );
    Ok(())
}

pub async fn memory(upstream: SocketAddr) -> Result<()> {
    let (mut idle, mut after, mut quiet) = ([0.0; COLUMNS.len()], [0.0; COLUMNS.len()], [0.0; COLUMNS.len()]);
    for (i, proxy) in each(upstream).enumerate() {
        wait_for_descriptors().await?;
        [idle[i], after[i], quiet[i]] = match held_and_quiet(&proxy?).await {
            Ok(costs) => costs,
            // What the others can't do leaves their column empty.
            Err(error) if i > 0 => {
                eprintln!("{} did not hold so many: {error:#}", COLUMNS[i]);
                [f64::NAN; 3]
            }
            Err(error) => return Err(error),
        };
    }
    table::print(
        "Quiet connections",
        &format!(
            "{HELD} held at once. Memory is what the process has written to (RssAnon) beyond what it had without them."
        ),
        &["", COLUMNS[0], COLUMNS[1], COLUMNS[2], "of HAProxy"],
        &[
            row("KiB per connection, after a message of 128 B", idle, 2),
            row("KiB per connection, after one of 16 KiB", after, 2),
            row("CPU in percent, pings and all (the others send none)", quiet, 2),
        ],
    );
    Ok(())
}

/// KiB per connection after a short and after a long message, and CPU in percent while all are quiet.
async fn held_and_quiet(proxy: &Proxy) -> Result<[f64; 3]> {
    // What is there once, and not per connection, is there before.
    echo_all(&mut hold(proxy, 16).await?, 16 * 1024).await?;
    let empty = proxy.memory()?;
    let mut clients = hold(proxy, HELD).await?;
    echo_all(&mut clients, 128).await?;
    let idle = per_connection(proxy, empty)?;
    echo_all(&mut clients, 16 * 1024).await?;
    let after = per_connection(proxy, empty)?;
    let before = proxy.cpu()?;
    tokio::time::sleep(QUIET).await;
    let quiet = proxy.cpu()?.saturating_sub(before).as_secs_f64() / QUIET.as_secs_f64() * 100.0;
    Ok([idle, after, quiet])
}

/// Waits until the upstream, which shares our descriptors, has closed the connections of the proxy before.
async fn wait_for_descriptors() -> Result<()> {
    for _ in 0..600 {
        if std::fs::read_dir("/proc/self/fd")?.count() < 200 {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    anyhow::bail!("connections of the last proxy are still open after half a minute")
}

async fn hold(proxy: &Proxy, count: usize) -> Result<Vec<Client>> {
    let mut clients = Vec::with_capacity(count);
    // Not all at the same time: it is not the storm that is measured.
    while clients.len() < count {
        let more = BUSY.min(count - clients.len());
        let connected = try_join_all((0..more).map(|_| Client::connect(proxy.addr))).await;
        clients.extend(connected.with_context(|| format!("with {} connections held", clients.len()))?);
    }
    Ok(clients)
}

async fn echo_all(clients: &mut [Client], length: usize) -> Result<()> {
    let message = Message::new(length);
    for some in clients.chunks_mut(BUSY) {
        try_join_all(some.iter_mut().map(|client| client.echo(&message))).await?;
    }
    Ok(())
}

fn per_connection(proxy: &Proxy, empty: u64) -> Result<f64> {
    Ok(proxy.memory()?.saturating_sub(empty) as f64 / HELD as f64 / 1024.0)
}

/// A row of numbers, and how the first compares with the second.
fn row(name: &str, numbers: [f64; COLUMNS.len()], digits: usize) -> Vec<String> {
    let ratio = if numbers[1] > 0.0 { format!("{:.2}", numbers[0] / numbers[1]) } else { "–".to_owned() };
    let numbers =
        numbers.iter().map(|number| if number.is_nan() { "–".to_owned() } else { format!("{number:.digits$}") });
    [name.to_owned()].into_iter().chain(numbers).chain([ratio]).collect()
}
