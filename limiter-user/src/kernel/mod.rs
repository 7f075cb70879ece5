//! The kernel's side, seen from user space: load, attach, pin; the maps as typed methods; refusals as they come.

mod attach;
mod audit;
mod backstop;
mod btf;
mod control;
mod debug_log;
mod error;
mod events;
mod host;
mod kick;
mod layout;
mod link;
mod live;
mod load;
mod maps;
mod pinned;
mod pins;
mod recount;
mod report;
mod rules;
mod sock_diag;

pub use attach::{AttachReport, Attached, InterfaceReport};
pub use audit::{AdoptedOpen, Audit, Auditor};
pub use control::Control;
pub use debug_log::DebugLog;
pub use error::KernelError;
pub use events::{Event, Events};
pub use kick::kick;
pub use live::LivePolicy;
pub use load::{Loaded, load_unpinned};
pub use maps::{Ledger, ServiceEntry, Services, Sources};
pub use pinned::{Pinned, detach};
pub use pins::XdpMode;
pub use report::{AttachedInterface, ConnectionRow, Counters, REPAIRS, ServiceRow, SourceRow, Status};
pub use rules::{RuleInForce, Rules};
