//! Who a client is, behind proxies that are trusted to say so.
//!
//! X-Forwarded-For and Forwarded (RFC 7239) are lists to which each proxy appends whom it was connected to by. So they are
//! walked from the right, and only as long as the address in hand is a trusted proxy's: whatever stands to the left of
//! the first other address is that address's own claim.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use hyper::{
    HeaderMap,
    header::{FORWARDED, HeaderName, VIA},
};
use ipnet::IpNet;

use super::answer::Refusal;

pub(super) const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
pub(super) const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// Whom a request comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    /// The first address, from our end, that is no trusted proxy's.
    pub(super) ip: IpAddr,
    /// How it speaks to the outermost proxy, where a trusted one says so.
    pub(super) scheme: Option<Scheme>,
    /// Whether it is a trusted proxy, which does not say for whom it speaks.
    pub(super) is_proxy: bool,
}

/// Whether a client speaks through TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scheme {
    Http,
    Https,
}

impl Scheme {
    fn parse(name: &[u8]) -> Option<Self> {
        let is = |names: [&str; 2]| names.iter().any(|known| name.eq_ignore_ascii_case(known.as_bytes()));
        match () {
            () if is(["https", "wss"]) => Some(Self::Https),
            () if is(["http", "ws"]) => Some(Self::Http),
            () => None,
        }
    }

    /// As X-Forwarded-Proto has it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }
}

/// Whether `ip` is the address of a trusted proxy.
pub(super) fn is_trusted(ip: IpAddr, trusted: &[IpNet]) -> bool {
    trusted.iter().any(|network| network.contains(&ip))
}

/// The header by which a request shows that it came through a proxy.
pub(super) fn proxy_header(headers: &HeaderMap) -> Option<&'static str> {
    let known = [(X_FORWARDED_FOR, "X-Forwarded-For"), (FORWARDED, "Forwarded"), (VIA, "Via")];
    known.into_iter().find(|(name, _)| headers.contains_key(name)).map(|(_, shown)| shown)
}

/// Whom a request with these headers comes from, if `peer` sent it. Headers of a peer that is no trusted proxy (`is_proxy`) say
/// nothing.
///
/// An error if the headers contradict each other or can't be read where it matters: to guess would be to let a client
/// choose under which address it counts.
pub(super) fn identify(
    peer: IpAddr,
    is_proxy: bool,
    headers: &HeaderMap,
    trusted: &[IpNet],
) -> Result<Identity, Refusal> {
    let nobody_else = Identity { ip: peer, scheme: None, is_proxy };
    if !is_proxy {
        return Ok(nobody_else);
    }
    let by_list = headers.contains_key(X_FORWARDED_FOR).then(|| walk(peer, x_forwarded_for(headers), trusted));
    let by_rfc = headers.contains_key(FORWARDED).then(|| walk(peer, forwarded(headers), trusted));
    let identity = match (by_list.transpose()?, by_rfc.transpose()?) {
        // A proxy that writes one of them passes the other on as the client sent it.
        (Some(list), Some(rfc)) if list.ip != rfc.ip => {
            return Err(Refusal::Bad("Forwarded and X-Forwarded-For name different clients"));
        }
        (_, Some(rfc)) => rfc,
        (Some(list), None) => list,
        (None, None) => nobody_else,
    };
    Ok(Identity { scheme: identity.scheme.or_else(|| x_forwarded_proto(headers)), ..identity })
}

/// A node as the proxy to the right of it reports it.
struct Hop {
    /// `None`: the proxy does not say ("unknown", a name of its own, or nothing that can be read).
    ip: Option<IpAddr>,
    scheme: Option<Scheme>,
}

/// `hops` come from right to left.
fn walk(
    peer: IpAddr,
    mut hops: impl Iterator<Item = Result<Hop, Refusal>>,
    trusted: &[IpNet],
) -> Result<Identity, Refusal> {
    let mut identity = Identity { ip: peer, scheme: None, is_proxy: true };
    while identity.is_proxy {
        match hops.next().transpose()? {
            Some(Hop { ip: Some(ip), scheme }) => {
                let is_proxy = is_trusted(ip, trusted);
                identity = Identity { ip, scheme: scheme.or(identity.scheme), is_proxy };
            }
            // The proxy in hand does not tell for whom it speaks, so it counts itself.
            Some(Hop { ip: None, .. }) | None => break,
        }
    }
    Ok(identity)
}

/// The addresses of X-Forwarded-For, last first.
fn x_forwarded_for(headers: &HeaderMap) -> impl Iterator<Item = Result<Hop, Refusal>> {
    headers
        .get_all(X_FORWARDED_FOR)
        .iter()
        .rev()
        .flat_map(|line| line.as_bytes().rsplit(|byte| *byte == b','))
        .map(<[u8]>::trim_ascii)
        // Empty elements of a list are to be passed over (RFC 9110, 5.6.1.2).
        .filter(|node| !node.is_empty())
        .map(|node| Ok(Hop { ip: address(node), scheme: None }))
}

