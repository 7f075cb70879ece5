//! What holds for input of any kind, told as functions that panic where it does not: `cargo xtask fuzz` looks for such an input.
//!
//! Each begins with the bytes as they may come from a client, a proxy, an upstream, the network or an editor. That nothing panics is the least;
//! each checks what the code around relies on. Only in the tests and in the fuzzer's build, so what they need of the modules is
//! there alone.

mod config;
mod packet;

#[cfg(test)]
mod tests;

use crate::gateway::fuzz::{forwarded, frames, handshake, json, proxy_protocol, token, upstream};

/// A function that panics for an input that it finds wrong.
pub type Target = fn(&[u8]);

/// Each by its name, which is that of the folder with its seeds, too.
pub const TARGETS: [(&str, Target); 9] = [
    ("config", config::config),
    ("forwarded", forwarded),
    ("frames", frames),
    ("handshake", handshake),
    ("json", json),
    ("packet", packet::packet),
    ("proxy_protocol", proxy_protocol),
    ("token", token),
    ("upstream", upstream),
];
