//! A link without link headers between two namespaces: a tun device in each, and a thread that carries packets between them.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    mem,
    os::{
        fd::{AsRawFd, RawFd},
        unix::{fs::OpenOptionsExt, net::UnixStream},
    },
    thread::JoinHandle,
};

use anyhow::{Context, Result};

use crate::netns::Namespace;

/// Two tun devices of the same name. They go when this is dropped.
#[derive(Debug)]
pub struct TunLink {
    stop: UnixStream,
    thread: Option<JoinHandle<()>>,
}

impl TunLink {
    /// Makes a device of that name in each namespace.
    pub fn new(name: &str, ends: [&Namespace; 2]) -> Result<Self> {
        let [first, second] =
            ends.map(|namespace| namespace.enter(|| device(name)).context("cannot make a tun device (CONFIG_TUN)"));
        let (mut first, mut second) = (first?, second?);
        let (stop, stopped) = UnixStream::pair()?;
        let thread = std::thread::spawn(move || {
            while wait([first.as_raw_fd(), second.as_raw_fd(), stopped.as_raw_fd()]) {
                carry(&mut first, &mut second);
                carry(&mut second, &mut first);
            }
        });
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for TunLink {
    fn drop(&mut self) {
        // Wakes the thread: its end of the pair reads end of file.
        let _ = self.stop.shutdown(std::net::Shutdown::Both);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            eprintln!("the thread between two tun devices panicked");
        }
    }
}

fn device(name: &str) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
    // SAFETY: an all-zero ifreq is a valid one.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_TUN | libc::IFF_NO_PI).map_err(io::Error::other)?;
    // SAFETY: the request holds a name that ends with a zero, and the flags.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

/// Waits until a device has a packet. `false` when it is time to end.
fn wait(descriptors: [RawFd; 3]) -> bool {
    let mut polled = descriptors.map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
    // SAFETY: the pointer and the length are those of one array.
    let ready = unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, -1) };
    ready >= 0 && polled[2].revents == 0
}

fn carry(from: &mut File, to: &mut File) {
    let mut packet = [0; 2048];
    // A device that is down takes and gives nothing.
    while let Ok(length) = from.read(&mut packet) {
        let _ = to.write(&packet[..length]);
    }
}
