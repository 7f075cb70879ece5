//! A second look at the kernel's BPF objects, by bare system calls: what is pinned, and whether an object still exists.

use std::{
    ffi::CString,
    fs, io, mem,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

/// Kinds of BPF objects that can be pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// A map.
    Map,
    /// A program.
    Program,
    /// A link between a program and what it is attached to.
    Link,
}

/// A BPF object of the running kernel. Ids are not used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Object {
    /// What it is.
    pub kind: Kind,
    /// The kernel's id of it.
    pub id: u32,
}

impl Object {
    /// Whether the kernel still has it.
    pub fn exists(self) -> Result<bool> {
        // BPF_{PROG,MAP,LINK}_GET_FD_BY_ID
        let command = match self.kind {
            Kind::Program => 13,
            Kind::Map => 14,
            Kind::Link => 30,
        };
        match descriptor(command, &mut [self.id, 0, 0]) {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error).with_context(|| format!("cannot look for {self:?}")),
        }
    }
}

/// A program that is attached somewhere.
#[derive(Debug)]
pub struct Attached(OwnedFd);

impl Attached {
    /// The program of id `program`.
    pub fn open(program: u32) -> Result<Self> {
        // BPF_PROG_GET_FD_BY_ID
        descriptor(13, &mut [program, 0, 0]).map(Self).with_context(|| format!("cannot open the program {program}"))
    }

    /// Its answer to a packet (`BPF_PROG_TEST_RUN`).
    pub fn run(&self, packet: &[u8]) -> Result<u32> {
        /// The part of `union bpf_attr` that is for this command.
        #[repr(C)]
        struct TestRun {
            program: u32,
            answer: u32,
            data_in_bytes: u32,
            data_out_bytes: u32,
            data_in: u64,
            data_out: u64,
            repeat: u32,
            duration: u32,
        }
        let mut attributes = TestRun {
            program: self.0.as_raw_fd().cast_unsigned(),
            answer: 0,
            data_in_bytes: u32::try_from(packet.len())?,
            data_out_bytes: 0,
            data_in: packet.as_ptr() as u64,
            data_out: 0,
            repeat: 1,
            duration: 0,
        };
        call(10, &mut attributes).context("BPF_PROG_TEST_RUN")?;
        Ok(attributes.answer)
    }
}

/// A link between a program and what it is attached to, which is pinned.
#[derive(Debug)]
pub struct Link(OwnedFd);

impl Link {
    /// The link that is pinned there.
    pub fn open(pin: &Path) -> Result<Self> {
        let path = CString::new(pin.as_os_str().as_bytes())?;
        // BPF_OBJ_GET
        descriptor(7, &mut [path.as_ptr() as u64, 0])
            .map(Self)
            .with_context(|| format!("cannot open {}", pin.display()))
    }

    /// Its program.
    pub fn program(&self) -> Result<OwnedFd> {
        /// The part of `union bpf_attr` that is for this command.
        #[repr(C)]
        struct InfoByFd {
            descriptor: u32,
            length: u32,
            info: u64,
        }
        // The first three words of struct bpf_link_info: type, id, prog_id.
        let mut info = [0_u32; 3];
        let mut attributes = InfoByFd {
            descriptor: self.0.as_raw_fd().cast_unsigned(),
            length: u32::try_from(mem::size_of_val(&info))?,
            info: info.as_mut_ptr() as u64,
        };
        // BPF_OBJ_GET_INFO_BY_FD, then BPF_PROG_GET_FD_BY_ID
        call(15, &mut attributes).context("cannot ask a link for its program")?;
        descriptor(13, &mut [info[2], 0, 0]).with_context(|| format!("cannot open the program {}", info[2]))
    }

    /// Puts another program in the place of its own: no packet is without one.
    pub fn put(&self, program: BorrowedFd<'_>) -> Result<()> {
        let mut attributes = [self.0.as_raw_fd().cast_unsigned(), program.as_raw_fd().cast_unsigned(), 0, 0];
        // BPF_LINK_UPDATE
        call(29, &mut attributes).context("cannot put another program into a link")?;
        Ok(())
    }
}

/// Every file below a folder of the bpffs.
pub fn pins_below(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut pins = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            pins.extend(pins_below(&entry.path())?);
        } else {
            pins.push(entry.path());
        }
    }
    Ok(pins)
}

