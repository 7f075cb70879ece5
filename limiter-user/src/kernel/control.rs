//! The control program: the only way by which user space takes something out of the ledger.

use std::{fmt, net::SocketAddr};

use aya::{
    TestRun as _,
    programs::{Program, ProgramError, TestRunOptions, Xdp},
};
use limiter_common::{
    Counter, Endpoints, abi,
    control::{Request, answer, op},
};

use super::{KernelError, load::Loaded};

/// Runs the control program.
pub struct Control {
    loaded: Loaded,
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control").finish_non_exhaustive()
    }
}

impl Control {
    /// With programs that are loaded.
    pub fn new(loaded: Loaded) -> Self {
        Self { loaded }
    }

    /// Takes a connection out of the ledger that the gateway has given up. `false` if it is not there (any more), or the
    /// addresses belong to another socket by now.
    pub fn release(&self, remote: SocketAddr, local: SocketAddr, cookie: u64) -> Result<bool, KernelError> {
        let request = Request {
            op: op::RELEASE,
            counter: Counter::ClosedGateway as u32,
            owner: cookie,
            key: Endpoints::new(remote, local).key(),
        };
        Ok(self.ask(&request)? == answer::DONE)
    }

    /// Takes out the reservations that the stack did not confirm in time. The programs do the same when there is traffic;
    /// this is for when there is none.
    pub fn expire(&self) -> Result<(), KernelError> {
        let request = Request { op: op::EXPIRE, ..Request::default() };
        while self.ask(&request)? == answer::AGAIN {}
        Ok(())
    }

    fn ask(&self, request: &Request) -> Result<u32, KernelError> {
        const WHAT: &str = "can't run the control program";
        let program: &Xdp = match self.loaded.programs.program(abi::PROGRAM_CONTROL) {
            Some(program @ Program::Xdp(_)) => program.try_into().map_err(KernelError::failed(WHAT))?,
            _ => return Err(KernelError::failed(WHAT)(ProgramError::UnexpectedProgramType)),
        };
        let options =
            TestRunOptions { data_in: Some(bytemuck::bytes_of(request)), repeat: 1, ..TestRunOptions::default() };
        Ok(program.test_run(options).map_err(KernelError::failed(WHAT))?.return_value)
    }
}
