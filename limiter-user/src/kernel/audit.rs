//! Compares the ledger with the sockets that the kernel has, and mends what differs.
//!
//! Both change all the time, and neither can be read in one step. So nothing is mended because of one look: what differs
//! must differ in two passes in a row, for the same socket (by its cookie), and still differ when that one socket is looked
//! up. A slot that was reserved and is not confirmed yet is left to its expiry, unless that has forgotten it.

use std::{
    collections::{HashMap, HashSet},
    fmt, io,
    sync::Arc,
    time::{Duration, Instant},
};

use limiter_common::{
    Counter, Endpoints, LedgerEntry, Netns,
    ledger::{FLAG_ADOPTED, OWNER_REMOVED, RESERVATION_NS, is_reservation},
};

use super::{
    KernelError,
    control::{Adoption, Control},
    host,
    maps::{Audits, Ledger, Sources},
    namespaces::{Absences, Sockets},
    pins::Pins,
    recount,
    rules::Rules,
    services::Services,
    sock_diag::Socket,
};

/// Audits one pinned state.
pub struct Auditor {
    pub(super) ledger: Ledger,
    pub(super) sources: Sources,
    pub(super) services: Services,
    pub(super) rules: Rules,
    reports: Audits,
    pub(super) control: Arc<Control>,
    pub(super) sockets: Sockets,
    absences: Absences,
    /// What differed at the last pass.
    suspects: Differences,
    /// Whether the kernel has told that it can close sockets on behalf of others; until it was tried, it is believed to.
    pub(super) can_destroy: bool,
}

impl fmt::Debug for Auditor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Auditor").field("sockets", &self.sockets).finish_non_exhaustive()
    }
}

/// What a pass did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Audit {
    /// Connections that were missing from the ledger.
    pub adopted: u64,
    /// Entries whose socket was gone.
    pub removed: u64,
    /// Connections that were cut because they were past their limits.
    pub cut: u64,
    /// By how much counts and entries differ, over all services.
    pub drift: u64,
}

/// What became of the connections that were open before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AdoptedOpen {
    /// They count from now on.
    pub adopted: u64,
    /// They don't, because the kernel could not tell of their end.
    pub left_out: u64,
    /// They don't, because the ledger is full.
    pub no_room: u64,
}

#[derive(Debug, Default)]
struct Differences {
    /// Entries without a socket: connection and cookie.
    gone: HashSet<(Endpoints, u64)>,
    /// Sockets without an entry, likewise.
    unknown: HashSet<(Endpoints, u64)>,
}

/// A reservation of this age is not in the queue of those that wait for their end: more were made at once than it has room for.
/// Several times what one waits for, so that it is not the audit that ends those of every day.
const FORGOTTEN: Duration = Duration::from_nanos(3 * RESERVATION_NS);

type Entries = Vec<(Endpoints, LedgerEntry)>;

impl Auditor {
    /// For the state that is pinned there, which was attached in the network namespace of the calling thread.
    pub(super) fn new(pins: &Pins, control: Arc<Control>) -> Result<Self, KernelError> {
        let services = Services::open(pins)?;
        Ok(Self {
            ledger: Ledger::open(pins)?,
            sources: Sources::open(pins)?,
            services,
            rules: Rules::open(pins)?,
            reports: Audits::open(pins)?,
            control,
            sockets: Sockets::open().map_err(no_list)?,
            absences: Absences::default(),
            suspects: Differences::default(),
            can_destroy: true,
        })
    }

    /// Enters the connections that were open before the limiter was attached. `audited`: somebody will remove those whose
    /// end the kernel can't tell; otherwise these are not entered, since their slots would never come back.
    pub fn adopt_open(&mut self, audited: bool) -> Result<AdoptedOpen, KernelError> {
        let result = self.adopt_found(audited);
        self.sockets.let_go();
        result
    }

    fn adopt_found(&mut self, audited: bool) -> Result<AdoptedOpen, KernelError> {
        let mut result = AdoptedOpen::default();
        let (_, mut found) = self.compare()?;
        if found.unknown.is_empty() {
            return Ok(result);
        }
        let watched = self.watch(&found.unknown)?;
        // An audit sees the end of those here, and of those elsewhere as long as somebody is there with them.
        let may_stay = |netns: Netns| watched.contains(&netns) || audited && netns.is_own();
        // From here on each end is told. Those that ended before are no longer in this list.
        (_, found) = self.compare()?;
        for (connection, cookie) in found.unknown {
            if !may_stay(connection.netns) {
                result.left_out += 1;
                continue;
            }
            match self.adopt(&Socket::new(connection, cookie), Counter::OpenedAdopted)? {
                Adoption::Done => result.adopted += 1,
                Adoption::Full => result.no_room += 1,
                Adoption::NotNeeded => {}
            }
        }
        Ok(result)
    }

    /// One pass.
    pub fn audit(&mut self) -> Result<Audit, KernelError> {
        let result = self.audit_all();
        // What is held of other namespaces would keep them from going.
        self.sockets.let_go();
        result
    }

