//! The TCP sockets of a network namespace, as the kernel lists them (`sock_diag(7)`), and their end by force.

use std::{fmt, io, net::SocketAddr};

use limiter_common::{Endpoints, Netns};
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer, NetlinkMessage,
    NetlinkSerializable, Parseable as _,
};
use netlink_packet_sock_diag::{
    AF_INET, AF_INET6, IPPROTO_TCP, SOCK_DIAG_BY_FAMILY, SockDiagDestroy, SockDiagMessage, TCP_CLOSE_WAIT,
    TCP_ESTABLISHED,
    inet::{ExtensionFlags, InetRequest, InetResponseHeader, SocketId, StateFlags},
};
use netlink_sys::{Socket as Netlink, SocketAddr as NetlinkAddr, protocols::NETLINK_SOCK_DIAG};

use super::features::Feature;

/// Longest message that the kernel sends, in bytes: it fills pages up to 32 KiB.
const LONGEST_MESSAGE: usize = 64 * 1024;

/// How often a list is asked for that the kernel says it could not give consistently.
const DUMP_ATTEMPTS: usize = 5;

/// A connection's socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Socket {
    /// Its addresses, IPv4 as IPv4 whatever the socket's own family is.
    pub connection: Endpoints,
    /// `SO_COOKIE`: never used again for another socket, as long as the host runs.
    pub cookie: u64,
    /// The device that it is bound to, or 0.
    interface: u32,
    state: u8,
}

impl Socket {
    /// The socket of a connection, as the ledger knows it.
    pub fn new(connection: Endpoints, cookie: u64) -> Self {
        Self { connection, cookie, interface: 0, state: 0 }
    }

    /// Whether this end still keeps the connection up: the server has not closed it. What the server has given up is not
    /// to be counted, however long the kernel waits for the client.
    pub fn is_held(&self) -> bool {
        self.state == TCP_ESTABLISHED || self.state == TCP_CLOSE_WAIT
    }
}

/// What came of closing a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destroyed {
    /// It is closed, and the client is sent a RST.
    Yes,
    /// It was gone already.
    Gone,
    /// The kernel was built without `CONFIG_INET_DIAG_DESTROY`.
    Unsupported,
}

/// Whether this kernel can close sockets from outside (`CONFIG_INET_DIAG_DESTROY`). Takes `CAP_NET_ADMIN`.
pub fn can_destroy() -> io::Result<bool> {
    // There is no such socket: nothing listens on port 0.
    let nobody = SocketAddr::from(([127, 0, 0, 1], 0));
    let answer = SockDiag::open()?.destroy_exactly(&Socket::new(Endpoints::new(nobody, nobody), 1))?;
    Ok(answer != Destroyed::Unsupported)
}

/// A way to ask the kernel.
pub struct SockDiag {
    /// The namespace that it asks.
    netns: Netns,
    netlink: Netlink,
    buffer: Vec<u8>,
    sequence: u32,
}

impl fmt::Debug for SockDiag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SockDiag").finish_non_exhaustive()
    }
}

impl SockDiag {
    /// For the network namespace that the calling thread is in; the one that limiter was attached in, unless
    /// [`Self::be_in`] says otherwise.
    pub fn open() -> io::Result<Self> {
        let netlink = Netlink::new(NETLINK_SOCK_DIAG)?;
        netlink.connect(&NetlinkAddr::new(0, 0))?;
        Ok(Self { netns: Netns::OWN, netlink, buffer: vec![0; LONGEST_MESSAGE], sequence: 0 })
    }

    /// Says that the namespace is not that which limiter was attached in, but this one.
    pub fn be_in(&mut self, netns: Netns) {
        self.netns = netns;
    }

    /// Hands over every socket of an established connection with that local port, in whatever state of closing it is;
    /// not those that are still being opened, nor what is left of one in `TIME_WAIT`. Sockets that come and go meanwhile may
    /// be missed, and one may come twice.
    pub fn list(&mut self, port: u16, mut found: impl FnMut(Socket)) -> io::Result<()> {
        for family in [AF_INET, AF_INET6] {
            let mut attempts = 0;
            while self.dump(family, port, &mut found)? == Dump::Interrupted {
                attempts += 1;
                if attempts == DUMP_ATTEMPTS {
                    return Err(io::Error::other("the list of sockets changed each time that it was read"));
                }
            }
        }
        Ok(())
    }

    /// The socket, if it is there, with its state.
    pub fn look_up(&mut self, socket: &Socket) -> io::Result<Option<Socket>> {
        self.send(request(socket), NLM_F_REQUEST)?;
        let mut found = None;
        let netns = self.netns;
        let answer = self.receive(|header| found = parse(header, netns))?;
        match answer {
            Answer::More => Ok(found),
            Answer::Error(libc::ENOENT | libc::ESTALE) => Ok(None),
            answer => Err(unexpected(answer)),
        }
    }

