//! A client without a TCP stack: it sends exactly the segments it is told to, under any address.

use std::{
    collections::{HashMap, HashSet},
    io, iter,
    mem::{self, MaybeUninit},
    net::{IpAddr, SocketAddr},
    os::fd::AsRawFd,
    ptr,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, Socket, Type};

use crate::{
    lab::{CLIENT_INTERFACE, Client, Family, PORT},
    segment::{Segment, flags},
    wait::SOON,
};

/// How long an answer that may not come is waited for.
const PATIENCE: Duration = Duration::from_secs(3);

/// Sends and receives on a client's link, as an address that the client's kernel does not have: so it doesn't answer the
/// server's segments by RST.
#[derive(Debug)]
pub struct RawClient {
    socket: Socket,
    address: IpAddr,
    server: SocketAddr,
    mac: [u8; 6],
    server_mac: [u8; 6],
    next_port: u16,
}

/// A connection of a [`RawClient`], as far as it has come.
#[derive(Clone, Copy, Debug)]
pub struct RawConnection {
    /// The client's end.
    pub local: SocketAddr,
    /// The service.
    pub server: SocketAddr,
    /// The next sequence number that the client sends.
    pub next_sequence: u32,
    /// The next sequence number that the client expects, which is the server's first plus one.
    pub expected: u32,
}

impl RawConnection {
    /// A segment without data of this connection.
    pub fn segment(&self, flags: u8) -> Segment {
        Segment {
            source: self.local,
            destination: self.server,
            sequence: self.next_sequence,
            acknowledgement: if flags & flags::ACK == 0 { 0 } else { self.expected },
            flags,
            options: Vec::new(),
            payload: Vec::new(),
        }
    }
}

impl RawClient {
    /// With the client's [silent address](Client::silent_address).
    pub fn new(client: &Client, family: Family) -> Result<Self> {
        Self::with_address(client, client.silent_address(family), family)
    }

    /// On the client's link, with an address that may be somebody else's; answers then go there.
    pub fn with_address(client: &Client, address: IpAddr, family: Family) -> Result<Self> {
        let index = client.namespace.interface_index(CLIENT_INTERFACE)?;
        let socket = client.namespace.enter(|| packet_socket(index)).context("cannot open a packet socket")?;
        Ok(Self {
            socket,
            address,
            server: SocketAddr::new(client.server_address(family), PORT),
            mac: client.mac(),
            server_mac: client.server_mac(),
            next_port: 20_000,
        })
    }

    /// The client's address.
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// Sends `count` SYNs from as many ports, none of them used before by this client, and returns without waiting for
    /// answers.
    pub fn send_syns(&mut self, count: u16) -> Result<Vec<Segment>> {
        let syns = self.syns(count);
        self.send(&syns)?;
        Ok(syns)
    }

    /// `count` SYNs from as many ports, none of them used before by this client.
    pub fn syns(&mut self, count: u16) -> Vec<Segment> {
        let syn = || {
            self.next_port += 1;
            self.syn(SocketAddr::new(self.address, self.next_port))
        };
        iter::repeat_with(syn).take(count.into()).collect()
    }

    /// Sends `count` SYNs and waits for a SYN-ACK to each. The server believes each to be half-open.
    pub fn half_open(&mut self, count: u16) -> Result<Vec<RawConnection>> {
        let connections = self.half_open_within(count, SOON)?;
        ensure!(connections.len() == usize::from(count), "{} of {count} SYNs were answered", connections.len());
        Ok(connections)
    }

    /// Sends `count` SYNs, and returns the connections that were answered by a SYN-ACK before `patience` has passed.
    pub fn half_open_within(&mut self, count: u16, patience: Duration) -> Result<Vec<RawConnection>> {
        let syns = self.send_syns(count)?;
        self.answered(&syns, patience)
    }

