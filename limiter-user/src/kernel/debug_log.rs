//! Debug messages of the kernel programs, which are compiled in and cost nothing unless they are asked for at load.

use std::{fmt, io};

use aya::Ebpf;
use aya_log::EbpfLogger;
use tokio::io::unix::AsyncFd;

use super::KernelError;

/// The reading end of the ring buffer that the programs write messages to.
pub struct DebugLog(EbpfLogger<&'static dyn log::Log>);

impl fmt::Debug for DebugLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DebugLog").finish_non_exhaustive()
    }
}

impl DebugLog {
    pub(super) fn new(programs: &mut Ebpf) -> Result<Self, KernelError> {
        EbpfLogger::init(programs).map(Self).map_err(|error| KernelError::Failed {
            what: "can't read the programs' debug messages (debug_log)".to_owned(),
            source: Box::new(error),
        })
    }

    /// Writes messages to this process's log as they come; ends only with an error. Runs on a tokio runtime.
    pub async fn forward(self) -> io::Error {
        // SAFETY: the logger owns its descriptor, returns the same one every time, and is dropped only after it was taken
        // off the reactor.
        let mut logger = match unsafe { AsyncFd::register(self.0) } {
            Ok(logger) => logger,
            Err(error) => return error.into(),
        };
        loop {
            let mut ready = match logger.readable_mut().await {
                Ok(ready) => ready,
                Err(error) => return error,
            };
            ready.get_inner_mut().flush();
            ready.clear_ready();
        }
    }
}
