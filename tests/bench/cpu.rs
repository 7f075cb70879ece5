//! Where a thread runs.

use std::io;

use anyhow::{Result, ensure};

/// Keeps this thread, and those that it starts from now on, to one CPU.
pub fn pin_to(cpu: usize) -> Result<()> {
    // SAFETY: a set of CPUs is bits, for which zero is a value; CPU_SET checks the index, and the size is that of the set.
    let done = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set) == 0
    };
    ensure!(done, "cannot keep to CPU {cpu}, and others take another: {}", io::Error::last_os_error());
    Ok(())
}
