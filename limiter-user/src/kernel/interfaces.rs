//! How the programs of admission get onto interfaces, stay there, and get off again.

use std::io;

use aya::programs::{ProgramError, SchedClassifier, Xdp, links::FdLink};

use super::{
    KernelError, clsact,
    error::Errno as _,
    host, link,
    load::{Hook, Loaded},
    pins::Pins,
    placement::{Mode, Pin, Placement, Why},
    tc, xdp,
};
use crate::config::AttachMode;

/// How an interface is attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InterfaceReport {
    /// Its name.
    pub name: String,
    /// How.
    pub mode: Mode,
    /// Why not in a faster mode, if that was tried.
    pub why: Option<Why>,
}

/// The interfaces of one pin path.
pub struct Interfaces<'a> {
    pins: &'a Pins,
    mode: AttachMode,
}

/// The program on an interface. What is new ends with this, unless [`Interfaces::keep`] is called.
pub struct Attachment {
    name: String,
    placement: Placement,
    held: Held,
}

enum Held {
    /// By what was pinned already.
    Pinned,
    /// By a link, to be pinned.
    Link(FdLink),
    /// By a filter, to be kept.
    Filter(clsact::Filter),
}

impl<'a> Interfaces<'a> {
    /// Those of a pin path, to be attached in this mode.
    pub fn new(pins: &'a Pins, mode: AttachMode) -> Self {
        Self { pins, mode }
    }

    /// Attaches the program to each interface, or puts it in the place of the one that is pinned there.
    pub fn attach(&self, loaded: &mut Loaded, interfaces: &[(String, u32)]) -> Result<Vec<Attachment>, KernelError> {
        let pinned = self.pinned()?;
        interfaces
            .iter()
            .map(|(name, index)| {
                let device = Device::look_at(self.pins, name, *index)?;
                for pin in pinned.iter().filter(|pin| pin.placement.interface == *index) {
                    if self.allows(pin.placement.mode) {
                        if device.replace(loaded, pin)? {
                            let placement = pin.placement;
                            return Ok(Attachment { name: name.clone(), placement, held: Held::Pinned });
                        }
                        // It leads nowhere any more.
                        remove(pin)?;
                    } else if pin.placement.mode.is_xdp() && self.mode != AttachMode::Tc {
                        // In the way of the other mode of XDP. One on TC goes when the new one is there, and the other way round.
                        remove(pin)?;
                    }
                }
                device.attach(loaded, self.mode)
            })
            .collect()
    }

    fn allows(&self, mode: Mode) -> bool {
        match self.mode {
            AttachMode::Auto => true,
            AttachMode::Native => mode == Mode::Native,
            AttachMode::Generic => mode == Mode::Generic,
            AttachMode::Tc => !mode.is_xdp(),
        }
    }

    /// Makes what was attached outlive the process.
    pub fn keep(&self, attachments: Vec<Attachment>) -> Result<Vec<InterfaceReport>, KernelError> {
        attachments
            .into_iter()
            .map(|Attachment { name, placement, held }| {
                match held {
                    Held::Pinned => {}
                    Held::Link(link) => link::pin(link, &self.pins.placement(&placement))?,
                    Held::Filter(filter) => filter.keep(),
                }
                // What else is pinned for this interface is of another mode, and done with.
                for pin in self.pinned()? {
                    if pin.placement.interface == placement.interface && pin.placement != placement {
                        remove(&pin)?;
                    }
                }
                Ok(InterfaceReport { name, mode: placement.mode, why: placement.why })
            })
            .collect()
    }

    /// Detaches from the interfaces that are not among these.
    pub fn remove_others(&self, interfaces: &[u32]) -> Result<(), KernelError> {
        for pin in self.pinned()? {
            if !interfaces.contains(&pin.placement.interface) {
                remove(&pin)?;
            }
        }
        Ok(())
    }

    /// What is pinned.
    pub fn pinned(&self) -> Result<Vec<Pin>, KernelError> {
        self.pins.placements().map_err(KernelError::failed(format!("can't list {}", self.pins.links().display())))
    }
}

fn remove(pin: &Pin) -> Result<(), KernelError> {
    pin.detach()
        .and_then(|()| pin.remove())
        .map_err(KernelError::failed(format!("can't detach {}", pin.path.display())))
}

/// What came of XDP where it need not be XDP.
enum OnXdp {
    Attached(Attachment),
    Impossible(Why),
}

/// An interface, as far as it matters how to attach to it.
struct Device<'a> {
    pins: &'a Pins,
    name: &'a str,
    index: u32,
    has_ethernet: bool,
}

