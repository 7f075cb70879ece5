//! The program of admission on TC: by a link where the kernel has them (TCX, 6.6), by a filter of a clsact qdisc otherwise.

use std::{io, path::Path};

use aya::programs::{
    LinkOrder, SchedClassifier, TcAttachType,
    links::FdLink,
    tc::{SchedClassifierLink, TcAttachOptions},
};

use super::{KernelError, clsact, error::Errno as _, features::Feature, link};

/// The program on an interface. It ends with this.
pub enum Attached {
    /// By a link.
    Link(FdLink),
    /// By a filter.
    Filter(clsact::Filter),
}

/// Attaches it to an interface, before all other programs there: who passes a packet on may do so for good. `note`: the
/// folder that is to say that there is a filter.
pub fn attach(program: &mut SchedClassifier, name: &str, interface: u32, note: &Path) -> Result<Attached, KernelError> {
    let what = || format!("can't attach the classifier to {name}");
    if !Feature::Tcx.is_hidden() {
        let order = TcAttachOptions::TcxOrder(LinkOrder::first());
        match program.attach_with_options(name, TcAttachType::Ingress, order) {
            Ok(id) => {
                let link = program.take_link(id).map_err(KernelError::failed(what()))?;
                return Ok(Attached::Link(link.try_into().map_err(KernelError::failed(what()))?));
            }
            // A kernel before 6.6 doesn't know this kind of link.
            Err(error) if error.errno() == Some(libc::EINVAL) => {
                tracing::debug!(interface = name, "this kernel has no TCX; a filter of a clsact qdisc instead");
            }
            Err(error) => return Err(KernelError::failed(what())(error)),
        }
    }
    clsact::Filter::attach(program, interface, note).map(Attached::Filter).map_err(KernelError::failed(format!(
        "{} by a filter of a clsact qdisc (CONFIG_NET_SCH_INGRESS, CONFIG_NET_CLS_BPF)",
        what()
    )))
}

/// Puts it in the place of the program that a pinned link holds, without a gap. `false` if the link's interface is gone.
pub fn replace_link(program: &mut SchedClassifier, pin: &Path) -> Result<bool, KernelError> {
    link::replace(pin, |link| {
        let id = program.attach_to_link(SchedClassifierLink::try_from(link).map_err(link::wrong_kind)?)?;
        program.take_link(id).map(drop)
    })
}

/// The same for a filter. `false` if it is gone.
pub fn replace_filter(program: &SchedClassifier, interface: u32) -> Result<bool, KernelError> {
    let what = || format!("can't replace the program of the filter on the interface of index {interface}");
    match clsact::replace(program, interface) {
        Ok(replaced) => Ok(replaced),
        Err(error) if is_gone(&error) => Ok(false),
        Err(error) => Err(KernelError::failed(what())(error)),
    }
}

/// Whether an error says that there is no such interface, or nothing on it.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENOENT))
}
