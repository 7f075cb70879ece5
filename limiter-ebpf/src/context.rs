//! What a program is given of a packet: by XDP a frame in one piece, by TC a `sk_buff`.
//!
//! A `sk_buff` differs in what matters here:
//! - Only its linear part can be read directly. Headers may lie behind that, and are brought there first.
//! - The outer VLAN tag is in its metadata; the Ethernet header already says what is behind it.
//! - On a device without link headers (tun, ppp, WireGuard) it begins with the network header.
//! - Its checksum may be one that was never computed, or a sum of the device's over the whole packet. The helpers that write
//!   to it know.
//! - It may be several segments of one connection, which GRO has put together.

use core::{arch::asm, hint, mem};

use aya_ebpf::{
    EbpfContext,
    bindings::{__sk_buff, BPF_F_RECOMPUTE_CSUM},
    helpers::{
        bpf_l4_csum_replace, bpf_redirect, bpf_skb_change_tail, bpf_skb_load_bytes, bpf_skb_pull_data,
        bpf_skb_store_bytes, bpf_xdp_adjust_tail,
    },
    programs::XdpContext,
};

use limiter_common::policy::InForce;

use crate::{
    admission, challenge, completion,
    headers::TcpHeader,
    listener::Terms,
    locate,
    options::{self, OPTION_UNKNOWN},
    packet::{self, Cursor, Segment},
    reply::{self, Question},
};

/// A TCP header with all the options that it has room for.
const MAX_TCP_HEADER: usize = 60;

/// A packet that has come in.
pub trait Packet: EbpfContext {
    /// Where it begins.
    fn data(&self) -> usize;

    /// Where that part ends that can be read directly.
    fn data_end(&self) -> usize;

    /// Brings that many bytes, or all that there are, into the part that can be read directly. What pointed into the packet
    /// before points nowhere now.
    fn reach(&self, bytes: u32);

    /// How long it is, from its link header on, in bytes.
    fn length(&self) -> usize;

    /// Whether it begins with an Ethernet header.
    fn has_ethernet(&self) -> bool;

    /// Whether the checksum of its TCP header, which begins there, is yet to be computed, from that of the addresses on, by whoever
    /// sends it. What pointed into the packet before points nowhere now.
    fn is_unsummed(&self, tcp: usize) -> bool;

    /// Cuts it to a length, which is no greater than its own. What pointed into the packet before points nowhere now.
    fn cut(&self, length: usize) -> Option<()>;

    /// Writes to it, behind the link header. What pointed into the packet before points nowhere now.
    fn write<T: Copy>(&self, offset: usize, value: &T) -> Option<()>;

    /// Writes the addresses of its Ethernet header. What pointed into the packet before points nowhere now.
    fn write_link(&self, addresses: &[[u16; 3]; 2]) -> Option<()>;

    /// Steps over the link header, and returns what follows it.
    fn link_header(&self, cursor: &mut Cursor) -> Option<u16>;

    /// [`locate::limiter_locate`], or its like.
    fn locate(&self) -> u32;

    /// [`options::limiter_offer`], or its like.
    fn offer(&self, tcp: u32) -> u64;

    /// [`challenge::limiter_cookie`], or its like.
    fn cookie(&self, question: &Question, largest_buffer: u32, terms: &mut Terms) -> i64;

    /// [`admission::limiter_syn`], or its like.
    fn syn(&self, service: u16, in_force: InForce) -> u32;

    /// [`completion::limiter_prove`], or its like.
    fn prove(&self, service: u16) -> u32;

    /// [`completion::limiter_handshake`], or its like.
    fn handshake(&self, service: u16, in_force: InForce) -> u32;

    /// [`completion::limiter_refuse`], or its like.
    fn refuse(&self, service: u16, in_force: InForce, refused: u32);

    /// Writes the flags of a segment of this packet, and mends the checksum. What pointed into the packet before points
    /// nowhere now.
    fn set_flags(&self, segment: &Segment, flags: u8);

    /// The same for the sequence number.
    fn set_sequence(&self, segment: &Segment, sequence: u32);

    /// Makes the stack skip a Fast Open option, if this packet's SYN has one: it would open the connection at once. What
    /// pointed into the packet before points nowhere now.
    fn void_fast_open(&self, segment: &Segment);
}

