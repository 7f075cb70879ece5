//! Loads the programs and attaches them, taking over what an earlier process left pinned.
//!
//! The order is such that a host is never left half limited: what can fail without a trace (names, privileges, locks, the
//! verifier) comes first, then the programs are attached, that of the ledger before those of admission, then the policy
//! goes into the maps, and what was attached is pinned. A first attach that fails removes what it had pinned; a take-over
//! that fails leaves the old policy in force, and what the old links were attached to.

use std::{
    fs, io,
    os::fd::{AsFd as _, OwnedFd},
    sync::Arc,
};

use aya::{
    Ebpf,
    programs::{CgroupAttachMode, SockOps, links::FdLink},
};
use limiter_common::abi;

use super::{
    Auditor, Challenges, KernelError, challenge,
    control::Control,
    debug_log::DebugLog,
    delivery,
    events::Events,
    host, in_force,
    interfaces::{InterfaceReport, Interfaces},
    keeper::Keeper,
    layout, link,
    live::LivePolicy,
    load::{Loaded, load, program},
    pins::{Lock, Pins},
};
use crate::{
    config::{AttachMode, Kernel, Service},
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
    interfaces: Vec<String>,
    attach_mode: AttachMode,
    // Last, so that nobody else starts before the rest is dropped.
    lock: Lock,
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

impl Attached {
    /// Attaches to every interface of the configuration, for these services and with these rules.
    ///
    /// # Errors
    ///
    /// [`KernelError`] says which of the preconditions does not hold; nothing is left behind then that was not there
    /// before.
    pub fn attach(config: &Kernel, services: &[Service], rules: &[Rule]) -> Result<(Self, AttachReport), KernelError> {
        Self::attach_after(config, services, rules, None)
    }

    /// The same where the process before has shared its lock ([`Self::share_lock`]): nobody else comes in between.
    ///
    /// # Errors
    ///
    /// As [`Self::attach`].
    pub fn attach_after(
        config: &Kernel,
        services: &[Service],
        rules: &[Rule],
        handed_lock: Option<OwnedFd>,
    ) -> Result<(Self, AttachReport), KernelError> {
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
        let lock = match handed_lock {
            Some(handed) => pins.lock_handed(handed)?,
            None => pins.lock()?,
        };
        layout::check_version(&pins)?;
        let taken_over = pins.exist();
        let result =
            Attach { config, pins: &pins, netns_cookie, taken_over }.run(&cgroup, &interfaces, services, rules);
        match result {
            Ok((services, mut loaded, events, report)) => {
                let debug_log = loaded.debug_log.take();
                let control = Arc::new(Control::new(loaded));
                let attached = Self {
                    pins,
                    services,
                    control,
                    events: Some(events),
                    debug_log,
                    interfaces: config.interfaces.clone(),
                    attach_mode: config.attach_mode,
                    lock,
                };
                Ok((attached, report))
            }
            Err(error) => {
                if !taken_over {
                    // What is there is what this attempt has made. The first error is the one to tell.
                    let _ = challenge::restore(&pins);
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

    /// Whoever attaches interfaces again that go away and come back.
    pub fn keeper(&self) -> Result<Keeper, KernelError> {
        Keeper::new(&self.pins, &self.interfaces, self.attach_mode, self.control())
    }

    /// Whoever tells the programs what they need to know of the host for a challenge.
    pub fn challenges(&self) -> Result<Challenges, KernelError> {
        Challenges::open(&self.pins)
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

    /// A second hand on the lock that keeps other daemons off, for the process that comes after this one. From now on it lasts as
    /// long as either of them.
    ///
    /// # Errors
    ///
    /// That of the kernel, which is out of descriptors.
    pub fn share_lock(&self) -> io::Result<OwnedFd> {
        self.lock.share()
    }

    /// Has others be told that it is this process that holds the lock, after one before has shared it.
    ///
    /// # Errors
    ///
    /// That of the kernel. The lock is held all the same.
    pub fn claim_lock(&self) -> io::Result<()> {
        self.lock.claim()
    }

    /// Takes everything away again.
    pub fn detach(self) -> Result<(), KernelError> {
        challenge::restore(&self.pins)?;
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
            let sizes = layout::check(self.pins)?;
            if !self.pins.netns(self.netns_cookie).is_dir() {
                return Err(KernelError::OtherNamespace { pin_path: self.pins.root().to_owned() });
            }
            if sizes.ledger != self.config.max_connections {
                warnings.push(format!(
                    "the pinned ledger has room for {} connections, not for {}: it keeps its size until `limiter detach`",
                    sizes.ledger, self.config.max_connections
                ));
            }
            if sizes.rules != self.config.max_rules {
                warnings.push(format!(
                    "what is pinned has room for {} rules, not for {}: that stays so until `limiter detach`",
                    sizes.rules, self.config.max_rules
                ));
            }
        } else {
            self.make_folders()?;
        }

        let mut loaded = load(self.config, self.pins, self.netns_cookie, tiers(services))?;
        if !loaded.verifies_handshakes {
            warnings.push(
                "this kernel shows no BTF (/sys/kernel/btf/vmlinux), so handshakes are counted by sock_ops alone: a burst of them can pass a limit by a few"
                    .to_owned(),
            );
        }
        let sock_ops = attach_sock_ops(&mut loaded.programs, cgroup)?;
        let placement = Interfaces::new(self.pins, self.config.attach_mode);
        let attachments = placement.attach(&mut loaded, interfaces)?;
        let events = Events::open(self.pins)?;

        challenge::put(self.pins, self.config)?;

        // Nothing is left that can be refused: from here on it stays.
        let services = in_force::put(self.pins, services, rules, self.config.on_full)?;
        self.pin_sock_ops(sock_ops)?;
        let configured: Vec<Service> = services.iter().map(|(_, service)| service.clone()).collect();
        warnings.extend(delivery::put(&mut loaded, self.pins, &configured)?.warning());
        let reports = placement.keep(attachments)?;
        placement.remove_others(&interfaces.iter().map(|(_, index)| *index).collect::<Vec<_>>())?;
        let report = AttachReport { taken_over: self.taken_over, interfaces: reports, warnings };
        Ok((services, loaded, events, report))
    }

    fn make_folders(&self) -> Result<(), KernelError> {
        // Left over from an attach that died half-way.
        challenge::restore(self.pins)?;
        self.pins.clear()?;
        for folder in [self.pins.links(), self.pins.netns(self.netns_cookie)] {
            fs::create_dir_all(&folder)
                .map_err(KernelError::failed(format!("can't make the folder {}", folder.display())))?;
        }
        Ok(())
    }

    /// Puts the new link of the `sock_ops` program in the place of the old one. For a moment both are attached, which
    /// counts nothing twice: an entry is confirmed by the cookie of its socket.
    fn pin_sock_ops(&self, link: FdLink) -> Result<(), KernelError> {
        let next = self.pins.sock_ops_next();
        // Left over from an attach that died half-way.
        let _ = fs::remove_file(&next);
        link::pin(link, &next)?;
        fs::rename(&next, self.pins.sock_ops())
            .map_err(KernelError::failed(format!("can't move {} to its place", next.display())))
    }
}

/// How many tiers of sources there are.
fn tiers(services: &[Service]) -> u32 {
    let has_wide = |service: &Service| service.limits.wide_ipv4_prefix != 0 || service.limits.wide_ipv6_prefix != 0;
    if services.iter().any(has_wide) { 2 } else { 1 }
}

fn attach_sock_ops(ebpf: &mut Ebpf, cgroup: &fs::File) -> Result<FdLink, KernelError> {
    const WHAT: &str = "can't attach the sock_ops program to the cgroup v2 root";
    let program: &mut SockOps = program(ebpf, abi::PROGRAM_SOCK_OPS)?;
    // A link of a cgroup always lets others be attached beside it, and takes no flag that would say so.
    let id = program.attach(cgroup.as_fd(), CgroupAttachMode::Single).map_err(KernelError::failed(WHAT))?;
    let link = program.take_link(id).map_err(KernelError::failed(WHAT))?;
    link.try_into().map_err(KernelError::failed(WHAT))
}
