//! XDP programs of few instructions: somebody else's on an interface, and the baseline of the benchmarks.

use std::{
    mem,
    os::fd::{AsFd as _, AsRawFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use anyhow::{Context, Result};

use crate::{
    bpf::{call, descriptor},
    netns::Namespace,
};

/// What a program answers to every packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Answer {
    /// `XDP_DROP`
    Drop = 1,
    /// `XDP_PASS`
    Pass = 2,
    /// `XDP_TX`: back out of the interface that it came in by.
    Transmit = 3,
}

/// A program that gives every packet the same answer.
#[derive(Debug)]
pub struct BareXdp {
    program: OwnedFd,
}

/// The attachment of a program to an interface; it ends when this is dropped.
#[derive(Debug)]
pub struct Attachment {
    _link: OwnedFd,
}

/// The attributes of `BPF_PROG_TEST_RUN`.
#[repr(C)]
#[derive(Default)]
struct TestRun {
    program: u32,
    answer: u32,
    data_in_size: u32,
    data_out_size: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration_ns: u32,
    context_in_size: u32,
    context_out_size: u32,
    context_in: u64,
    context_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    padding: u32,
}

/// `BPF_F_TEST_XDP_LIVE_FRAMES` (kernel 5.18).
const LIVE_FRAMES: u32 = 1 << 1;

impl BareXdp {
    /// Loads it.
    pub fn load(answer: Answer) -> Result<Self> {
        Self::load_instructions(&with_answer(answer))
    }

    /// Loads one that writes random numbers to frames of `length` bytes before it answers. To each of at most two places
    /// goes one of 16 bits, and to the places that stand with it its complement.
    pub fn load_randomising(answer: Answer, length: usize, places: &[(usize, Vec<usize>)]) -> Result<Self> {
        let length = i32::try_from(length)?;
        let mut writes = Vec::new();
        for (place, complements) in places {
            writes.extend([
                // r1 = r0 & 0xffff; *(u16 *)(r2 + place) = r1; r1 ^= 0xffff; r0 >>= 16
                instruction(0xbf, 1, 0, 0, 0),
                instruction(0x57, 1, 0, 0, 0xffff),
                instruction(0x6b, 2, 1, i16::try_from(*place)?, 0),
                instruction(0xa7, 1, 0, 0, 0xffff),
                instruction(0x77, 0, 0, 0, 16),
            ]);
            for place in complements {
                writes.push(instruction(0x6b, 2, 1, i16::try_from(*place)?, 0));
            }
        }
        let mut instructions = vec![
            // r6 = r1; call bpf_get_prandom_u32
            instruction(0xbf, 6, 1, 0, 0),
            instruction(0x85, 0, 0, 0, 7),
            // r2 = data; r3 = data_end; r4 = r2 + length; if r4 > r3 then to the answer
            instruction(0x61, 2, 6, 0, 0),
            instruction(0x61, 3, 6, 4, 0),
            instruction(0xbf, 4, 2, 0, 0),
            instruction(0x07, 4, 0, 0, length),
            instruction(0x2d, 4, 3, i16::try_from(writes.len())?, 0),
        ];
        instructions.extend(writes);
        instructions.extend(with_answer(answer));
        Self::load_instructions(&instructions)
    }

    fn load_instructions(instructions: &[[u8; 8]]) -> Result<Self> {
        #[repr(C)]
        struct ProgLoad {
            prog_type: u32,
            insn_cnt: u32,
            insns: u64,
            license: u64,
            between: [u32; 11],
            expected_attach_type: u32,
            rest: [u64; 10],
        }
        let license = c"GPL";
        let program = descriptor(
            // BPF_PROG_LOAD of a BPF_PROG_TYPE_XDP
            5,
            &mut ProgLoad {
                prog_type: 6,
                insn_cnt: u32::try_from(instructions.len())?,
                insns: instructions.as_ptr() as u64,
                license: license.as_ptr() as u64,
                between: [0; 11],
                // BPF_XDP, as aya has it: of one link, all programs have the same.
                expected_attach_type: 37,
                rest: [0; 10],
            },
        )
        .context("cannot load an XDP program: this needs root (CAP_BPF)")?;
        Ok(Self { program })
    }

    /// Its descriptor.
    pub fn program(&self) -> BorrowedFd<'_> {
        self.program.as_fd()
    }

    /// Attaches it.
    pub fn attach(&self, namespace: &Namespace, interface: &str) -> Result<Attachment> {
        let index = namespace.interface_index(interface)?;
        // BPF_LINK_CREATE to BPF_XDP
        let link = namespace
            .enter(|| descriptor(28, &mut [self.program.as_raw_fd().cast_unsigned(), index, 37, 0]))
            .with_context(|| format!("cannot attach an XDP program to {interface}"))?;
        Ok(Attachment { _link: link })
    }

    /// How long one run on a frame takes, over so many.
    pub fn time(&self, frame: &[u8], repeat: u32) -> Result<Duration> {
        self.test_run(frame, TestRun { repeat, ..TestRun::default() })
    }

    /// Takes a frame as if it had come in by an interface, so many times, and does with it as the program answers. With
    /// [`Answer::Transmit`] that is a generator of packets: it sends them out by the interface. Both ends of a veth need an
    /// XDP program for that. Returns how long one takes, which holds all that the kernel does on this CPU until it is at
    /// the other end and done with.
    pub fn send(&self, namespace: &Namespace, interface: &str, frame: &[u8], repeat: u32) -> Result<Duration> {
        let length = u32::try_from(frame.len())?;
        // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex
        let context = [0, length, 0, namespace.interface_index(interface)?, 0, 0];
        namespace.enter(|| {
            self.test_run(
                frame,
                TestRun {
                    repeat,
                    flags: LIVE_FRAMES,
                    context_in: context.as_ptr() as u64,
                    context_in_size: u32::try_from(mem::size_of_val(&context))?,
                    batch_size: 64,
                    ..TestRun::default()
                },
            )
        })
    }

    fn test_run(&self, frame: &[u8], mut run: TestRun) -> Result<Duration> {
        run.program = self.program.as_raw_fd().cast_unsigned();
        run.data_in = frame.as_ptr() as u64;
        run.data_in_size = u32::try_from(frame.len())?;
        call(10, &mut run).context("cannot run a program (BPF_PROG_TEST_RUN)")?;
        Ok(Duration::from_nanos(run.duration_ns.into()))
    }
}

/// r0 = answer; exit
fn with_answer(answer: Answer) -> [[u8; 8]; 2] {
    [instruction(0xb7, 0, 0, 0, answer as i32), instruction(0x95, 0, 0, 0, 0)]
}

/// `struct bpf_insn`.
fn instruction(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> [u8; 8] {
    let mut bytes = [code, source << 4 | destination, 0, 0, 0, 0, 0, 0];
    bytes[2..4].copy_from_slice(&offset.to_ne_bytes());
    bytes[4..].copy_from_slice(&immediate.to_ne_bytes());
    bytes
}
