//! Loads the programs and attaches them, taking over what an earlier process left pinned.
//!
//! The order is such that a host is never left half limited: what can fail without a trace (names, privileges, locks, the
//! verifier) comes first, then the programs are attached, that of the ledger before those of admission, then the policy
//! goes into the maps, and what was attached is pinned. A first attach that fails removes what it had pinned; a take-over
//! that fails leaves the old policy in force, and what the old links were attached to.

use std::{fs, os::fd::AsFd as _, sync::Arc};

use aya::{
    Ebpf,
    programs::{
        CgroupAttachMode, ProgramError, SockOps, Xdp, XdpMode as AyaXdpMode,
        links::{FdLink, PinnedLink},
        xdp::XdpLink,
    },
};
use limiter_common::abi;

use super::{
    Auditor, KernelError,
    control::Control,
    debug_log::DebugLog,
    error::Errno as _,
    events::Events,
    host, layout, link,
    live::LivePolicy,
    load::{Loaded, load, program},
    maps::{ServiceEntry, Services},
    pins::{Lock, Pins, XdpMode, XdpPin},
    rules::Rules,
};
use crate::{
    config::{AttachMode, Kernel, OnFull, Service},
    policy::Rule,
};

/// The programs, attached and pinned. Dropping this leaves them in force.
#[derive(Debug)]
pub struct Attached {
    pins: Pins,
    services: Vec<(u32, Service)>,
    control: Arc<Control>,
    events: Option<Events>,
    debug_log: Option<DebugLog>,
    // Last, so that nobody else starts before the rest is dropped.
    _lock: Lock,
}

/// What attaching did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachReport {
    /// Whether a pinned state was there and goes on.
    pub taken_over: bool,
    /// Each interface, and how it is attached.
    pub interfaces: Vec<InterfaceReport>,
    /// What the user should know although it is no error.
    pub warnings: Vec<String>,
}

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

impl Attached {
    /// Attaches to every interface of the configuration, for these services and with these rules.
    ///
    /// # Errors
    ///
    /// [`KernelError`] says which of the preconditions does not hold; nothing is left behind then that was not there
    /// before.
    pub fn attach(config: &Kernel, services: &[Service], rules: &[Rule]) -> Result<(Self, AttachReport), KernelError> {
        if services.len() > abi::MAX_SERVICES as usize {
            return Err(KernelError::TooManyServices { count: services.len() });
        }
        host::require_privilege("load and attach kernel programs")?;
        let interfaces: Vec<(String, u32)> = config
            .interfaces
            .iter()
            .map(|name| Ok((name.clone(), host::interface_index(name)?)))
            .collect::<Result<_, KernelError>>()?;
        let cgroup = host::cgroup()?;
        let netns_cookie = host::netns_cookie()?;

        let pins = Pins::new(&config.pin_path);
        let lock = pins.lock()?;
        layout::check_version(&pins)?;
        let taken_over = pins.exist();
        let result =
            Attach { config, pins: &pins, netns_cookie, taken_over }.run(&cgroup, &interfaces, services, rules);
        match result {
            Ok((services, mut loaded, events, report)) => {
                let debug_log = loaded.debug_log.take();
                let control = Arc::new(Control::new(loaded));
                Ok((Self { pins, services, control, events: Some(events), debug_log, _lock: lock }, report))
            }
            Err(error) => {
                if !taken_over {
                    // What is there is what this attempt has made. The first error is the one to tell.
                    let _ = pins.remove();
                }
                Err(error)
            }
        }
    }

    /// The services, each with its live policy.
    pub fn policies(&self) -> Result<Vec<(Service, LivePolicy)>, KernelError> {
        self.services
            .iter()
            .map(|(index, service)| {
                Ok((service.clone(), LivePolicy::new(&self.pins, *index, service.limits, Arc::clone(&self.control))?))
            })
            .collect()
    }

    /// The control program.
    pub fn control(&self) -> Arc<Control> {
        Arc::clone(&self.control)
    }

    /// Whoever compares the ledger with the kernel's sockets.
    pub fn auditor(&self) -> Result<Auditor, KernelError> {
        Auditor::new(&self.pins, self.control())
    }

    /// The refusals as they are reported; `Some` once.
    pub fn take_events(&mut self) -> Option<Events> {
        self.events.take()
    }

    /// The programs' debug messages, if they were asked for; `Some` once.
    pub fn take_debug_log(&mut self) -> Option<DebugLog> {
        self.debug_log.take()
    }

    /// Takes everything away again.
    pub fn detach(self) -> Result<(), KernelError> {
        self.pins.remove().map(|_| ())
    }
}

/// One attempt to attach.
struct Attach<'a> {
    config: &'a Kernel,
    pins: &'a Pins,
    netns_cookie: u64,
    taken_over: bool,
}

