//! Filters of clsact qdiscs, by rtnetlink: how TC programs are attached before kernel 6.6.
//!
//! A filter is no link: it needs no pin and stays until it is removed, and nothing says whose it is but its handle.

use std::{
    fs, io,
    os::fd::{AsFd as _, AsRawFd as _},
    path::{Path, PathBuf},
};

use aya::programs::SchedClassifier;
use limiter_common::abi;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer,
    NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::{
    RouteNetlinkMessage,
    tc::{TcAttribute, TcBpfFlags, TcFilterBpfOption, TcHandle, TcMessage, TcOption},
};
use netlink_sys::{Socket as Netlink, SocketAddr as NetlinkAddr, protocols::NETLINK_ROUTE};

/// The handle of limiter's filters ("lim1").
const HANDLE: u32 = 0x6c69_6d31;

/// Filters run by their priority, and one that decides ends it: so limiter's takes the first priority that is free. A
/// priority is taken when it has filters of another kind.
const PRIORITIES: std::ops::RangeInclusive<u16> = 1..=16;

/// `ETH_P_ALL` of `linux/if_ether.h`: packets of every protocol.
const EVERY_PROTOCOL: u16 = 3;

const INGRESS: TcHandle = TcHandle { major: u16::MAX, minor: TcHandle::MIN_INGRESS };
const EGRESS: TcHandle = TcHandle { major: u16::MAX, minor: TcHandle::MIN_EGRESS };

/// Longest message of the kernel's that is taken, in bytes.
const LONGEST_MESSAGE: usize = 64 * 1024;

/// A filter of limiter's. It is removed with this, unless it is [kept](Self::keep).
#[derive(Debug)]
pub struct Filter {
    interface: u32,
    note: PathBuf,
    kept: bool,
}

/// In the folder that notes a filter, a folder that says that the qdisc was made for it.
const OWN_QDISC: &str = "qdisc";

impl Filter {
    /// Puts a program on the ingress of an interface. `note` is the folder that says so: it is made first, so that whoever
    /// comes after one who died on the way knows what to remove.
    pub fn attach(program: &SchedClassifier, interface: u32, note: &Path) -> io::Result<Self> {
        // From here on it is taken away again if something fails.
        let filter = Self { interface, note: note.to_owned(), kept: false };
        let own_qdisc = note.join(OWN_QDISC);
        fs::create_dir_all(&own_qdisc)?;
        match request(
            RouteNetlinkMessage::NewQueueDiscipline(qdisc(interface)),
            NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL,
        ) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => fs::remove_dir(&own_qdisc)?,
            result => result?,
        }
        if replace(program, interface)? {
            return Ok(filter);
        }
        let mut result = Err(io::Error::other("every priority is taken by other filters"));
        for priority in PRIORITIES {
            result = put(program, interface, priority, NLM_F_CREATE);
            // Another kind of filter, or another protocol, has this priority.
            if !matches!(&result, Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EEXIST))) {
                break;
            }
        }
        result.map(|()| filter)
    }

    /// Leaves it where it is.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Filter {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        if let Err(error) = remove(self.interface, &self.note).and_then(|()| fs::remove_dir_all(&self.note)) {
            tracing::warn!(%error, interface = self.interface, "can't take the filter away again");
        }
    }
}

/// Puts a program in the place of the one of limiter's filter, without a gap. `false` if there is none.
pub fn replace(program: &SchedClassifier, interface: u32) -> io::Result<bool> {
    let Some(priority) = filters(interface, INGRESS)?.into_iter().find_map(|filter| filter.own_priority) else {
        return Ok(false);
    };
    put(program, interface, priority, 0).map(|()| true)
}

/// Removes limiter's filter; and the qdisc, if that was made for it (which `note` says) and nobody else uses it by now. What
/// is gone already, and be it the interface, is no error.
pub fn remove(interface: u32, note: &Path) -> io::Result<()> {
    match remove_there(interface, note.join(OWN_QDISC).is_dir()) {
        Err(error) if !matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENOENT | libc::EINVAL)) => Err(error),
        _ => Ok(()),
    }
}

