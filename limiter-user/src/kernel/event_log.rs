//! The ring buffer of refusals, read beside whoever consumes it.
//!
//! A ring buffer has one consumer: what it has read, the kernel may write over. With a daemon, that is the daemon. But a record
//! stays where it is until it is written over, and the position that the kernel writes at can be read by anybody who may
//! map the buffer. So each reader here keeps a position of its own, starts at the oldest record that is whole, and takes nothing
//! away from others; what it was too slow for, it counts. Where nobody consumes, a reader makes room for what comes next.
//! (docs/adr/0007)

use std::{
    fs, io,
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd},
        unix::fs::MetadataExt as _,
    },
    path::PathBuf,
    ptr::{self, NonNull},
    sync::atomic::{AtomicU32, AtomicUsize, Ordering, fence},
};

use limiter_common::{abi, event::Refusal};

use super::{Event, KernelError, events, pins::Pins};

/// The kernel's `BPF_RINGBUF_BUSY_BIT`: the record is being written.
const BUSY: u32 = 1 << 31;
/// The kernel's `BPF_RINGBUF_DISCARD_BIT`: it was given up.
const DISCARDED: u32 = 1 << 30;
/// The kernel's `BPF_RINGBUF_HDR_SZ`.
const HEADER_BYTES: usize = 8;
/// What each record takes; the programs write no others, so they begin at its multiples.
const RECORD_BYTES: usize = (HEADER_BYTES + size_of::<Refusal>()).next_multiple_of(8);
const RING_BYTES: usize = abi::EVENTS_BYTES as usize;

/// One reader.
#[derive(Debug)]
pub struct EventLog {
    consumer: Mapping,
    /// The position that the kernel writes at, then, from the next page on, the data, twice.
    producer: Mapping,
    page: usize,
    position: usize,
    /// Where it was pinned, and as which inode.
    pin: Option<(PathBuf, u64)>,
}

/// What was read at once.
#[derive(Debug, Default)]
pub struct EventBatch {
    /// The records, oldest first.
    pub events: Vec<Event>,
    /// How many were written over before they were read.
    pub lost: u64,
}

impl EventLog {
    /// The pinned buffer, from the oldest record that it still has.
    pub(super) fn open(pins: &Pins) -> Result<Self, KernelError> {
        let path = pins.map(abi::MAP_EVENTS);
        let what = format!("can't open the map pinned at {}", path.display());
        let map = aya::maps::MapData::from_pin(&path).map_err(KernelError::failed(what.clone()))?;
        // The mappings keep the buffer; the descriptor may go.
        let mut log = Self::on(map.fd().as_fd()).map_err(KernelError::failed(what.clone()))?;
        let inode = fs::metadata(&path).map_err(KernelError::failed(what))?.ino();
        log.pin = Some((path, inode));
        Ok(log)
    }

