//! The admin address: metrics and health over HTTP, for Prometheus, load balancers and people with curl.
//!
//! - `/metrics`: what is counted, in the `OpenMetrics` text format.
//! - `/healthz`: 200 as long as the process answers; with how overloaded it is.
//! - `/readyz`: 200 while clients are served; 503 with the reason as JSON while it starts or drains.
//!
//! These are for everybody who reaches the address, which is a loopback one unless the configuration says otherwise, and change
//! nothing. What is below `/v1/` takes the secret of `admin.token_file`, and is not there without one:
//!
//! - `POST /v1/publish`, `POST /v1/disconnect`: messages to clients, and their end.
//! - `GET /v1/rooms`, `GET /v1/users`: who is there.

mod control;
mod door;
mod kernel;
mod metrics;
mod problem;
mod process;
mod readiness;
mod server;

pub use control::{Control, LONGEST_BODY_BYTES};
pub use kernel::KernelState;
pub use metrics::Metrics;
pub use readiness::{Readiness, State};
pub use server::{Admin, BindError, Bound};
