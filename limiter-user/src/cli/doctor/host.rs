//! What the probes look at: this host, or a made-up one in tests.

use std::{fs, io, os::unix::ffi::OsStrExt as _, path::Path};

use super::link::{self, Link};
use crate::kernel;

/// A host that can be looked at.
pub(super) trait Host {
    /// The text of a file of `/proc` or `/sys`, without the end of its last line.
    fn read(&self, path: &str) -> io::Result<String>;

    /// Whether a file can be opened for reading.
    fn readable(&self, path: &str) -> io::Result<()>;

    /// The magic number of the filesystem that holds `path`, or its nearest ancestor that exists.
    fn filesystem(&self, path: &Path) -> io::Result<i64>;

    /// A network interface of this process's network namespace; `None`: there is none of that name.
    fn link(&self, name: &str) -> io::Result<Option<Link>>;

    /// Whether the kernel can close sockets from outside.
    fn can_destroy(&self) -> io::Result<bool>;
}

/// This host.
pub(super) struct Real;

impl Host for Real {
    fn read(&self, path: &str) -> io::Result<String> {
        fs::read_to_string(path).map(|text| text.trim_end().to_owned())
    }

    fn readable(&self, path: &str) -> io::Result<()> {
        fs::File::open(path).map(drop)
    }

    fn filesystem(&self, path: &Path) -> io::Result<i64> {
        let nearest = path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
        let nearest = std::ffi::CString::new(nearest.as_os_str().as_bytes())?;
        let mut statistics = std::mem::MaybeUninit::<libc::statfs>::uninit();
        // SAFETY: the path ends with a zero, and the kernel writes at most one `statfs` where the pointer leads.
        if unsafe { libc::statfs(nearest.as_ptr(), statistics.as_mut_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call succeeded, so the structure was filled in.
        let statistics = unsafe { statistics.assume_init() };
        // The type's width differs between C libraries; magic numbers have 32 bits.
        #[allow(clippy::unnecessary_cast, reason = "i64 with glibc on x86_64, not everywhere")]
        Ok(statistics.f_type as i64)
    }

    fn link(&self, name: &str) -> io::Result<Option<Link>> {
        link::look_up(name)
    }

    fn can_destroy(&self) -> io::Result<bool> {
        kernel::can_destroy()
    }
}
