//! What comes over a client's link, as it comes.

use std::{
    io,
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use socket2::Socket;

use crate::{
    lab::{CLIENT_INTERFACE, Client},
    raw::packet_socket,
    segment::{Segment, flags},
};

/// Longer than any segment that the kernel puts together.
const LONGEST_FRAME: usize = 1 << 17;

/// Keeps every frame that comes over a client's link from the moment that it is made.
#[derive(Debug)]
pub struct Capture(Socket);

impl Capture {
    /// On the client's link.
    pub fn new(client: &Client) -> Result<Self> {
        let index = client.namespace.interface_index(CLIENT_INTERFACE)?;
        client.namespace.enter(|| packet_socket(index)).map(Self).context("cannot open a packet socket")
    }

    /// The segments of one direction of a connection, up to its end: the first that has a FIN, or a RST.
    pub fn up_to_the_end(
        &self,
        source: SocketAddr,
        destination: SocketAddr,
        patience: Duration,
    ) -> Result<Vec<Segment>> {
        let deadline = Instant::now() + patience;
        let mut segments = Vec::new();
        while Instant::now() < deadline {
            self.0.set_read_timeout(Some(Duration::from_millis(100)))?;
            let mut frame: Vec<u8> = Vec::with_capacity(LONGEST_FRAME);
            let length = match self.0.recv(frame.spare_capacity_mut()) {
                Ok(length) => length,
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                    continue;
                }
                Err(error) => return Err(error).context("cannot receive on the packet socket"),
            };
            // SAFETY: recv has filled the first `length` bytes.
            unsafe { frame.set_len(length) };
            let Some(segment) = Segment::parse(&frame) else { continue };
            if segment.source != source || segment.destination != destination {
                continue;
            }
            let is_last = segment.flags & (flags::FIN | flags::RST) != 0;
            segments.push(segment);
            if is_last {
                return Ok(segments);
            }
        }
        bail!("from {source} to {destination} came no end: {segments:?}")
    }
}
