//! From a value of the file to a value that is meant: what is right, and how to say what is not.

use std::{
    collections::HashSet,
    fmt::Display,
    hash::Hash,
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    path::PathBuf,
    time::{Duration, SystemTime},
};

use bytesize::ByteSize;
use clap::ValueEnum;
use ipnet::IpNet;
use toml::{
    de::DeValue,
    value::{Datetime, Offset},
};

use super::{
    AllowedOrigin, Listen,
    read::{Fault, Item, nearest},
};
use crate::policy::{Cidr, InvalidCidr};

/// Longest duration that is taken, so that no deadline overflows.
pub(super) const LONGEST: Duration = Duration::from_hours(365 * 24);

const LOG_LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// What a value is, for a reader.
pub(super) fn kind(item: &Item) -> String {
    match item.get_ref() {
        DeValue::String(text) if text.chars().count() <= 40 => format!("the string {text:?}"),
        DeValue::String(_) => "a string".into(),
        DeValue::Integer(number) => format!("the number {number}"),
        DeValue::Float(number) => format!("the number {number}"),
        DeValue::Boolean(value) => format!("{value}"),
        DeValue::Datetime(_) => "a date".into(),
        DeValue::Array(_) => "an array".into(),
        DeValue::Table(_) => "a table".into(),
    }
}

pub(super) fn expected(item: &Item, what: impl Display) -> Fault {
    Fault::new(item, format!("found {}, expected {what}", kind(item)))
}

pub(super) fn text<'a>(item: &'a Item, what: &str) -> Result<&'a str, Fault> {
    item.get_ref().as_str().ok_or_else(|| expected(item, what))
}

pub(super) fn boolean(item: &Item) -> Result<bool, Fault> {
    item.get_ref().as_bool().ok_or_else(|| expected(item, "true or false"))
}

/// A whole number of that range; `meaning` says what it counts.
pub(super) fn integer<T>(item: &Item, range: RangeInclusive<T>, meaning: &str) -> Result<T, Fault>
where
    T: TryFrom<i128> + PartialOrd + Display,
{
    let what = || format!("a whole number from {} to {} ({meaning})", range.start(), range.end());
    let DeValue::Integer(number) = item.get_ref() else { return Err(expected(item, what())) };
    i128::from_str_radix(number.as_str(), number.radix())
        .ok()
        .and_then(|number| T::try_from(number).ok())
        .filter(|number| range.contains(number))
        .ok_or_else(|| expected(item, what()))
}

/// A point in time: a date and a time, and where it is that time.
pub(super) fn time(item: &Item) -> Result<SystemTime, Fault> {
    let what = "a date and a time from 1970 on with its offset, such as 2030-01-31T00:00:00Z";
    item.get_ref().as_datetime().and_then(point_in_time).ok_or_else(|| expected(item, what))
}

/// The same of a date-time by itself; `None` if it has no offset, or is before 1970.
pub(super) fn point_in_time(found: &Datetime) -> Option<SystemTime> {
    let (date, time) = (found.date?, found.time?);
    let (second, nanosecond) = (time.second.unwrap_or(0), time.nanosecond.unwrap_or(0));
    let text = format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{second:02}.{nanosecond:09}Z",
        date.year, date.month, date.day, time.hour, time.minute
    );
    let there = humantime::parse_rfc3339(&text).ok()?;
    let minutes = match found.offset? {
        Offset::Z => 0,
        Offset::Custom { minutes } => minutes,
    };
    let offset = Duration::from_mins(minutes.unsigned_abs().into());
    if minutes < 0 { there.checked_add(offset) } else { there.checked_sub(offset) }
}

/// A TCP port.
pub(super) fn port(item: &Item) -> Result<u16, Fault> {
    integer(item, 1..=u16::MAX, "a TCP port")
}

