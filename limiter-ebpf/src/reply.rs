//! Answers to a client in the server's name, made in the place of the packet that is answered: it leaves by the interface
//! that it came in by, with its VLAN tags, to where it came from.
//!
//! Only what is sure to be a whole and sound question is answered. The answer is never longer than the question.

use core::{hint, mem};

use aya_ebpf::{
    bindings::{xdp_action, xdp_md},
    helpers::{bpf_ktime_get_ns, bpf_xdp_adjust_tail},
    programs::XdpContext,
};
use limiter_common::{
    Counter,
    policy::{RESET_RATE, ServiceState},
};

use crate::{
    atomic,
    counters::count,
    headers::{ACK, EthernetHeader, Ipv4Header, Ipv6Header, PROTOCOL_TCP, RST, TcpHeader},
    locate::{self, HIDDEN, IS_FRAGMENT, IS_V6, NETWORK_END, NETWORK_SHIFT, TCP_END},
    maps::SERVICE_STATE,
    packet::Cursor,
};

/// How often a token is tried for that another CPU has taken meanwhile.
const ATTEMPTS: usize = 4;

/// Shortest frame of Ethernet, without its checksum. A frame that came padded is not cut below that.
const SHORTEST_FRAME: usize = 60;
/// Most bytes between the end of an answer and [`SHORTEST_FRAME`].
const MOST_PADDING: usize = SHORTEST_FRAME - (14 + 20 + 20);

const TTL: u8 = 64;
const DONT_FRAGMENT: u16 = 0x4000;

/// Answers a refused SYN by a RST, and counts that. Returns the XDP action: `XDP_TX`, or `XDP_DROP` if there is no answer.
///
/// A global function, like [`locate::limiter_locate`]: it has a stack and a judgement of the verifier for itself.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn limiter_reset(ctx: *mut xdp_md, service: u32) -> u32 {
    let sent = match SERVICE_STATE.get_ptr_mut(service) {
        Some(state) => may_reset(state) && reset(&XdpContext::new(ctx)).is_some(),
        None => false,
    };
    count(service as u16, if sent { Counter::ResetSent } else { Counter::ResetSuppressed });
    if sent { xdp_action::XDP_TX } else { xdp_action::XDP_DROP }
}

/// Takes a token for a RST.
#[inline(always)]
fn may_reset(state: *mut ServiceState) -> bool {
    // SAFETY: the helper has no precondition.
    let now_ns = unsafe { bpf_ktime_get_ns() };
    // SAFETY: the pointer comes from a look-up in an array; the word is aligned.
    unsafe {
        let bucket = &raw mut (*state).resets_ns;
        for _ in 0..ATTEMPTS {
            let word = atomic::load(bucket);
            if !RESET_RATE.has_token(word, now_ns) {
                return false;
            }
            if atomic::compare_exchange(bucket, word, RESET_RATE.spent(word, now_ns)) {
                return true;
            }
        }
    }
    false
}

/// Makes a RST of the frame, which is a SYN (RFC 9293 section 3.10.7.1: sequence number 0, and an acknowledgement of
/// everything that the segment takes up in sequence space). `None` if there is no right answer; the frame is worth nothing
/// then.
#[inline(always)]
fn reset(ctx: &XdpContext) -> Option<()> {
    let question = Question::read(ctx)?;
    let answer = TcpHeader {
        source_port: question.local_port,
        destination_port: question.remote_port,
        sequence: 0,
        acknowledgement: question.sequence.wrapping_add(question.length).to_be(),
        data_offset: 5 << 4,
        flags: RST | ACK,
        window: 0,
        checksum: 0,
        urgent: 0,
    };
    send_back(ctx, &question, &answer, None)
}

/// What an answer takes from the segment that it answers. Ports are as they stand in the packet.
pub struct Question {
    /// From [`locate::limiter_locate`].
    pub place: u32,
    pub remote_port: u16,
    pub local_port: u16,
    pub sequence: u32,
    /// How much of the sequence space it takes up: the SYN, and its data.
    pub length: u32,
    /// Of the TCP header, options included, in bytes.
    pub header_length: u32,
}