    /// Closes a socket, whoever holds it. Its connection is reset.
    pub fn destroy(&mut self, socket: &Socket) -> io::Result<Destroyed> {
        match self.destroy_exactly(socket)? {
            // A socket that is bound to a device is only found with the device's index.
            Destroyed::Gone if socket.interface == 0 => {
                let mut bound = None;
                self.list(socket.connection.local_port, |other| {
                    if other.cookie == socket.cookie && other.interface != 0 {
                        bound = Some(other);
                    }
                })?;
                bound.map_or(Ok(Destroyed::Gone), |bound| self.destroy_exactly(&bound))
            }
            destroyed => Ok(destroyed),
        }
    }

    fn destroy_exactly(&mut self, socket: &Socket) -> io::Result<Destroyed> {
        if Feature::Destroy.is_hidden() {
            return Ok(Destroyed::Unsupported);
        }
        self.send(SockDiagDestroy::new(request(socket)), NLM_F_REQUEST | NLM_F_ACK)?;
        match self.receive(|_| {})? {
            Answer::Done => Ok(Destroyed::Yes),
            Answer::Error(libc::ENOENT | libc::ESTALE) => Ok(Destroyed::Gone),
            Answer::Error(libc::EOPNOTSUPP) => Ok(Destroyed::Unsupported),
            answer => Err(unexpected(answer)),
        }
    }

    fn dump(&mut self, family: u8, port: u16, found: &mut impl FnMut(Socket)) -> io::Result<Dump> {
        let mut socket_id = if family == AF_INET { SocketId::new_v4() } else { SocketId::new_v6() };
        socket_id.source_port = port;
        let states = StateFlags::ESTABLISHED
            | StateFlags::FIN_WAIT1
            | StateFlags::FIN_WAIT2
            | StateFlags::CLOSE_WAIT
            | StateFlags::LAST_ACK
            | StateFlags::CLOSING;
        let request =
            InetRequest { family, protocol: IPPROTO_TCP, extensions: ExtensionFlags::empty(), states, socket_id };
        self.send(SockDiagMessage::InetRequest(request), NLM_F_REQUEST | NLM_F_DUMP)?;
        let mut interrupted = false;
        let netns = self.netns;
        loop {
            let mut each = |payload: &[u8]| {
                if let Some(socket) = parse(payload, netns).filter(|socket| socket.connection.local_port == port) {
                    found(socket);
                }
            };
            let answer = self.receive_into(&mut each, &mut interrupted)?;
            match answer {
                Answer::More => {}
                Answer::Done if interrupted => return Ok(Dump::Interrupted),
                Answer::Done => return Ok(Dump::Whole),
                answer @ Answer::Error(_) => return Err(unexpected(answer)),
            }
        }
    }

    fn send<M: NetlinkSerializable>(&mut self, message: M, flags: u16) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = netlink_packet_core::NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, netlink_packet_core::NetlinkPayload::InnerMessage(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.netlink.send(&bytes, 0).map(|_| ())
    }

    fn receive(&mut self, mut each: impl FnMut(&[u8])) -> io::Result<Answer> {
        self.receive_into(&mut each, &mut false)
    }

    /// Receives one datagram, which holds one or several messages, and hands over the sockets among them.
    fn receive_into(&mut self, each: &mut impl FnMut(&[u8]), interrupted: &mut bool) -> io::Result<Answer> {
        let length = loop {
            match self.netlink.recv(&mut &mut self.buffer[..], libc::MSG_TRUNC) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                length => break length?,
            }
        };
        let mut rest = self.buffer.get(..length).ok_or_else(|| malformed("is longer than any should be"))?;
        while !rest.is_empty() {
            let message = NetlinkBuffer::new_checked(rest).map_err(|_| malformed("is cut off"))?;
            // Aligned, as the next one is; the last may lack its padding.
            let whole = (message.length() as usize).next_multiple_of(4).min(rest.len());
            rest = &rest[whole..];
            // What is left of a request that failed half-way is not an answer to this one.
            if message.sequence_number() != self.sequence {
                continue;
            }
            *interrupted |= message.flags() & NLM_F_DUMP_INTR != 0;
            match message.message_type() {
                NLMSG_DONE | NLMSG_ERROR => {
                    let code = message.payload().first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                    return Ok(if code == 0 { Answer::Done } else { Answer::Error(-code) });
                }
                SOCK_DIAG_BY_FAMILY => each(message.payload()),
                _ => {}
            }
        }
        Ok(Answer::More)
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Dump {
    Whole,
    Interrupted,
}

#[derive(Clone, Copy, Debug)]
enum Answer {
    /// Sockets, and perhaps more to come.
    More,
    Done,
    /// An error number of the system's.
    Error(i32),
}

fn request(socket: &Socket) -> SockDiagMessage {
    let (remote, local) = (socket.connection.remote(), socket.connection.local());
    // The cookie is two words in the request and one number elsewhere.
    let mut cookie = [0; 8];
    let [low, high] = halves(socket.cookie);
    cookie[..4].copy_from_slice(&low.to_ne_bytes());
    cookie[4..].copy_from_slice(&high.to_ne_bytes());
    let socket_id = SocketId {
        source_port: local.port(),
        destination_port: remote.port(),
        source_address: local.ip(),
        destination_address: remote.ip(),
        interface_id: socket.interface,
        cookie,
    };
    SockDiagMessage::InetRequest(InetRequest {
        family: if remote.is_ipv4() { AF_INET } else { AF_INET6 },
        protocol: IPPROTO_TCP,
        extensions: ExtensionFlags::empty(),
        states: StateFlags::all(),
        socket_id,
    })
}

/// `None` for what is no TCP connection.
fn parse(payload: &[u8], netns: Netns) -> Option<Socket> {
    let header = InetResponseHeader::parse(payload).ok()?;
    let id = header.socket_id;
    let (low, high) = id.cookie.split_at(4);
    let half = |bytes: &[u8]| Some(u64::from(u32::from_ne_bytes(bytes.try_into().ok()?)));
    let cookie = half(low)? | half(high)? << 32;
    let remote = SocketAddr::new(id.destination_address.to_canonical(), id.destination_port);
    let local = SocketAddr::new(id.source_address.to_canonical(), id.source_port);
    let connection = Endpoints { netns, ..Endpoints::new(remote, local) };
    Some(Socket { connection, cookie, interface: id.interface_id, state: header.state })
}

#[expect(clippy::cast_possible_truncation, reason = "each half is what is wanted")]
const fn halves(number: u64) -> [u32; 2] {
    [number as u32, (number >> 32) as u32]
}

fn unexpected(answer: Answer) -> io::Error {
    match answer {
        Answer::Error(libc::ENOENT) => {
            io::Error::other("the kernel can't list TCP sockets: it needs CONFIG_INET_DIAG (modprobe tcp_diag)")
        }
        Answer::Error(code) => io::Error::from_raw_os_error(code),
        Answer::More | Answer::Done => malformed("is no answer to the question"),
    }
}

fn malformed(what: &str) -> io::Error {
    io::Error::other(format!("a message of sock_diag {what}"))
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};