impl Packet for XdpContext {
    #[inline(always)]
    fn data(&self) -> usize {
        self.data()
    }

    #[inline(always)]
    fn data_end(&self) -> usize {
        self.data_end()
    }

    #[inline(always)]
    fn reach(&self, _: u32) {}

    #[inline(always)]
    fn length(&self) -> usize {
        // Of two pointers the verifier takes no difference in 32 bits, which is what the compiler would make of it.
        hint::black_box(self.data_end() - self.data())
    }

    #[inline(always)]
    fn has_ethernet(&self) -> bool {
        true
    }

    #[inline(always)]
    fn is_unsummed(&self, _: usize) -> bool {
        false
    }

    #[inline(always)]
    fn cut(&self, length: usize) -> Option<()> {
        // SAFETY: the context is that of this program.
        (unsafe { bpf_xdp_adjust_tail(self.ctx, length as i32 - self.length() as i32) } == 0).then_some(())
    }

    #[inline(always)]
    fn write<T: Copy>(&self, offset: usize, value: &T) -> Option<()> {
        let mut cursor = Cursor::new(self);
        cursor.skip(offset);
        // SAFETY: take checked it.
        unsafe { *cursor.take::<T>()? = *value };
        Some(())
    }

    #[inline(always)]
    fn write_link(&self, addresses: &[[u16; 3]; 2]) -> Option<()> {
        self.write(0, addresses)
    }

    #[inline(always)]
    fn link_header(&self, cursor: &mut Cursor) -> Option<u16> {
        packet::ethernet(cursor)
    }

    #[inline(always)]
    fn offer(&self, tcp: u32) -> u64 {
        options::limiter_offer(self.ctx, tcp)
    }

    #[inline(always)]
    fn cookie(&self, question: &Question, largest_buffer: u32, terms: &mut Terms) -> i64 {
        challenge::limiter_cookie(self.ctx, question.place, question.header_length, largest_buffer, &raw mut *terms)
    }

    #[inline(always)]
    fn locate(&self) -> u32 {
        locate::limiter_locate(self.ctx)
    }

    #[inline(always)]
    fn syn(&self, service: u16, in_force: InForce) -> u32 {
        admission::limiter_syn(self.ctx, service.into(), in_force.0)
    }

    #[inline(always)]
    fn prove(&self, service: u16) -> u32 {
        completion::limiter_prove(self.ctx, service.into())
    }

    #[inline(always)]
    fn handshake(&self, service: u16, in_force: InForce) -> u32 {
        completion::limiter_handshake(self.ctx, service.into(), in_force.0)
    }

    #[inline(always)]
    fn refuse(&self, service: u16, in_force: InForce, refused: u32) {
        completion::limiter_refuse(self.ctx, service.into(), in_force.0, refused);
    }

    #[inline(always)]
    fn set_flags(&self, segment: &Segment, flags: u8) {
        segment.set_flags(flags);
    }

    #[inline(always)]
    fn set_sequence(&self, segment: &Segment, sequence: u32) {
        segment.set_sequence(sequence);
    }

    #[inline(always)]
    fn void_fast_open(&self, segment: &Segment) {
        let place = options::limiter_fast_open(self.ctx, segment.offset as u32);
        if place != 0 {
            segment.void_option(self, place as usize);
        }
    }
}

/// What TC hands over.
pub struct Skb {
    skb: *mut __sk_buff,
    /// Whether packets of this device begin with an Ethernet header.
    has_ethernet: bool,
}

impl Skb {
    #[inline(always)]
    pub const fn new(skb: *mut __sk_buff, has_ethernet: bool) -> Self {
        Self { skb, has_ethernet }
    }
}

impl EbpfContext for Skb {
    #[inline(always)]
    fn as_ptr(&self) -> *mut core::ffi::c_void {
        self.skb.cast()
    }
}

