//! Messages of a client, put together of its frames.

use bytes::Bytes;

use crate::gateway::{
    push::{Kind, LONGEST_HEADER, frame, header},
    relay::{CONTROL_MAX, Header, Opcode, Sender},
};

/// The message that comes in, if one does. What is pushed has been looked at: it is a client's frames in which everything is as it
/// should be, headers and control frames are there whole.
#[derive(Debug, Default)]
pub(super) struct Assembly(Option<Box<Incoming>>);

#[derive(Debug)]
struct Incoming {
    kind: Kind,
    /// Room for the header of the frame that will be made of it, and the payload so far.
    message: Vec<u8>,
    /// How many bytes are missing of the frame that has begun.
    left: u64,
    /// Of the next of them.
    mask: [u8; 4],
    /// Whether that frame is the last of the message.
    fin: bool,
}

impl Assembly {
    /// Takes the next bytes. `complete` is given each message that they complete, as a frame of a server, with the length of its payload;
    /// and the answer to each ping.
    pub(super) fn push(&mut self, mut bytes: &[u8], mut complete: impl FnMut(Kind, Bytes, usize)) {
        loop {
            if let Some(incoming) = &mut self.0
                && incoming.left > 0
            {
                bytes = incoming.take(bytes);
                if incoming.left > 0 {
                    return;
                }
            }
            if let Some(incoming) = self.0.take_if(|incoming| incoming.fin) {
                let length = incoming.message.len() - LONGEST_HEADER;
                complete(incoming.kind, incoming.into_frame(), length);
            }
            let Ok(Some(header)) = Header::parse(bytes, Sender::Client) else { return };
            bytes = &bytes[header.length..];
            if header.opcode.is_control() {
                // It is there whole, and no longer than this.
                let length = usize::try_from(header.payload).unwrap_or(CONTROL_MAX).min(bytes.len());
                let (payload, rest) = bytes.split_at(length);
                bytes = rest;
                if header.opcode == Opcode::Ping {
                    let mut payload = payload.to_vec();
                    unmask(&mut payload, header.mask);
                    complete(Kind::Pong, frame(Kind::Pong, &payload), length);
                }
                continue;
            }
            self.begin(&header, bytes.len());
        }
    }

    /// A frame begins of which so many bytes at most are there.
    fn begin(&mut self, header: &Header, there: usize) {
        let incoming = self.0.get_or_insert_with(|| {
            let kind = if header.opcode == Opcode::Text { Kind::Text } else { Kind::Binary };
            // What is only announced gets no memory.
            let there = usize::try_from(header.payload).unwrap_or(usize::MAX).min(there);
            let mut message = Vec::with_capacity(LONGEST_HEADER + there);
            message.resize(LONGEST_HEADER, 0);
            Box::new(Incoming { kind, message, left: 0, mask: [0; 4], fin: false })
        });
        (incoming.left, incoming.mask, incoming.fin) = (header.payload, header.mask, header.fin);
    }
}

impl Incoming {
    /// Takes what belongs to the frame, and gives the rest.
    fn take<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        let length = usize::try_from(self.left).unwrap_or(usize::MAX).min(bytes.len());
        let (payload, rest) = bytes.split_at(length);
        let from = self.message.len();
        self.message.extend_from_slice(payload);
        unmask(&mut self.message[from..], self.mask);
        self.mask.rotate_left(length % 4);
        self.left -= length as u64;
        rest
    }

    fn into_frame(mut self) -> Bytes {
        let (header, from) = header(self.kind, self.message.len() - LONGEST_HEADER);
        self.message[from..LONGEST_HEADER].copy_from_slice(&header[from..]);
        // It may be kept for a while, and by many.
        if self.message.capacity() > self.message.len() + self.message.len() / 8 {
            self.message.shrink_to_fit();
        }
        Bytes::from(self.message).slice(from..)
    }
}

fn unmask(payload: &mut [u8], mask: [u8; 4]) {
    let [a, b, c, d] = mask;
    let wide = u64::from_ne_bytes([a, b, c, d, a, b, c, d]);
    let (words, rest) = payload.as_chunks_mut::<8>();
    for word in words {
        *word = (u64::from_ne_bytes(*word) ^ wide).to_ne_bytes();
    }
    for (byte, mask) in rest.iter_mut().zip(mask.iter().cycle()) {
        *byte ^= mask;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A client's frame.
    fn masked(first: u8, payload: &[u8], mask: [u8; 4]) -> Vec<u8> {
        let mut made = vec![first];
        match payload.len() {
            length @ ..126 => made.push(0x80 | u8::try_from(length).unwrap()),
            length @ 126..0x1_0000 => {
                made.push(0xfe);
                made.extend_from_slice(&u16::try_from(length).unwrap().to_be_bytes());
            }
            length => {
                made.push(0xff);
                made.extend_from_slice(&(length as u64).to_be_bytes());
            }
        }
        made.extend_from_slice(&mask);
        made.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
        made
    }

    proptest! {
        #[test]
        fn messages_come_out_as_they_went_in_however_they_are_cut(
            messages in proptest::collection::vec(
                (any::<bool>(), proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..300), 1..4)),
                1..6,
            ),
            long in 0..70_000usize,
            mask in any::<[u8; 4]>(),
            pings in any::<bool>(),
            cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..12),
        ) {
            let mut messages = messages;
            messages[0].1[0].resize(long, 9);
            let (mut wire, mut expected, mut places) = (Vec::new(), Vec::new(), Vec::new());
            for (is_text, fragments) in &messages {
                for (at, fragment) in fragments.iter().enumerate() {
                    let fin = if at + 1 == fragments.len() { 0x80 } else { 0 };
                    let opcode = match (at, is_text) { (0, true) => 1, (0, false) => 2, _ => 0 };
                    wire.extend(masked(fin | opcode, fragment, mask));
                    // Headers are handed over whole.
                    places.extend(wire.len() - fragment.len()..=wire.len());
                    if pings {
                        wire.extend(masked(0x89, b"p", mask));
                        wire.extend(masked(0x8a, b"q", mask));
                        expected.push(frame(Kind::Pong, b"p"));
                        places.push(wire.len());
                    }
                }
                let kind = if *is_text { Kind::Text } else { Kind::Binary };
                expected.push(frame(kind, &fragments.concat()));
                if pings {
                    // The last ping came after the message.
                    let last = expected.len() - 1;
                    expected.swap(last - 1, last);
                }
            }
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| places[cut.index(places.len())]).collect();
            cuts.push(wire.len());
            cuts.sort_unstable();
            let (mut assembly, mut got, mut from) = (Assembly::default(), Vec::new(), 0);
            for cut in cuts {
                assembly.push(&wire[from..cut], |kind, made, length| {
                    let header = made.len() - length;
                    assert!((2..=LONGEST_HEADER).contains(&header), "{kind:?}");
                    got.push(made);
                });
                from = cut;
            }
            prop_assert_eq!(got, expected);
            prop_assert!(assembly.0.is_none(), "a quiet session keeps nothing");
        }
    }

    #[test]
    fn what_is_only_announced_gets_no_memory() {
        let mut assembly = Assembly::default();
        let header = [&[0x82, 0xff][..], &(1_u64 << 30).to_be_bytes(), &[0; 4], b"abc"].concat();
        assembly.push(&header, |_, _, _| panic!("it is not complete"));
        assert!(assembly.0.unwrap().message.capacity() < 64);
    }
}
