//! SYN cookies made in XDP, while a service is flooded with SYNs.
//!
//! A SYN is answered before the stack sees it, and nothing is stored. The cookie is the kernel's own
//! (`bpf_tcp_gen_syncookie`, kernel 5.2), so the stack takes the ACK that brings it back for the end of a handshake, and so do
//! the limits. Of the SYN's options only the MSS outlives that: the kernel hides the others in its timestamps, behind an
//! offset for each pair of addresses that it tells nobody.

use core::{hint, mem};

use aya_ebpf::{
    bindings::{BPF_TCP_LISTEN, bpf_sock, tcphdr, xdp_action, xdp_md},
    helpers::{bpf_check_mtu, bpf_ktime_get_coarse_ns, bpf_sk_release, bpf_tcp_gen_syncookie},
    programs::XdpContext,
};
use limiter_common::{
    Counter,
    challenge::{Challenge, HOLD_NS, WINDOW_NS, is_flood},
};

use crate::{
    atomic,
    counters::count,
    handshake,
    headers::{ACK, SYN, TcpHeader},
    locate::{IS_V6, TCP_END},
    maps::CHALLENGES,
    packet::{self, Network, Segment},
    reply::{Question, send_back},
};

/// What a client may send before the stack itself tells its window: more than anybody's first flight, and less than any
/// listener's buffer. Without window scaling.
const FIRST_WINDOW: u16 = 32_768;
/// The MSS option (RFC 9293 section 3.7.1): its kind and its length.
const MSS_OPTION: u32 = 2 << 24 | 4 << 16;
/// A network's MTU where the device doesn't tell one.
const USUAL_MTU: u32 = 1500;

/// Counts a SYN that nothing speaks against, and says whether its service is to answer by a cookie now.
///
/// Several CPUs may begin a window at once, which costs a few SYNs in the count of a thousand.
#[inline(always)]
pub fn is_on(service: u16) -> bool {
    let Some(challenge) = CHALLENGES.get_ptr_mut(u32::from(service)) else { return false };
    // SAFETY: the pointer comes from a look-up in an array; its elements stay, and are aligned. The helper has no
    // precondition.
    unsafe {
        let threshold = atomic::load(&raw const (*challenge).threshold);
        if threshold == 0 {
            return false;
        }
        let now_ns = bpf_ktime_get_coarse_ns();
        let until_ns = atomic::load(&raw const (*challenge).until_ns);
        let on = now_ns < until_ns;
        if is_flood(threshold, on, count_syn(challenge, now_ns)) {
            (&raw mut (*challenge).until_ns).write_volatile(now_ns + HOLD_NS);
            return true;
        }
        on
    }
}

/// How many SYNs there were in this window, this one counted.
#[inline(always)]
unsafe fn count_syn(challenge: *mut Challenge, now_ns: u64) -> u64 {
    // SAFETY: the caller vouches for the pointer.
    unsafe {
        if now_ns.saturating_sub(atomic::load(&raw const (*challenge).window_ns)) >= WINDOW_NS {
            (&raw mut (*challenge).window_ns).write_volatile(now_ns);
            (&raw mut (*challenge).syns).write_volatile(0);
        }
        atomic::fetch_add(&raw mut (*challenge).syns, 1) + 1
    }
}

/// Answers a SYN by a cookie, and counts that. Returns the XDP action: `XDP_TX`, or `XDP_PASS` where the stack is to see to
/// it: nobody listens, or the listener takes no cookies now.
///
/// A global function, like [`crate::locate::limiter_locate`].
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn limiter_challenge(ctx: *mut xdp_md, service: u32) -> u32 {
    match challenge(&XdpContext::new(ctx)) {
        Some(Answered::Sent) => {
            count(service as u16, Counter::SynChallenged);
            xdp_action::XDP_TX
        }
        // What is left of the frame is no SYN.
        Some(Answered::Spoiled) => xdp_action::XDP_DROP,
        None => {
            count(service as u16, Counter::SynAdmitted);
            xdp_action::XDP_PASS
        }
    }
}

enum Answered {
    Sent,
    Spoiled,
}

