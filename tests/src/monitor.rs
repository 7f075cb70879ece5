//! Looks all the time at how many connections a service has established.

use std::{
    collections::{HashMap, HashSet},
    fs,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result, anyhow};

use crate::{
    netns::Namespace,
    wait::{SOON, eventually},
};

/// Samples the kernel's list of TCP sockets.
#[derive(Debug)]
pub struct Monitor {
    stop: Arc<AtomicBool>,
    samples: Arc<AtomicU64>,
    thread: Option<JoinHandle<Result<Peaks>>>,
}

/// What a [`Monitor`] saw.
#[derive(Debug, Default)]
pub struct Peaks {
    /// How often it looked.
    pub samples: u64,
    most: HashMap<IpAddr, usize>,
}

impl Peaks {
    /// The largest number of established connections that one client address had in any sample.
    pub fn of(&self, client: IpAddr) -> usize {
        self.most.get(&client.to_canonical()).copied().unwrap_or(0)
    }
}

/// Between two samples: they cost CPU time that the tests share.
const PAUSE: Duration = Duration::from_micros(500);

impl Monitor {
    /// Begins to sample the established sockets of `port` in `namespace`.
    pub fn start(namespace: &Namespace, port: u16) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let samples = Arc::new(AtomicU64::new(0));
        let taken = Arc::clone(&samples);
        let thread = namespace.spawn(move || {
            let mut peaks = Peaks::default();
            while !stopped.load(Ordering::Relaxed) {
                for (client, count) in established_here(port)? {
                    let most = peaks.most.entry(client).or_default();
                    *most = (*most).max(count);
                }
                peaks.samples = taken.fetch_add(1, Ordering::Relaxed) + 1;
                thread::sleep(PAUSE);
            }
            Ok(peaks)
        })?;
        Ok(Self { stop, samples, thread: Some(thread) })
    }

    /// Looks once more, ends, and says what was seen.
    pub fn finish(mut self) -> Result<Peaks> {
        let before = self.samples.load(Ordering::Relaxed);
        let thread = self.thread.as_ref().context("a monitor is finished once")?;
        // The first of these may have begun before.
        eventually(SOON, "the monitor has looked twice", || {
            Ok(thread.is_finished() || self.samples.load(Ordering::Relaxed) >= before + 2)
        })?;
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("a monitor is finished once")?;
        thread.join().map_err(|_| anyhow!("the monitor panicked"))?
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Established connections of `port` in `namespace`, by client address.
pub fn established(namespace: &Namespace, port: u16) -> Result<HashMap<IpAddr, usize>> {
    namespace.enter(|| established_here(port))
}

fn established_here(port: u16) -> Result<HashMap<IpAddr, usize>> {
    // The kernel gives the list in pieces, and a socket at the seam of two may come twice.
    let mut clients = HashSet::new();
    for file in ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"] {
        let table = fs::read_to_string(file).with_context(|| format!("cannot read {file}"))?;
        for line in table.lines().skip(1) {
            let (local_port, remote, state) =
                parse_line(line).with_context(|| format!("unexpected line in {file}: {line}"))?;
            if local_port == port && state == ESTABLISHED {
                clients.insert(remote);
            }
        }
    }
    let mut counts = HashMap::new();
    for client in clients {
        *counts.entry(client.ip()).or_default() += 1;
    }
    Ok(counts)
}

/// `TCP_ESTABLISHED`
const ESTABLISHED: u8 = 1;

/// `0: 0100007F:1F90 0200007F:C001 01 …`: place, local, remote, state.
fn parse_line(line: &str) -> Option<(u16, SocketAddr, u8)> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let (_, local_port) = fields.next()?.split_once(':')?;
    let (remote, remote_port) = fields.next()?.split_once(':')?;
    let state = fields.next()?;
    let mut words = remote.as_bytes().chunks(8).map(|word| {
        // Each word was read from memory in host order.
        Some(u32::from_str_radix(str::from_utf8(word).ok()?, 16).ok()?.to_ne_bytes())
    });
    let remote = if remote.len() == 8 {
        IpAddr::from(words.next()??)
    } else {
        let words: Vec<[u8; 4]> = words.collect::<Option<_>>()?;
        let octets: [u8; 16] = words.concat().try_into().ok()?;
        IpAddr::from(Ipv6Addr::from(octets)).to_canonical()
    };
    let port = |digits| u16::from_str_radix(digits, 16).ok();
    let remote = SocketAddr::new(remote, port(remote_port)?);
    Some((port(local_port)?, remote, u8::from_str_radix(state, 16).ok()?))
}
