//! Sockets that the service manager hands over, as `sd_listen_fds(3)` has it.

use std::{
    io,
    os::fd::{FromRawFd, OwnedFd},
    sync::{Mutex, PoisonError},
};

use super::listen::BindError;

/// A descriptor, and its name (`FileDescriptorName=`).
type Named = (String, OwnedFd);

/// Those that nobody has taken yet; `None`: nobody has looked.
static LEFT: Mutex<Option<Vec<Named>>> = Mutex::new(None);

/// What the process before has had of the service manager, and hands over. In the place of what the environment says, which is
/// for that process.
pub(super) fn give(named: Vec<Named>) {
    *LEFT.lock().unwrap_or_else(PoisonError::into_inner) = Some(named);
}

/// A second hand on those that nobody has taken.
pub(super) fn left() -> io::Result<Vec<Named>> {
    let left = LEFT.lock().unwrap_or_else(PoisonError::into_inner);
    left.iter().flatten().map(|(name, fd)| Ok((name.clone(), fd.try_clone()?))).collect()
}

/// Takes those of that name, or all that are left. Each is handed out once.
pub(super) fn take(name: Option<&str>) -> Result<Vec<Named>, BindError> {
    let mut left = LEFT.lock().unwrap_or_else(PoisonError::into_inner);
    let all = match left.take() {
        Some(all) => all,
        None => look()?,
    };
    let (taken, rest) = all.into_iter().partition(|(known, _)| name.is_none_or(|name| name == known));
    *left = Some(rest);
    Ok(taken)
}

fn look() -> Result<Vec<Named>, BindError> {
    let named = sd_notify::listen_fds_with_names().map_err(BindError::Inherited)?;
    // SAFETY: LISTEN_PID says that these descriptors are for this process, which has opened none of them itself, and `LEFT`
    // sees to it that they are looked at once, so each has one owner.
    Ok(named.map(|(fd, name)| (name, unsafe { OwnedFd::from_raw_fd(fd) })).collect())
}
