//! What the kernel programs and user space of limiter share: the keys and values of the BPF maps, verdicts, counters and
//! event records.
//!
//! The crate is `no_std` and does no I/O. Everything that lies in a map is `#[repr(C)]` with its padding spelled out, so
//! that both sides agree on each byte.
//!
//! # Byte order
//!
//! Addresses are kept as they stand in a packet (network order, see [`Address`]). Every other number, ports included, is
//! in host order.
//!
//! # Changing a layout
//!
//! A change to any type here that lies in a map, or to the meaning of one of its fields, must raise
//! [`abi::ABI_VERSION`]: a running host holds maps of the old layout.
#![cfg_attr(not(any(test, feature = "user")), no_std)]

pub mod abi;
pub mod address;
pub mod audit;
pub mod bucket;
pub mod challenge;
pub mod control;
pub mod event;
pub mod ledger;
#[cfg(any(test, feature = "user"))]
pub mod model;
pub mod policy;
pub mod rule;
pub mod source;
pub mod user;
pub mod verdict;

pub use address::Address;
pub use ledger::{ConnectionKey, Endpoints, LedgerEntry, Netns, TagSecret};
pub use policy::ServicePolicy;
pub use source::{SourceEntry, SourceKey};
pub use verdict::{Counter, DenyReason};