// Both ends are read by instructions that say so: the fields have 32 bits, and pointers that the compiler keeps as such are none to
// the verifier.
impl Packet for Skb {
    #[inline(always)]
    fn data(&self) -> usize {
        let data;
        // SAFETY: a field of the context, which the kernel keeps valid.
        unsafe {
            asm!(
                "{data} = *(u32 *)({skb} + {offset})",
                data = out(reg) data,
                skb = in(reg) self.skb,
                offset = const mem::offset_of!(__sk_buff, data),
                options(pure, readonly, nostack, preserves_flags),
            );
        }
        data
    }

    #[inline(always)]
    fn data_end(&self) -> usize {
        let end;
        // SAFETY: as above.
        unsafe {
            asm!(
                "{end} = *(u32 *)({skb} + {offset})",
                end = out(reg) end,
                skb = in(reg) self.skb,
                offset = const mem::offset_of!(__sk_buff, data_end),
                options(pure, readonly, nostack, preserves_flags),
            );
        }
        end
    }

    #[inline(always)]
    fn reach(&self, bytes: u32) {
        // SAFETY: as above.
        let length = unsafe { (*self.skb).len };
        let bytes = if bytes < length { bytes } else { length };
        if self.data() + bytes as usize > self.data_end() {
            // Where the kernel has no memory for it, the headers stay out of reach, and the packet passes unread; a connection
            // that is opened by it is counted when it is open.
            // SAFETY: the context is that of a classifier.
            unsafe { bpf_skb_pull_data(self.skb, bytes) };
        }
    }

    #[inline(always)]
    fn length(&self) -> usize {
        // SAFETY: as above.
        unsafe { (*self.skb).len as usize }
    }

    #[inline(always)]
    fn has_ethernet(&self) -> bool {
        self.has_ethernet
    }

    // There is nothing to ask for it. But the helper that mends a checksum leaves one alone that is not there yet.
    #[inline(always)]
    fn is_unsummed(&self, tcp: usize) -> bool {
        let place = (tcp + mem::offset_of!(TcpHeader, checksum)) as u32;
        let (Some(before), 0) = (
            self.load::<u16>(place),
            // SAFETY: the context is that of a classifier; the place is that of the checksum.
            unsafe { bpf_l4_csum_replace(self.skb, place, 0, 1, 2) },
        ) else {
            return false;
        };
        let is_unsummed = self.load::<u16>(place) == Some(before);
        self.store(place as usize, before, 0);
        is_unsummed
    }

    #[inline(always)]
    fn cut(&self, length: usize) -> Option<()> {
        // SAFETY: the context is that of a classifier.
        if unsafe { bpf_skb_change_tail(self.skb, length as u32, 0) } != 0 {
            return None;
        }
        self.reach(length as u32);
        Some(())
    }

    #[inline(always)]
    fn write<T: Copy>(&self, offset: usize, value: &T) -> Option<()> {
        self.store(offset, *value, BPF_F_RECOMPUTE_CSUM.into())
    }

    // No sum of the device's covers the link header.
    #[inline(always)]
    fn write_link(&self, addresses: &[[u16; 3]; 2]) -> Option<()> {
        self.store(0, *addresses, 0)
    }

    #[inline(always)]
    fn link_header(&self, cursor: &mut Cursor) -> Option<u16> {
        if self.has_ethernet {
            packet::ethernet(cursor)
        } else {
            // SAFETY: a field of the context, which the kernel keeps valid.
            Some(u16::from_be(unsafe { (*self.skb).protocol } as u16))
        }
    }

    #[inline(always)]
    fn locate(&self) -> u32 {
        locate::limiter_locate_skb(self.skb, u32::from(self.has_ethernet))
    }

    #[inline(always)]
    fn offer(&self, tcp: u32) -> u64 {
        options::limiter_offer_skb(self.skb, tcp)
    }

    #[inline(always)]
    fn cookie(&self, question: &Question, largest_buffer: u32, terms: &mut Terms) -> i64 {
        challenge::limiter_cookie_skb(self.skb, question.place, question.header_length, largest_buffer, &raw mut *terms)
    }

    #[inline(always)]
    fn syn(&self, service: u16, in_force: InForce) -> u32 {
        admission::limiter_syn_skb(self.skb, u32::from(self.has_ethernet), service.into(), in_force.0)
    }

    #[inline(always)]
    fn prove(&self, service: u16) -> u32 {
        completion::limiter_prove_skb(self.skb, u32::from(self.has_ethernet), service.into())
    }

