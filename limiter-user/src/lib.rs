//! limiter keeps a WebSocket service alive on a Linux host: kernel programs refuse the connections that are too many, and
//! a gateway in user space sees to the messages.
//!
//! Dependencies point one way: [`gateway`] knows [`policy`] and nothing of the kernel; [`kernel`] implements the policy
//! that the gateway asks; the command line, in [`cli`], puts them together.

pub mod admin;
pub mod cli;
pub mod config;
pub mod gateway;
pub mod kernel;
pub mod policy;
