//! What a refused SYN takes end to end: from a veth's one end through the other's XDP program.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Result, ensure};
use limiter_tests::{
    bare::{Answer, BareXdp},
    frame::Frame,
    lab::{CLIENT_INTERFACE, Client, Family, Lab, PORT},
    limiter::Limiter,
    tcp::{Crowd, PlainServer},
};

use crate::table;

const ROUNDS: usize = 5;
const SYNS: u32 = 2_000_000;

pub fn run() -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    let generator = BareXdp::load(Answer::Transmit)?;
    // A veth that sends from XDP needs a program at its own end, too.
    let _open = BareXdp::load(Answer::Pass)?.attach(&client.namespace, CLIENT_INTERFACE)?;

    let mut rows = Vec::new();
    for family in [Family::V4, Family::V6] {
        let (mut drop, mut refuse) = (Duration::MAX, Duration::MAX);
        for _ in 0..ROUNDS {
            drop = drop.min(bare_drop(&lab, client, &generator, family)?);
            refuse = refuse.min(refused(&lab, client, &generator, family)?);
        }
        rows.push(vec![
            format!("{family:?}"),
            drop.as_nanos().to_string(),
            refuse.as_nanos().to_string(),
            format!("{:.2}", refuse.as_secs_f64() / drop.as_secs_f64()),
        ]);
    }
    table::print(
        "A refused SYN, end to end on veth",
        &format!(
            "Sent by a program that transmits (live frames of BPF_PROG_TEST_RUN) and received by native XDP on the same \
             CPU; nanoseconds per SYN hold both. The fastest of {ROUNDS} rounds of {SYNS} SYNs."
        ),
        &["family", "bare XDP_DROP, ns", "refused by limiter, ns", "ratio"],
        &rows,
    );
    Ok(())
}

fn bare_drop(lab: &Lab, client: &Client, generator: &BareXdp, family: Family) -> Result<Duration> {
    let _drop = BareXdp::load(Answer::Drop)?.attach(&lab.server, &client.server_interface())?;
    flood(lab, client, generator, family)
}

fn refused(lab: &Lab, client: &Client, generator: &BareXdp, family: Family) -> Result<Duration> {
    let limiter = Limiter::new(&lab.server)?;
    let _server = PlainServer::start(&lab.server, family)?;
    limiter.protect(lab, 1, &[])?;
    let _held = Crowd::connect(&client.namespace, client.service(family), 1, Duration::from_secs(5))?;
    limiter.wait_held(client.address(family), 1)?;
    let taken = flood(lab, client, generator, family)?;
    let counted = limiter.counter("syn_source_limit")?;
    ensure!(counted >= u64::from(SYNS) / 2, "limiter refused only {counted} of {SYNS} SYNs");
    Ok(taken)
}

fn flood(lab: &Lab, client: &Client, generator: &BareXdp, family: Family) -> Result<Duration> {
    send_counted(lab, client, generator, &syn(client, family), SYNS)
}

/// Sends a frame so many times and returns how long each one that arrived took. A veth whose queue is full (when the kernel
/// puts the receiving off to a thread that has to wait for the CPU) drops packets before any program sees them: those cost
/// nothing, and count for nothing.
pub fn send_counted(lab: &Lab, client: &Client, generator: &BareXdp, frame: &[u8], count: u32) -> Result<Duration> {
    let interface = client.server_interface();
    let before = lab.server.received_packets(&interface)?;
    let taken = generator.send(&client.namespace, CLIENT_INTERFACE, frame, count)?;
    let arrived = lab.server.received_packets(&interface)? - before;
    // Fewer than were sent, but for a neighbour discovery or two.
    let arrived = u32::try_from(arrived)?;
    ensure!(arrived > 0, "no SYN arrived");
    Ok(taken.mul_f64(f64::from(count) / f64::from(arrived)))
}

fn syn(client: &Client, family: Family) -> Vec<u8> {
    let source = SocketAddr::new(client.address(family), 50_000);
    let mut frame = Frame::syn(source, SocketAddr::new(client.server_address(family), PORT)).to_bytes();
    frame[..6].copy_from_slice(&client.server_mac());
    frame[6..12].copy_from_slice(&client.mac());
    frame
}
