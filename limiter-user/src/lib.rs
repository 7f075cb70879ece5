//! limiter keeps a WebSocket service alive on a Linux host: kernel programs refuse the connections that are too many, and
//! a gateway in user space sees to the messages.
//!
//! An application of yours gets the same without the gateway by a [`guard`] over its listener.
//!
//! Dependencies point one way: [`gateway`] and [`guard`] know [`policy`] and nothing of the kernel; [`kernel`]
//! implements the policy that they ask; the command line, in [`cli`], puts them together.

pub mod admin;
pub mod cli;
pub mod config;
#[cfg(any(test, limiter_fuzz))]
pub mod fuzz;
pub mod gateway;
pub mod guard;
pub mod kernel;
pub mod policy;
