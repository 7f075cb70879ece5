//! The header of a frame (RFC 6455, 5.2).

/// Longest payload of a control frame.
pub(in crate::gateway) const CONTROL_MAX: usize = 125;

/// Longest header: two bytes, a length of eight and a mask.
#[cfg(test)]
pub(super) const LONGEST: usize = 14;

/// Whose frames they are. Those of a client are masked and those of a server aren't, or they break the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::gateway) enum Sender {
    Client,
    Server,
}

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::gateway) enum Opcode {
    Continuation,
    Text,
    Binary,
    Close,
    Ping,
    Pong,
}

impl Opcode {
    pub(in crate::gateway) fn is_control(self) -> bool {
        matches!(self, Self::Close | Self::Ping | Self::Pong)
    }

    fn of(bits: u8) -> Option<Self> {
        Some(match bits {
            0 => Self::Continuation,
            1 => Self::Text,
            2 => Self::Binary,
            8 => Self::Close,
            9 => Self::Ping,
            10 => Self::Pong,
            _ => return None,
        })
    }
}

/// A header that breaks no rule that can be told from it alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::gateway) struct Header {
    /// Whether it is the last frame of its message.
    pub(in crate::gateway) fin: bool,
    pub(in crate::gateway) opcode: Opcode,
    /// What the payload is combined with by exclusive or; zeros for a server's frame.
    pub(in crate::gateway) mask: [u8; 4],
    /// Length of the header itself, in bytes.
    pub(in crate::gateway) length: usize,
    /// Length of the payload, in bytes; may be 2^63 or more, which no frame may have.
    pub(in crate::gateway) payload: u64,
}

impl Header {
    /// Of what begins with a header. `None`: more bytes are needed. An error is a breach of the protocol, told as soon as the
    /// byte is there that shows it.
    pub(in crate::gateway) fn parse(bytes: &[u8], sender: Sender) -> Result<Option<Self>, &'static str> {
        let Some((&first, rest)) = bytes.split_first() else { return Ok(None) };
        if first & 0x70 != 0 {
            return Err("a reserved bit is set");
        }
        let fin = first & 0x80 != 0;
        let opcode = Opcode::of(first & 0x0f).ok_or("unknown opcode")?;
        if opcode.is_control() && !fin {
            return Err("fragmented control frame");
        }
        let Some((&second, rest)) = rest.split_first() else { return Ok(None) };
        match (sender, second & 0x80 != 0) {
            (Sender::Client, false) => return Err("frame without mask"),
            (Sender::Server, true) => return Err("masked frame"),
            (Sender::Client, true) | (Sender::Server, false) => {}
        }
        let (payload, rest) = match second & 0x7f {
            126 => {
                let Some((length, rest)) = rest.split_first_chunk() else { return Ok(None) };
                (u64::from(u16::from_be_bytes(*length)), rest)
            }
            127 => {
                let Some((length, rest)) = rest.split_first_chunk() else { return Ok(None) };
                (u64::from_be_bytes(*length), rest)
            }
            short => (u64::from(short), rest),
        };
        if opcode.is_control() && payload > CONTROL_MAX as u64 {
            return Err("control frame over 125 bytes");
        }
        // The same length in more bytes than it takes is forbidden, so that there is one way to read a frame.
        let shortest = match second & 0x7f {
            126 => CONTROL_MAX as u64 + 1,
            127 => 1 << 16,
            _ => 0,
        };
        if payload < shortest {
            return Err("length in more bytes than it takes");
        }
        let (mask, rest) = match sender {
            Sender::Client => {
                let Some((mask, rest)) = rest.split_first_chunk() else { return Ok(None) };
                (*mask, rest)
            }
            Sender::Server => ([0; 4], rest),
        };
        Ok(Some(Self { fin, opcode, mask, length: bytes.len() - rest.len(), payload }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_length_is_read_and_no_byte_too_early() {
        let cases: [(&[u8], u64); 5] = [
            (&[0x82, 0x85], 5),
            (&[0x82, 0xfd], 125),
            (&[0x82, 0xfe, 0, 126], 126),
            (&[0x82, 0xff, 0, 0, 0, 0, 0, 1, 0, 0], 1 << 16),
            (&[0x82, 0xff, 0x80, 0, 0, 0, 0, 0, 0, 0], 1 << 63),
        ];
        for (bytes, payload) in cases {
            let whole = [bytes, &[1, 2, 3, 4]].concat();
            for cut in 0..whole.len() {
                assert_eq!(Header::parse(&whole[..cut], Sender::Client), Ok(None), "{cut} bytes of {whole:?}");
            }
            let header = Header::parse(&whole, Sender::Client).unwrap().unwrap();
            assert_eq!((header.payload, header.length, header.mask), (payload, whole.len(), [1, 2, 3, 4]));
            assert!(header.length <= LONGEST);
        }
    }

    #[test]
    fn a_servers_frame_has_no_mask() {
        let header = Header::parse(&[0x01, 3], Sender::Server).unwrap().unwrap();
        let expected = Header { fin: false, opcode: Opcode::Text, mask: [0; 4], length: 2, payload: 3 };
        assert_eq!(header, expected);
    }

    #[test]
    fn breaches_are_told_as_soon_as_they_show() {
        for bytes in [
            &[0xc1][..],
            &[0xa1],
            &[0x91],
            &[0x83],
            &[0x8b],
            &[0x09],
            &[0x08],
            &[0x81, 0x01],
            &[0x89, 0xfe, 0, 126],
            &[0x82, 0xfe, 0, 125],
            &[0x82, 0xff, 0, 0, 0, 0, 0, 0, 0xff, 0xff],
        ] {
            assert!(Header::parse(bytes, Sender::Client).is_err(), "{bytes:?}");
        }
        assert!(Header::parse(&[0x81, 0x81], Sender::Server).is_err());
    }
}
