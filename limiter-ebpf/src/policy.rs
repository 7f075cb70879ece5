//! The policy in force. [`InForce`] says how it changes; a program asks once for a packet which copy it is to go by.

use limiter_common::{Netns, ServicePolicy, policy::InForce};

use crate::{
    atomic,
    maps::{IN_FORCE, PORTS, SERVICES, SOCKET_PORTS},
};

/// Which copy is in force.
#[inline(always)]
pub fn in_force() -> InForce {
    match IN_FORCE.get_ptr(0) {
        // SAFETY: the pointer comes from a look-up in an array; its elements stay.
        Some(word) => InForce(unsafe { atomic::load(word) }),
        None => InForce::default(),
    }
}

/// The word of a port that a service has in either copy. Enough to leave everybody else's packets alone.
#[inline(always)]
pub fn word_of(port: u16) -> Option<u32> {
    match PORTS.get(u32::from(port)) {
        None | Some(0) => None,
        Some(word) => Some(*word),
    }
}

/// The service that listens on `port`, if any.
#[inline(always)]
pub fn service_on(port: u16, in_force: InForce) -> Option<u16> {
    in_force.service(word_of(port)?)
}

/// The limits of a service. Nobody writes to them as long as this program runs.
#[inline(always)]
pub fn of_service(service: u16, in_force: InForce) -> Option<&'static ServicePolicy> {
    SERVICES.get(in_force.place_of(service))
}

/// The word of a port that sockets of a service have in either copy, in whatever namespace.
#[inline(always)]
pub fn word_of_sockets(port: u16) -> Option<u64> {
    match SOCKET_PORTS.get(u32::from(port)) {
        None | Some(0) => None,
        Some(word) => Some(*word),
    }
}

/// The service that counts a socket of that port and namespace, if any does.
#[inline(always)]
pub fn service_of_socket(port: u16, netns: Netns, in_force: InForce) -> Option<u16> {
    in_force.service_of_socket(word_of_sockets(port)?, netns.is_own())
}
