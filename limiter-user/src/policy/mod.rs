//! Limits as data, and who to ask for them.

mod accepted;
mod fixed;
mod limits;
mod rates;
mod rule;

pub(crate) use accepted::Accepted;

pub use fixed::Fixed;
pub use limits::{Limits, Source};
pub use rates::{Rates, TooFast};
pub use rule::{Action, Cidr, InvalidCidr, OwnLimits, Rule};

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

/// The limits in force for one service, and the place where the ends of its connections are told.
///
/// The gateway holds one and knows nothing of what is behind it: kernel maps that the command line changes at any time
/// (`kernel::LivePolicy`), or numbers that never change ([`Fixed`]).
pub trait Policy: Send + Sync + 'static {
    /// The limits at this moment. Called for every handshake, so it must be cheap (a map lookup).
    fn limits(&self) -> Limits;

    /// The limits that hold for a client at this moment, rules and all.
    fn limits_for(&self, client: IpAddr) -> Limits {
        let _ = client;
        self.limits()
    }

    /// Whether a rule denies a client that the kernel could not see: one behind a proxy.
    fn denies(&self, client: IpAddr) -> bool {
        let _ = client;
        false
    }

    /// Whether somebody else, such as the kernel, holds rules and rates against the clients that connect directly. If not, the
    /// gateway does; it always does for those behind a proxy.
    fn is_kept_below(&self) -> bool {
        true
    }

    /// Whether nobody is refused for the limits and rules: who would be is counted, and let in.
    fn observes(&self) -> bool {
        false
    }

    /// The client of a connection has shown who it is: from now on the connection counts against that user instead of its
    /// source. Called at most once for a connection, and before [`Self::closed`].
    fn authenticated(&self, connection: &Connection, user: &str) {
        let _ = (connection, user);
    }

    /// Denies a source for that time, for what its clients have sent; where a rule lets it past the limits, it stays.
    /// Whether the kernel keeps it out now: the gateway does in any case.
    fn deny(&self, source: Source, time: Duration) -> bool {
        let _ = (source, time);
        false
    }

    /// The gateway is done with a connection: whatever state the kernel's socket is in, it counts no more. Called exactly
    /// once for every accepted connection, before its descriptor is closed.
    fn closed(&self, connection: &Connection);
}

/// An accepted TCP connection, as the kernel knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Connection {
    /// The client; IPv4-mapped addresses are given as IPv4. Port 0: it came by a unix socket, of which the kernel's limits know
    /// nothing.
    pub remote: SocketAddr,
    /// The address that it connected to; IPv4-mapped addresses are given as IPv4.
    pub local: SocketAddr,
    /// The socket's cookie (`SO_COOKIE`): never used again as long as the host is up. 0 where nobody below keeps anything
    /// ([`Policy::is_kept_below`]).
    pub cookie: u64,
}