type Parts = (Vec<(u32, Service)>, Loaded, Events, AttachReport);

impl Attach<'_> {
    fn run(
        &self,
        cgroup: &fs::File,
        interfaces: &[(String, u32)],
        services: &[Service],
        rules: &[Rule],
    ) -> Result<Parts, KernelError> {
        let mut warnings = Vec::new();
        if self.taken_over {
            let size = layout::check(self.pins)?;
            if !self.pins.netns(self.netns_cookie).is_dir() {
                return Err(KernelError::OtherNamespace { pin_path: self.pins.root().to_owned() });
            }
            if size != self.config.max_connections {
                warnings.push(format!(
                    "the pinned ledger has room for {size} connections, not for {}: it keeps its size until `limiter detach`",
                    self.config.max_connections
                ));
            }
        } else {
            self.make_folders()?;
        }

        let mut loaded = load(self.config, self.pins, self.netns_cookie)?;
        if !loaded.verifies_handshakes {
            warnings.push(
                "this kernel shows no BTF (/sys/kernel/btf/vmlinux), so handshakes are counted by sock_ops alone: a burst of them can pass a limit by a few"
                    .to_owned(),
            );
        }
        let sock_ops = attach_sock_ops(&mut loaded.programs, cgroup)?;
        let links = self.attach_xdp(&mut loaded.programs, interfaces)?;
        let events = Events::open(self.pins)?;

        // Nothing is left that can be refused: from here on it stays.
        Rules::open(self.pins)?.set_from_file(rules)?;
        let services = put_in_force(self.pins, services, self.config.on_full)?;
        self.pin_sock_ops(sock_ops)?;
        let mut reports = Vec::new();
        for link in links {
            if let Some(new) = link.new {
                pin(new, &self.pins.xdp(link.report.mode, link.interface))?;
            }
            reports.push(link.report);
        }
        self.remove_stale(interfaces)?;
        let report = AttachReport { taken_over: self.taken_over, interfaces: reports, warnings };
        Ok((services, loaded, events, report))
    }

    fn make_folders(&self) -> Result<(), KernelError> {
        // Left over from an attach that died half-way, before anything was attached.
        if self.pins.version().exists() {
            fs::remove_dir_all(self.pins.version())
                .map_err(KernelError::failed(format!("can't clear {}", self.pins.version().display())))?;
        }
        for folder in [self.pins.links(), self.pins.netns(self.netns_cookie)] {
            fs::create_dir_all(&folder)
                .map_err(KernelError::failed(format!("can't make the folder {}", folder.display())))?;
        }
        Ok(())
    }

    /// Attaches the XDP program to each interface, or puts it in the place of the one that is pinned there. New links end
    /// with the returned values, unless they are pinned.
    fn attach_xdp(&self, ebpf: &mut Ebpf, interfaces: &[(String, u32)]) -> Result<Vec<XdpAttachment>, KernelError> {
        let pinned = self.pinned_links()?;
        let program: &mut Xdp = program(ebpf, abi::PROGRAM_XDP)?;
        interfaces
            .iter()
            .map(|(name, index)| {
                if let Some(pin) = pinned.iter().find(|pin| pin.interface == *index) {
                    if self.allows(pin.mode) && replace(program, pin)? {
                        let report = InterfaceReport { name: name.clone(), mode: pin.mode, fallback: None };
                        return Ok(XdpAttachment { interface: *index, report, new: None });
                    }
                    // Its interface is gone (and came back), or it is to be attached another way.
                    fs::remove_file(&pin.path)
                        .map_err(KernelError::failed(format!("can't remove {}", pin.path.display())))?;
                }
                let (mode, fallback, link) = attach_new(program, name, *index, self.config.attach_mode)?;
                let report = InterfaceReport { name: name.clone(), mode, fallback };
                Ok(XdpAttachment { interface: *index, report, new: Some(link) })
            })
            .collect()
    }

    fn allows(&self, mode: XdpMode) -> bool {
        match self.config.attach_mode {
            AttachMode::Auto => true,
            AttachMode::Native => mode == XdpMode::Native,
            AttachMode::Generic => mode == XdpMode::Generic,
        }
    }

    /// Puts the new link of the `sock_ops` program in the place of the old one. For a moment both are attached, which
    /// counts nothing twice: an entry is confirmed by the cookie of its socket.
    fn pin_sock_ops(&self, link: FdLink) -> Result<(), KernelError> {
        let next = self.pins.sock_ops_next();
        // Left over from an attach that died half-way.
        let _ = fs::remove_file(&next);
        pin(link, &next)?;
        fs::rename(&next, self.pins.sock_ops())
            .map_err(KernelError::failed(format!("can't move {} to its place", next.display())))
    }

    /// Detaches from the interfaces that are not in the configuration any more.
    fn remove_stale(&self, interfaces: &[(String, u32)]) -> Result<(), KernelError> {
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

struct XdpAttachment {
    interface: u32,
    report: InterfaceReport,
    /// To be pinned; `None` if it is an old one, which is.
    new: Option<FdLink>,
}

/// Writes limits first and ports last, so that no port ever leads to a service without limits.
fn put_in_force(pins: &Pins, services: &[Service], on_full: OnFull) -> Result<Vec<(u32, Service)>, KernelError> {
    let mut maps = Services::open(pins)?;
    let known = maps.all()?;
    let placed = place(&known, services)?;
    for (index, service) in &placed {
        let entry =
            ServiceEntry { name: service.name.clone(), limits: service.limits, on_deny: service.on_deny, on_full };
        maps.set(*index, &entry)?;
    }
    let wanted: Vec<(u16, u32)> =
        placed.iter().flat_map(|(index, service)| service.ports.iter().map(|port| (*port, *index))).collect();
    for (port, _) in maps.ports()? {
        if !wanted.iter().any(|(wanted, _)| *wanted == port) {
            maps.set_port(port, None)?;
        }
    }
    for (port, index) in wanted {
        maps.set_port(port, Some(index))?;
    }
    for (index, _) in known {
        if !placed.iter().any(|(placed, _)| *placed == index) {
            maps.clear(index)?;
        }
    }
    Ok(placed)
}

/// The index of each service. One keeps its index as long as it keeps its name, because open connections are counted by
/// it; for the same reason none gets that of another that has just gone.
fn place(known: &[(u32, ServiceEntry)], services: &[Service]) -> Result<Vec<(u32, Service)>, KernelError> {
    let mut taken: Vec<u32> = known.iter().map(|(index, _)| *index).collect();
    services
        .iter()
        .map(|service| {
            let index = match known.iter().find(|(_, entry)| entry.name == service.name) {
                Some((index, _)) => *index,
                None => (0..abi::MAX_SERVICES)
                    .find(|index| !taken.contains(index))
                    .ok_or(KernelError::TooManyServices { count: taken.len() + 1 })?,
            };
            taken.push(index);
            Ok((index, service.clone()))
        })
        .collect()
}

fn attach_sock_ops(ebpf: &mut Ebpf, cgroup: &fs::File) -> Result<FdLink, KernelError> {
    const WHAT: &str = "can't attach the sock_ops program to the cgroup v2 root";
    let program: &mut SockOps = program(ebpf, abi::PROGRAM_SOCK_OPS)?;
    // A link of a cgroup always lets others be attached beside it, and takes no flag that would say so.
    let id = program.attach(cgroup.as_fd(), CgroupAttachMode::Single).map_err(KernelError::failed(WHAT))?;
    let link = program.take_link(id).map_err(KernelError::failed(WHAT))?;
    link.try_into().map_err(KernelError::failed(WHAT))
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

fn pin(link: FdLink, path: &std::path::Path) -> Result<(), KernelError> {
    link.pin(path).map(|_| ()).map_err(KernelError::failed(format!("can't pin the link at {}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::OnDeny, policy::Limits};

    fn service(name: &str) -> Service {
        Service { name: name.into(), ports: vec![1], limits: Limits::default(), on_deny: OnDeny::Drop }
    }

    fn known(index: u32, name: &str) -> (u32, ServiceEntry) {
        let service = service(name);
        let entry = ServiceEntry {
            name: service.name,
            limits: service.limits,
            on_deny: service.on_deny,
            on_full: OnFull::Open,
        };
        (index, entry)
    }

    fn indexes(known: &[(u32, ServiceEntry)], names: &[&str]) -> Option<Vec<u32>> {
        let services: Vec<Service> = names.iter().map(|name| service(name)).collect();
        place(known, &services).ok().map(|placed| placed.into_iter().map(|(index, _)| index).collect())
    }

    #[test]
    fn a_service_keeps_its_index_and_a_new_one_gets_none_that_was_used() {
        let known = [known(0, "chat"), known(1, "game")];
        assert_eq!(indexes(&known, &["game", "feed", "chat"]), Some(vec![1, 2, 0]));
        assert_eq!(indexes(&known, &["feed", "relay"]), Some(vec![2, 3]));
        assert_eq!(indexes(&[], &["feed", "relay"]), Some(vec![0, 1]));
    }

    #[test]
    fn where_every_index_is_taken_nothing_is_placed() {
        let known: Vec<_> = (0..abi::MAX_SERVICES).map(|index| known(index, &format!("s{index}"))).collect();
        assert_eq!(indexes(&known, &["s3"]), Some(vec![3]));
        assert_eq!(indexes(&known, &["another"]), None);
    }
}
