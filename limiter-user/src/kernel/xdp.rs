//! The program of admission on XDP.

use std::path::Path;

use aya::programs::{ProgramError, Xdp, XdpMode, links::FdLink, xdp::XdpLink};

use super::{KernelError, error::Errno as _, link, placement::Mode};

/// Attaches it to an interface.
pub fn attach(program: &mut Xdp, interface: u32, mode: Mode) -> Result<FdLink, ProgramError> {
    let mode = if mode == Mode::Native { XdpMode::Driver } else { XdpMode::Skb };
    let id = program.attach_to_if_index(interface, mode)?;
    // A link made by netlink can't be pinned and is refused here; dropping it detaches.
    program.take_link(id)?.try_into().map_err(link::wrong_kind)
}

/// Puts it in the place of the program that a pinned link holds, without a gap. `false` if the link's interface is gone.
pub fn replace(program: &mut Xdp, pin: &Path) -> Result<bool, KernelError> {
    link::replace(pin, |link| {
        let id = program.attach_to_link(XdpLink::try_from(link).map_err(link::wrong_kind)?)?;
        program.take_link(id).map(drop)
    })
}

/// Whether somebody else's program is on the interface. `EEXIST`: in the other mode.
pub fn is_taken(error: &ProgramError) -> bool {
    matches!(error.errno(), Some(libc::EBUSY | libc::EEXIST))
}
