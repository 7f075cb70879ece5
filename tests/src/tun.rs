//! A link without link headers between two namespaces: a tun device in each, and a thread that carries packets between them.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    mem,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::{
        fd::{AsRawFd, RawFd},
        unix::{fs::OpenOptionsExt, net::UnixStream},
    },
    thread::JoinHandle,
};

use anyhow::{Context, Result};

use crate::{
    lab::{Family, PORT},
    netns::Namespace,
};

/// A server and a client with nothing but such a link between them.
#[derive(Debug)]
pub struct TunLab {
    /// Where the service and limiter run.
    pub server: Namespace,
    /// The client.
    pub client: Namespace,
    _link: TunLink,
}

/// The name of the device in both.
pub const TUN: &str = "tun0";

impl TunLab {
    /// Both up, with an address of each family.
    pub fn new() -> Result<Self> {
        let (server, client) = (Namespace::new()?, Namespace::new()?);
        let link = TunLink::new(TUN, [&server, &client])?;
        for (namespace, host) in [(&server, 1), (&client, 2)] {
            namespace.ip(&format!(
                "link set {TUN} up\naddr add 198.19.0.{host}/24 dev {TUN}\naddr add 2001:db8:19::{host}/64 dev {TUN} nodad\n"
            ))?;
        }
        Ok(Self { server, client, _link: link })
    }

    /// The service.
    pub fn service(&self, family: Family) -> SocketAddr {
        let address = match family {
            Family::V4 => Ipv4Addr::new(198, 19, 0, 1).into(),
            Family::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0x19, 0, 0, 0, 0, 1).into(),
        };
        SocketAddr::new(address, PORT)
    }
}

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
