//! SYN cookies made before the stack sees a SYN, while a service is flooded with SYNs.
//!
//! A SYN is answered before the stack sees it, and nothing is stored. The cookie is the kernel's own
//! (`bpf_tcp_gen_syncookie`, kernel 5.2), so the stack takes the ACK that brings it back for the end of a handshake, and so do
//! the limits. It stands for the client's MSS. The other options the stack finds in the timestamp that the ACK brings back, where it
//! would have put them itself: in the lowest bits. Only where `net.ipv4.tcp_timestamps` is 2, though: with 1, timestamps begin at
//! an offset for each pair of addresses that the kernel tells nobody ([`crate::listener`]).

use core::{hint, mem};

use aya_ebpf::{
    bindings::{__sk_buff, BPF_TCP_LISTEN, TC_ACT_SHOT, TC_ACT_UNSPEC, bpf_sock, tcphdr, xdp_action, xdp_md},
    helpers::{bpf_check_mtu, bpf_ktime_get_coarse_ns, bpf_ktime_get_ns, bpf_sk_release, bpf_tcp_gen_syncookie},
    programs::XdpContext,
};
use limiter_common::{
    Counter,
    challenge::{Challenge, HOLD_NS, WINDOW_NS, is_flood},
};

use crate::{
    atomic,
    context::{Packet, Skb},
    counters::count,
    handshake,
    headers::{ACK, ECE, SYN, TcpHeader},
    listener::{self, Terms},
    locate::{IS_V6, TCP_END},
    maps::CHALLENGES,
    options::{NO_WINDOW_SCALE, OFFERS_SACK, OFFERS_TIMESTAMPS, window_scale},
    packet::{self, Network, Segment},
    reply::{MAX_OPTION_WORDS, Options, Question, send_back},
};

/// What a client may send before the stack itself tells its window: more than anybody's first flight, and no more than a
/// listener has room for. Never scaled.
const FIRST_WINDOW: u32 = 32_768;
/// A network's MTU where the device doesn't tell one.
const USUAL_MTU: u32 = 1500;

// Words of options as Linux lays them out (RFC 9293 section 3.1, RFC 2018 section 2, RFC 7323 sections 2.2 and 3.2): kind,
// length and content.
const MSS: u32 = 2 << 24 | 4 << 16;
const SACK_PERMITTED: u32 = 4 << 24 | 2 << 16;
const NOTHING_TWICE: u32 = 1 << 24 | 1 << 16;
const TIMESTAMPS: u32 = 8 << 8 | 10;
const WINDOW_SCALE: u32 = 1 << 24 | 3 << 16 | 3 << 8;

/// How many of the lowest bits of a cookie's timestamp hide options: the client's window scale, and these.
const HIDING_BITS: u32 = 6;
const HIDES_SACK: u64 = 1 << 4;
const HIDES_ECN: u64 = 1 << 5;
/// Of the unit of timestamps.
const NANOSECONDS: u64 = 1_000_000;

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
    match challenge_and_count(&XdpContext::new(ctx), service) {
        Some(Answered::Sent) => xdp_action::XDP_TX,
        Some(Answered::Spoiled) => xdp_action::XDP_DROP,
        None => xdp_action::XDP_PASS,
    }
}

/// The same for the packets of TC: `TC_ACT_REDIRECT`, or `TC_ACT_UNSPEC`.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn limiter_challenge_skb(skb: *mut __sk_buff, has_ethernet: u32, service: u32) -> i32 {
    let ctx = Skb::new(skb, has_ethernet != 0);
    match challenge_and_count(&ctx, service) {
        Some(Answered::Sent) => ctx.send(),
        Some(Answered::Spoiled) => TC_ACT_SHOT,
        None => TC_ACT_UNSPEC,
    }
}

enum Answered {
    Sent,
    /// What is left of the packet is no SYN.
    Spoiled,
}

#[inline(always)]
fn challenge_and_count(ctx: &impl Packet, service: u32) -> Option<Answered> {
    let answered = challenge(ctx, service);
    match answered {
        Some(Answered::Sent) => count(service as u16, Counter::SynChallenged),
        Some(Answered::Spoiled) => {}
        None => count(service as u16, Counter::SynAdmitted),
    }
    answered
}

