//! How much of the stack a program's calls take, one in the other.

use std::{fmt, mem, os::fd::AsRawFd};

use anyhow::{Context, Result, ensure};

use crate::bpf;

/// What older kernels (before 6.8) round the stack of each function up to.
const ROUNDING: u32 = 32;

/// A chain of calls, and what it takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// In bytes, each function's rounded up.
    pub bytes: u32,
    /// The functions, from the program on: their place among all, how many instructions they have, and what they take.
    pub functions: Vec<(usize, usize, u32)>,
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes:", self.bytes)?;
        self.functions
            .iter()
            .try_for_each(|(place, length, bytes)| write!(f, " function {place} of {length} instructions, {bytes};"))
    }
}

/// The chain of calls that takes the most of the stack, in a program that the kernel has compiled.
pub fn deepest(program: &impl AsRawFd) -> Result<Chain> {
    let mut info = info(program, |_| {})?;
    let mut instructions = vec![[0_u8; 8]; info.translated_bytes as usize / 8];
    let mut functions = vec![Function::default(); info.functions as usize];
    ensure!(
        !functions.is_empty() && info.function_bytes as usize == mem::size_of::<Function>(),
        "the kernel tells nothing of the program's functions"
    );
    info = self::info(program, |wanted| {
        wanted.translated_bytes = info.translated_bytes;
        wanted.translated = instructions.as_mut_ptr() as u64;
        wanted.functions = info.functions;
        wanted.function_bytes = info.function_bytes;
        wanted.function_places = functions.as_mut_ptr() as u64;
    })?;
    ensure!(info.translated != 0, "the kernel hides the instructions (kernel.kptr_restrict, net.core.bpf_jit_harden)");
    let starts: Vec<usize> = functions.iter().map(|function| function.instruction as usize).collect();
    let ends = starts[1..].iter().copied().chain([instructions.len()]);
    let bodies: Vec<Body> =
        starts.iter().zip(ends).map(|(&start, end)| Body::of(&instructions[start..end])).collect::<Result<_>>()?;
    deepest_from(0, &bodies, bodies.len())
}

/// A function, as far as its stack is concerned.
struct Body {
    length: usize,
    /// The lowest place that it reaches, in bytes below its frame's end.
    bytes: u32,
    calls: Vec<usize>,
}

impl Body {
    fn of(instructions: &[[u8; 8]]) -> Result<Self> {
        /// The register that points to the end of the frame.
        const FRAME: u8 = 10;
        let mut body = Self { length: instructions.len(), bytes: 0, calls: Vec::new() };
        // Which registers hold a copy of it: that is then moved down to where a variable is.
        let mut copies = [false; 16];
        for &[code, registers, low, high, immediate @ ..] in instructions {
            let (destination, source) = (registers & 0x0f, registers >> 4);
            let offset = i32::from(i16::from_ne_bytes([low, high]));
            let immediate = i32::from_ne_bytes(immediate);
            let mut reach = |place: i32| body.bytes = body.bytes.max(place.min(0).unsigned_abs());
            match (code & 0x07, code) {
                // loads, stores
                (1, _) if source == FRAME => reach(offset),
                (2 | 3, _) if destination == FRAME => reach(offset),
                // r = r10
                (7, 0xbf) => {
                    copies[usize::from(destination)] = source == FRAME;
                    continue;
                }
                // r += a number
                (7, 0x07) if copies[usize::from(destination)] => reach(immediate),
                // a call of a function of the program; in its number, once it is compiled
                (5, 0x85) if source == 1 => {
                    body.calls.push(usize::try_from(immediate).context("a call of a function of the program")?);
                }
                _ => {}
            }
            if matches!(code & 0x07, 1 | 4 | 7) {
                copies[usize::from(destination)] = false;
            }
        }
        Ok(body)
    }
}

/// `left`: how many calls there may be yet. No function of the programs calls itself.
fn deepest_from(function: usize, bodies: &[Body], left: usize) -> Result<Chain> {
    ensure!(left > 0, "a function calls itself");
    let body = bodies.get(function).context("a call of a function that is there")?;
    let mut deepest = Chain { bytes: 0, functions: Vec::new() };
    for &call in &body.calls {
        let chain = deepest_from(call, bodies, left - 1)?;
        if chain.bytes > deepest.bytes {
            deepest = chain;
        }
    }
    deepest.bytes += body.bytes.max(1).next_multiple_of(ROUNDING);
    deepest.functions.insert(0, (function, body.length, body.bytes));
    Ok(deepest)
}

/// `struct bpf_func_info`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Function {
    instruction: u32,
    type_id: u32,
}

/// The beginning of `struct bpf_prog_info`, up to where programs are told apart.
#[repr(C)]
#[derive(Clone, Copy)]
struct Info {
    kind: u32,
    id: u32,
    tag: [u8; 8],
    compiled_bytes: u32,
    translated_bytes: u32,
    compiled: u64,
    translated: u64,
    load_time: u64,
    uid: u32,
    maps: u32,
    map_ids: u64,
    name: [u8; 16],
    interface: u32,
    flags: u32,
    namespace_device: u64,
    namespace: u64,
    compiled_functions: u32,
    compiled_lengths: u32,
    compiled_places: u64,
    compiled_lengths_places: u64,
    btf: u32,
    function_bytes: u32,
    function_places: u64,
    functions: u32,
    lines: u32,
}

fn info(program: &impl AsRawFd, prepare: impl FnOnce(&mut Info)) -> Result<Info> {
    /// The part of `union bpf_attr` that is for this command.
    #[repr(C)]
    struct Query {
        program: u32,
        length: u32,
        info: u64,
    }
    // SAFETY: all zero is a valid Info.
    let mut info: Info = unsafe { mem::zeroed() };
    prepare(&mut info);
    let mut query = Query {
        program: program.as_raw_fd().cast_unsigned(),
        length: u32::try_from(mem::size_of::<Info>())?,
        info: (&raw mut info) as u64,
    };
    // BPF_OBJ_GET_INFO_BY_FD
    bpf::call(15, &mut query).context("BPF_OBJ_GET_INFO_BY_FD")?;
    Ok(info)
}
