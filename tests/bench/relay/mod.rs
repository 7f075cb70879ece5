//! The gateway as a WebSocket reverse proxy, beside `HAProxy` and nginx as Debian has them: the same clients, the same
//! upstream, one proxy after the other in each round.
//!
//! Every proxy has one CPU to itself and runs one thread; clients and upstream share another CPU, and a thread. limiter has all
//! its limits on messages on; the others look at no message.

#![expect(clippy::cast_precision_loss, reason = "counts and bytes here are far below 2^53")]

mod cost;
mod fairness;
mod load;
mod proxy;

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::Result;
use tokio::{net::TcpListener, runtime::Builder};

use crate::cpu;
use proxy::{Kind, Proxy, Upstreams};

/// CPUs of the proxy, and of everything else.
const PROXY_CPU: usize = 0;
const LOAD_CPU: usize = 1;

/// CPU per message.
pub fn messages() -> Result<()> {
    with_upstream(cost::messages)
}

/// Rate and CPU of connections that come and go.
pub fn connections() -> Result<()> {
    with_upstream(cost::connections)
}

/// Memory and CPU of connections that are quiet.
pub fn memory() -> Result<()> {
    with_upstream(cost::memory)
}

/// What one client that floods does to the others.
pub fn fairness() -> Result<()> {
    with_upstream(fairness::run)
}

fn with_upstream(section: impl AsyncFnOnce(SocketAddr) -> Result<()>) -> Result<()> {
    proxy::install_missing()?;
    load::raise_descriptor_limit()?;
    cpu::pin_to(LOAD_CPU)?;
    Builder::new_current_thread().enable_all().build()?.block_on(async {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let upstream = listener.local_addr()?;
        tokio::spawn(load::echo(listener));
        section(upstream).await
    })
}

/// Each proxy in turn, started anew.
fn each(upstream: SocketAddr) -> impl Iterator<Item = Result<Proxy>> {
    KINDS.into_iter().map(move |kind| {
        eprintln!("{kind:?} …");
        Proxy::start(kind, Upstreams { echo: upstream, flood: None })
    })
}

/// The proxies, and what they are called. The first is compared with the second.
const KINDS: [Kind; 3] = [Kind::Limiter, Kind::HaProxy, Kind::Nginx];
const COLUMNS: [&str; KINDS.len()] = ["limiter", "HAProxy", "nginx"];
