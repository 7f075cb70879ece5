//! Which copy of the policy is in force, as user space reads and writes it.

use std::{fmt, io, thread, time::Duration};

use aya::maps::{Array, Map, MapData};
use limiter_common::{abi, policy::InForce};

use super::{KernelError, maps::open, pins::Pins};

/// How often a reading is tried again that met a change. There is a pause of milliseconds between any two.
const ATTEMPTS: usize = 100;

/// `MEMBARRIER_CMD_GLOBAL` of linux/membarrier.h (kernel 4.3).
const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;

/// How long programs are waited for where the kernel does not say when they have ended (one CPU that is never idle,
/// `nohz_full`). They take microseconds, and nothing interrupts them but a host that takes the CPU away.
const LONG_ENOUGH: Duration = Duration::from_secs(1);

/// The word that says it.
pub(super) struct Word(Array<MapData, u64>);

impl fmt::Debug for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Word").finish_non_exhaustive()
    }
}

impl Word {
    /// Opens the pinned map.
    pub(super) fn open(pins: &Pins) -> Result<Self, KernelError> {
        open(&pins.map(abi::MAP_IN_FORCE), Map::Array).map(Self)
    }

    /// The word as it is now.
    pub(super) fn read(&self) -> Result<InForce, KernelError> {
        self.0.get(&0, 0).map(InForce).map_err(KernelError::failed("can't read which policy is in force"))
    }

    /// Reads by several system calls what belongs to one policy.
    pub(super) fn read_with<T>(&self, read: impl Fn(InForce) -> Result<T, KernelError>) -> Result<T, KernelError> {
        for _ in 0..ATTEMPTS {
            let before = self.read()?;
            let value = read(before)?;
            if self.read()? == before {
                return Ok(value);
            }
        }
        Err(KernelError::Failed {
            what: "can't read the policy in force".to_owned(),
            source: "it changes all the time".into(),
        })
    }

    /// Puts other copies in force, in one step.
    pub(super) fn write(&mut self, in_force: InForce) -> Result<(), KernelError> {
        self.0.set(0, in_force.0, 0).map_err(KernelError::failed("can't put the new policy in force"))
    }
}

/// Waits until every kernel program has ended that runs now on any CPU.
///
/// The system call is one for memory barriers. The kernel keeps what it promises by waiting for an RCU grace period, and
/// programs run in RCU read-side sections; the kernel's own tests of BPF wait in this way.
pub(super) fn wait_for_programs() {
    // SAFETY: the call takes no pointers.
    let answer = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if answer != 0 {
        tracing::debug!(error = %io::Error::last_os_error(), "no membarrier: waiting for a second instead");
        thread::sleep(LONG_ENOUGH);
    }
}