#[inline(always)]
fn challenge(ctx: &impl Packet, service: u32) -> Option<Answered> {
    let question = Question::read(ctx)?;
    let offer = ctx.offer(question.place % TCP_END as u32);
    let mut terms = Terms::default();
    let cookie = ctx.cookie(&question, largest_buffer(service), &mut terms);
    if cookie < 0 {
        return None;
    }

    let mut flags = SYN | ACK;
    let mut window = FIRST_WINDOW;
    let mut mss = mss(ctx, question.place & IS_V6 != 0);
    let mut options = Options { words: [0; MAX_OPTION_WORDS], count: usize::from(question.room >= 1) };
    if terms.max_segment != 0 && terms.max_segment < mss {
        mss = terms.max_segment;
    }
    if terms.space != 0 && terms.space < window {
        window = terms.space;
    }
    // Without a timestamp, the stack would know of none of the others.
    let scales = terms.scales != 0 && window_scale(offer) != NO_WINDOW_SCALE;
    let words = MAX_OPTION_WORDS - usize::from(!scales);
    if terms.timestamps != 0 && offer & OFFERS_TIMESTAMPS != 0 && question.room >= words {
        let ecn = terms.ecn != 0 && question.asks_for_ecn;
        if ecn {
            flags |= ECE;
        }
        options.count = words;
        grant(&mut options, offer, &terms, scales, ecn);
    }
    options.words[0] = (MSS | mss).to_be();
    let answer = TcpHeader {
        source_port: question.local_port,
        destination_port: question.remote_port,
        sequence: (cookie as u32).to_be(),
        // Data in a SYN is not taken: the client sends it again.
        acknowledgement: question.sequence.wrapping_add(1).to_be(),
        data_offset: 0,
        flags,
        window: (window as u16).to_be(),
        checksum: 0,
        urgent: 0,
    };
    match send_back(ctx, &question, answer, &options) {
        Some(()) => Some(Answered::Sent),
        None => Some(Answered::Spoiled),
    }
}

/// Grants what is offered and what the listener grants, behind the MSS: a timestamp that hides all of that from the client, and shows
/// it to the stack when it comes back (`cookie_timestamp_decode`).
#[inline(always)]
fn grant(options: &mut Options, offer: u64, terms: &Terms, scales: bool, ecn: bool) {
    let mut hidden = NO_WINDOW_SCALE;
    if scales {
        hidden = window_scale(offer);
        options.words[4] = (WINDOW_SCALE | terms.window_scale).to_be();
    }
    let mut before_timestamps = NOTHING_TWICE;
    if terms.sack != 0 && offer & OFFERS_SACK != 0 {
        hidden |= HIDES_SACK;
        before_timestamps = SACK_PERMITTED;
    }
    if ecn {
        hidden |= HIDES_ECN;
    }
    // The stack's own clock. It is never put forward: what the stack says next must not be less.
    // SAFETY: the helper has no precondition.
    let now = unsafe { bpf_ktime_get_ns() } / NANOSECONDS;
    let mut timestamp = now >> HIDING_BITS << HIDING_BITS | hidden;
    if timestamp > now {
        timestamp -= 1 << HIDING_BITS;
    }
    options.words[1] = (before_timestamps | TIMESTAMPS).to_be();
    options.words[2] = (timestamp as u32).to_be();
    options.words[3] = (offer as u32).to_be();
}

/// The largest receive buffer that there may be; 0: not known.
#[inline(always)]
fn largest_buffer(service: u32) -> u32 {
    match CHALLENGES.get_ptr(service) {
        // SAFETY: the pointer comes from a look-up in an array; its elements stay, and are aligned.
        Some(challenge) => unsafe { (&raw const (*challenge).largest_buffer).read_volatile() },
        None => 0,
    }
}

/// In the place of a cookie, like any error.
const NO_COOKIE: i64 = -1;

/// The MSS that a cookie stands for: the greatest of four that is not above the client's.
#[inline(always)]
const fn mss_of(cookie: i64) -> u32 {
    (cookie >> 32) as u32
}

/// The kernel's cookie for the SYN at that place ([`crate::locate::limiter_locate`]) with that length of its TCP header, and above
/// its 32 bits, [`mss_of`] it; or a negative number. Writes the listener's terms, where buffers are at most so large.
///
/// A global function, like [`crate::locate::limiter_locate`]. (With a pointer to memory: kernel 5.13.)
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn limiter_cookie(
    ctx: *mut xdp_md,
    place: u32,
    header_length: u32,
    largest_buffer: u32,
    terms: *mut Terms,
) -> i64 {
    if terms.is_null() {
        return NO_COOKIE;
    }
    // SAFETY: the verifier has checked that this is what is behind the pointer.
    agreed(&XdpContext::new(ctx), place, header_length, largest_buffer, unsafe { &mut *terms })
}

