//! An application with limiter inside: the guard over its listener gives slots back to the kernel's ledger.

use std::{net::Ipv6Addr, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use limiter::{
    config::{Kernel, Service},
    guard::Guard,
    kernel::Attached,
    policy::{Limits, Policy},
};
use limiter_tests::{
    both_families,
    lab::{CLIENT_INTERFACE, Family, Lab, PORT},
    limiter::Limiter,
    netns::Namespace,
    tcp::{Crowd, listener},
    wait::{SOON, eventually},
};
use tokio::sync::mpsc;

both_families!(a_dropped_connection_gives_its_slot_back_though_the_client_vanished);

/// Longer than a client waits before it sends its SYN again (1 s), so that retries are part of what is seen.
const PAST_RETRIES: Duration = Duration::from_millis(2500);

/// What the application is told to do.
enum Order {
    DropAll,
    Detach,
}

fn a_dropped_connection_gives_its_slot_back_though_the_client_vanished(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let limiter = Limiter::new(&lab.server)?;
    let kernel = Kernel {
        interfaces: vec![client.server_interface()],
        pin_path: limiter.pin_path().to_owned(),
        ..Kernel::default()
    };
    let (orders, received) = mpsc::unbounded_channel();
    let application = application(&lab.server, kernel, received)?;
    eventually(SOON, "limiter is attached", || Ok(limiter.output(["status"]).is_ok()))?;

    let crowd = Crowd::connect(&client.namespace, client.service(family), 20, PAST_RETRIES)?;
    assert_eq!(limiter.held_by(client.address(family))?, 3, "as many as there may be");
    client.namespace.ip(&format!("link set {CLIENT_INTERFACE} down"))?;
    drop(crowd);
    assert_eq!(limiter.held_by(client.address(family))?, 3, "nobody has told the kernel of an end");
    orders.send(Order::DropAll)?;
    limiter.wait_held(client.address(family), 0)?;
    assert_eq!(limiter.counter("closed_gateway")?, 3, "by the application's word, not by the sockets' end");

    orders.send(Order::Detach)?;
    application.join().map_err(|_| anyhow::anyhow!("the application panicked"))??;
    assert!(limiter.output(["status"]).is_err(), "nothing is left");
    Ok(())
}

/// Accepts whatever comes and holds it, until it is told otherwise.
fn application(
    server: &Namespace,
    kernel: Kernel,
    mut orders: mpsc::UnboundedReceiver<Order>,
) -> Result<std::thread::JoinHandle<Result<()>>> {
    let listener = listener(server, (Ipv6Addr::UNSPECIFIED, PORT).into(), 64)?;
    listener.set_nonblocking(true)?;
    server.spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let mut service = Service::new("app", [PORT]);
            service.limits = Limits { connections_per_source: 3, ..Limits::default() };
            let (attached, _) = Attached::attach(&kernel, &[service], &[])?;
            let (_, policy) = attached.policies()?.into_iter().next().context("one service was attached")?;
            let mut guard =
                Guard::new(tokio::net::TcpListener::from_std(listener)?, Arc::new(policy) as Arc<dyn Policy>)?;
            let mut held = Vec::new();
            loop {
                tokio::select! {
                    accepted = guard.accept() => held.push(accepted),
                    order = orders.recv() => match order {
                        Some(Order::DropAll) => held.clear(),
                        Some(Order::Detach) | None => return Ok(attached.detach()?),
                    },
                }
            }
        })
    })
}
