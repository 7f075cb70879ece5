//! What one client that floods does to the others.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use futures_util::future::try_join_all;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{
    COLUMNS, each,
    load::{Client, Message},
    proxy::Proxy,
};
use crate::table;

const PACED: usize = 16;
const PACE: Duration = Duration::from_millis(10);
const LASTS: Duration = Duration::from_secs(4);

/// How long echoes took.
struct Latency {
    p50: Duration,
    p99: Duration,
}

pub async fn run(upstream: SocketAddr) -> Result<()> {
    let mut rows: Vec<Vec<String>> = Vec::new();
    for (proxy, name) in each(upstream).zip(COLUMNS) {
        let proxy = proxy?;
        let alone = paced(&proxy).await?;
        let client = Client::connect(proxy.addr).await?;
        let flood = tokio::spawn(flood(client));
        let flooded = paced(&proxy).await?;
        flood.abort();
        let micros = |time: Duration| time.as_micros().to_string();
        rows.push(vec![
            name.to_owned(),
            micros(alone.p50),
            micros(flooded.p50),
            format!("{:.1}", flooded.p50.as_secs_f64() / alone.p50.as_secs_f64()),
            micros(alone.p99),
            micros(flooded.p99),
        ]);
    }
    table::print(
        "One client floods",
        &format!(
            "{PACED} clients send a message of 128 B every {PACE:?}, for {LASTS:?} without and as long with another client that \
             sends messages of 16 KiB as fast as they are taken. How long their echoes take, in microseconds."
        ),
        &["proxy", "p50 alone", "p50 flooded", "times", "p99 alone", "p99 flooded"],
        &rows,
    );
    Ok(())
}

/// Sends without waiting for what comes back, which is read and thrown away.
async fn flood(client: Client) -> Result<()> {
    let message = Message::new(16 * 1024);
    let (mut read, mut write) = client.0.into_split();
    let discard = async {
        let mut buffer = vec![0; 256 * 1024];
        while read.read(&mut buffer).await? > 0 {}
        anyhow::Ok(())
    };
    let send = async {
        loop {
            write.write_all(&message.sent).await?;
        }
        #[expect(unreachable_code, reason = "gives the block its type")]
        anyhow::Ok(())
    };
    tokio::try_join!(discard, send).map(drop)
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
