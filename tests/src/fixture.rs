//! What tests of the programs begin with: a service, a SYN for it of either family, and sources that have connections.

use std::net::SocketAddr;

use anyhow::Result;
use limiter::kernel::Hook;
use limiter_common::{Endpoints, ServicePolicy, SourceKey};

use crate::{frame::Frame, program::Program};

/// The service's port.
pub const PORT: u16 = 8080;

/// How many connections a source may have by [`policy`].
pub const LIMIT: u16 = 2;

/// A SYN by IPv4.
pub fn v4() -> Frame {
    Frame::syn(([192, 0, 2, 7], 40_000).into(), ([192, 0, 2, 1], PORT).into())
}

/// A SYN by IPv6.
pub fn v6() -> Frame {
    Frame::syn(([0x2001, 0xdb8, 0, 0, 0, 0, 0, 7], 40_000).into(), ([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1], PORT).into())
}

/// So many connections of each address by IPv4, and of each /64 by IPv6.
pub fn policy() -> ServicePolicy {
    ServicePolicy { connections_per_source: LIMIT.into(), ipv4_prefix: 32, ipv6_prefix: 64, ..ServicePolicy::default() }
}

/// A program for this hook whose one service has sources with so many connections each.
pub fn program_for(hook: Hook, policy: &ServicePolicy, sources: &[&str], connections: u16) -> Result<Program> {
    let mut program = Program::load_for(hook)?;
    program.set_service(0, PORT, policy)?;
    for source in sources {
        for port in 1..=connections {
            let remote = SocketAddr::new(source.parse()?, port);
            let local = if remote.is_ipv4() { v4().destination } else { v6().destination };
            let ends = Endpoints::new(remote, local);
            let source = SourceKey::new(0, &ends.remote, policy.ipv4_prefix, policy.ipv6_prefix);
            program.add_connection(&ends, &source)?;
        }
    }
    Ok(program)
}
