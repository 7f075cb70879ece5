//! Answers to a client in the server's name, made in the place of the packet that is answered: it leaves by the interface
//! that it came in by, with its VLAN tags, to where it came from.
//!
//! Only what is sure to be a whole and sound question is answered. The answer is never longer than the question.

use core::mem;

use aya_ebpf::{
    bindings::{__sk_buff, TC_ACT_SHOT, xdp_action, xdp_md},
    helpers::bpf_ktime_get_ns,
    programs::XdpContext,
};
use limiter_common::{
    Counter,
    policy::{RESET_RATE, ServiceState},
};

use crate::{
    atomic,
    context::{Packet, Skb},
    counters::count,
    headers::{ACK, CWR, ECE, EthernetHeader, Ipv4Header, Ipv6Header, PROTOCOL_TCP, RST, TcpHeader},
    locate::{ALL_HEADERS, HIDDEN, IS_FRAGMENT, IS_V6, NETWORK_END, NETWORK_SHIFT, TCP_END},
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

/// In the byte of an IP header that has the class of traffic, too (RFC 3168).
const CONGESTION_BITS: u8 = 0x03;

/// Answers a refused SYN by a RST, and counts that. Returns the XDP action: `XDP_TX`, or `XDP_DROP` if there is no answer.
///
/// A global function, like [`crate::locate::limiter_locate`]: it has a stack and a judgement of the verifier for itself.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn limiter_reset(ctx: *mut xdp_md, service: u32) -> u32 {
    if reset_and_count(&XdpContext::new(ctx), service) { xdp_action::XDP_TX } else { xdp_action::XDP_DROP }
}

/// The same for the packets of TC: `TC_ACT_REDIRECT` or `TC_ACT_SHOT`.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn limiter_reset_skb(skb: *mut __sk_buff, has_ethernet: u32, service: u32) -> i32 {
    let ctx = Skb::new(skb, has_ethernet != 0);
    if reset_and_count(&ctx, service) { ctx.send() } else { TC_ACT_SHOT }
}

