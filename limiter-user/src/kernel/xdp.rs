//! The program of admission on XDP.

use std::{io, path::Path};

use aya::programs::{
    ProgramError, Xdp, XdpMode,
    links::{FdLink, PinnedLink},
    xdp::XdpLink,
};

use super::{KernelError, error::Errno as _, placement::Mode};

/// Attaches it to an interface.
pub fn attach(program: &mut Xdp, interface: u32, mode: Mode) -> Result<FdLink, ProgramError> {
    let mode = if mode == Mode::Native { XdpMode::Driver } else { XdpMode::Skb };
    let id = program.attach_to_if_index(interface, mode)?;
    // A link made by netlink can't be pinned and is refused here; dropping it detaches.
    program.take_link(id)?.try_into().map_err(|error| ProgramError::IOError(io::Error::other(error)))
}

/// Puts it in the place of the program that a pinned link holds, without a gap. `false` if the link's interface is gone.
pub fn replace(program: &mut Xdp, pin: &Path) -> Result<bool, KernelError> {
    let what = || format!("can't replace the program of {}", pin.display());
    let link = PinnedLink::from_pin(pin).map_err(KernelError::failed(what()))?;
    let link = XdpLink::try_from(FdLink::from(link)).map_err(KernelError::failed(what()))?;
    match program.attach_to_link(link) {
        Ok(id) => {
            // The pin keeps it attached; this process's hand on it goes.
            drop(program.take_link(id).map_err(KernelError::failed(what()))?);
            Ok(true)
        }
        Err(error) if error.errno() == Some(libc::ENOLINK) => Ok(false),
        Err(error) => Err(KernelError::failed(what())(error)),
    }
}

/// Whether somebody else's program is on the interface. `EEXIST`: in the other mode.
pub fn is_taken(error: &ProgramError) -> bool {
    matches!(error.errno(), Some(libc::EBUSY | libc::EEXIST))
}
