//! Pinning links, and detaching pinned ones at once. To remove its pin also ends it, but only when the kernel comes round to it: for a moment
//! the program is still there, and an interface can't be given another one.

use std::{
    ffi::CString,
    io, mem,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    path::Path,
};

use aya::programs::links::FdLink;

use super::KernelError;

/// `BPF_OBJ_GET` and `BPF_LINK_DETACH` of linux/bpf.h (the latter since 5.9).
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_LINK_DETACH: libc::c_int = 34;

/// Makes a link outlive the process.
pub fn pin(link: FdLink, path: &Path) -> Result<(), KernelError> {
    link.pin(path).map(|_| ()).map_err(KernelError::failed(format!("can't pin the link at {}", path.display())))
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