/// One of the names of an enumeration.
pub(super) fn choice<T: ValueEnum>(item: &Item) -> Result<T, Fault> {
    let possible: Vec<_> = T::value_variants().iter().filter_map(ValueEnum::to_possible_value).collect();
    let names: Vec<&str> = possible.iter().map(clap::builder::PossibleValue::get_name).collect();
    let what = format!("one of {}", names.join(", "));
    let found = text(item, &what)?;
    T::from_str(found, false).map_err(|_| match nearest(found, &names) {
        Some(near) => expected(item, format!("{what}; did you mean {near:?}?")),
        None => expected(item, what),
    })
}

/// A duration with its unit, of that range.
pub(super) fn duration(item: &Item, shortest: Duration, longest: Duration) -> Result<Duration, Fault> {
    let what = r#"a duration with its unit, such as "500ms", "30s" or "5m""#;
    let duration = humantime::parse_duration(text(item, what)?).map_err(|_| expected(item, what))?;
    if duration < shortest || duration > longest {
        let (shortest, longest) = (humantime::format_duration(shortest), humantime::format_duration(longest));
        return Err(expected(item, format!("a duration from {shortest} to {longest}")));
    }
    Ok(duration)
}

/// A size in bytes, with a unit or without, of that range.
pub(super) fn size(item: &Item, range: RangeInclusive<u64>) -> Result<usize, Fault> {
    let what = r#"a size with its unit, such as "64KiB""#;
    let bytes = match item.get_ref() {
        DeValue::String(text) => text.parse::<ByteSize>().map_err(|_| expected(item, what))?.as_u64(),
        DeValue::Integer(number) => {
            u64::from_str_radix(number.as_str(), number.radix()).map_err(|_| expected(item, what))?
        }
        _ => return Err(expected(item, what)),
    };
    usize::try_from(bytes).ok().filter(|_| range.contains(&bytes)).ok_or_else(|| {
        expected(item, format!("a size from {} to {}", ByteSize(*range.start()), ByteSize(*range.end())))
    })
}

/// An array of values, none of them twice.
pub(super) fn list<T>(item: &Item, convert: impl Fn(&Item) -> Result<T, Fault>, what: &str) -> Result<Vec<T>, Fault>
where
    T: Clone + Eq + Hash,
{
    let array = item.get_ref().as_array().ok_or_else(|| expected(item, format!("an array of {what}")))?;
    let mut seen = HashSet::new();
    array
        .iter()
        .map(|item| {
            let value = convert(item)?;
            if !seen.insert(value.clone()) {
                return Err(Fault::new(item, format!("{} is given twice", kind(item))));
            }
            Ok(value)
        })
        .collect()
}

/// `8080` or `[8080, 8443]`.
pub(super) fn ports(item: &Item) -> Result<Vec<u16>, Fault> {
    if !item.get_ref().is_array() {
        return Ok(vec![port(item)?]);
    }
    let ports = list(item, port, "TCP ports")?;
    if ports.is_empty() { Err(expected(item, "at least one TCP port")) } else { Ok(ports) }
}

/// A prefix of addresses, or an address.
pub(super) fn cidr(item: &Item) -> Result<Cidr, Fault> {
    text(item, "a prefix of addresses, such as \"192.0.2.0/24\"")?
        .parse()
        .map_err(|error: InvalidCidr| Fault::new(item, format!("found {}: {error}", kind(item))))
}