/// X-Forwarded-Proto, if it says one thing.
fn x_forwarded_proto(headers: &HeaderMap) -> Option<Scheme> {
    let mut lines = headers.get_all(X_FORWARDED_PROTO).iter();
    match (lines.next(), lines.next()) {
        (Some(line), None) => Scheme::parse(line.as_bytes().trim_ascii()),
        _ => None,
    }
}

/// The elements of Forwarded, last first. A line is read when the walk comes to it.
fn forwarded(headers: &HeaderMap) -> impl Iterator<Item = Result<Hop, Refusal>> {
    headers.get_all(FORWARDED).iter().rev().flat_map(|line| match elements(line.as_bytes()) {
        Some(hops) => hops.into_iter().rev().map(Ok).collect(),
        // An open quote in a client's part of a line would hide what a proxy appended to it.
        None => vec![Err(Refusal::Bad("the Forwarded header breaks RFC 7239"))],
    })
}

/// The elements of one line of Forwarded; `None` if it breaks the grammar.
fn elements(line: &[u8]) -> Option<Vec<Hop>> {
    let mut rest = line.trim_ascii_start();
    let mut hops = Vec::new();
    while !rest.is_empty() {
        let (hop, after) = element(rest)?;
        hops.extend(hop);
        rest = after.trim_ascii_start();
    }
    Some(hops)
}

#[cfg(any(test, limiter_fuzz))]
/// The addresses of one line of Forwarded; `None` if it breaks the grammar.
pub(super) fn nodes(line: &[u8]) -> Option<Vec<Option<IpAddr>>> {
    Some(elements(line)?.iter().map(|hop| hop.ip).collect())
}

/// One element, `None` for an empty one, and what follows its comma.
fn element(mut rest: &[u8]) -> Option<(Option<Hop>, &[u8])> {
    let mut node: Option<Vec<u8>> = None;
    let mut scheme: Option<Vec<u8>> = None;
    let mut is_empty = true;
    loop {
        rest = rest.trim_ascii_start();
        match rest.split_first() {
            Some((b';', after)) => rest = after,
            Some((b',', _)) | None => break,
            Some(_) => {
                let equals = rest.iter().position(|byte| *byte == b'=')?;
                let (name, after) = (&rest[..equals], &rest[equals + 1..]);
                if name.is_empty() || !name.iter().all(|byte| is_token(*byte)) {
                    return None;
                }
                let (value, after) = value(after)?;
                rest = after.trim_ascii_start();
                if !matches!(rest.first(), None | Some(b',' | b';')) {
                    return None;
                }
                is_empty = false;
                let target = match () {
                    () if name.eq_ignore_ascii_case(b"for") => &mut node,
                    () if name.eq_ignore_ascii_case(b"proto") => &mut scheme,
                    () => continue,
                };
                // Each parameter once per element (RFC 7239, section 4).
                if target.replace(value).is_some() {
                    return None;
                }
            }
        }
    }
    let after = rest.split_first().map_or(rest, |(_, after)| after);
    if is_empty {
        return Some((None, after));
    }
    let ip = node.as_deref().and_then(address);
    Some((Some(Hop { ip, scheme: scheme.as_deref().and_then(Scheme::parse) }), after))
}

/// A parameter's value without its quotes, and what follows it. Characters that only a quoted value may have (colons,
/// brackets) are taken without quotes too: many proxies forget them, and no other reading is possible.
fn value(text: &[u8]) -> Option<(Vec<u8>, &[u8])> {
    let Some(mut rest) = text.strip_prefix(b"\"") else {
        let end = text.iter().position(|byte| !is_token(*byte) && !b":[]".contains(byte)).unwrap_or(text.len());
        return (end > 0).then(|| (text[..end].to_vec(), &text[end..]));
    };
    let mut value = Vec::new();
    loop {
        let (byte, after) = rest.split_first()?;
        rest = after;
        match byte {
            b'"' => return Some((value, rest)),
            b'\\' => {
                let (escaped, after) = rest.split_first()?;
                value.push(*escaped);
                rest = after;
            }
            byte => value.push(*byte),
        }
    }
}

fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// The address of a node: plain, or with a port, IPv6 with or without brackets.
fn address(node: &[u8]) -> Option<IpAddr> {
    let node = str::from_utf8(node).ok()?;
    let ip: IpAddr = if let Some(bracketed) = node.strip_prefix('[') {
        let (ip, port) = bracketed.split_once(']')?;
        if !port.is_empty() && !port.strip_prefix(':').is_some_and(is_port) {
            return None;
        }
        ip.parse::<Ipv6Addr>().ok()?.into()
    } else if let Ok(ip) = node.parse() {
        ip
    } else {
        let (ip, port) = node.split_once(':')?;
        if !is_port(port) {
            return None;
        }
        ip.parse::<Ipv4Addr>().ok()?.into()
    };
    Some(ip.to_canonical())
}

/// A port as RFC 7239 (section 6) has it, which may also be hidden behind a name.
fn is_port(port: &str) -> bool {
    match port.strip_prefix('_') {
        Some(name) => !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)),
        None => (1..=5).contains(&port.len()) && port.bytes().all(|b| b.is_ascii_digit()),
    }
}

#[cfg(test)]
#[path = "forwarded_tests.rs"]
mod tests;
