//! Closes what an address has open, now.

use std::{net::SocketAddr, path::Path, thread, time::Duration};

use ipnet::IpNet;
use limiter_common::{
    Endpoints, SourceKey,
    ledger::{OWNER_REMOVED, RESERVATION_NS, is_reservation},
};

use super::{
    KernelError,
    audit::no_list,
    host,
    maps::Ledger,
    namespaces::Sockets,
    pinned::Pinned,
    sock_diag::{Destroyed, Socket},
    users,
};

/// Whose connections are closed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kicked {
    /// Those from a prefix of addresses.
    Clients(IpNet),
    /// Those of a user.
    User(String),
}

/// Closes every connection in the ledger of the state pinned there that is one of `kicked`. Returns their clients.
///
/// # Errors
///
/// [`KernelError::NoDestroy`] if this kernel can't close sockets on behalf of others, and those of [`Pinned::open`].
pub fn kick(pin_path: &Path, kicked: &Kicked) -> Result<Vec<SocketAddr>, KernelError> {
    let pinned = Pinned::open(pin_path)?;
    let mut cutter = Cutter::new(&pinned)?;
    match kicked {
        Kicked::Clients(clients) => cutter.cut(clients),
        Kicked::User(name) => {
            let id = users::id(name);
            cutter.cut_those(|_, source| source.is_user() && source.address == id)
        }
    }
}

/// How often it is looked whether the stack has opened what was half open.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// Closes connections on behalf of whoever holds them.
#[derive(Debug)]
pub struct Cutter {
    ledger: Ledger,
    sockets: Sockets,
    /// Slots of these clients that the stack has not confirmed yet.
    pending: usize,
}

impl Cutter {
    /// For the connections of that state.
    ///
    /// # Errors
    ///
    /// [`KernelError::OtherNamespace`] if its sockets are not of this network namespace.
    pub fn new(pinned: &Pinned) -> Result<Self, KernelError> {
        pinned.require_this_namespace()?;
        Ok(Self { ledger: Ledger::open(pinned.pins())?, sockets: Sockets::open().map_err(no_list)?, pending: 0 })
    }

    /// Closes every open connection whose client is in `clients`. Returns their clients.
    ///
    /// # Errors
    ///
    /// [`KernelError::NoDestroy`] if this kernel can't close sockets on behalf of others.
    pub fn cut(&mut self, clients: &IpNet) -> Result<Vec<SocketAddr>, KernelError> {
        self.cut_those(|connection, _| clients.contains(&connection.remote().ip()))
    }

    /// The same for those of which `is_meant` says so, given what they count against.
    fn cut_those(&mut self, is_meant: impl Fn(&Endpoints, &SourceKey) -> bool) -> Result<Vec<SocketAddr>, KernelError> {
        let cut = self.cut_found(is_meant);
        // Other namespaces may go now.
        self.sockets.let_go();
        cut
    }

    fn cut_found(&mut self, is_meant: impl Fn(&Endpoints, &SourceKey) -> bool) -> Result<Vec<SocketAddr>, KernelError> {
        let mut cut = Vec::new();
        self.pending = 0;
        for (connection, entry) in self.ledger.entries()? {
            if entry.owner == OWNER_REMOVED || !is_meant(&connection, &entry.source) {
                continue;
            }
            if is_reservation(entry.owner) {
                self.pending += 1;
                continue;
            }
            let Some(sockets) = self.sockets.of(connection.netns).map_err(no_list)? else { continue };
            match sockets.destroy(&Socket::new(connection, entry.owner)).map_err(no_list)? {
                Destroyed::Yes => cut.push(connection.remote()),
                Destroyed::Gone => {}
                Destroyed::Unsupported => return Err(KernelError::NoDestroy),
            }
        }
        Ok(cut)
    }

    /// The same, and those too that were half open at that moment and open yet, or expire. For when nobody new gets in.
    ///
    /// # Errors
    ///
    /// Those of [`Self::cut`].
    pub fn cut_all(&mut self, clients: &IpNet) -> Result<Vec<SocketAddr>, KernelError> {
        let deadline = host::monotonic() + Duration::from_nanos(RESERVATION_NS);
        let mut cut = self.cut(clients)?;
        while self.pending > 0 && host::monotonic() < deadline {
            thread::sleep(LOOK_INTERVAL);
            cut.extend(self.cut(clients)?);
        }
        Ok(cut)
    }
}
