//! The pinned state, opened by name.

use std::path::Path;

use super::{ConnectionRow, KernelError, ServiceRow, SourceRow, Status};
use crate::policy::Limits;

/// The state of an attached limiter, whether a daemon runs on it or not.
#[derive(Debug)]
pub struct Pinned {}

impl Pinned {
    /// Opens what is pinned at `pin_path`.
    pub fn open(_pin_path: &Path) -> Result<Self, KernelError> {
        todo!()
    }

    /// What is in force.
    pub fn status(&self) -> Result<Status, KernelError> {
        todo!()
    }

    /// Services, in the order of their index.
    pub fn services(&self) -> Result<Vec<ServiceRow>, KernelError> {
        todo!()
    }

    /// Every source that holds a connection, those with most connections first.
    pub fn sources(&self) -> Result<Vec<SourceRow>, KernelError> {
        todo!()
    }

    /// Every connection in the ledger, oldest first.
    pub fn connections(&self) -> Result<Vec<ConnectionRow>, KernelError> {
        todo!()
    }

    /// Puts new limits in force for the service of that index; connections that are open stay open.
    pub fn set_limits(&self, _service: u32, _limits: &Limits) -> Result<(), KernelError> {
        todo!()
    }
}
