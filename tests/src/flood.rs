//! Floods of SYNs, each from another port, or from another address too. They are sent by an XDP program as fast as the
//! machine takes them (live frames of `BPF_PROG_TEST_RUN`), with checksums that the stack finds right.

use std::{net::IpAddr, time::Duration};

use anyhow::Result;

use crate::{
    bare::{Answer, Attachment, BareXdp},
    lab::{CLIENT_INTERFACE, Client, Family, PORT},
    segment::{Segment, flags},
};

/// Who the SYNs say that they are from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum From {
    /// This address, from any port.
    One(IpAddr),
    /// Any of 65,536 sources ([`random_sources`]), from any port.
    Random,
}

/// The sources of [`From::Random`], each of which is a /32 or a /64 of its own.
pub const fn random_sources(family: Family) -> &'static str {
    match family {
        Family::V4 => "10.77.0.0/16",
        Family::V6 => "2001:db8:77::/48",
    }
}

/// A generator on a client's link.
#[derive(Debug)]
pub struct Flood<'lab> {
    client: &'lab Client,
    program: BareXdp,
    frame: Vec<u8>,
    /// A veth that sends from XDP needs a program at its own end, too.
    _open: Attachment,
}

impl<'lab> Flood<'lab> {
    /// Prepares one; nothing is sent yet.
    pub fn new(client: &'lab Client, family: Family, from: From) -> Result<Self> {
        let source = match (from, family) {
            (From::One(address), _) => address,
            (From::Random, Family::V4) => IpAddr::from([10, 77, 0, 0]),
            (From::Random, Family::V6) => "2001:db8:77::1".parse()?,
        };
        let varies_address = from == From::Random;
        // Each half word that the program fills with a random number has its complement in another one that the same
        // checksums cover, so their sum, which is that of 0 and 0xffff, stays what it is here.
        let syn = Segment {
            source: (source, 0).into(),
            destination: (client.server_address(family), PORT).into(),
            sequence: if varies_address { u32::MAX } else { 0xffff },
            acknowledgement: 0,
            flags: flags::SYN,
            options: vec![2, 4, 5, 0xb4],
            payload: Vec::new(),
        };
        let mut frame = syn.to_frame(client.mac(), client.server_mac());
        let (tcp, address) = match family {
            // The lower half of the address; the fourth group, which is the end of the /64.
            Family::V4 => (34, 28),
            Family::V6 => (54, 28),
        };
        let mut halves = vec![(tcp, vec![tcp + 6])];
        if varies_address {
            let mut complements = vec![tcp + 4];
            if family == Family::V4 {
                // The identification, of which the header's checksum is one of zero so far.
                const IDENTIFICATION: usize = 18;
                frame[IDENTIFICATION..IDENTIFICATION + 2].fill(0xff);
                complements.push(IDENTIFICATION);
            }
            halves.push((address, complements));
        }
        let program = BareXdp::load_randomising(Answer::Transmit, frame.len(), &halves)?;
        let open = BareXdp::load(Answer::Pass)?.attach(&client.namespace, CLIENT_INTERFACE)?;
        Ok(Self { client, program, frame, _open: open })
    }

    /// Sends so many, as fast as the machine takes them, and returns how long each one took.
    pub fn send(&self, count: u32) -> Result<Duration> {
        self.program.send(&self.client.namespace, CLIENT_INTERFACE, &self.frame, count)
    }
}