    fn audit_all(&mut self) -> Result<Audit, KernelError> {
        let mut result = Audit::default();
        let (entries, found) = self.compare()?;
        let gone: Vec<_> = found.gone.intersection(&self.suspects.gone).copied().collect();
        for suspect in gone {
            let socket = Socket::new(suspect.0, suspect.1);
            if self.look_up(&socket)?.is_some() {
                continue;
            }
            // Where the kernel can't tell of the end of what was open before, this is how it is seen.
            let adopted = self.ledger.get(&suspect.0)?.is_some_and(|entry| entry.flags & FLAG_ADOPTED != 0);
            let counter = match suspect.1 {
                owner if is_reservation(owner) => Counter::ClosedExpired,
                _ if adopted => Counter::ClosedSocket,
                _ => Counter::ClosedAudit,
            };
            if self.control.release_as(&socket, counter)? && counter == Counter::ClosedAudit {
                result.removed += 1;
            }
        }
        let unknown: HashSet<_> = found.unknown.intersection(&self.suspects.unknown).copied().collect();
        let watched = self.watch(&unknown)?;
        for (connection, cookie) in unknown {
            // Elsewhere, what the stack does not tell of might never be seen to end.
            let may_stay = connection.netns.is_own() || watched.contains(&connection.netns);
            if may_stay && self.adopt(&Socket::new(connection, cookie), Counter::OpenedAudit)? == Adoption::Done {
                result.adopted += 1;
            }
        }
        self.suspects = found;
        result.cut = self.cut_past_limit(entries)?;
        let drift = recount::drift(&self.services, &self.ledger, &self.sources)?;
        result.drift = drift.values().sum();
        self.reports.set(&drift)?;
        Ok(result)
    }

    /// Enters a connection, unless its socket is gone or given up, and takes it out again if it went meanwhile: before the
    /// entry was there, its end had nothing to remove.
    fn adopt(&mut self, socket: &Socket, counter: Counter) -> Result<Adoption, KernelError> {
        if !self.is_held(socket)? || self.ledger.get(&socket.connection)?.is_some() {
            return Ok(Adoption::NotNeeded);
        }
        let adoption = self.control.adopt(socket, counter)?;
        if adoption == Adoption::Done && self.look_up(socket)?.is_none() {
            self.control.release_as(socket, Counter::ClosedSocket)?;
        }
        Ok(adoption)
    }

    fn is_held(&mut self, socket: &Socket) -> Result<bool, KernelError> {
        Ok(self.look_up(socket)?.is_some_and(|socket| socket.is_held()))
    }

    /// The socket, if it is there; in a namespace that can't be found, it is not.
    fn look_up(&mut self, socket: &Socket) -> Result<Option<Socket>, KernelError> {
        match self.sockets.of(socket.connection.netns).map_err(no_list)? {
            Some(sockets) => sockets.look_up(socket).map_err(no_list),
            None => Ok(None),
        }
    }

    /// Has the stack tell of the end of what is open in the namespaces of these sockets. Returns those of which it will.
    fn watch(&mut self, sockets: &HashSet<(Endpoints, u64)>) -> Result<HashSet<Netns>, KernelError> {
        let mut watched = HashSet::new();
        for netns in sockets.iter().map(|(connection, _)| connection.netns).collect::<HashSet<_>>() {
            let control = Arc::clone(&self.control);
            if self.sockets.inside(netns, move || control.watch()).map_err(no_list)?.transpose()? == Some(true) {
                watched.insert(netns);
            }
        }
        Ok(watched)
    }

    /// What is in the ledger, and how it differs from the kernel's sockets.
    fn compare(&mut self) -> Result<(Entries, Differences), KernelError> {
        let counted = self.services.sockets()?;
        let entries = self.ledger.entries()?;
        // Of each connection in the ledger: its owner, and whether there is such a socket.
        let mut known: HashMap<Endpoints, (u64, bool)> =
            entries.iter().map(|(key, entry)| (*key, (entry.owner, false))).collect();
        let mut unknown = HashSet::new();
        let mut namespaces = vec![Netns::OWN];
        if entries.iter().any(|(key, _)| !key.netns.is_own()) || counted.values().any(|socket| socket.others.is_some())
        {
            namespaces.extend(self.sockets.others().map_err(no_list)?);
        }
        for &netns in &namespaces {
            let of_service: HashSet<u16> = counted
                .iter()
                .filter(|(_, socket)| if netns.is_own() { socket.own } else { socket.others }.is_some())
                .map(|(port, _)| *port)
                .collect();
            // Connections can outlive their service.
            let outlived =
                entries.iter().map(|(key, _)| key).filter(|key| key.netns == netns).map(|key| key.local_port);
            let ports: HashSet<u16> = of_service.iter().copied().chain(outlived).collect();
            let Some(sockets) = self.sockets.of(netns).map_err(no_list)? else { continue };
            for port in ports {
                sockets
                    .list(port, |socket| match known.get_mut(&socket.connection) {
                        Some((owner, there)) => *there |= *owner == socket.cookie,
                        None if of_service.contains(&port) && socket.is_held() => {
                            unknown.insert((socket.connection, socket.cookie));
                        }
                        None => {}
                    })
                    .map_err(no_list)?;
            }
        }
        let missing = known.keys().map(|key| key.netns).filter(|netns| !namespaces.contains(netns)).collect();
        let gone_namespaces = self.absences.gone(&missing, Instant::now());
        let now_ns = host::monotonic().as_nanos();
        let forgotten: HashSet<Endpoints> = entries
            .iter()
            .filter(|(_, entry)| u128::from(entry.opened_ns) + FORGOTTEN.as_nanos() < now_ns)
            .map(|(key, _)| *key)
            .collect();
        let gone = known
            .into_iter()
            .filter(|(key, _)| !missing.contains(&key.netns) || gone_namespaces.contains(&key.netns))
            .filter(|(key, (owner, there))| {
                !there && *owner != OWNER_REMOVED && (!is_reservation(*owner) || forgotten.contains(key))
            })
            .map(|(key, (owner, _))| (key, owner))
            .collect();
        Ok((entries, Differences { gone, unknown }))
    }
}

pub(super) fn no_list(error: io::Error) -> KernelError {
    KernelError::failed("can't ask the kernel for its TCP sockets")(error)
}
