//! The gateway with real sockets on loopback.

mod sessions;
mod support;
