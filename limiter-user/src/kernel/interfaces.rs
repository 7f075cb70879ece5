//! How the program of admission gets onto interfaces, stays there, and gets off again.

use std::fs;

use aya::{
    Ebpf,
    programs::{
        ProgramError, Xdp, XdpMode as AyaXdpMode,
        links::{FdLink, PinnedLink},
        xdp::XdpLink,
    },
};
use limiter_common::abi;

use super::{
    KernelError,
    error::Errno as _,
    link,
    load::program,
    pins::{Pins, XdpMode, XdpPin},
};
use crate::config::AttachMode;

/// How an interface is attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InterfaceReport {
    /// Its name.
    pub name: String,
    /// How.
    pub mode: XdpMode,
    /// Why it is not native, if native was tried.
    pub fallback: Option<String>,
}

/// The interfaces of one pin path.
pub struct Interfaces<'a> {
    pins: &'a Pins,
    mode: AttachMode,
}

/// The program on an interface. A new link ends with this, unless [`Interfaces::keep`] is called.
pub struct Attachment {
    interface: u32,
    report: InterfaceReport,
    /// To be pinned; `None` if it is an old one, which is.
    new: Option<FdLink>,
}

impl<'a> Interfaces<'a> {
    /// Those of a pin path, to be attached in this mode.
    pub fn new(pins: &'a Pins, mode: AttachMode) -> Self {
        Self { pins, mode }
    }

    /// Attaches the program to each interface, or puts it in the place of the one that is pinned there.
    pub fn attach(&self, ebpf: &mut Ebpf, interfaces: &[(String, u32)]) -> Result<Vec<Attachment>, KernelError> {
        let pinned = self.pinned_links()?;
        let program: &mut Xdp = program(ebpf, abi::PROGRAM_XDP)?;
        interfaces
            .iter()
            .map(|(name, index)| {
                if let Some(pin) = pinned.iter().find(|pin| pin.interface == *index) {
                    if self.allows(pin.mode) && replace(program, pin)? {
                        let report = InterfaceReport { name: name.clone(), mode: pin.mode, fallback: None };
                        return Ok(Attachment { interface: *index, report, new: None });
                    }
                    // Its interface is gone (and came back), or it is to be attached another way.
                    fs::remove_file(&pin.path)
                        .map_err(KernelError::failed(format!("can't remove {}", pin.path.display())))?;
                }
                let (mode, fallback, link) = attach_new(program, name, *index, self.mode)?;
                let report = InterfaceReport { name: name.clone(), mode, fallback };
                Ok(Attachment { interface: *index, report, new: Some(link) })
            })
            .collect()
    }

    fn allows(&self, mode: XdpMode) -> bool {
        match self.mode {
            AttachMode::Auto => true,
            AttachMode::Native => mode == XdpMode::Native,
            AttachMode::Generic => mode == XdpMode::Generic,
        }
    }

    /// Pins what was attached.
    pub fn keep(&self, attachments: Vec<Attachment>) -> Result<Vec<InterfaceReport>, KernelError> {
        attachments
            .into_iter()
            .map(|Attachment { interface, report, new }| {
                if let Some(new) = new {
                    link::pin(new, &self.pins.xdp(report.mode, interface))?;
                }
                Ok(report)
            })
            .collect()
    }

    /// Detaches from the interfaces that are not among these.
    pub fn remove_others(&self, interfaces: &[(String, u32)]) -> Result<(), KernelError> {
        for pin in self.pinned_links()? {
            if !interfaces.iter().any(|(_, index)| *index == pin.interface) {
                link::detach(&pin.path).map_err(KernelError::failed(format!("can't detach {}", pin.path.display())))?;
                fs::remove_file(&pin.path)
                    .map_err(KernelError::failed(format!("can't remove {}", pin.path.display())))?;
            }
        }
        Ok(())
    }

    fn pinned_links(&self) -> Result<Vec<XdpPin>, KernelError> {
        self.pins.xdp_links().map_err(KernelError::failed(format!("can't list {}", self.pins.links().display())))
    }
}

/// Puts the program in the place of the one that a pinned link holds, without a gap. `false` if the link's interface is
/// gone.
fn replace(program: &mut Xdp, pin: &XdpPin) -> Result<bool, KernelError> {
    let what = || format!("can't replace the program of {}", pin.path.display());
    let link = PinnedLink::from_pin(&pin.path).map_err(KernelError::failed(what()))?;
    let link = XdpLink::try_from(FdLink::from(link)).map_err(KernelError::failed(what()))?;
    match program.attach_to_link(link) {
        Ok(id) => {
            // The pin keeps it attached; this process's hand on it goes.
            drop(program.take_link(id).map_err(KernelError::failed(what()))?);
            Ok(true)
        }
        Err(error) if error.errno() == Some(libc::ENOLINK) => Ok(false),
        Err(error) => Err(KernelError::failed(what())(error)),
    }
}

/// Attaches to an interface that has no pinned link: natively if that is possible and wanted, otherwise generically.
fn attach_new(
    program: &mut Xdp,
    name: &str,
    index: u32,
    mode: AttachMode,
) -> Result<(XdpMode, Option<String>, FdLink), KernelError> {
    let mut fallback = None;
    if mode != AttachMode::Generic {
        match attach_as(program, index, AyaXdpMode::Driver) {
            Ok(link) => return Ok((XdpMode::Native, None, link)),
            Err(error) => {
                if is_taken(&error) {
                    return Err(KernelError::InterfaceTaken { interface: name.to_owned() });
                }
                let source = std::io::Error::other(error);
                if mode == AttachMode::Native {
                    return Err(KernelError::NoNativeXdp { interface: name.to_owned(), source });
                }
                fallback = Some(cause(&source));
            }
        }
    }
    match attach_as(program, index, AyaXdpMode::Skb) {
        Ok(link) => Ok((XdpMode::Generic, fallback, link)),
        Err(error) if is_taken(&error) => Err(KernelError::InterfaceTaken { interface: name.to_owned() }),
        Err(error) => Err(KernelError::failed(format!("can't attach the XDP program to {name}"))(error)),
    }
}

fn attach_as(program: &mut Xdp, index: u32, mode: AyaXdpMode) -> Result<FdLink, ProgramError> {
    let id = program.attach_to_if_index(index, mode)?;
    // A link made by netlink can't be pinned and is refused here; dropping it detaches.
    program.take_link(id)?.try_into().map_err(|error| ProgramError::IOError(std::io::Error::other(error)))
}

/// Whether somebody else's program is on the interface. `EEXIST`: in the other mode.
fn is_taken(error: &ProgramError) -> bool {
    matches!(error.errno(), Some(libc::EBUSY | libc::EEXIST))
}

/// The innermost cause of an error.
fn cause(error: &(dyn std::error::Error + 'static)) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}
