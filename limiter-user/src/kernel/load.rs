//! Hands the programs to the kernel.

use std::{fmt, io};

use aya::{
    Ebpf, EbpfLoader,
    maps::Array,
    programs::{Program, ProgramError, SchedClassifier, SockOps, Xdp},
};
use limiter_common::{TagSecret, abi, source::REPORT_INTERVAL_SECONDS};

use super::{KernelError, btf::VMLINUX, debug_log::DebugLog, error::log_end, host, offsets::Offsets, pins::Pins};
use crate::config::Kernel;

/// The object file of the programs.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/limiter.bpf.o"));

/// Bytes of the ring buffer of debug messages as long as nobody wants them: as few as the kernel takes.
const LOG_BYTES_OFF: u32 = 4096;
const LOG_MAP: &str = "AYA_LOGS";

/// Where a program of admission sees packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// XDP: in the driver, or where the network stack takes packets from it.
    Xdp,
    /// TC on ingress: behind that, when they are packets of the stack's.
    Tc,
    /// The same on a device whose packets have no Ethernet header.
    TcL3,
}

impl Hook {
    /// The program for it.
    pub const fn program(self) -> &'static str {
        match self {
            Self::Xdp => abi::PROGRAM_XDP,
            Self::Tc => abi::PROGRAM_TC,
            Self::TcL3 => abi::PROGRAM_TC_L3,
        }
    }
}

/// The programs, not attached. Those of the ledger are accepted by the verifier; those of admission when they are asked for.
pub struct Loaded {
    /// The programs and the maps.
    pub programs: Ebpf,
    /// Whether XDP can tell a completed handshake, which takes the kernel's BTF.
    pub verifies_handshakes: bool,
    /// The programs' debug messages, if they were asked for.
    pub debug_log: Option<DebugLog>,
}

