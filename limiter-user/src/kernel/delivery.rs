//! The program that sees segments where they are delivered, for services some of whose sockets XDP can't look up. It is attached
//! while there is such a service, and only then: every packet that a socket of the host is given runs it.

use std::{fs, os::fd::AsFd as _};

use aya::programs::{CgroupAttachMode, CgroupSkb, ProgramError, cgroup_skb::CgroupSkbAttachType, links::FdLink};
use limiter_common::abi;

use super::{
    KernelError,
    features::Feature,
    host, link,
    load::{Loaded, program},
    pins::Pins,
};
use crate::config::Service;

/// Whether handshakes of sockets that XDP can't look up are counted before the stack opens the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// There are no such services.
    NotNeeded,
    /// They are.
    Attached,
    /// They are counted when they are open: this kernel refuses the program.
    Unsupported,
}

impl Delivery {
    /// What the user should know although it is no error.
    pub fn warning(self) -> Option<String> {
        (self == Self::Unsupported).then(|| {
            "this kernel can't count connections of other namespaces or ports before they are open (it must be 6.17 or \
             later, with BTF), so a burst of them can pass a limit; those past it are cut by a running `limiter run`"
                .to_owned()
        })
    }
}

/// Attaches the program at the root of the cgroups if one of these services needs it, in the place of another version of it, and
/// takes it away if none does.
pub fn put(loaded: &mut Loaded, pins: &Pins, services: &[Service]) -> Result<Delivery, KernelError> {
    if !services.iter().any(Service::has_sockets_elsewhere) {
        remove(pins)?;
        return Ok(Delivery::NotNeeded);
    }
    // Without the kernel's types there is nothing to tell the end of a handshake by.
    if Feature::Delivery.is_hidden() || !loaded.verifies_handshakes {
        remove(pins)?;
        return Ok(Delivery::Unsupported);
    }
    let delivery: &mut CgroupSkb = program(&mut loaded.programs, abi::PROGRAM_DELIVERY)?;
    if delivery.fd().is_err()
        && let Err(error) = delivery.load()
    {
        tracing::debug!(%error, "this kernel refuses the program that sees what is delivered");
        remove(pins)?;
        return Ok(Delivery::Unsupported);
    }
    let attached = attach(delivery).map_err(KernelError::failed(WHAT))?;
    let next = pins.delivery_next();
    // Left over from an attach that died half-way.
    let _ = fs::remove_file(&next);
    link::pin(attached, &next)?;
    // For a moment both are attached: what the first has reserved, the second finds in the ledger.
    fs::rename(&next, pins.delivery()).map_err(KernelError::failed(WHAT))?;
    Ok(Delivery::Attached)
}

const WHAT: &str = "can't attach the program that sees what is delivered to the cgroup v2 root";

fn attach(program: &mut CgroupSkb) -> Result<FdLink, ProgramError> {
    let cgroup = host::cgroup().map_err(|error| ProgramError::IOError(std::io::Error::other(error)))?;
    let id = program.attach(cgroup.as_fd(), CgroupSkbAttachType::Ingress, CgroupAttachMode::Single)?;
    program.take_link(id)?.try_into().map_err(link::wrong_kind)
}

fn remove(pins: &Pins) -> Result<(), KernelError> {
    for path in [pins.delivery(), pins.delivery_next()] {
        if path.exists() {
            let what = || format!("can't detach what is pinned at {}", path.display());
            link::detach(&path).map_err(KernelError::failed(what()))?;
            fs::remove_file(&path).map_err(KernelError::failed(what()))?;
        }
    }
    Ok(())
}
