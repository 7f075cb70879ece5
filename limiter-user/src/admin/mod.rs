//! The admin address: metrics and health over HTTP, for Prometheus, load balancers and people with curl.
//!
//! - `/metrics`: what is counted, in the `OpenMetrics` text format.
//! - `/healthz`: 200 as long as the process answers.
//! - `/readyz`: 200 while clients are served; 503 with the reason as JSON while it starts or drains.
//!
//! Only GET and HEAD are answered, and nothing can be changed here. There is no authentication: the address is a loopback
//! one unless the configuration says otherwise.

mod kernel;
mod metrics;
mod process;
mod readiness;
mod server;

pub use kernel::KernelState;
pub use metrics::Metrics;
pub use readiness::{Readiness, State};
pub use server::{Admin, BindError, Bound};
