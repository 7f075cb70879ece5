//! Network interfaces, by ioctl: `/sys/class/net` shows the namespace that `/sys` was mounted in, which need not be ours.

use std::{
    ffi::{CStr, CString},
    io,
    os::{fd::AsRawFd, unix::net::UnixDatagram},
};

use crate::kernel;

/// What is known of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Link {
    /// Its index.
    pub(super) index: u32,
    /// Whether it is up.
    pub(super) up: bool,
    /// Whether it is a loopback device.
    pub(super) loopback: bool,
    /// Whether its packets begin with an Ethernet header; `None`: with something that limiter can't read.
    pub(super) ethernet: Option<bool>,
    /// The name of its driver, where it has one.
    pub(super) driver: Option<String>,
}

/// `ethtool_drvinfo` of `<linux/ethtool.h>`.
#[repr(C)]
struct DriverInfo {
    command: u32,
    driver: [u8; 32],
    rest: [u8; 160],
}

const _: () = assert!(size_of::<DriverInfo>() == 196);

/// `ETHTOOL_GDRVINFO`.
const GET_DRIVER_INFO: u32 = 3;
const SIOCGIFFLAGS: libc::Ioctl = 0x8913;
const SIOCETHTOOL: libc::Ioctl = 0x8946;

/// The interface of that name in this process's network namespace.
pub(super) fn look_up(name: &str) -> io::Result<Option<Link>> {
    let Ok(c_name) = CString::new(name) else { return Ok(None) };
    if name.len() >= libc::IFNAMSIZ {
        return Ok(None);
    }
    // SAFETY: the name ends with a zero.
    let index = unsafe { libc::if_nametoindex(c_name.as_ptr()) };
    if index == 0 {
        let error = io::Error::last_os_error();
        return if error.raw_os_error() == Some(libc::ENODEV) { Ok(None) } else { Err(error) };
    }
    // Any socket takes the requests of network interfaces.
    let socket = UnixDatagram::unbound()?;
    let flags = flags(&socket, name)?;
    Ok(Some(Link {
        index,
        up: flags & libc::IFF_UP != 0,
        loopback: flags & libc::IFF_LOOPBACK != 0,
        ethernet: kernel::link_type(name)?.has_ethernet(),
        driver: driver(&socket, name)?,
    }))
}

fn flags(socket: &UnixDatagram, name: &str) -> io::Result<i32> {
    let mut request = request(name);
    // SAFETY: the request is an `ifreq` with a name that ends with a zero; the kernel fills in the flags.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), SIOCGIFFLAGS, &raw mut request) })?;
    // SAFETY: the call succeeded, so the flags are what the union holds.
    Ok(unsafe { request.ifr_ifru.ifru_flags }.into())
}

fn driver(socket: &UnixDatagram, name: &str) -> io::Result<Option<String>> {
    let mut info = DriverInfo { command: GET_DRIVER_INFO, driver: [0; 32], rest: [0; 160] };
    let mut request = request(name);
    request.ifr_ifru.ifru_data = (&raw mut info).cast();
    // SAFETY: the request leads to an `ethtool_drvinfo` that lives until the call returns, and the kernel fills it in.
    match check(unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) }) {
        Ok(()) => {}
        // A device without a driver to speak of, like the loopback device.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(None),
        Err(error) => return Err(error),
    }
    let driver = CStr::from_bytes_until_nul(&info.driver).map(|name| name.to_string_lossy().into_owned());
    Ok(driver.ok().filter(|name| !name.is_empty()))
}

/// An empty request about an interface whose name is shorter than `IFNAMSIZ`.
fn request(name: &str) -> libc::ifreq {
    // SAFETY: an `ifreq` is integers and pointers, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_device_is_there_and_an_unknown_one_is_not() {
        let link = look_up("lo").unwrap().unwrap();
        assert!(link.loopback && link.index > 0);
        assert_eq!(link.ethernet, Some(true));
        assert_eq!(link.driver, None);
        assert_eq!(look_up("no-such-device").unwrap(), None);
        assert_eq!(look_up("a name that is much too long").unwrap(), None);
        assert_eq!(look_up("with\0zero").unwrap(), None);
    }
}