impl<'a> Device<'a> {
    fn look_at(pins: &'a Pins, name: &'a str, index: u32) -> Result<Self, KernelError> {
        let kind = host::link_type(name)
            .map_err(KernelError::failed(format!("can't ask for the kind of the interface {name}")))?;
        let has_ethernet = kind
            .has_ethernet()
            .ok_or_else(|| KernelError::UnknownLinkType { interface: name.to_owned(), number: kind.0 })?;
        Ok(Self { pins, name, index, has_ethernet })
    }

    fn tc_hook(&self) -> Hook {
        if self.has_ethernet { Hook::Tc } else { Hook::TcL3 }
    }

    /// Puts the program in the place of the one that is pinned, without a gap. `false` if that is gone.
    fn replace(&self, loaded: &mut Loaded, pin: &Pin) -> Result<bool, KernelError> {
        if pin.placement.mode.is_xdp() {
            return xdp::replace(loaded.admission::<Xdp>(Hook::Xdp)?, &pin.path);
        }
        let classifier = loaded.admission::<SchedClassifier>(self.tc_hook())?;
        match pin.placement.mode {
            Mode::Tcx => tc::replace_link(classifier, &pin.path),
            _ => tc::replace_filter(classifier, self.index),
        }
    }

    /// Attaches to an interface that has no program of limiter's: in the fastest mode that is to be had and wanted.
    fn attach(&self, loaded: &mut Loaded, mode: AttachMode) -> Result<Attachment, KernelError> {
        let why = match mode {
            AttachMode::Tc => None,
            AttachMode::Auto if !self.has_ethernet => Some(Why::NoEthernet),
            _ if !self.has_ethernet => {
                return Err(KernelError::NoEthernet { interface: self.name.to_owned() });
            }
            _ => match self.attach_xdp(loaded, mode)? {
                OnXdp::Attached(attachment) => return Ok(attachment),
                OnXdp::Impossible(why) => Some(why),
            },
        };
        let classifier = loaded.admission::<SchedClassifier>(self.tc_hook())?;
        let note = self.pins.placement(&Placement { mode: Mode::Clsact, interface: self.index, why });
        Ok(match tc::attach(classifier, self.name, self.index, &note)? {
            tc::Attached::Link(link) => self.attached(Mode::Tcx, why, Held::Link(link)),
            tc::Attached::Filter(filter) => self.attached(Mode::Clsact, why, Held::Filter(filter)),
        })
    }

    fn attached(&self, mode: Mode, why: Option<Why>, held: Held) -> Attachment {
        Attachment { name: self.name.to_owned(), placement: Placement { mode, interface: self.index, why }, held }
    }

    /// Natively if that is possible and wanted, otherwise generically.
    fn attach_xdp(&self, loaded: &mut Loaded, wanted: AttachMode) -> Result<OnXdp, KernelError> {
        let program = match loaded.admission::<Xdp>(Hook::Xdp) {
            Ok(program) => program,
            Err(KernelError::Refused { source, .. }) if wanted == AttachMode::Auto => {
                return Ok(OnXdp::Impossible(Why::Refused(source.raw_os_error().unwrap_or(libc::EINVAL))));
            }
            Err(error) => return Err(error),
        };
        let mut why = None;
        for mode in [Mode::Native, Mode::Generic] {
            match wanted {
                AttachMode::Native if mode != Mode::Native => continue,
                AttachMode::Generic if mode != Mode::Generic => continue,
                _ => {}
            }
            let error = match xdp::attach(program, self.index, mode) {
                Ok(link) => return Ok(OnXdp::Attached(self.attached(mode, why, Held::Link(link)))),
                Err(error) => error,
            };
            let reason = reason(&error);
            if wanted != AttachMode::Auto {
                return Err(self.refused(reason, mode, error));
            }
            if reason == Why::Taken {
                return Ok(OnXdp::Impossible(reason));
            }
            why.get_or_insert(reason);
        }
        Ok(OnXdp::Impossible(why.unwrap_or(Why::Taken)))
    }

    fn refused(&self, reason: Why, mode: Mode, error: ProgramError) -> KernelError {
        let interface = self.name.to_owned();
        match (reason, mode) {
            (Why::Taken, _) => KernelError::InterfaceTaken { interface },
            (_, Mode::Native) => KernelError::NoNativeXdp { interface, source: io::Error::other(error) },
            _ => KernelError::failed(format!("can't attach the XDP program to {interface}"))(error),
        }
    }
}

fn reason(error: &ProgramError) -> Why {
    if xdp::is_taken(error) { Why::Taken } else { Why::Refused(error.errno().unwrap_or(libc::EINVAL)) }
}
