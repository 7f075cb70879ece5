//! What TCP gets through a device with limiter on it, beside one with a program that passes everything.
//!
//! What one connection carries differs more from one to the next, and from one second to the next, than by what is measured. So
//! there is one connection, under which the program of the device is exchanged many times a second.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::fd::{AsFd as _, BorrowedFd},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow};
use limiter_tests::{
    bare::{Answer, BareXdp},
    bpf::{self, Link},
    lab::{CLIENT_INTERFACE, Client, Family, Lab, PORT},
    limiter::Limiter,
    tcp,
};

use crate::{cpu, table};

/// How often each of the two programs is put in the place of the other.
const ROUNDS: usize = 800;
const ROUND: Duration = Duration::from_millis(20);
/// How long a round's packets may still be on their way in the next one.
const SETTLING: Duration = Duration::from_millis(2);

/// Who sends and who receives stay on a CPU each: where the scheduler puts them makes more of a difference than anything else.
const SENDER_CPU: usize = 0;
const RECEIVER_CPU: usize = 1;
const CHUNK: usize = 128 * 1024;

pub fn run() -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    // Native XDP on one end of a veth takes it on the other, too, or offloads differ.
    let bare = BareXdp::load(Answer::Pass)?;
    let _open = bare.attach(&client.namespace, CLIENT_INTERFACE)?;
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(&lab, 5, &[])?;
    let link = xdp_link(&limiter)?;
    let limited = link.program()?;
    let mut rows = Vec::new();
    for family in [Family::V4, Family::V6] {
        let rounds = rates(&lab, client, family, &link, [bare.program(), limited.as_fd()])?;
        let ratios: Vec<f64> = rounds.iter().map(|[bare, limited]| limited / bare).collect();
        let [bare, limited] = [0, 1].map(|of| median(rounds.iter().map(|rates| rates[of]).collect()));
        let change = median(ratios.clone());
        // The median of so many values of that spread is off by about this much.
        let spread = median(ratios.iter().map(|ratio| (ratio - change).abs()).collect()) * 1.4826;
        #[expect(clippy::cast_precision_loss, reason = "a few hundred")]
        let error = spread * 1.253 / (ratios.len() as f64).sqrt();
        rows.push(vec![
            format!("{family:?}"),
            format!("{bare:.2}"),
            format!("{limited:.2}"),
            format!("{:+.1} % ± {:.1}", (change - 1.0) * 100.0, error * 100.0),
        ]);
    }
    table::print(
        "TCP through the device",
        &format!(
            "One connection from one namespace to another over a veth, under which the program of the device is exchanged every \
             {ROUND:?}; Gbit/s, the median of {ROUNDS} rounds. The difference: the median of what it was from one round to the next, \
             and its standard error."
        ),
        &["family", "bare XDP_PASS", "limiter", "difference"],
        &rows,
    );
    Ok(())
}

/// The link of the one interface that limiter is attached to.
fn xdp_link(limiter: &Limiter<'_>) -> Result<Link> {
    let pin = bpf::pins_below(limiter.pin_path())?
        .into_iter()
        .find(|pin| pin.file_name().is_some_and(|name| name.to_string_lossy().starts_with("native-")))
        .ok_or_else(|| anyhow!("limiter is not attached by native XDP"))?;
    Link::open(&pin)
}

/// What one connection from the client to the server carries with each of the programs, in Gbit/s, round by round.
fn rates(
    lab: &Lab,
    client: &Client,
    family: Family,
    link: &Link,
    programs: [BorrowedFd<'_>; 2],
) -> Result<Vec<[f64; 2]>> {
    let listener = tcp::listener(&lab.server, SocketAddr::new(family.unspecified(), PORT), 16)?;
    let mut sending = client.namespace.enter(|| TcpStream::connect(client.service(family)))?;
    let (mut receiving, _) = listener.accept()?;
    let (received, ended) = (&AtomicU64::new(0), &AtomicBool::new(false));
    thread::scope(|scope| {
        let reader = scope.spawn(move || -> Result<()> {
            cpu::pin_to(RECEIVER_CPU)?;
            let mut buffer = vec![0; CHUNK];
            loop {
                match receiving.read(&mut buffer)? {
                    0 => return Ok(()),
                    bytes => received.fetch_add(bytes as u64, Ordering::Relaxed),
                };
            }
        });
        let sender = scope.spawn(move || -> Result<()> {
            cpu::pin_to(SENDER_CPU)?;
            let chunk = vec![0; CHUNK];
            while !ended.load(Ordering::Relaxed) {
                sending.write_all(&chunk)?;
            }
            Ok(())
        });
        let measured = (0..ROUNDS)
            .map(|round| {
                let mut rates = [0.0; 2];
                // Each of them is as often the first.
                for of in [round % 2, 1 - round % 2] {
                    link.put(programs[of])?;
                    thread::sleep(SETTLING);
                    let (begun, before) = (Instant::now(), received.load(Ordering::Relaxed));
                    thread::sleep(ROUND - SETTLING);
                    let bytes = received.load(Ordering::Relaxed) - before;
                    #[expect(clippy::cast_precision_loss, reason = "a rate")]
                    let bits = bytes as f64 * 8.0;
                    rates[of] = bits / begun.elapsed().as_secs_f64() / 1e9;
                }
                Ok(rates)
            })
            .collect();
        ended.store(true, Ordering::Relaxed);
        sender.join().map_err(|_| anyhow!("the sender panicked"))??;
        reader.join().map_err(|_| anyhow!("the reader panicked"))??;
        measured
    })
}

/// Of at least one value.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}
