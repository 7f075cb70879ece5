//! Refusals as the kernel reports them, sampled: one per source and second.

use std::{fmt, io, mem, net::SocketAddr, time::Duration};

use aya::maps::{Map, MapData, RingBuf};
use limiter_common::{
    DenyReason, Netns, abi,
    event::{Refusal, Stage},
};
use tokio::io::unix::AsyncFd;

use super::{KernelError, maps, pins::Pins};

/// A refused connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// When, since the host was booted.
    pub since_boot: Duration,
    /// Index of the service.
    pub service: u32,
    /// Why.
    pub reason: DenyReason,
    /// When it was refused.
    pub stage: Stage,
    /// The service only observes, and the packet passed.
    pub observed: bool,
    /// The client; of a SYN, as it claims.
    pub remote: SocketAddr,
    /// What it wanted to connect to.
    pub local: SocketAddr,
    /// The network namespace of its socket, if it has one.
    pub netns: Netns,
    /// Refusals of the same source (or the same full service) that were not reported since the last one.
    pub unreported: u64,
}

/// The reading end of the ring buffer.
pub struct Events {
    pins: Pins,
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events").finish_non_exhaustive()
    }
}

impl Events {
    /// Of the pinned buffer. There may be one reader at a time.
    pub(super) fn open(pins: &Pins) -> Result<Self, KernelError> {
        buffer(pins)?;
        Ok(Self { pins: pins.clone() })
    }

    /// Hands every event to `handle` as it comes; ends only with an error. Runs on a tokio runtime.
    pub async fn read(self, mut handle: impl FnMut(Event)) -> io::Error {
        // Now, and not before: it begins where the last reader was when it is opened, and that may have read on since.
        let buffer = match buffer(&self.pins) {
            Ok(buffer) => buffer,
            Err(error) => return io::Error::other(error),
        };
        // SAFETY: the buffer owns its descriptor, returns the same one every time, and is dropped only after it was
        // taken off the reactor.
        let mut buffer = match unsafe { AsyncFd::register(buffer) } {
            Ok(buffer) => buffer,
            Err(error) => return error.into(),
        };
        loop {
            let mut ready = match buffer.readable_mut().await {
                Ok(ready) => ready,
                Err(error) => return error,
            };
            while let Some(record) = ready.get_inner_mut().next() {
                if let Some(event) = parse(&record) {
                    handle(event);
                }
            }
            ready.clear_ready();
        }
    }
}

fn buffer(pins: &Pins) -> Result<RingBuf<MapData>, KernelError> {
    maps::open(&pins.map(abi::MAP_EVENTS), Map::RingBuf)
}

/// `None` for a record of another length or an unknown reason, which only another version's programs could write.
fn parse(record: &[u8]) -> Option<Event> {
    if record.len() != mem::size_of::<Refusal>() {
        return None;
    }
    // SAFETY: the length was checked, and every bit pattern is a record.
    from_record(&unsafe { record.as_ptr().cast::<Refusal>().read_unaligned() })
}

/// `None` for an unknown reason or stage.
pub(super) fn from_record(refusal: &Refusal) -> Option<Event> {
    Some(Event {
        since_boot: Duration::from_nanos(refusal.time_ns),
        service: u32::from(refusal.service),
        reason: DenyReason::from_number(refusal.reason)?,
        stage: Stage::from_number(refusal.stage)?,
        observed: refusal.observed != 0,
        remote: refusal.connection.remote(),
        local: refusal.connection.local(),
        netns: refusal.connection.netns,
        unreported: refusal.unreported,
    })
}
