//! The control program: the only way by which user space changes what is in the ledger.

use std::{
    fmt, io,
    io::Read as _,
    net::{IpAddr, SocketAddr},
    sync::{PoisonError, RwLock},
};

use aya::{
    Btf, TestRun as _,
    programs::{Iter, Program, ProgramError, TestRunOptions, Xdp},
};
use limiter_common::{
    Counter, DenyReason, Endpoints, abi,
    control::{Request, answer, op, watch},
    user::Member,
};

use super::{
    KernelError,
    features::Feature,
    load::{Loaded, program},
    sock_diag::Socket,
};
use crate::policy::Connection;

/// Runs the control program.
pub struct Control {
    // Only to load and attach programs takes more than a look.
    loaded: RwLock<Loaded>,
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control").finish_non_exhaustive()
    }
}

/// What came of entering a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Adoption {
    /// It is in the ledger now.
    Done,
    /// It was there already, or its port is no service's.
    NotNeeded,
    /// The ledger has no room.
    Full,
}

impl Control {
    /// With programs that are loaded.
    pub fn new(loaded: Loaded) -> Self {
        Self { loaded: RwLock::new(loaded) }
    }

    /// Takes a connection out of the ledger that the gateway has given up. `false` if it is not there (any more), or the
    /// addresses belong to another socket by now.
    pub fn release(&self, remote: SocketAddr, local: SocketAddr, cookie: u64) -> Result<bool, KernelError> {
        self.release_as(&Socket::new(Endpoints::new(remote, local), cookie), Counter::ClosedGateway)
    }

    /// Has a connection count against a user instead of its source. `false` if it is not in the ledger (any more).
    pub fn count_for_user(&self, connection: &Connection, member: Member) -> Result<bool, KernelError> {
        let socket = Socket::new(Endpoints::new(connection.remote, connection.local), connection.cookie);
        let request = Request { member, ..request(op::COUNT_FOR_USER, &socket, Counter::CountedForUser) };
        match self.ask(&request)? {
            answer::DONE | answer::THERE_ALREADY => Ok(true),
            answer::FULL => Err(KernelError::Failed {
                what: "the ledger has no room for another user".to_owned(),
                source: "raise max_connections".into(),
            }),
            _ => Ok(false),
        }
    }

    /// Takes a socket's connection out of the ledger.
    pub(super) fn release_as(&self, socket: &Socket, counter: Counter) -> Result<bool, KernelError> {
        Ok(self.ask(&request(op::RELEASE, socket, counter))? == answer::DONE)
    }

    /// Enters a connection that is open already. As [`Counter::OpenedAdopted`] it is never cut; as
    /// [`Counter::OpenedAudit`] it is marked if it is past its limits.
    pub(super) fn adopt(&self, socket: &Socket, counter: Counter) -> Result<Adoption, KernelError> {
        Ok(match self.ask(&request(op::ADOPT, socket, counter))? {
            answer::DONE => Adoption::Done,
            answer::FULL => Adoption::Full,
            _ => Adoption::NotNeeded,
        })
    }

    /// Why a SYN of that client to that port would be refused now, if it would. Nothing comes of the question. The port must be
    /// a service's.
    pub(super) fn judge(&self, client: IpAddr, port: u16) -> Result<Option<DenyReason>, KernelError> {
        let ends = Endpoints { remote: client.into(), local_port: port, ..Endpoints::default() };
        let answer = self.ask(&Request { op: op::JUDGE, connection: ends, ..Request::default() })?;
        let reason = answer.checked_sub(answer::ADMITTED).and_then(|number| u8::try_from(number).ok());
        match reason.map(|number| (number, DenyReason::from_number(number))) {
            Some((0, _)) => Ok(None),
            Some((_, Some(reason))) => Ok(Some(reason)),
            _ => Err(KernelError::Failed {
                what: format!("the control program can't say what a SYN to port {port} gets"),
                source: format!("it answered {answer}").into(),
            }),
        }
    }

    /// Counts something that happened to a connection.
    pub(super) fn count(&self, connection: &Endpoints, counter: Counter) -> Result<(), KernelError> {
        self.ask(&request(op::COUNT, &Socket::new(*connection, 0), counter)).map(|_| ())
    }

    /// Takes out the reservations that the stack did not confirm in time. The programs do the same when there is traffic;
    /// this is for a daemon, when there is none. Without one, `Pinned` looks through the whole ledger.
    pub fn expire(&self) -> Result<(), KernelError> {
        let request = Request { op: op::EXPIRE, ..Request::default() };
        while self.ask(&request)? == answer::AGAIN {}
        Ok(())
    }

    /// Works with the programs, which nobody else does meanwhile.
    pub(super) fn with_programs<T>(&self, work: impl FnOnce(&mut Loaded) -> T) -> T {
        work(&mut self.loaded.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// Has the stack tell of the end of every connection of a service that is open now, in the calling thread's network
    /// namespace. `false` if this kernel can't (before 6.12).
    pub(super) fn watch(&self) -> Result<bool, KernelError> {
        const WHAT: &str = "can't go through the open connections";
        if Feature::Watch.is_hidden() {
            return Ok(false);
        }
        let mut loaded = self.loaded.write().unwrap_or_else(PoisonError::into_inner);
        let watcher: &mut Iter = program(&mut loaded.programs, abi::PROGRAM_WATCH)?;
        // Loaded when it is needed, which is seldom: reading the kernel's types takes a while.
        if watcher.fd().is_err() {
            let Ok(btf) = Btf::from_sys_fs() else { return Ok(false) };
            if let Err(error) = watcher.load("tcp", &btf) {
                tracing::debug!(%error, "this kernel refuses the program that goes through open connections");
                return Ok(false);
            }
        }
        let link = watcher.attach().and_then(|id| watcher.take_link(id)).map_err(KernelError::failed(WHAT))?;
        let mut sockets = link.into_file().map_err(|error| KernelError::failed(WHAT)(io::Error::other(error)))?;
        let mut outcomes = Vec::new();
        sockets.read_to_end(&mut outcomes).map_err(KernelError::failed(WHAT))?;
        Ok(!outcomes.contains(&watch::REFUSED))
    }

    fn ask(&self, request: &Request) -> Result<u32, KernelError> {
        const WHAT: &str = "can't run the control program";
        let loaded = self.loaded.read().unwrap_or_else(PoisonError::into_inner);
        let program: &Xdp = match loaded.programs.program(abi::PROGRAM_CONTROL) {
            Some(program @ Program::Xdp(_)) => program.try_into().map_err(KernelError::failed(WHAT))?,
            _ => return Err(KernelError::failed(WHAT)(ProgramError::UnexpectedProgramType)),
        };
        let options =
            TestRunOptions { data_in: Some(bytemuck::bytes_of(request)), repeat: 1, ..TestRunOptions::default() };
        Ok(program.test_run(options).map_err(KernelError::failed(WHAT))?.return_value)
    }
}

fn request(op: u32, socket: &Socket, counter: Counter) -> Request {
    Request { op, counter: counter as u32, owner: socket.cookie, connection: socket.connection, ..Request::default() }
}