#[inline(always)]
fn challenge(ctx: &XdpContext) -> Option<Answered> {
    let question = Question::read(ctx)?;
    let segment = packet::at(ctx, question.place)?;
    let listener = handshake::lookup(ctx, &segment);
    if listener.is_null() {
        return None;
    }
    // SAFETY: the socket is not null, and we hold a reference.
    let cookie = if unsafe { (*listener).state } == BPF_TCP_LISTEN { cookie(ctx, listener, &question) } else { None };
    // SAFETY: we hold the reference, and use the socket no more.
    unsafe { bpf_sk_release(listener.cast()) };
    let answer = TcpHeader {
        source_port: question.local_port,
        destination_port: question.remote_port,
        sequence: cookie?.to_be(),
        // Data in a SYN is not taken: the client sends it again.
        acknowledgement: question.sequence.wrapping_add(1).to_be(),
        data_offset: 5 << 4,
        flags: SYN | ACK,
        window: FIRST_WINDOW.to_be(),
        checksum: 0,
        urgent: 0,
    };
    let option = MSS_OPTION | mss(ctx, question.place & IS_V6 != 0);
    match send_back(ctx, &question, &answer, Some(option.to_be())) {
        Some(()) => Some(Answered::Sent),
        None => Some(Answered::Spoiled),
    }
}

/// The kernel's cookie for a SYN.
#[inline(always)]
fn cookie(ctx: &XdpContext, listener: *mut bpf_sock, question: &Question) -> Option<u32> {
    // One call for each length: the verifier wants to know it.
    match question.header_length {
        20 => cookie_for::<20>(ctx, listener, question),
        24 => cookie_for::<24>(ctx, listener, question),
        28 => cookie_for::<28>(ctx, listener, question),
        32 => cookie_for::<32>(ctx, listener, question),
        36 => cookie_for::<36>(ctx, listener, question),
        40 => cookie_for::<40>(ctx, listener, question),
        44 => cookie_for::<44>(ctx, listener, question),
        48 => cookie_for::<48>(ctx, listener, question),
        52 => cookie_for::<52>(ctx, listener, question),
        56 => cookie_for::<56>(ctx, listener, question),
        60 => cookie_for::<60>(ctx, listener, question),
        _ => None,
    }
}

#[inline(always)]
fn cookie_for<const LENGTH: usize>(ctx: &XdpContext, listener: *mut bpf_sock, question: &Question) -> Option<u32> {
    let Segment { network, .. } = packet::at(ctx, question.place)?;
    // The compiler is not to add this up once more after the check, which would be of no use to the verifier then.
    let tcp = hint::black_box(ctx.data() + question.place as usize % TCP_END);
    if tcp + LENGTH > ctx.data_end() {
        return None;
    }
    let (ip, ip_length) = match network {
        Network::V4(ip) => (ip.cast_mut().cast(), 20),
        Network::V6(ip) => (ip.cast_mut().cast(), 40),
    };
    // SAFETY: the caller holds a reference to the listener; both headers lie in the packet, with these lengths.
    let answer = unsafe { bpf_tcp_gen_syncookie(listener.cast(), ip, ip_length, tcp as *mut tcphdr, LENGTH as u32) };
    // Negative: an error. Otherwise, above the cookie, the MSS that it stands for, which is the client's.
    (answer >= 0).then_some(answer as u32)
}

/// The largest segment that the host can receive by this device.
#[inline(always)]
fn mss(ctx: &XdpContext, v6: bool) -> u32 {
    let mut mtu = 0;
    // SAFETY: the context is that of this program; the number is the caller's own. (Kernel 5.12.)
    let failed = unsafe { bpf_check_mtu(ctx.ctx.cast(), 0, &raw mut mtu, 0, 0) } < 0;
    let headers = if v6 { 40 } else { 20 } + mem::size_of::<TcpHeader>() as u32;
    if failed || mtu <= headers {
        mtu = USUAL_MTU;
    }
    let mss = mtu - headers;
    if mss > u16::MAX.into() { u16::MAX.into() } else { mss }
}
