//! Load, attach, pin; the maps as typed methods.

mod error;
mod pinned;
mod report;

pub use error::KernelError;
pub use pinned::Pinned;
pub use report::{AttachedInterface, ConnectionRow, Counters, ServiceRow, SourceRow, Status};