    /// The connections of these SYNs that are answered by a SYN-ACK before `patience` has passed.
    pub fn answered(&self, syns: &[Segment], patience: Duration) -> Result<Vec<RawConnection>> {
        let mut answers = HashMap::new();
        let deadline = Instant::now() + patience;
        while answers.len() < syns.len() {
            let Some(segment) = self.receive(deadline)? else { break };
            let syn = syns.iter().find(|syn| syn.source == segment.destination);
            if let Some(syn) = syn
                && segment.flags & (flags::SYN | flags::ACK) == flags::SYN | flags::ACK
                && segment.acknowledgement == syn.sequence.wrapping_add(1)
            {
                answers.insert(syn.source, segment);
            }
        }
        Ok(answers
            .into_values()
            .map(|answer| RawConnection {
                local: answer.destination,
                server: answer.source,
                next_sequence: answer.acknowledgement,
                expected: answer.sequence.wrapping_add(1),
            })
            .collect())
    }

    /// Opens a connection from each of these addresses. Answers to all of them have to come by this client's link.
    pub fn open_from(&mut self, addresses: &[IpAddr]) -> Result<()> {
        /// Fewer than any queue takes.
        const AT_ONCE: usize = 256;
        self.next_port += 1;
        let port = self.next_port;
        for addresses in addresses.chunks(AT_ONCE) {
            let mut waiting: HashMap<IpAddr, Segment> = addresses
                .iter()
                .map(|&address| {
                    let source = SocketAddr::new(address, port);
                    (address, self.syn(source))
                })
                .collect();
            let deadline = Instant::now() + SOON;
            while !waiting.is_empty() {
                ensure!(Instant::now() < deadline, "{} of {AT_ONCE} SYNs were not answered", waiting.len());
                self.send(&waiting.values().cloned().collect::<Vec<_>>())?;
                let again = Instant::now() + Duration::from_secs(1);
                let mut acks = Vec::new();
                while !waiting.is_empty() {
                    let Some(segment) = self.receive_any(again)? else { break };
                    if let Some(syn) = waiting.get(&segment.destination.ip())
                        && segment.flags & (flags::SYN | flags::ACK) == flags::SYN | flags::ACK
                        && segment.acknowledgement == syn.sequence.wrapping_add(1)
                    {
                        waiting.remove(&segment.destination.ip());
                        acks.push(Segment {
                            source: segment.destination,
                            destination: segment.source,
                            sequence: segment.acknowledgement,
                            acknowledgement: segment.sequence.wrapping_add(1),
                            flags: flags::ACK,
                            options: Vec::new(),
                            payload: Vec::new(),
                        });
                    }
                }
                self.send(&acks)?;
            }
        }
        Ok(())
    }

    fn syn(&self, source: SocketAddr) -> Segment {
        Segment {
            source,
            destination: self.server,
            sequence: u32::from(source.port()) << 12,
            acknowledgement: 0,
            flags: flags::SYN,
            options: Vec::new(),
            payload: Vec::new(),
        }
    }

    /// Sends a byte on each connection, and returns how many of them the server resets by a segment that a client's stack
    /// would accept; waits for `expected`.
    pub fn reset_when_sending(&self, connections: &mut [RawConnection], expected: usize) -> Result<usize> {
        let data = |connection: &RawConnection| Segment { payload: vec![b'?'], ..connection.segment(flags::ACK) };
        self.send(&connections.iter().map(data).collect::<Vec<_>>())?;
        for connection in &mut *connections {
            connection.next_sequence = connection.next_sequence.wrapping_add(1);
        }
        let mut reset = HashSet::new();
        let deadline = Instant::now() + PATIENCE;
        while reset.len() < expected {
            let Some(segment) = self.receive(deadline)? else { break };
            let connection = connections.iter().find(|connection| connection.local == segment.destination);
            if let Some(connection) = connection
                && segment.flags & flags::RST != 0
                && segment.sequence == connection.expected
            {
                reset.insert(segment.destination);
            }
        }
        Ok(reset.len())
    }

    /// Resets connections with the right sequence numbers.
    pub fn reset(&self, connections: &[RawConnection]) -> Result<()> {
        let resets: Vec<_> = connections.iter().map(|connection| connection.segment(flags::RST)).collect();
        self.send(&resets)
    }