fn remove_there(interface: u32, made_qdisc: bool) -> io::Result<()> {
    for filter in filters(interface, INGRESS)? {
        if let Some(priority) = filter.own_priority {
            let message = message(interface, HANDLE.into(), INGRESS, info(priority));
            request(RouteNetlinkMessage::DelTrafficFilter(message), NLM_F_REQUEST | NLM_F_ACK)?;
        }
    }
    if made_qdisc && filters(interface, INGRESS)?.is_empty() && filters(interface, EGRESS)?.is_empty() {
        request(RouteNetlinkMessage::DelQueueDiscipline(qdisc(interface)), NLM_F_REQUEST | NLM_F_ACK)?;
    }
    Ok(())
}

/// Makes limiter's filter, or changes its program.
fn put(program: &SchedClassifier, interface: u32, priority: u16, flags: u16) -> io::Result<()> {
    let descriptor = program.fd().map_err(io::Error::other)?.as_fd().as_raw_fd().cast_unsigned();
    let mut filter = message(interface, HANDLE.into(), INGRESS, info(priority));
    filter.attributes = vec![
        TcAttribute::Kind("bpf".to_owned()),
        TcAttribute::Options(vec![
            TcOption::Bpf(TcFilterBpfOption::ProgFd(descriptor)),
            TcOption::Bpf(TcFilterBpfOption::ProgName(abi::PROGRAM_TC.to_owned())),
            TcOption::Bpf(TcFilterBpfOption::Flags(TcBpfFlags::DirectAction)),
        ]),
    ];
    request(RouteNetlinkMessage::NewTrafficFilter(filter), NLM_F_REQUEST | NLM_F_ACK | flags)
}

/// A filter on an interface.
struct Found {
    /// Its priority, if it is limiter's.
    own_priority: Option<u16>,
}

/// The filters on one side of an interface.
fn filters(interface: u32, side: TcHandle) -> io::Result<Vec<Found>> {
    let message = message(interface, TcHandle::UNSPEC, side, 0);
    let mut found = Vec::new();
    exchange(RouteNetlinkMessage::GetTrafficFilter(message), NLM_F_REQUEST | NLM_F_DUMP, |payload| {
        // struct tcmsg, read here and not by its type: filters of whatever kind there are count.
        let word = |at: usize| payload.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes);
        let (Some(index), Some(handle), Some(info)) = (word(4), word(8), word(16)) else { return };
        // One without a handle stands for all of its priority, and is listed with them.
        if index == interface && handle != 0 {
            let priority = u16::try_from(info >> 16).ok();
            found.push(Found { own_priority: priority.filter(|_| handle == HANDLE) });
        }
    })?;
    Ok(found)
}

fn qdisc(interface: u32) -> TcMessage {
    let mut message = message(interface, TcHandle { major: u16::MAX, minor: 0 }, TcHandle::CLSACT, 0);
    message.attributes = vec![TcAttribute::Kind("clsact".to_owned())];
    message
}

fn message(interface: u32, handle: TcHandle, parent: TcHandle, info: u32) -> TcMessage {
    let mut message = TcMessage::with_index(interface.cast_signed());
    message.header.handle = handle;
    message.header.parent = parent;
    message.header.info = info;
    message
}

fn info(priority: u16) -> u32 {
    u32::from(priority) << 16 | u32::from(EVERY_PROTOCOL.to_be())
}

fn request(message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
    exchange(message, flags, |_| {})
}

/// Sends a request, and hands over the payload of each message that answers it.
fn exchange(message: RouteNetlinkMessage, flags: u16, mut each: impl FnMut(&[u8])) -> io::Result<()> {
    let netlink = Netlink::new(NETLINK_ROUTE)?;
    netlink.connect(&NetlinkAddr::new(0, 0))?;
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    netlink.send(&bytes, 0)?;

    let malformed = || io::Error::other("a message of the kernel's is malformed");
    let mut buffer = vec![0; LONGEST_MESSAGE];
    loop {
        let length = match netlink.recv(&mut &mut buffer[..], libc::MSG_TRUNC) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            length => length?,
        };
        let mut rest = buffer.get(..length).ok_or_else(malformed)?;
        while !rest.is_empty() {
            let message = NetlinkBuffer::new_checked(rest).map_err(|_| malformed())?;
            rest = &rest[(message.length() as usize).next_multiple_of(4).min(rest.len())..];
            match message.message_type() {
                NLMSG_DONE | NLMSG_ERROR => {
                    let code = message.payload().first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                    return if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) };
                }
                _ => each(message.payload()),
            }
        }
    }
}