    /// The buffer of that descriptor, which must be a ring buffer of [`abi::EVENTS_BYTES`].
    ///
    /// # Errors
    ///
    /// What mapping it into memory gives.
    pub fn on(map: BorrowedFd<'_>) -> io::Result<Self> {
        // SAFETY: the call has no precondition.
        let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).map_err(io::Error::other)?;
        let consumer = Mapping::new(map, 0, page, libc::PROT_READ | libc::PROT_WRITE)?;
        let producer = Mapping::new(map, page, page + 2 * RING_BYTES, libc::PROT_READ)?;
        let mut log = Self { consumer, producer, page, position: 0, pin: None };
        log.position = log.oldest();
        Ok(log)
    }

    /// What has come since the last time, or is there at the first.
    pub fn read(&mut self) -> EventBatch {
        let mut batch = EventBatch::default();
        loop {
            let (oldest, end) = (self.oldest(), self.end());
            if self.position < oldest {
                batch.lost += ((oldest - self.position) / RECORD_BYTES) as u64;
                self.position = oldest;
            }
            if self.position >= end {
                return batch;
            }
            let header = self.header(self.position).load(Ordering::Acquire);
            if header & BUSY != 0 {
                return batch;
            }
            let refusal = self.record(self.position);
            fence(Ordering::Acquire);
            // Written over while it was read: look again where the oldest is now.
            if self.position < self.oldest() {
                continue;
            }
            if header as usize == size_of::<Refusal>() {
                batch.events.extend(events::from_record(&refusal));
            } else if header & DISCARDED == 0 {
                // Of another version's programs: what follows can't be told apart.
                self.position = end;
                return batch;
            }
            self.position += RECORD_BYTES;
        }
    }

    /// Whether it is still the buffer that is pinned there: after `detach`, nothing goes into this one any more.
    pub fn is_pinned(&self) -> bool {
        self.pin.as_ref().is_some_and(|(path, inode)| fs::metadata(path).is_ok_and(|pin| pin.ino() == *inode))
    }

    /// Whether nothing more went into the buffer, because nobody consumes it.
    pub fn is_full(&self) -> bool {
        self.end().saturating_sub(self.consumed().load(Ordering::Acquire)) > RING_BYTES - RECORD_BYTES
    }

    /// Lets the kernel write over what was read here. Only for who is alone with the buffer.
    pub fn consume(&self) {
        self.consumed().fetch_max(self.position, Ordering::AcqRel);
    }

    /// The position after the last record that was begun.
    fn end(&self) -> usize {
        // SAFETY: the page begins with the kernel's position, an aligned word, and is mapped as long as `self` is there.
        unsafe { self.producer.at(0).cast::<AtomicUsize>().as_ref() }.load(Ordering::Acquire)
    }

    /// The position of the oldest record that is whole.
    fn oldest(&self) -> usize {
        // What is not consumed is not written over. Positions only grow, so what this was true of stays whole until the next
        // look.
        let consumed = self.consumed().load(Ordering::Acquire);
        oldest(self.end()).min(consumed)
    }

    fn consumed(&self) -> &AtomicUsize {
        // SAFETY: as above; this page may be written to.
        unsafe { self.consumer.at(0).cast::<AtomicUsize>().as_ref() }
    }

    fn header(&self, position: usize) -> &AtomicU32 {
        // SAFETY: within the first copy of the data, and aligned: positions are multiples of eight.
        unsafe { self.producer.at(self.page + position % RING_BYTES).cast::<AtomicU32>().as_ref() }
    }

    /// The record of a position, which the kernel may be writing over at this moment: the caller looks afterwards.
    fn record(&self, position: usize) -> Refusal {
        let place = self.producer.at(self.page + position % RING_BYTES + HEADER_BYTES);
        // SAFETY: within both copies of the data, aligned to eight, and every bit pattern is a record. Volatile, since others
        // may write there.
        unsafe { ptr::read_volatile(place.cast::<Refusal>().as_ptr()) }
    }
}

/// The oldest position of a whole record, if everything is consumed and the kernel has come as far as `end`. The header of the record that is begun next is
/// written before `end` moves, so one record's room is left out.
const fn oldest(end: usize) -> usize {
    end.saturating_sub(RING_BYTES - RECORD_BYTES).next_multiple_of(RECORD_BYTES)
}

/// Memory of a map.
#[derive(Debug)]
struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the memory is the same for every thread, and is only read, or written to by atomics.
unsafe impl Send for Mapping {}

impl Mapping {
    fn new(map: BorrowedFd<'_>, offset: usize, bytes: usize, protection: libc::c_int) -> io::Result<Self> {
        let offset = offset.try_into().map_err(io::Error::other)?;
        // SAFETY: a new mapping, wherever there is room.
        let start =
            unsafe { libc::mmap(ptr::null_mut(), bytes, protection, libc::MAP_SHARED, map.as_raw_fd(), offset) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(start.cast()).map(|start| Self { start, bytes }).ok_or_else(|| io::Error::other("mapped at 0"))
    }

    /// # Panics
    /// Past the end.
    fn at(&self, offset: usize) -> NonNull<u8> {
        assert!(offset < self.bytes, "{offset} is within {} bytes", self.bytes);
        // SAFETY: within the mapping.
        unsafe { self.start.add(offset) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: it was mapped with this size, and nobody holds a reference.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_record_is_whole_and_begins_where_one_begins() {
        assert_eq!(oldest(0), 0);
        assert_eq!(oldest(RECORD_BYTES), 0);
        for records in [RING_BYTES / RECORD_BYTES, RING_BYTES / RECORD_BYTES + 1, 1_000_000] {
            let end = records * RECORD_BYTES;
            let oldest = oldest(end);
            assert_eq!(oldest % RECORD_BYTES, 0);
            // The next record's header does not reach it, and the one before is not whole.
            assert!(end + RECORD_BYTES <= oldest + RING_BYTES, "{records}");
            assert!(oldest == 0 || end + RECORD_BYTES > oldest - RECORD_BYTES + RING_BYTES, "{records}");
        }
    }
}