    #[inline(always)]
    fn handshake(&self, service: u16, in_force: InForce) -> u32 {
        completion::limiter_handshake_skb(self.skb, u32::from(self.has_ethernet), service.into(), in_force.0)
    }

    #[inline(always)]
    fn refuse(&self, service: u16, in_force: InForce, refused: u32) {
        let has_ethernet = u32::from(self.has_ethernet);
        completion::limiter_refuse_skb(self.skb, has_ethernet, service.into(), in_force.0, refused);
    }

    // Not by writing to the packet: for a program that does, the kernel copies the headers of every packet that somebody
    // else looks at, too.
    #[inline(always)]
    fn set_flags(&self, segment: &Segment, flags: u8) {
        let (before, after) = segment.with_flags(flags);
        self.store(segment.offset + mem::offset_of!(TcpHeader, flags), flags, 0);
        // SAFETY: the context is that of a classifier; the place is that of the checksum.
        unsafe { bpf_l4_csum_replace(self.skb, checksum_of(segment), before.into(), after.into(), 2) };
    }

    #[inline(always)]
    fn set_sequence(&self, segment: &Segment, sequence: u32) {
        let before = segment.sequence().to_be();
        self.store(segment.offset + mem::offset_of!(TcpHeader, sequence), sequence.to_be(), 0);
        // SAFETY: the context is that of a classifier; the place is that of the checksum.
        unsafe {
            bpf_l4_csum_replace(self.skb, checksum_of(segment), before.into(), sequence.to_be().into(), 4);
        }
    }

    #[inline(always)]
    fn void_fast_open(&self, segment: &Segment) {
        self.reach((segment.offset + MAX_TCP_HEADER) as u32);
        let place = options::limiter_fast_open_skb(self.skb, segment.offset as u32);
        if place == 0 {
            return;
        }
        let Some(kind) = self.load::<u8>(place) else { return };
        let (before, after) = segment.option_words(place as usize, kind);
        self.store(place as usize, OPTION_UNKNOWN, 0);
        // SAFETY: the context is that of a classifier; the place is that of the checksum.
        unsafe {
            bpf_l4_csum_replace(self.skb, checksum_of(segment), before.to_be().into(), after.to_be().into(), 2);
        }
    }
}

impl Skb {
    /// [`reply::limiter_reset_skb`]
    #[inline(always)]
    pub fn reset(&self, service: u16) -> i32 {
        reply::limiter_reset_skb(self.skb, u32::from(self.has_ethernet), service.into())
    }

    /// [`challenge::limiter_challenge_skb`]
    #[inline(always)]
    pub fn challenge(&self, service: u16) -> i32 {
        challenge::limiter_challenge_skb(self.skb, u32::from(self.has_ethernet), service.into())
    }

    /// Has it leave by the device that it came in by. Returns the action: `TC_ACT_REDIRECT`.
    #[inline(always)]
    pub fn send(&self) -> i32 {
        // SAFETY: a field of the context, which the kernel keeps valid; the helper has no precondition.
        unsafe { bpf_redirect((*self.skb).ifindex, 0) as i32 }
    }

    #[inline(always)]
    fn store<T>(&self, offset: usize, value: T, flags: u64) -> Option<()> {
        let size = mem::size_of::<T>() as u32;
        // SAFETY: the context is that of a classifier; the value has that size.
        let outcome = unsafe { bpf_skb_store_bytes(self.skb, offset as u32, (&raw const value).cast(), size, flags) };
        (outcome == 0).then_some(())
    }

    #[inline(always)]
    fn load<T: Default>(&self, offset: u32) -> Option<T> {
        let mut value = T::default();
        // SAFETY: the context is that of a classifier; the value is ours, and every pattern of its bits is one.
        let outcome =
            unsafe { bpf_skb_load_bytes(self.skb.cast(), offset, (&raw mut value).cast(), mem::size_of::<T>() as u32) };
        (outcome == 0).then_some(value)
    }
}

#[inline(always)]
fn checksum_of(segment: &Segment) -> u32 {
    (segment.offset + mem::offset_of!(TcpHeader, checksum)) as u32
}
