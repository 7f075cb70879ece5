//! What limiter costs, measured on this machine: `cargo xtask bench [-- SECTION…]`.
//!
//! Every number stands beside the same measurement of a baseline, taken in turns in the same run: machines differ, and one
//! machine differs from minute to minute. Of several rounds the fastest counts, since whatever else the machine does can
//! only add.

mod cpu;
mod peers;
mod programs;
mod refusal;
mod relay;
mod scale;
mod table;
mod throughput;

use anyhow::{Result, bail};

/// A name and what measures and prints it.
type Section = (&'static str, fn() -> Result<()>);

/// The sections, in the order in which they run.
const SECTIONS: [Section; 9] = [
    ("programs", programs::run),
    ("refusal", refusal::run),
    ("peers", peers::run),
    ("throughput", throughput::run),
    ("scale", scale::run),
    ("relay-messages", relay::messages),
    ("relay-connections", relay::connections),
    ("relay-memory", relay::memory),
    ("relay-fairness", relay::fairness),
];

fn main() -> Result<()> {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let known = SECTIONS.map(|(name, _)| name);
    if let Some(unknown) = wanted.iter().find(|name| !known.contains(&name.as_str())) {
        bail!("there is no section {unknown}; those there are: {}", known.join(", "));
    }
    for (name, run) in SECTIONS {
        if wanted.is_empty() || wanted.iter().any(|wanted| wanted == name) {
            run()?;
        }
    }
    Ok(())
}