pub(super) fn interface(item: &Item) -> Result<String, Fault> {
    let name = text(item, r#"the name of a network interface, such as "eth0""#)?;
    check_interface(name).map_err(|why| Fault::new(item, why))?;
    Ok(name.to_owned())
}

/// What the kernel takes as the name of an interface (`dev_valid_name`).
pub(super) fn check_interface(name: &str) -> Result<(), String> {
    let valid = !name.is_empty()
        && name.len() < libc::IFNAMSIZ
        && name != "."
        && name != ".."
        && !name.chars().any(|c| c == '/' || c == ':' || c.is_whitespace() || c.is_control());
    if valid { Ok(()) } else { Err(format!("{name:?} can't be the name of a network interface")) }
}

pub(super) fn absolute_path(item: &Item) -> Result<PathBuf, Fault> {
    let what = "an absolute path";
    let path = PathBuf::from(text(item, what)?);
    if path.is_absolute() { Ok(path) } else { Err(expected(item, what)) }
}

/// An absolute path, or nothing for `""`.
pub(super) fn optional_path(item: &Item) -> Result<Option<PathBuf>, Fault> {
    let what = "an absolute path, or \"\" for none";
    match text(item, what)? {
        "" => Ok(None),
        path if path.starts_with('/') => Ok(Some(path.into())),
        _ => Err(expected(item, what)),
    }
}

pub(super) fn listen(item: &Item) -> Result<Listen, Fault> {
    let listen: Listen = text(item, r#"an address and a port, such as "0.0.0.0:8080" or "[::]:8080""#)?
        .parse()
        .map_err(|why: super::InvalidListen| Fault::new(item, why.to_string()))?;
    if listen.tcp().is_some_and(|address| address.port() == 0) {
        return Err(expected(item, "a port other than 0: limits hold for a port that is known"));
    }
    Ok(listen)
}

/// Permissions of a file, in octal.
pub(super) fn mode(item: &Item) -> Result<u32, Fault> {
    let what = r#"permissions in octal digits, such as "0660""#;
    let digits = text(item, what)?;
    let is_octal = (3..=4).contains(&digits.len()) && digits.bytes().all(|b| (b'0'..=b'7').contains(&b));
    // The kernel gives no other bits a meaning on a socket.
    u32::from_str_radix(digits, 8).ok().filter(|mode| is_octal && *mode <= 0o777).ok_or_else(|| expected(item, what))
}

/// A network, or whoever connects to a unix socket.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) enum TrustedProxy {
    Network(IpNet),
    Unix,
}

pub(super) fn trusted_proxy(item: &Item) -> Result<TrustedProxy, Fault> {
    if item.get_ref().as_str() == Some("unix") {
        return Ok(TrustedProxy::Unix);
    }
    network(item).map(TrustedProxy::Network)
}

/// A network, or one address, which stands for a network of its own.
pub(super) fn network(item: &Item) -> Result<IpNet, Fault> {
    let what = r#"an address or a network, such as "192.0.2.7", "10.0.0.0/8" or "2001:db8::/32""#;
    let found = text(item, what)?;
    let network = match found.parse::<IpAddr>() {
        Ok(address) => IpNet::from(address),
        Err(_) => found.parse().map_err(|_| expected(item, what))?,
    };
    if network.addr() != network.network() {
        return Err(expected(item, format!("an address or a network; did you mean \"{}\"?", network.trunc())));
    }
    match network {
        // Addresses of such clients are taken for the IPv4 addresses that they are.
        IpNet::V6(network) if network.addr().to_ipv4_mapped().is_some() => {
            Err(expected(item, "an IPv4 network to be written as one, such as \"10.0.0.0/8\""))
        }
        network => Ok(network),
    }
}

/// An address, or nothing for `""`.
pub(super) fn optional_address(item: &Item) -> Result<Option<SocketAddr>, Fault> {
    let what = r#"an address and a port, such as "127.0.0.1:9180", or "" for none"#;
    match text(item, what)? {
        "" => Ok(None),
        address => address.parse().map(Some).map_err(|_| expected(item, what)),
    }
}

pub(super) fn origin(item: &Item) -> Result<AllowedOrigin, Fault> {
    text(item, r#"an origin such as "https://example.com""#)?
        .parse()
        .map_err(|why: super::InvalidOrigin| Fault::new(item, why.to_string()))
}

pub(super) fn log_filter(item: &Item) -> Result<String, Fault> {
    let what = r#"a level (off, error, warn, info, debug, trace) or a filter such as "info,limiter::gateway=debug""#;
    let filter = text(item, what)?;
    // EnvFilter takes a bare word for the name of a module: a misspelt level would silence everything.
    let words_are_levels = filter
        .split(',')
        .filter(|directive| !directive.contains(['=', '[']))
        .all(|word| LOG_LEVELS.contains(&word.trim().to_lowercase().as_str()));
    if words_are_levels && filter.parse::<tracing_subscriber::EnvFilter>().is_ok() {
        Ok(filter.to_owned())
    } else {
        Err(expected(item, what))
    }
}
