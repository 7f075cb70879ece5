//! Users as the kernel's maps have them.

use std::net::{IpAddr, Ipv6Addr};

use limiter_common::{
    Address, SourceKey,
    user::{Member, UserName},
};
use ring::digest;

/// What the connections of a user of that service count against. `None` if the name is too long.
pub(super) fn member(service: u32, name: &str) -> Option<Member> {
    let source = SourceKey::of_user(u16::try_from(service).ok()?, id(name));
    Some(Member { source, name: UserName::new(name)? })
}

/// A hash of a name: half of its SHA-256, so that nobody finds two names that count as one.
pub(super) fn id(name: &str) -> Address {
    let hash = digest::digest(&digest::SHA256, name.as_bytes());
    let mut half = [0; 16];
    half.copy_from_slice(&hash.as_ref()[..16]);
    IpAddr::V6(Ipv6Addr::from(half)).into()
}