/// Every object that is pinned below a folder of the bpffs, and the programs of the links among them.
pub fn objects_below(folder: &Path) -> Result<Vec<Object>> {
    let mut objects = Vec::new();
    for pin in pins_below(folder)? {
        let file = open_pin(&pin).with_context(|| format!("cannot open the pin {}", pin.display()))?;
        let number = file.as_raw_fd();
        let target = fs::read_link(format!("/proc/self/fd/{number}"))?;
        let target = target.to_string_lossy();
        let info = fs::read_to_string(format!("/proc/thread-self/fdinfo/{number}"))?;
        let id =
            |name: &str| -> Option<u32> { info.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok()) };
        let kind = match &*target {
            _ if target.contains("bpf-map") => Kind::Map,
            _ if target.contains("bpf-prog") => Kind::Program,
            _ if target.contains("link") => Kind::Link,
            _ => anyhow::bail!("{} is pinned, and is none of map, program and link: {target}", pin.display()),
        };
        let field = match kind {
            Kind::Map => "map_id:",
            Kind::Program => "prog_id:",
            Kind::Link => "link_id:",
        };
        objects.push(Object { kind, id: id(field).with_context(|| format!("no {field} in {info}"))? });
        if kind == Kind::Link {
            objects.push(Object { kind: Kind::Program, id: id("prog_id:").context("a link has a program")? });
        }
    }
    objects.sort();
    objects.dedup();
    Ok(objects)
}

/// Puts an array map with one element of `value_size` bytes in place of whatever is pinned at `path`.
pub fn replace_pin(path: &Path, value_size: u32) -> Result<()> {
    // BPF_MAP_CREATE of a BPF_MAP_TYPE_ARRAY: type, key size, value size, entries, flags
    let map = descriptor(0, &mut [2_u32, 4, value_size, 1, 0])?;
    fs::remove_file(path).with_context(|| format!("cannot unpin {}", path.display()))?;
    let name = CString::new(path.as_os_str().as_bytes())?;
    // BPF_OBJ_PIN
    call(6, &mut [name.as_ptr() as u64, u64::from(map.as_raw_fd().cast_unsigned())])
        .with_context(|| format!("cannot pin at {}", path.display()))?;
    Ok(())
}

/// [`fill_map`] for the map that is pinned there.
pub fn update_batch<K: Copy, V: Copy>(path: &Path, keys: &[K], values: &[V]) -> Result<()> {
    let map = open_pin(path).with_context(|| format!("cannot open the pin {}", path.display()))?;
    fill_map(map.as_fd(), keys, values)
}

/// Writes values to a map, all in one system call (kernel 5.6; 5.14 for tries). The types must be the map's.
pub fn fill_map<K: Copy, V: Copy>(map: BorrowedFd<'_>, keys: &[K], values: &[V]) -> Result<()> {
    #[repr(C)]
    struct Batch {
        from: u64,
        to: u64,
        keys: u64,
        values: u64,
        count: u32,
        map: u32,
        element_flags: u64,
        flags: u64,
    }
    ensure!(keys.len() == values.len(), "a value for each key");
    let mut batch = Batch {
        from: 0,
        to: 0,
        keys: keys.as_ptr() as u64,
        values: values.as_ptr() as u64,
        count: u32::try_from(keys.len())?,
        map: map.as_raw_fd().cast_unsigned(),
        element_flags: 0,
        flags: 0,
    };
    // BPF_MAP_UPDATE_BATCH
    call(26, &mut batch)
        .with_context(|| format!("cannot write {} values: the map took {}", keys.len(), batch.count))?;
    Ok(())
}

/// An error that names the precondition unless /sys/fs/bpf is a bpffs.
pub fn require_bpffs() -> Result<()> {
    // SAFETY: statfs fills the struct, whose all-zero state is valid, and reads a C string.
    let (outcome, stat) = unsafe {
        let mut stat: libc::statfs = mem::zeroed();
        (libc::statfs(c"/sys/fs/bpf".as_ptr(), &raw mut stat), stat)
    };
    ensure!(
        outcome == 0 && stat.f_type == libc::BPF_FS_MAGIC,
        "no bpffs at /sys/fs/bpf, where the end to end tests pin: mount -t bpf bpf /sys/fs/bpf"
    );
    Ok(())
}

fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let name = CString::new(path.as_os_str().as_bytes())?;
    // BPF_OBJ_GET
    descriptor(7, &mut [name.as_ptr() as u64, 0])
}

/// bpf(2) for a command that gives a descriptor.
pub(crate) fn descriptor<T>(command: i32, attributes: &mut T) -> io::Result<OwnedFd> {
    let number = call(command, attributes)?;
    // SAFETY: the kernel has just given us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// bpf(2).
pub(crate) fn call<T>(command: i32, attributes: &mut T) -> io::Result<i32> {
    // SAFETY: the kernel reads `size_of::<T>()` bytes; every pointer in the attributes is to something that lives in the
    // caller until the call has returned.
    let outcome = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attributes, mem::size_of::<T>()) };
    if outcome < 0 {
        return Err(io::Error::last_os_error());
    }
    i32::try_from(outcome).map_err(io::Error::other)
}