/// The same for the packets of TC.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn limiter_cookie_skb(
    skb: *mut __sk_buff,
    place: u32,
    header_length: u32,
    largest_buffer: u32,
    terms: *mut Terms,
) -> i64 {
    if terms.is_null() {
        return NO_COOKIE;
    }
    // Nothing is asked of it that depends on whether it has an Ethernet header.
    // SAFETY: the verifier has checked that this is what is behind the pointer.
    agreed(&Skb::new(skb, true), place, header_length, largest_buffer, unsafe { &mut *terms })
}

#[inline(always)]
fn agreed(ctx: &impl Packet, place: u32, header_length: u32, largest_buffer: u32, terms: &mut Terms) -> i64 {
    let Some(segment) = packet::at(ctx, place) else { return NO_COOKIE };
    let listener = handshake::lookup(ctx, &segment);
    if listener.is_null() {
        return NO_COOKIE;
    }
    // SAFETY: the socket is not null, and we hold a reference.
    let cookie = if unsafe { (*listener).state } == BPF_TCP_LISTEN {
        cookie(ctx, listener, place, header_length)
    } else {
        NO_COOKIE
    };
    if cookie >= 0 {
        *terms = listener::terms(listener, mss_of(cookie), largest_buffer);
    }
    // SAFETY: we hold the reference, and use the socket no more.
    unsafe { bpf_sk_release(listener.cast()) };
    cookie
}

/// The kernel's cookie. No `Option`: where there is none, the compiler would leave undefined what the verifier wants to see
/// defined.
#[inline(always)]
fn cookie(ctx: &impl Packet, listener: *mut bpf_sock, place: u32, header_length: u32) -> i64 {
    // One call for each length: the verifier wants to know it.
    match header_length {
        20 => cookie_for::<20>(ctx, listener, place),
        24 => cookie_for::<24>(ctx, listener, place),
        28 => cookie_for::<28>(ctx, listener, place),
        32 => cookie_for::<32>(ctx, listener, place),
        36 => cookie_for::<36>(ctx, listener, place),
        40 => cookie_for::<40>(ctx, listener, place),
        44 => cookie_for::<44>(ctx, listener, place),
        48 => cookie_for::<48>(ctx, listener, place),
        52 => cookie_for::<52>(ctx, listener, place),
        56 => cookie_for::<56>(ctx, listener, place),
        60 => cookie_for::<60>(ctx, listener, place),
        _ => NO_COOKIE,
    }
}

#[inline(always)]
fn cookie_for<const LENGTH: usize>(ctx: &impl Packet, listener: *mut bpf_sock, place: u32) -> i64 {
    let Some(Segment { network, .. }) = packet::at(ctx, place) else { return NO_COOKIE };
    // The compiler is not to add this up once more after the check, which would be of no use to the verifier then.
    let tcp = hint::black_box(ctx.data() + place as usize % TCP_END);
    if tcp + LENGTH > ctx.data_end() {
        return NO_COOKIE;
    }
    let (ip, ip_length) = match network {
        Network::V4(ip) => (ip.cast_mut().cast(), 20),
        Network::V6(ip) => (ip.cast_mut().cast(), 40),
    };
    // SAFETY: the caller holds a reference to the listener; both headers lie in the packet, with these lengths.
    unsafe { bpf_tcp_gen_syncookie(listener.cast(), ip, ip_length, tcp as *mut tcphdr, LENGTH as u32) }
}

/// The largest segment that the host can receive by this device.
#[inline(always)]
fn mss(ctx: &impl Packet, v6: bool) -> u32 {
    let mut mtu = 0;
    // SAFETY: the context is that of this program; the number is the caller's own. (Kernel 5.12.)
    let failed = unsafe { bpf_check_mtu(ctx.as_ptr(), 0, &raw mut mtu, 0, 0) } < 0;
    let headers = if v6 { 40 } else { 20 } + mem::size_of::<TcpHeader>() as u32;
    if failed || mtu <= headers {
        mtu = USUAL_MTU;
    }
    let mss = mtu - headers;
    if mss > u16::MAX.into() { u16::MAX.into() } else { mss }
}