    use socket2::SockRef;

    use super::*;

    /// A connection: the client's end, the server's end, and the server's socket as the kernel should list it.
    fn connect(listener: &TcpListener, to: IpAddr) -> (TcpStream, TcpStream, Socket) {
        let client = TcpStream::connect((to, listener.local_addr().unwrap().port())).unwrap();
        let (server, remote) = listener.accept().unwrap();
        let canonical = |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
        let connection = Endpoints::new(canonical(remote), canonical(server.local_addr().unwrap()));
        let cookie = SockRef::from(&server).cookie().unwrap();
        (client, server, Socket { connection, cookie, interface: 0, state: TCP_ESTABLISHED })
    }

    fn list(port: u16) -> Vec<Socket> {
        let mut sockets = Vec::new();
        SockDiag::open().unwrap().list(port, |socket| sockets.push(socket)).unwrap();
        sockets.sort_by_key(|socket| socket.cookie);
        sockets
    }

    #[test]
    fn sockets_of_both_families_are_listed_and_an_ipv4_mapped_one_is_ipv4() {
        let dual = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)).unwrap();
        let port = dual.local_addr().unwrap().port();
        assert_eq!(list(port), [], "a listener is no connection");
        let (_c1, _s1, mapped) = connect(&dual, Ipv4Addr::LOCALHOST.into());
        let (_c2, _s2, plain) = connect(&dual, Ipv6Addr::LOCALHOST.into());
        assert!(mapped.connection.remote().is_ipv4());
        let mut expected = [mapped, plain];
        expected.sort_by_key(|socket| socket.cookie);
        assert_eq!(list(port), expected);

        let v4 = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let (_c3, _s3, third) = connect(&v4, Ipv4Addr::LOCALHOST.into());
        assert_eq!(list(v4.local_addr().unwrap().port()), [third]);
    }

    #[test]
    fn one_socket_is_looked_up_by_its_cookie() {
        let dual = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)).unwrap();
        let mut diag = SockDiag::open().unwrap();
        for to in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
            let (client, server, socket) = connect(&dual, to);
            let asked = Socket::new(socket.connection, socket.cookie);
            assert_eq!(diag.look_up(&asked).unwrap(), Some(socket));
            assert!(socket.is_held());
            let another = Socket::new(socket.connection, socket.cookie + (1 << 40));
            assert_eq!(diag.look_up(&another).unwrap(), None, "the same addresses, another socket");
            // The server gives it up and the client does not answer: still there, not held any more.
            drop(server);
            let closing = diag.look_up(&asked).unwrap().unwrap();
            assert!(!closing.is_held(), "{closing:?}");
            drop(client);
        }
    }

    #[test]
    fn a_crowd_that_fills_several_messages_is_listed_whole() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let crowd: Vec<_> = (0..600).map(|_| connect(&listener, Ipv4Addr::LOCALHOST.into())).collect();
        let mut expected: Vec<_> = crowd.iter().map(|(_, _, socket)| *socket).collect();
        expected.sort_by_key(|socket| socket.cookie);
        assert_eq!(list(listener.local_addr().unwrap().port()), expected);
    }

    #[test]
    fn an_answer_that_is_cut_off_is_no_socket() {
        for length in 0..72 {
            assert_eq!(parse(&vec![u8::from(length > 0) * AF_INET; length], Netns::OWN), None, "{length} bytes");
        }
    }
}
