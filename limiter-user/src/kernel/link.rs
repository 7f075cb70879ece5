//! Pinning links, putting other programs into pinned ones, and detaching these at once. To remove its pin also ends it, but only when the kernel comes round to it: for a moment
//! the program is still there, and an interface can't be given another one.

use std::{
    ffi::CString,
    io, mem,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    path::Path,
};

use aya::programs::{
    ProgramError,
    links::{FdLink, LinkError, PinnedLink},
};

use super::{KernelError, error::Errno as _};

/// `BPF_OBJ_GET` and `BPF_LINK_DETACH` of linux/bpf.h (the latter since 5.9).
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_LINK_DETACH: libc::c_int = 34;

/// Makes a link outlive the process.
pub fn pin(link: FdLink, path: &Path) -> Result<(), KernelError> {
    link.pin(path).map(|_| ()).map_err(KernelError::failed(format!("can't pin the link at {}", path.display())))
}

/// Puts another program into the link pinned at `path`, without a gap. `attach` does that, and lets go of the link: the pin keeps
/// it attached. `false` if the link's interface is gone.
pub fn replace(path: &Path, attach: impl FnOnce(FdLink) -> Result<(), ProgramError>) -> Result<bool, KernelError> {
    let what = || format!("can't replace the program of {}", path.display());
    let link = PinnedLink::from_pin(path).map_err(KernelError::failed(what()))?;
    match attach(link.into()) {
        Ok(()) => Ok(true),
        Err(error) if error.errno() == Some(libc::ENOLINK) => Ok(false),
        Err(error) => Err(KernelError::failed(what())(error)),
    }
}

/// A link that is of another kind than it should be, as the error of attaching a program.
pub fn wrong_kind(error: LinkError) -> ProgramError {
    ProgramError::IOError(io::Error::other(error))
}

/// Takes the program of the link pinned at `path` from what it is attached to. The pin stays.
///
/// # Errors
///
/// The kernel's; `ENOLINK` does not come: a link whose interface is gone is detached already.
pub fn detach(path: &Path) -> io::Result<()> {
    let name = CString::new(path.as_os_str().as_encoded_bytes())?;
    let link = bpf(BPF_OBJ_GET, &mut ObjGet { pathname: name.as_ptr() as u64, bpf_fd: 0, file_flags: 0 })?;
    // SAFETY: the kernel has just given us this descriptor.
    let link = unsafe { OwnedFd::from_raw_fd(link) };
    match bpf(BPF_LINK_DETACH, &mut link.as_raw_fd()) {
        Err(error) if error.raw_os_error() != Some(libc::ENOLINK) => Err(error),
        _ => Ok(()),
    }
}

/// Attributes of `BPF_OBJ_GET`.
#[repr(C)]
struct ObjGet {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// bpf(2).
pub(super) fn bpf<T>(command: libc::c_int, attributes: &mut T) -> io::Result<libc::c_int> {
    // SAFETY: the kernel reads that many bytes; every pointer in the attributes outlives the call.
    let answer = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attributes, mem::size_of::<T>()) };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    libc::c_int::try_from(answer).map_err(io::Error::other)
}
