//! Closes what an address has open, now.

use std::{net::SocketAddr, path::Path};

use ipnet::IpNet;
use limiter_common::ledger::{OWNER_REMOVED, is_reservation};

use super::{
    KernelError,
    audit::no_list,
    maps::Ledger,
    pinned::Pinned,
    sock_diag::{Destroyed, SockDiag, Socket},
};

/// Closes every connection in the ledger of the state pinned there whose client is in `clients`. Returns their clients.
///
/// # Errors
///
/// [`KernelError::NoDestroy`] if this kernel can't close sockets on behalf of others, and those of [`Pinned::open`].
pub fn kick(pin_path: &Path, clients: &IpNet) -> Result<Vec<SocketAddr>, KernelError> {
    let pinned = Pinned::open(pin_path)?;
    pinned.require_this_namespace()?;
    let mut sockets = SockDiag::open().map_err(no_list)?;
    let mut kicked = Vec::new();
    for (connection, entry) in Ledger::open(pinned.pins())?.entries()? {
        let is_open = entry.owner != OWNER_REMOVED && !is_reservation(entry.owner);
        if !is_open || !clients.contains(&connection.remote().ip()) {
            continue;
        }
        match sockets.destroy(&Socket::new(connection, entry.owner)).map_err(no_list)? {
            Destroyed::Yes => kicked.push(connection.remote()),
            Destroyed::Gone => {}
            Destroyed::Unsupported => return Err(KernelError::NoDestroy),
        }
    }
    Ok(kicked)
}