impl Loaded {
    /// The program of admission for a hook, accepted by the verifier. Each is loaded for itself, when it is needed: what a
    /// kernel refuses keeps nobody from what it takes.
    pub fn admission<'a, P>(&'a mut self, hook: Hook) -> Result<&'a mut P, KernelError>
    where
        &'a mut P: TryFrom<&'a mut Program, Error = ProgramError>,
    {
        self.load_admission(hook)?;
        program(&mut self.programs, hook.program())
    }

    /// Hands the program of admission for a hook to the kernel, unless it has it.
    pub fn load_admission(&mut self, hook: Hook) -> Result<(), KernelError> {
        let name = hook.program();
        match hook {
            Hook::Xdp => {
                let xdp: &mut Xdp = program(&mut self.programs, name)?;
                if xdp.fd().is_err() {
                    xdp.load().map_err(|error| refused(name, error))?;
                }
            }
            Hook::Tc | Hook::TcL3 => {
                let tc: &mut SchedClassifier = program(&mut self.programs, name)?;
                if tc.fd().is_err() {
                    tc.load().map_err(|error| refused(name, error))?;
                }
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Loaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Loaded").field("verifies_handshakes", &self.verifies_handshakes).finish_non_exhaustive()
    }
}

/// Loads the programs of the ledger. Maps are made and pinned, or opened where they are pinned already. `tiers`: how many
/// tiers of sources there is to be room for.
pub fn load(config: &Kernel, pins: &Pins, netns_cookie: u64, tiers: u32) -> Result<Loaded, KernelError> {
    load_with(config, Some(pins), netns_cookie, tiers)
}

/// The same without pins: everything goes when the returned value does. For tests and benchmarks.
pub fn load_unpinned(config: &Kernel, netns_cookie: u64) -> Result<Loaded, KernelError> {
    load_with(config, None, netns_cookie, 2)
}

/// The control program alone, with the pinned maps, for a command that has a question.
pub fn load_control(pins: &Pins) -> Result<Loaded, KernelError> {
    let mut loader = EbpfLoader::new();
    loader.override_global(aya_log::LEVEL, &0_u8, true).map_max_entries(LOG_MAP, LOG_BYTES_OFF);
    pin(&mut loader, pins);
    let mut programs = loader.load(OBJECT).map_err(KernelError::failed(MAPS))?;
    let control: &mut Xdp = program(&mut programs, abi::PROGRAM_CONTROL)?;
    control.load().map_err(|error| refused(abi::PROGRAM_CONTROL, error))?;
    Ok(Loaded { programs, verifies_handshakes: false, debug_log: None })
}

fn pin(loader: &mut EbpfLoader<'_>, pins: &Pins) {
    for name in abi::PINNED_MAPS {
        loader.map_pin_path(name, pins.map(name));
    }
}

const MAPS: &str = "can't load the kernel programs' maps";

fn load_with(config: &Kernel, pins: Option<&Pins>, netns_cookie: u64, tiers: u32) -> Result<Loaded, KernelError> {
    let offsets = Offsets::of_kernel().map_err(KernelError::failed(format!("can't read {VMLINUX}")))?;
    let reads_kernel_memory = u32::from(host::lets_programs_read_its_memory());
    let report_interval = REPORT_INTERVAL_SECONDS * host::jiffies_per_second();
    let log_level = if config.debug_log { aya_log::Level::Debug as u8 } else { 0 };

    let mut loader = EbpfLoader::new();
    loader
        .override_global(abi::GLOBAL_SNT_ISN_OFFSET, &offsets.snt_isn, true)
        .override_global(abi::GLOBAL_READS_KERNEL_MEMORY, &reads_kernel_memory, true)
        .override_global(abi::GLOBAL_REPORT_INTERVAL, &report_interval, true)
        .override_global(abi::GLOBAL_NETNS_COOKIE, &netns_cookie, true)
        .override_global(aya_log::LEVEL, &log_level, true)
        .map_max_entries(abi::MAP_LEDGER, config.max_connections)
        // There are never more sources of a tier than connections.
        .map_max_entries(abi::MAP_SOURCES, config.max_connections.saturating_mul(tiers))
        .map_max_entries(abi::MAP_MEMBERS, config.max_connections)
        // Each is of an entry in the ledger.
        .map_max_entries(abi::MAP_RESERVATIONS, config.max_connections.max(abi::MIN_RESERVATIONS));
    for name in abi::MAP_RULES {
        loader.map_max_entries(name, config.max_rules);
    }
    for (field, offset) in abi::LISTENER_FIELDS.iter().zip(&offsets.listener) {
        loader.override_global(field.global, offset, true);
    }
    if !config.debug_log {
        loader.map_max_entries(LOG_MAP, LOG_BYTES_OFF);
    }
    if let Some(pins) = pins {
        pin(&mut loader, pins);
    }
    let mut programs = loader.load(OBJECT).map_err(KernelError::failed(MAPS))?;

    make_secret(&mut programs)?;

    let sock_ops: &mut SockOps = program(&mut programs, abi::PROGRAM_SOCK_OPS)?;
    sock_ops.load().map_err(|error| refused(abi::PROGRAM_SOCK_OPS, error))?;
    let control: &mut Xdp = program(&mut programs, abi::PROGRAM_CONTROL)?;
    control.load().map_err(|error| refused(abi::PROGRAM_CONTROL, error))?;
    let debug_log = if config.debug_log { Some(DebugLog::new(&mut programs)?) } else { None };
    Ok(Loaded { programs, verifies_handshakes: offsets.snt_isn != 0, debug_log })
}

/// Gives a new ledger the secret that its keys are made with. One that is there already stays: entries have been made with
/// it.
fn make_secret(programs: &mut Ebpf) -> Result<(), KernelError> {
    let what = || "can't give the ledger its secret".to_owned();
    let map = programs.map_mut(abi::MAP_TAG_SECRET).ok_or_else(|| KernelError::Failed {
        what: what(),
        source: "the object file has no such map; it was built wrong".into(),
    })?;
    let mut secrets: Array<_, TagSecret> = map.try_into().map_err(KernelError::failed(what()))?;
    if secrets.get(&0, 0).map_err(KernelError::failed(what()))? != TagSecret::default() {
        return Ok(());
    }
    let mut bytes = [0; size_of::<TagSecret>()];
    getrandom::fill(&mut bytes).map_err(io::Error::from).map_err(KernelError::failed(what()))?;
    let (words, _) = bytes.as_chunks();
    let mut secret = TagSecret::default();
    for (number, word) in secret.0.iter_mut().zip(words) {
        *number = u64::from_ne_bytes(*word);
    }
    secrets.set(0, secret, 0).map_err(KernelError::failed(what()))
}

/// A program of the object file, as its type.
pub fn program<'a, P>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut P, KernelError>
where
    &'a mut P: TryFrom<&'a mut Program, Error = ProgramError>,
{
    let what = || format!("the object file has no program {name} of the right type; it was built wrong");
    ebpf.program_mut(name)
        .ok_or_else(|| KernelError::Failed { what: what(), source: "not found".into() })?
        .try_into()
        .map_err(|error| KernelError::Failed { what: what(), source: Box::new(error) })
}

fn refused(program: &'static str, error: ProgramError) -> KernelError {
    match error {
        ProgramError::LoadError { io_error, verifier_log } => {
            if io_error.raw_os_error() == Some(libc::EPERM) {
                return KernelError::NoPrivilege { action: "load kernel programs" };
            }
            KernelError::Refused { program, log: log_end(&verifier_log.to_string()), source: io_error }
        }
        error => KernelError::failed(format!("can't load the program {program}"))(error),
    }
}
