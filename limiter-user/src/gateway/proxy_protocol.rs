//! The PROXY protocol, versions 1 and 2: what a TCP proxy writes ahead of a connection to say for whom it is.
//!
//! As in <https://www.haproxy.org/download/3.2/doc/proxy-protocol.txt>.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use super::wire::Wire;

/// What every header of version 2 begins with.
const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";

/// What every header of version 1 begins with.
const V1: &[u8] = b"PROXY ";

/// Longest header of version 1, its line break included.
const LONGEST_V1: usize = 107;

/// Longest header of version 2 that is taken, in bytes. The format allows 64 KiB; what proxies add (TLVs: the TLS session, an
/// endpoint's name) is a few hundred bytes.
const LONGEST_V2: usize = 4096;

/// Bytes of a header of version 2 before the addresses.
const V2_PREFIX: usize = 16;

/// What a header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Header {
    /// A connection of this client to that address of the proxy.
    Proxied { source: SocketAddr, destination: SocketAddr },
    /// A connection of the proxy's own, or one whose addresses it does not know or that are none of TCP/IP.
    Local,
}

/// Why there is no header.
#[derive(Debug, thiserror::Error)]
pub(super) enum HeaderError {
    /// The connection ended or broke before the header did.
    #[error("the connection ended before its PROXY header was complete")]
    Ended,
    /// What comes is no header.
    #[error("{0}")]
    Invalid(&'static str),
}

/// Takes the header off the stream, and not a byte more.
pub(super) async fn read(stream: &Wire) -> Result<Header, HeaderError> {
    let mut header = Vec::new();
    let mut window = [0; 512];
    loop {
        let peeked = stream.peek(&mut window).await.map_err(|_| HeaderError::Ended)?;
        if peeked == 0 {
            return Err(HeaderError::Ended);
        }
        let taken = header.len();
        header.extend_from_slice(&window[..peeked]);
        let parsed = parse(&header)?;
        // As long as the header is not complete, all there is belongs to it.
        let length = parsed.map_or(header.len(), |(_, length)| length);
        take(stream, &mut window[..length - taken])?;
        header.truncate(length);
        if let Some((header, _)) = parsed {
            return Ok(header);
        }
    }
}

/// Reads what was seen by peeking, so it is there.
fn take(stream: &Wire, mut seen: &mut [u8]) -> Result<(), HeaderError> {
    while !seen.is_empty() {
        match stream.try_read(seen) {
            Ok(0) => return Err(HeaderError::Ended),
            Ok(n) => seen = &mut seen[n..],
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return Err(HeaderError::Ended),
        }
    }
    Ok(())
}

/// The header that `bytes` begin with, and its length; `None`: it goes on beyond them. Of what can't become a header any
/// more, no further byte is waited for.
pub(super) fn parse(bytes: &[u8]) -> Result<Option<(Header, usize)>, HeaderError> {
    if begins_alike(bytes, SIGNATURE) {
        parse_v2(bytes)
    } else if begins_alike(bytes, V1) {
        parse_v1(bytes)
    } else {
        Err(HeaderError::Invalid("it does not begin with a PROXY header"))
    }
}

/// Whether `bytes` begin with `magic`, as far as they go.
fn begins_alike(bytes: &[u8], magic: &[u8]) -> bool {
    bytes.iter().zip(magic).all(|(byte, expected)| byte == expected)
}

fn parse_v1(bytes: &[u8]) -> Result<Option<(Header, usize)>, HeaderError> {
    const WRONG: HeaderError = HeaderError::Invalid("its PROXY header of version 1 is malformed");
    let line = &bytes[..bytes.len().min(LONGEST_V1)];
    let Some(end) = line.windows(2).position(|pair| pair == b"\r\n") else {
        let is_too_long = line.len() == LONGEST_V1;
        return if is_too_long { Err(HeaderError::Invalid("its PROXY header is too long")) } else { Ok(None) };
    };
    let text = str::from_utf8(&line[..end]).map_err(|_| WRONG)?;
    let mut words = text.split(' ').skip(1);
    let header = match words.next() {
        // Whatever follows is to be ignored.
        Some("UNKNOWN") => Header::Local,
        Some("TCP4") => v1_addresses::<Ipv4Addr>(words).ok_or(WRONG)?,
        Some("TCP6") => v1_addresses::<Ipv6Addr>(words).ok_or(WRONG)?,
        _ => return Err(WRONG),
    };
    Ok(Some((header, end + 2)))
}

fn v1_addresses<'a, A: Into<IpAddr> + std::str::FromStr>(mut words: impl Iterator<Item = &'a str>) -> Option<Header> {
    let source: A = words.next()?.parse().ok()?;
    let destination: A = words.next()?.parse().ok()?;
    let source_port = port(words.next()?)?;
    let destination_port = port(words.next()?)?;
    words.next().is_none().then(|| proxied(source.into(), source_port, destination.into(), destination_port))
}

/// Digits alone, without leading zeros.
fn port(text: &str) -> Option<u16> {
    let is_plain = text.bytes().all(|b| b.is_ascii_digit()) && (text.len() == 1 || !text.starts_with('0'));
    is_plain.then(|| text.parse().ok()).flatten()
}

fn parse_v2(bytes: &[u8]) -> Result<Option<(Header, usize)>, HeaderError> {
    let Some((prefix, rest)) = bytes.split_first_chunk::<V2_PREFIX>() else { return Ok(None) };
    let [.., command, family, high, low] = *prefix;
    let length = usize::from(u16::from_be_bytes([high, low]));
    if V2_PREFIX + length > LONGEST_V2 {
        return Err(HeaderError::Invalid("its PROXY header is too long"));
    }
    let is_local = match command {
        0x20 => true,
        0x21 => false,
        _ => return Err(HeaderError::Invalid("its PROXY header has an unknown version or command")),
    };
    let Some(rest) = rest.get(..length) else { return Ok(None) };
    let addresses = match (is_local, family) {
        (false, 0x11) => v2_addresses::<4, 12>(rest),
        (false, 0x21) => v2_addresses::<16, 36>(rest),
        // For a health check the addresses mean nothing; then unspecified, datagrams, unix sockets.
        (true, _) | (false, 0x00 | 0x12 | 0x22 | 0x31 | 0x32) => Some(Header::Local),
        (false, _) => return Err(HeaderError::Invalid("its PROXY header has an unknown address family")),
    };
    let header = addresses.ok_or(HeaderError::Invalid("its PROXY header is too short for its addresses"))?;
    Ok(Some((header, V2_PREFIX + length)))
}

/// Two addresses of `N` bytes and two ports, `ALL` bytes together; TLVs may follow.
fn v2_addresses<const N: usize, const ALL: usize>(bytes: &[u8]) -> Option<Header>
where
    IpAddr: From<[u8; N]>,
{
    let (addresses, _) = bytes.split_first_chunk::<ALL>()?;
    let (source, rest) = addresses.split_first_chunk::<N>()?;
    let (destination, ports) = rest.split_first_chunk::<N>()?;
    let ports: [u8; 4] = ports.try_into().ok()?;
    let [a, b, c, d] = ports;
    Some(proxied((*source).into(), u16::from_be_bytes([a, b]), (*destination).into(), u16::from_be_bytes([c, d])))
}

fn proxied(source: IpAddr, source_port: u16, destination: IpAddr, destination_port: u16) -> Header {
    Header::Proxied {
        source: SocketAddr::new(source.to_canonical(), source_port),
        destination: SocketAddr::new(destination.to_canonical(), destination_port),
    }
}

#[cfg(test)]
#[path = "proxy_protocol_tests.rs"]
mod tests;
