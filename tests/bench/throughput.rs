//! What TCP gets through a device with limiter on it, beside one with a program that passes everything.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow};
use limiter_tests::{
    bare::{Answer, BareXdp},
    lab::{CLIENT_INTERFACE, Client, Family, Lab, PORT},
    limiter::Limiter,
    tcp,
};

use crate::{cpu, table};

const ROUNDS: usize = 41;
const ROUND: Duration = Duration::from_millis(500);

/// Who sends and who receives stay on a CPU each: where the scheduler puts them makes more of a difference than anything else.
const SENDER_CPU: usize = 0;
const RECEIVER_CPU: usize = 1;
const CHUNK: usize = 128 * 1024;

pub fn run() -> Result<()> {
    let lab = Lab::new(1)?;
    let client = &lab.clients[0];
    // Native XDP on one end of a veth takes it on the other, too, or offloads differ.
    let _open = BareXdp::load(Answer::Pass)?.attach(&client.namespace, CLIENT_INTERFACE)?;
    let mut rows = Vec::new();
    for family in [Family::V4, Family::V6] {
        let (mut bare, mut limited, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..ROUNDS {
            // Each of them is as often the first.
            let (without, with);
            if round % 2 == 0 {
                without = gigabits_bare(&lab, client, family)?;
                with = gigabits_limited(&lab, client, family)?;
            } else {
                with = gigabits_limited(&lab, client, family)?;
                without = gigabits_bare(&lab, client, family)?;
            }
            bare.push(without);
            limited.push(with);
            ratios.push(with / without);
        }
        let (bare, limited, change) = (median(bare), median(limited), (median(ratios) - 1.0) * 100.0);
        rows.push(vec![
            format!("{family:?}"),
            format!("{bare:.2}"),
            format!("{limited:.2}"),
            format!("{change:+.1} %"),
        ]);
    }
    table::print(
        "TCP through the device",
        &format!(
            "One connection from one namespace to another over a veth, {ROUND:?} at a time, in turns; Gbit/s, the median of {ROUNDS} \
             rounds. The difference: the median of what it was from one to the next."
        ),
        &["family", "bare XDP_PASS", "limiter", "difference"],
        &rows,
    );
    Ok(())
}

fn gigabits_bare(lab: &Lab, client: &Client, family: Family) -> Result<f64> {
    let attachment = BareXdp::load(Answer::Pass)?.attach(&lab.server, &client.server_interface())?;
    let carried = gigabits(lab, client, family)?;
    drop(attachment);
    lab.server.wait_xdp_free(&client.server_interface())?;
    Ok(carried)
}

fn gigabits_limited(lab: &Lab, client: &Client, family: Family) -> Result<f64> {
    let limiter = Limiter::new(&lab.server)?;
    limiter.protect(lab, 5, &[])?;
    let carried = gigabits(lab, client, family)?;
    drop(limiter);
    lab.server.wait_xdp_free(&client.server_interface())?;
    Ok(carried)
}

/// What one connection from the client to the server carries.
fn gigabits(lab: &Lab, client: &Client, family: Family) -> Result<f64> {
    let listener = tcp::listener(&lab.server, SocketAddr::new(family.unspecified(), PORT), 16)?;
    let mut sending = client.namespace.enter(|| TcpStream::connect(client.service(family)))?;
    let (mut receiving, _) = listener.accept()?;
    let reader = thread::spawn(move || -> Result<u64> {
        cpu::pin_to(RECEIVER_CPU)?;
        let mut buffer = vec![0; CHUNK];
        let mut received = 0;
        loop {
            match receiving.read(&mut buffer)? {
                0 => return Ok(received),
                bytes => received += bytes as u64,
            }
        }
    });
    let begun = Instant::now();
    let sender = thread::spawn(move || -> Result<()> {
        cpu::pin_to(SENDER_CPU)?;
        let chunk = vec![0; CHUNK];
        while begun.elapsed() < ROUND {
            sending.write_all(&chunk)?;
        }
        Ok(())
    });
    sender.join().map_err(|_| anyhow!("the sender panicked"))??;
    let received = reader.join().map_err(|_| anyhow!("the reader panicked"))??;
    #[expect(clippy::cast_precision_loss, reason = "a rate")]
    let bits = received as f64 * 8.0;
    Ok(bits / begun.elapsed().as_secs_f64() / 1e9)
}

/// Of an odd number of values.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}
