//! Whole maps by few system calls (kernel 5.6), which aya has no methods for.

use std::{
    io, mem,
    os::fd::{AsFd as _, AsRawFd as _},
};

use aya::{Pod, maps::MapData};

use super::link::bpf;

/// `BPF_MAP_LOOKUP_BATCH` of linux/bpf.h.
const BPF_MAP_LOOKUP_BATCH: libc::c_int = 24;

/// How many elements one system call reads.
const CHUNK: u32 = 16_384;

/// Attributes of the batch commands; `from` and `next` are `in_batch` and `out_batch` there.
#[repr(C)]
#[derive(Default)]
struct Batch {
    from: u64,
    next: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    element_flags: u64,
    flags: u64,
}

/// Every element of a map that is not per CPU; those that come and go meanwhile may be missing, and others there twice.
/// At most `most`.
pub(super) fn read<K: Pod, V: Pod>(map: &MapData, most: usize) -> io::Result<Vec<(K, V)>> {
    let mut elements = Vec::new();
    let mut keys: Vec<K> = Vec::with_capacity(CHUNK as usize);
    let mut values: Vec<V> = Vec::with_capacity(CHUNK as usize);
    // Where the last call has stopped: a key, for the kinds of maps that are read here.
    let mut place = mem::MaybeUninit::<K>::uninit();
    let mut started = false;
    while elements.len() < most {
        let mut batch = Batch {
            from: if started { place.as_ptr() as u64 } else { 0 },
            next: place.as_mut_ptr() as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: CHUNK,
            map: map.fd().as_fd().as_raw_fd().cast_unsigned(),
            ..Batch::default()
        };
        let last = match bpf(BPF_MAP_LOOKUP_BATCH, &mut batch) {
            Ok(_) => false,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            Err(error) => return Err(error),
        };
        let count = batch.count.min(CHUNK) as usize;
        // SAFETY: the kernel has written so many elements of these types, which is no more than there is room for; any bits
        // are a value of them.
        unsafe {
            keys.set_len(count);
            values.set_len(count);
        }
        elements.extend(keys.iter().copied().zip(values.iter().copied()));
        if last || count == 0 {
            break;
        }
        started = true;
    }
    elements.truncate(most);
    Ok(elements)
}
