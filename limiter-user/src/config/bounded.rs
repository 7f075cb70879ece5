//! Files that somebody names in the configuration.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

/// What is in a file that may have `longest` bytes: to read whatever a path leads to could fill the memory.
pub(super) fn read(path: &Path, longest: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(longest + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > longest {
        return Err(io::Error::other(format!("it is longer than {longest} bytes")));
    }
    Ok(bytes)
}