impl Question {
    /// Reads a SYN. `None` if it may not be answered: it is a fragment, was sent to many, or its lengths contradict each
    /// other.
    #[inline(always)]
    pub fn read(ctx: &XdpContext) -> Option<Self> {
        let place = locate::limiter_locate(ctx.ctx);
        if place == 0 || place & (HIDDEN | IS_FRAGMENT) != 0 {
            return None;
        }
        let network_at = network_at(place);
        let tcp_at = place as usize % TCP_END;
        let mut cursor = Cursor::new(ctx);
        // SAFETY: take checked it.
        if unsafe { (*cursor.take::<EthernetHeader>()?).destination[0] } & 1 != 0 {
            return None;
        }
        let mut cursor = Cursor::new(ctx);
        cursor.skip(network_at);
        // SAFETY: take checked both.
        let total = unsafe {
            if place & IS_V6 == 0 {
                let ip = &*cursor.take::<Ipv4Header>()?;
                if !is_unicast_v4(ip.source) || !is_unicast_v4(ip.destination) {
                    return None;
                }
                usize::from(u16::from_be(ip.total_length))
            } else {
                let ip = &*cursor.take::<Ipv6Header>()?;
                if !is_unicast_v6(&ip.source) || !is_unicast_v6(&ip.destination) {
                    return None;
                }
                usize::from(u16::from_be(ip.payload_length)) + mem::size_of::<Ipv6Header>()
            }
        };
        let mut cursor = Cursor::new(ctx);
        cursor.skip(tcp_at);
        // SAFETY: take checked it.
        let tcp = unsafe { &*cursor.take::<TcpHeader>()? };
        let header_length = usize::from(tcp.data_offset >> 4) * 4;
        let data_at = tcp_at + header_length;
        let end = network_at + total;
        if header_length < mem::size_of::<TcpHeader>() || data_at > end || end > frame_length(ctx) {
            return None;
        }
        Some(Self {
            place,
            remote_port: tcp.source_port,
            local_port: tcp.destination_port,
            sequence: u32::from_be(tcp.sequence),
            length: 1 + (end - data_at) as u32,
            header_length: header_length as u32,
        })
    }
}

/// Makes the answer of the frame, with this TCP header, in which only the checksum is missing, and perhaps an option of one
/// word: cuts it to its length, and sends it back where it came from, with a new network header. An option for which there is
/// no room is left out: no answer is longer than its question.
#[inline(always)]
pub fn send_back(ctx: &XdpContext, question: &Question, answer: &TcpHeader, option: Option<u32>) -> Option<()> {
    let network_at = network_at(question.place);
    let v6 = question.place & IS_V6 != 0;
    let network_length = if v6 { mem::size_of::<Ipv6Header>() } else { mem::size_of::<Ipv4Header>() };
    let before = frame_length(ctx);
    let mut tcp_length = mem::size_of::<TcpHeader>();
    let option = match option {
        Some(option) if before >= network_at + network_length + tcp_length + mem::size_of::<u32>() => {
            tcp_length += mem::size_of::<u32>();
            Some(option)
        }
        _ => None,
    };
    let answer_length = network_at + network_length + tcp_length;
    let after = if before >= SHORTEST_FRAME && answer_length < SHORTEST_FRAME { SHORTEST_FRAME } else { answer_length };
    // SAFETY: the context is that of this program; every pointer into the packet is made anew below.
    if unsafe { bpf_xdp_adjust_tail(ctx.ctx, after as i32 - before as i32) } != 0 {
        return None;
    }

    let mut cursor = Cursor::new(ctx);
    swap_words(cursor.take::<[[u16; 3]; 2]>()?);

    let mut cursor = Cursor::new(ctx);
    cursor.skip(network_at);
    let mut sum = u64::from((u32::from(PROTOCOL_TCP) << 16 | tcp_length as u32).to_be());
    // SAFETY: take checks each header before it is looked at.
    unsafe {
        if v6 {
            let ip = cursor.take::<Ipv6Header>()?;
            sum += swap_words((&raw mut (*ip).source).cast::<[[u32; 4]; 2]>());
            // The traffic class without its ECN bits, and no flow label.
            (*ip).class_and_flow = [(*ip).class_and_flow[0] & 0xc0, 0, 0];
            (*ip).payload_length = (tcp_length as u16).to_be();
            (*ip).next_header = PROTOCOL_TCP;
            (*ip).hop_limit = TTL;
        } else {
            let ip = cursor.take::<Ipv4Header>()?;
            sum += swap_words((&raw mut (*ip).source).cast::<[[u32; 1]; 2]>());
            (*ip).version_and_length = 4 << 4 | 5;
            (*ip).service &= !0x03;
            (*ip).total_length = (network_length as u16 + tcp_length as u16).to_be();
            (*ip).identification = 0;
            (*ip).flags_and_fragment = DONT_FRAGMENT.to_be();
            (*ip).ttl = TTL;
            (*ip).checksum = 0;
            (*ip).checksum = fold(sum_of::<5>(ip.cast()));
        }
    }
    let header = cursor.take::<TcpHeader>()?;
    // SAFETY: take checked both; the header is five words long.
    unsafe {
        *header = *answer;
        if let Some(option) = option {
            let place = cursor.take::<u32>()?;
            *place = option;
            sum += u64::from(option);
            (*header).data_offset = 6 << 4;
        }
        sum += sum_of::<5>(header.cast());
        (*header).checksum = fold(sum);
    }
    // All lengths are even. (And of single bytes the verifier would lose the bounds: what is before the end is not seen to be
    // a byte before it.)
    for _ in 0..MOST_PADDING / 2 {
        let Some(bytes) = cursor.take::<u16>() else { break };
        // SAFETY: take checked it.
        unsafe { *bytes = 0 };
    }
    Some(())
}