#[inline(always)]
fn reset_and_count(ctx: &impl Packet, service: u32) -> bool {
    let sent = match SERVICE_STATE.get_ptr_mut(service) {
        Some(state) => may_reset(state) && reset(ctx).is_some(),
        None => false,
    };
    count(service as u16, if sent { Counter::ResetSent } else { Counter::ResetSuppressed });
    sent
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
fn reset(ctx: &impl Packet) -> Option<()> {
    let question = Question::read(ctx)?;
    let answer = TcpHeader {
        source_port: question.local_port,
        destination_port: question.remote_port,
        sequence: 0,
        acknowledgement: question.sequence.wrapping_add(question.length).to_be(),
        data_offset: 0,
        flags: RST | ACK,
        window: 0,
        checksum: 0,
        urgent: 0,
    };
    send_back(ctx, &question, answer, &Options { words: [0; MAX_OPTION_WORDS], count: 0 })
}

/// What an answer takes from the segment that it answers. Ports are as they stand in the packet.
pub struct Question {
    /// From [`crate::locate::limiter_locate`].
    pub place: u32,
    pub remote_port: u16,
    pub local_port: u16,
    pub sequence: u32,
    /// How much of the sequence space it takes up: the SYN, and its data.
    pub length: u32,
    /// Of the TCP header, options included, in bytes.
    pub header_length: u32,
    /// How many words of options there is room for in an answer.
    pub room: usize,
    /// Whether it asks for ECN (RFC 3168 section 6.1.1).
    pub asks_for_ecn: bool,
    /// Whether its checksum is yet to be computed.
    is_unsummed: bool,
}

impl Question {
    /// Reads a SYN. `None` if it may not be answered: it is a fragment, was sent to many, or its lengths contradict each
    /// other. What pointed into the packet before points nowhere now.
    #[inline(always)]
    pub fn read(ctx: &impl Packet) -> Option<Self> {
        ctx.reach(ALL_HEADERS);
        let place = ctx.locate();
        if place == 0 || place & (HIDDEN | IS_FRAGMENT) != 0 {
            return None;
        }
        let network_at = network_at(place);
        let tcp_at = tcp_at(place);
        let is_unsummed = ctx.is_unsummed(tcp_at);
        // Who sums it up then does so from where the TCP header was.
        if is_unsummed && tcp_at != network_at + network_length(place) {
            return None;
        }
        if ctx.has_ethernet() {
            let mut cursor = Cursor::new(ctx);
            // SAFETY: take checked it.
            if unsafe { (*cursor.take::<EthernetHeader>()?).destination[0] } & 1 != 0 {
                return None;
            }
        }
        let mut cursor = Cursor::new(ctx);
        cursor.skip(network_at);
        // SAFETY: take checked both.
        let (total, congestion) = unsafe {
            if place & IS_V6 == 0 {
                let ip = &*cursor.take::<Ipv4Header>()?;
                if !is_unicast_v4(ip.source) || !is_unicast_v4(ip.destination) {
                    return None;
                }
                (usize::from(u16::from_be(ip.total_length)), ip.service & CONGESTION_BITS)
            } else {
                let ip = &*cursor.take::<Ipv6Header>()?;
                if !is_unicast_v6(&ip.source) || !is_unicast_v6(&ip.destination) {
                    return None;
                }
                let total = usize::from(u16::from_be(ip.payload_length)) + mem::size_of::<Ipv6Header>();
                (total, ip.class_and_flow[0] >> 4 & CONGESTION_BITS)
            }
        };
        let mut cursor = Cursor::new(ctx);
        cursor.skip(tcp_at);
        // SAFETY: take checked it.
        let tcp = unsafe { &*cursor.take::<TcpHeader>()? };
        let header_length = usize::from(tcp.data_offset >> 4) * 4;
        let data_at = tcp_at + header_length;
        let end = network_at + total;
        let length = ctx.length();
        if header_length < mem::size_of::<TcpHeader>() || data_at > end || end > length {
            return None;
        }
        let least = network_at + network_length(place) + mem::size_of::<TcpHeader>();
        Some(Self {
            place,
            remote_port: tcp.source_port,
            local_port: tcp.destination_port,
            sequence: u32::from_be(tcp.sequence),
            length: 1 + (end - data_at) as u32,
            header_length: header_length as u32,
            // It is as long as that: everything is in it that is in the answer.
            room: (length - least) / 4,
            asks_for_ecn: tcp.flags & (ECE | CWR) == ECE | CWR && congestion == 0,
            is_unsummed,
        })
    }
}

/// As many as an answer ever has.
pub const MAX_OPTION_WORDS: usize = 5;

/// The TCP options of an answer, in network order.
pub struct Options {
    pub words: [u32; MAX_OPTION_WORDS],
    pub count: usize,
}

/// Makes the answer of the packet, with this TCP header, in which the length and the checksum are missing, and these options, for
/// which there must be room: cuts it to its length, and turns it round, with a new network header.
#[inline(always)]
pub fn send_back(ctx: &impl Packet, question: &Question, mut tcp: TcpHeader, options: &Options) -> Option<()> {
    let network_at = network_at(question.place);
    let network_length = network_length(question.place);
    let tcp_length = mem::size_of::<TcpHeader>() + 4 * options.count;
    let mut end = network_at + network_length + tcp_length;
    let before = ctx.length();
    let is_padded = ctx.has_ethernet() && before >= SHORTEST_FRAME && end < SHORTEST_FRAME;
    ctx.cut(if is_padded { SHORTEST_FRAME } else { end })?;

    if ctx.has_ethernet() {
        let mut cursor = Cursor::new(ctx);
        // SAFETY: take checked it.
        let [server, client] = unsafe { cursor.take::<[[u16; 3]; 2]>()?.read_volatile() };
        ctx.write_link(&[client, server])?;
    }
    let pseudo = write_network(ctx, question.place, tcp_length as u16)?;

    tcp.data_offset = (tcp_length as u8 / 4) << 4;
    tcp.checksum = 0;
    let mut sum = pseudo + sum_of::<5>((&raw const tcp).cast());
    for at in 0..MAX_OPTION_WORDS {
        if at < options.count {
            sum += u64::from(options.words[at]);
        }
    }
    // Who is to sum it up begins with what is in the checksum's place.
    tcp.checksum = if question.is_unsummed { !fold(pseudo) } else { fold(sum) };
    let mut at = network_at + network_length;
    ctx.write(at, &tcp)?;
    at += mem::size_of::<TcpHeader>();
    for word in 0..MAX_OPTION_WORDS {
        if word < options.count {
            ctx.write(at, &options.words[word])?;
            at += mem::size_of::<u32>();
        }
    }
    if is_padded {
        // All lengths are even.
        for _ in 0..MOST_PADDING / 2 {
            if end >= SHORTEST_FRAME {
                break;
            }
            ctx.write(end, &0_u16)?;
            end += 2;
        }
    }
    Some(())
}

/// Writes the network header of an answer: that of its question, the other way round. Returns the sum of what the checksum of TCP
/// covers of it.
#[inline(always)]
fn write_network(ctx: &impl Packet, place: u32, tcp_length: u16) -> Option<u64> {
    let network_at = network_at(place);
    let mut cursor = Cursor::new(ctx);
    cursor.skip(network_at);
    let protocol = u64::from((u32::from(PROTOCOL_TCP) << 16 | u32::from(tcp_length)).to_be());
    // SAFETY: take checks each header before it is looked at. The words that are summed up are those of the structure.
    unsafe {
        if place & IS_V6 == 0 {
            let question = cursor.take::<Ipv4Header>()?;
            let mut ip = Ipv4Header {
                version_and_length: 4 << 4 | 5,
                service: (&raw const (*question).service).read_volatile() & !CONGESTION_BITS,
                total_length: (mem::size_of::<Ipv4Header>() as u16 + tcp_length).to_be(),
                identification: 0,
                flags_and_fragment: DONT_FRAGMENT.to_be(),
                ttl: TTL,
                protocol: PROTOCOL_TCP,
                checksum: 0,
                source: (&raw const (*question).destination).read_volatile(),
                destination: (&raw const (*question).source).read_volatile(),
            };
            ip.checksum = fold(sum_of::<5>((&raw const ip).cast()));
            let sum = protocol + u64::from(ip.source) + u64::from(ip.destination);
            ctx.write(network_at, &ip)?;
            Some(sum)
        } else {
            let question = cursor.take::<Ipv6Header>()?;
            let ip = Ipv6Header {
                version_and_class: (&raw const (*question).version_and_class).read_volatile(),
                // The traffic class without its ECN bits, and no flow label.
                class_and_flow: [(&raw const (*question).class_and_flow[0]).read_volatile() & 0xc0, 0, 0],
                payload_length: tcp_length.to_be(),
                next_header: PROTOCOL_TCP,
                hop_limit: TTL,
                source: (&raw const (*question).destination).read_volatile(),
                destination: (&raw const (*question).source).read_volatile(),
            };
            let sum = protocol + sum_of(&ip.source) + sum_of(&ip.destination);
            ctx.write(network_at, &ip)?;
            Some(sum)
        }
    }
}

#[inline(always)]
fn network_at(place: u32) -> usize {
    (place >> NETWORK_SHIFT) as usize % NETWORK_END
}

#[inline(always)]
fn tcp_at(place: u32) -> usize {
    place as usize % TCP_END
}

/// Of an answer.
#[inline(always)]
fn network_length(place: u32) -> usize {
    if place & IS_V6 == 0 { mem::size_of::<Ipv4Header>() } else { mem::size_of::<Ipv6Header>() }
}

/// The sum of words in network order; no number of them overflows it.
#[inline(always)]
fn sum_of<const N: usize>(words: *const [u32; N]) -> u64 {
    // SAFETY: the callers hand over what has that many words.
    (0..N).map(|at| u64::from(unsafe { (*words)[at] })).sum()
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
