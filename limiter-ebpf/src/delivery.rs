//! Segments as a listener is given them (`cgroup_skb`; kernel 6.17 for the namespace's cookie), for sockets that XDP can't look
//! up: in another network namespace, or behind a translation of ports.
//!
//! XDP sees such a segment with other addresses than its socket has, or where there is no such socket. Here, in front of the
//! socket, whatever was translated is, and the stack has yet to open the connection: so this is where the slot is reserved, as
//! exactly as XDP does it elsewhere. A packet can't be changed here, so a refused one is dropped: to its client it looks like a
//! full accept queue.

use core::{hint, mem};

use aya_ebpf::{
    bindings::{__sk_buff, BPF_TCP_LISTEN},
    helpers::{bpf_get_netns_cookie, bpf_skb_load_bytes},
    programs::SkBuffContext,
};
use limiter_common::{Address, Counter, Endpoints, Netns, policy::InForce};

use crate::{
    completion,
    counters::count,
    expiry, flows,
    handshake::{self, Proof},
    headers::{ACK, ExtensionHeader, HEADER_AUTHENTICATION, Ipv4Header, Ipv6Header, PROTOCOL_TCP, RST, SYN, TcpHeader},
    ledger,
    locate::is_extension,
    policy::{in_force, word_of_sockets},
    sockets::netns_of,
};

/// As in [`crate::locate`].
const MAX_EXTENSION_HEADERS: usize = 8;

/// What the kernel is answered.
const PASS: i32 = 1;
const DROP: i32 = 0;

/// Sees to a segment that is delivered to a socket of whatever kind.
#[inline(always)]
pub fn deliver(ctx: &SkBuffContext) -> i32 {
    let answer = if is_refused(ctx.skb.skb).unwrap_or(false) { DROP } else { PASS };
    // The verifier does not know what the functions return, and wants to see one of the two.
    hint::black_box(answer) & PASS
}

#[inline(always)]
fn is_refused(skb: *mut __sk_buff) -> Option<bool> {
    // SAFETY: fields of the context, and of the socket that it points to, which the kernel keeps valid; null was looked for.
    let port = unsafe {
        let socket = (&raw const (*skb).__bindgen_anon_2.sk).read_volatile();
        // Nearly every packet ends here. What ends a handshake is delivered to the listener.
        if socket.is_null() || (&raw const (*socket).state).read_volatile() != BPF_TCP_LISTEN {
            return None;
        }
        (&raw const (*socket).src_port).read_volatile() as u16
    };
    let word = word_of_sockets(port)?;
    let in_force = in_force();
    let service = in_force.service_of_socket(word, netns(skb).is_own())?;
    if limiter_delivered(skb, service.into()) == 0 {
        return None;
    }
    let refused = limiter_delivered_handshake(skb, service.into(), in_force.0);
    let is_dropped = refused != 0 && limiter_delivered_refusal(skb, service.into(), in_force.0, refused) != 0;
    expiry::limiter_expire();
    Some(is_dropped)
}

#[inline(always)]
fn netns(skb: *mut __sk_buff) -> Netns {
    // SAFETY: the context is that of this program.
    netns_of(unsafe { bpf_get_netns_cookie(skb.cast()) })
}

/// Whether a segment completes a handshake that is not in the ledger yet.
///
/// A global function, like [`crate::locate::limiter_locate`], and so are the others.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn limiter_delivered(skb: *mut __sk_buff, service: u32) -> u32 {
    u32::from(completes(skb, service as u16).unwrap_or(false))
}

#[inline(always)]
fn completes(skb: *mut __sk_buff, service: u16) -> Option<bool> {
    let delivered = read(skb)?;
    if delivered.flags & (SYN | ACK | RST) != ACK || flows::has_entry(&ledger::key_of(&delivered.ends)) {
        return None;
    }
    match handshake::prove_between(skb.cast(), &delivered.ends, delivered.is_v4, delivered.acknowledgement) {
        Proof::Completes => Some(true),
        Proof::Unproven => {
            count(service, Counter::HandshakeUnproven);
            None
        }
        // A SYN cookie can't be checked here: what it opens is counted when it is open.
        Proof::CompletesByCookie | Proof::NoHandshake => None,
    }
}

/// [`completion::limiter_handshake`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn limiter_delivered_handshake(skb: *mut __sk_buff, service: u32, in_force: u64) -> u32 {
    let Some(delivered) = read(skb) else { return 0 };
    completion::complete(&delivered.ends, service as u16, InForce(in_force)).unwrap_or(0)
}

/// Notes that a handshake is refused. Returns whether it is, and not only observed.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn limiter_delivered_refusal(skb: *mut __sk_buff, service: u32, in_force: u64, refused: u32) -> u32 {
    let Some(delivered) = read(skb) else { return 0 };
    u32::from(completion::note(&delivered.ends, service as u16, InForce(in_force), refused) == Some(false))
}

struct Delivered {
    ends: Endpoints,
    is_v4: bool,
    acknowledgement: u32,
    flags: u8,
}

/// What is in the headers, which the stack has checked by now.
#[inline(always)]
fn read(skb: *mut __sk_buff) -> Option<Delivered> {
    // An IPv4 header, and there is always as much.
    let ip: Ipv4Header = load(skb, 0)?;
    let (remote, local, tcp) = if ip.version_and_length >> 4 == 4 {
        let length = u32::from(ip.version_and_length & 0x0f) * 4;
        (Address::from_v4_word(ip.source), Address::from_v4_word(ip.destination), length)
    } else {
        let ip: Ipv6Header = load(skb, 0)?;
        let tcp = behind_extensions(skb, ip.next_header)?;
        (Address::from_v6_words(ip.source), Address::from_v6_words(ip.destination), tcp)
    };
    let header: TcpHeader = load(skb, tcp)?;
    Some(Delivered {
        ends: Endpoints {
            remote,
            local,
            remote_port: u16::from_be(header.source_port),
            local_port: u16::from_be(header.destination_port),
            netns: netns(skb),
        },
        is_v4: ip.version_and_length >> 4 == 4,
        acknowledgement: u32::from_be(header.acknowledgement),
        flags: header.flags,
    })
}

/// Where the TCP header is behind an IPv6 header. Fragments have been put together by now.
#[inline(always)]
fn behind_extensions(skb: *mut __sk_buff, mut next: u8) -> Option<u32> {
    let mut offset = mem::size_of::<Ipv6Header>() as u32;
    for _ in 0..MAX_EXTENSION_HEADERS {
        if !is_extension(next) {
            break;
        }
        let header: ExtensionHeader = load(skb, offset)?;
        let length = u32::from(header.length);
        offset += if next == HEADER_AUTHENTICATION { (length + 2) * 4 } else { (length + 1) * 8 };
        next = header.next_header;
    }
    (next == PROTOCOL_TCP).then_some(offset)
}

#[inline(always)]
fn load<T>(skb: *mut __sk_buff, offset: u32) -> Option<T> {
    let mut value = mem::MaybeUninit::<T>::uninit();
    // SAFETY: the context is that of this program; the value has that size, and every bit pattern is a header.
    unsafe {
        let answer = bpf_skb_load_bytes(skb.cast(), offset, value.as_mut_ptr().cast(), mem::size_of::<T>() as u32);
        (answer == 0).then(|| value.assume_init())
    }
}