    /// Sends the ACKs that complete the handshakes, all in one batch.
    pub fn complete(&self, connections: &[RawConnection]) -> Result<()> {
        let acks: Vec<_> = connections.iter().map(|connection| connection.segment(flags::ACK)).collect();
        self.send(&acks)
    }

    /// Sends segments in one system call.
    pub fn send(&self, segments: &[Segment]) -> Result<()> {
        self.send_frames(segments.iter().map(|segment| self.frame(segment)).collect())
    }

    /// A segment as it goes over the client's link.
    pub fn frame(&self, segment: &Segment) -> Vec<u8> {
        segment.to_frame(self.mac, self.server_mac)
    }

    /// Sends frames as they are, in one system call for each thousand.
    pub fn send_frames(&self, mut frames: Vec<Vec<u8>>) -> Result<()> {
        // The kernel takes 1024 messages at once.
        frames.chunks_mut(1000).try_for_each(|frames| self.send_batch(frames))
    }

    fn send_batch(&self, frames: &mut [Vec<u8>]) -> Result<()> {
        let mut parts: Vec<_> = frames
            .iter_mut()
            .map(|frame| libc::iovec { iov_base: frame.as_mut_ptr().cast(), iov_len: frame.len() })
            .collect();
        let mut messages: Vec<_> = parts
            .iter_mut()
            .map(|part| {
                // SAFETY: all zero is a valid mmsghdr: no address, no control data.
                let mut message: libc::mmsghdr = unsafe { mem::zeroed() };
                message.msg_hdr.msg_iov = part;
                message.msg_hdr.msg_iovlen = 1;
                message
            })
            .collect();
        let count = u32::try_from(messages.len())?;
        // SAFETY: `messages` points into `parts`, and that into `frames`; all live until the call has returned.
        let sent = unsafe { libc::sendmmsg(self.socket.as_raw_fd(), messages.as_mut_ptr(), count, 0) };
        ensure!(sent >= 0, "sendmmsg: {}", io::Error::last_os_error());
        ensure!(sent.cast_unsigned() == count, "sendmmsg took {sent} of {count} segments");
        Ok(())
    }

    /// The next segment from the service to this client's address; `None` at the deadline.
    pub fn receive(&self, deadline: Instant) -> Result<Option<Segment>> {
        loop {
            match self.receive_any(deadline)? {
                Some(segment) if segment.destination.ip() != self.address => {}
                other => return Ok(other),
            }
        }
    }

    /// The next segment from the service, whoever it is for; `None` at the deadline.
    pub fn receive_any(&self, deadline: Instant) -> Result<Option<Segment>> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.socket.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
            let mut buffer = [MaybeUninit::<u8>::uninit(); 2048];
            let length = match self.socket.recv(&mut buffer) {
                Ok(length) => length,
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                    continue;
                }
                Err(error) => return Err(error).context("cannot receive on the packet socket"),
            };
            let frame: Vec<u8> = buffer[..length]
                .iter()
                // SAFETY: recv has filled the first `length` bytes.
                .map(|byte| unsafe { byte.assume_init() })
                .collect();
            // Our own segments, which the socket sees as well, go the other way.
            if let Some(segment) = Segment::parse(&frame)
                && segment.source == self.server
            {
                return Ok(Some(segment));
            }
        }
    }
}

/// Sends frames on a client's link of which only the first bytes lie in one piece of memory.
#[derive(Debug)]
pub struct VnetSocket(Socket);

impl VnetSocket {
    /// On the client's link.
    pub fn new(client: &Client) -> Result<Self> {
        let index = client.namespace.interface_index(CLIENT_INTERFACE)?;
        let socket = client.namespace.enter(|| packet_socket(index)).context("cannot open a packet socket")?;
        set_packet_option(&socket, PACKET_VNET_HDR).context("PACKET_VNET_HDR")?;
        Ok(Self(socket))
    }

    /// Sends a frame of at least a page, whose first `linear` bytes are in one piece.
    pub fn send(&self, frame: &[u8], linear: u16) -> Result<()> {
        // struct virtio_net_hdr: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset
        let mut message = vec![0; 10];
        message[2..4].copy_from_slice(&linear.to_ne_bytes());
        message.extend(frame);
        let sent = self.0.send(&message)?;
        ensure!(sent == message.len(), "{sent} of {} bytes were sent", message.len());
        Ok(())
    }
}