#[inline(always)]
fn network_at(place: u32) -> usize {
    (place >> NETWORK_SHIFT) as usize % NETWORK_END
}

#[inline(always)]
fn frame_length(ctx: &XdpContext) -> usize {
    // Of two pointers the verifier takes no difference in 32 bits, which is what the compiler would make of it.
    hint::black_box(ctx.data_end() - ctx.data())
}

/// Swaps two fields that lie side by side in the packet, word by word, and returns the sum of their words.
///
/// Volatile, as every look at packets here: the compiler would read everything first and write it afterwards, and keep it on
/// the stack meanwhile, of which there are 512 bytes.
#[inline(always)]
fn swap_words<W: Copy + Into<u64>, const N: usize>(pair: *mut [[W; N]; 2]) -> u64 {
    let mut sum = 0;
    for at in 0..N {
        // SAFETY: the caller has checked that both fields lie in the packet.
        unsafe {
            let [first, second] = [&raw mut (*pair)[0][at], &raw mut (*pair)[1][at]];
            let (one, other) = (first.read_volatile(), second.read_volatile());
            first.write_volatile(other);
            second.write_volatile(one);
            sum += one.into() + other.into();
        }
    }
    sum
}

/// The sum of words as they stand in the packet; no number of them overflows it.
#[inline(always)]
fn sum_of<const N: usize>(words: *const [u32; N]) -> u64 {
    // SAFETY: the caller has checked that they lie in the packet.
    (0..N).map(|at| u64::from(unsafe { (&raw const (*words)[at]).read_volatile() })).sum()
}

/// The Internet checksum (RFC 1071) from a sum of words; like them, in network order.
#[inline(always)]
fn fold(sum: u64) -> u16 {
    let mut sum = (sum & 0xffff_ffff) + (sum >> 32);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    !(sum as u16)
}

/// Whether an IPv4 address, as it stands in a packet, can be that of one host: not 0.0.0.0, nor in 224.0.0.0/3.
#[inline(always)]
fn is_unicast_v4(address: u32) -> bool {
    address != 0 && u32::from_be(address) < 0xe000_0000
}

/// The same for IPv6: not ::, nor in ff00::/8.
#[inline(always)]
fn is_unicast_v6(address: &[u32; 4]) -> bool {
    u32::from_be(address[0]) >> 24 != 0xff && address[0] | address[1] | address[2] | address[3] != 0
}
