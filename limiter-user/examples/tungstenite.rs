//! An echo server by tokio-tungstenite, with limiter inside:
//!
//!     cargo run --example tungstenite                # its own count alone: 20 connections per source
//!     sudo target/debug/examples/tungstenite eth0    # and the kernel's limits on eth0
//!
//! With the kernel's limits, what is too many never gets a connection, `limiter status` and `limiter limit set` work from
//! another terminal, and all of it is gone when the server ends by Ctrl-C.

use std::sync::Arc;

use anyhow::Context as _;
use futures_util::StreamExt as _;
use limiter::{
    config::{Kernel, Service},
    guard::Guard,
    kernel::Attached,
    policy::{Fixed, Policy},
};
use tokio::net::TcpListener;

const PORT: u16 = 8080;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", PORT)).await.context("can't listen")?;
    let interfaces: Vec<String> = std::env::args().skip(1).collect();
    let attached = if interfaces.is_empty() { None } else { Some(attach(interfaces)?) };
    let policy = match &attached {
        Some(attached) => {
            let (_, policy) = attached.policies()?.into_iter().next().context("one service was attached")?;
            Arc::new(policy) as Arc<dyn Policy>
        }
        None => Arc::new(Fixed::default()),
    };
    let guard = Guard::new(listener, policy)?;
    tokio::select! {
        () = serve(guard) => {}
        signal = tokio::signal::ctrl_c() => signal?,
    }
    match attached {
        // Or leave it: limits and counts stay in force for the next start, which takes them over.
        Some(attached) => Ok(attached.detach()?),
        None => Ok(()),
    }
}

fn attach(interfaces: Vec<String>) -> anyhow::Result<Attached> {
    let service = Service::new("echo", [PORT]);
    let (attached, report) = Attached::attach(&Kernel { interfaces, ..Kernel::default() }, &[service], &[])?;
    for warning in report.warnings {
        eprintln!("{warning}");
    }
    Ok(attached)
}

async fn serve(mut guard: Guard) {
    loop {
        let (stream, guest) = guard.accept().await;
        tokio::spawn(async move {
            if let Err(refused) = guest.admit() {
                eprintln!("{}: {refused}", guest.remote());
                return;
            }
            let Ok(socket) = tokio_tungstenite::accept_async(stream).await else { return };
            let (write, read) = socket.split();
            // The slot comes back here, whatever the client does.
            let _ = read.forward(write).await;
        });
    }
}