/// Sees what comes over a client's link, with the VLAN tags, which the kernel takes out of frames.
#[derive(Debug)]
pub struct TagSocket(Socket);

impl TagSocket {
    /// On the client's link. It sees what comes from now on.
    pub fn new(client: &Client) -> Result<Self> {
        let index = client.namespace.interface_index(CLIENT_INTERFACE)?;
        let socket = client.namespace.enter(|| packet_socket(index)).context("cannot open a packet socket")?;
        set_packet_option(&socket, PACKET_AUXDATA).context("PACKET_AUXDATA")?;
        socket.set_read_timeout(Some(SOON))?;
        Ok(Self(socket))
    }

    /// The control field of the tag that a segment has come with, if it had one. What came before it is skipped.
    pub fn tag_of(&self, segment: &Segment) -> Result<Option<u16>> {
        loop {
            let mut frame = [0; 2048];
            // More than the header and a tpacket_auxdata take, and as aligned as they want it.
            let mut control = [0_u64; 16];
            let mut part = libc::iovec { iov_base: frame.as_mut_ptr().cast(), iov_len: frame.len() };
            // SAFETY: all zero is a valid msghdr.
            let mut message: libc::msghdr = unsafe { mem::zeroed() };
            message.msg_iov = &raw mut part;
            message.msg_iovlen = 1;
            message.msg_control = control.as_mut_ptr().cast();
            message.msg_controllen = mem::size_of_val(&control);
            // SAFETY: every pointer in the message is to what lives until the call has returned, with its length.
            let length = unsafe { libc::recvmsg(self.0.as_raw_fd(), &raw mut message, 0) };
            let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
            if Segment::parse(&frame[..length]).as_ref() != Some(segment) {
                continue;
            }
            // SAFETY: the kernel has filled the control data that the message points to.
            let data = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
            ensure!(!data.is_null(), "the kernel tells of no tag");
            // SAFETY: the socket has no other control data than this.
            let data = unsafe { libc::CMSG_DATA(data).cast::<libc::tpacket_auxdata>().read_unaligned() };
            return Ok((data.tp_status & libc::TP_STATUS_VLAN_VALID != 0).then_some(data.tp_vlan_tci));
        }
    }
}

/// Switches an option of packet sockets on.
fn set_packet_option(socket: &Socket, option: libc::c_int) -> io::Result<()> {
    let on: libc::c_int = 1;
    let length = libc::socklen_t::try_from(size_of_val(&on)).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open, and the length is that of the value.
    let outcome =
        unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_PACKET, option, (&raw const on).cast(), length) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Of `linux/if_packet.h`.
const PACKET_VNET_HDR: libc::c_int = 15;
const PACKET_AUXDATA: libc::c_int = 8;

/// `libc::ETH_P_ALL` and `libc::AF_PACKET` in the width that `sockaddr_ll` has them in.
const ETH_P_ALL: u16 = 3;
const AF_PACKET: u16 = 17;

/// A socket that sees every frame of an interface.
pub(crate) fn packet_socket(interface_index: u32) -> io::Result<Socket> {
    #[expect(clippy::cast_possible_truncation, reason = "it is 20")]
    const LENGTH: libc::socklen_t = mem::size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    let every_protocol = ETH_P_ALL.to_be();
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(i32::from(every_protocol))))?;
    socket.set_recv_buffer_size(8 << 20)?;
    let mut storage = SockAddrStorage::zeroed();
    let address = libc::sockaddr_ll {
        sll_family: AF_PACKET,
        sll_protocol: every_protocol,
        sll_ifindex: interface_index.cast_signed(),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    // SAFETY: SockAddrStorage is large and aligned enough for every kind of address, and the length is this one's.
    let address = unsafe {
        ptr::write((&raw mut storage).cast(), address);
        SockAddr::new(storage, LENGTH)
    };
    socket.bind(&address)?;
    Ok(socket)
}
