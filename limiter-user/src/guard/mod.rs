//! limiter inside an application: a guard over its listener, and admission as a [`tower`](tower_service) layer.
//!
//! What [`Guard::accept`] hands out tells the policy when it is dropped, so the slot of a connection comes back the moment
//! that the application is done with it, and not when the kernel has given up on a client that vanished. With the policy of
//! [`kernel::Attached`](crate::kernel::Attached) that is the ledger that the kernel's limits go by; with
//! [`policy::Fixed`](crate::policy::Fixed) there is no kernel's part, and [`Guest::admit`] alone keeps the limits, the rates of new
//! connections among them.
//!
//! ```no_run
//! # async fn serve() -> anyhow::Result<()> {
//! use std::sync::Arc;
//! use limiter::{guard::Guard, policy::Fixed};
//!
//! let listener = tokio::net::TcpListener::bind("0.0.0.0:8080").await?;
//! let mut guard = Guard::new(listener, Arc::new(Fixed::default()))?;
//! loop {
//!     let (stream, guest) = guard.accept().await;
//!     tokio::spawn(async move {
//!         if guest.admit().is_ok() {
//!             // tokio_tungstenite::accept_async(stream) …
//!         }
//!     });
//! #   drop(stream);
//! }
//! # }
//! ```
//!
//! For axum, [`Guard`] is a listener to serve on and [`Guest`] the connection's information; see `examples/axum.rs` and
//! `examples/tungstenite.rs`.

mod layer;
mod stream;
#[cfg(test)]
mod tests;

pub use layer::{Admit, AdmitLayer};
pub use stream::Guarded;

use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError, Weak},
};

use axum::{extract::connect_info::Connected, serve::IncomingStream};
use tokio::{
    net::{TcpListener, TcpStream},
    time::sleep,
};

use crate::{
    gateway::{
        admission::{Admission, Full, Permit},
        listen::{BACKOFF, is_about_one_connection},
        sampler::Sampler,
    },
    policy::{Accepted, Policy, Rates, TooFast},
};

/// A listener whose connections are counted.
pub struct Guard {
    listener: TcpListener,
    address: SocketAddr,
    policy: Arc<dyn Policy>,
    kept: Arc<Kept>,
}

/// What the connections of a listener are held against together.
#[derive(Default)]
struct Kept {
    admission: Arc<Admission>,
    rates: Rates,
    log: Sampler,
}

impl fmt::Debug for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guard").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Guard {
    /// Over a listener, by a policy: one service's of [`Attached::policies`](crate::kernel::Attached::policies), or limits
    /// that stay as they are.
    ///
    /// # Errors
    /// If the listener can't tell its address.
    pub fn new(listener: TcpListener, policy: Arc<dyn Policy>) -> io::Result<Self> {
        let address = listener.local_addr()?;
        Ok(Self { listener, address, policy, kept: Arc::default() })
    }

    /// The address that it listens on.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// The next connection, and the handle by which to ask whether there is room for it.
    ///
    /// Waits where accepting fails: a host that is out of descriptors has them again later, and clients wait in the backlog
    /// meanwhile. Dropping the future loses no connection.
    pub async fn accept(&mut self) -> (Guarded, Guest) {
        loop {
            match self.listener.accept().await {
                Ok((stream, remote)) => return self.guard(stream, remote),
                Err(error) if is_about_one_connection(&error) => {}
                Err(error) => {
                    tracing::warn!(%error, "cannot accept; clients wait in the backlog");
                    sleep(BACKOFF).await;
                }
            }
        }
    }

    fn guard(&self, stream: TcpStream, remote: SocketAddr) -> (Guarded, Guest) {
        let accepted = Accepted::new(&stream, remote, self.address, Arc::clone(&self.policy));
        let remote = accepted.connection().remote;
        let seat = Arc::new(Seat { accepted, kept: Arc::clone(&self.kept), permit: Mutex::default() });
        let guest = Guest { remote, seat: Arc::downgrade(&seat) };
        (Guarded::new(seat, stream), guest)
    }
}

/// Serves an axum application: `axum::serve(guard, app.into_make_service_with_connect_info::<Guest>())`.
impl axum::serve::Listener for Guard {
    type Io = Guarded;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Guarded, SocketAddr) {
        let (stream, guest) = Self::accept(self).await;
        (stream, guest.remote)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.address)
    }
}

impl Connected<IncomingStream<'_, Guard>> for Guest {
    fn connect_info(stream: IncomingStream<'_, Guard>) -> Self {
        stream.io().guest()
    }
}

/// What a connection holds as long as it is open. The permit is given back before the policy is told: fields are dropped in
/// this order.
struct Seat {
    permit: Mutex<Option<Permit>>,
    kept: Arc<Kept>,
    accepted: Accepted,
}

impl Seat {
    /// A slot for the client, if nothing speaks against it or the service only observes what does.
    fn admit(&self, client: IpAddr) -> Result<Permit, Refused> {
        let Kept { admission, rates, log } = &*self.kept;
        let policy = self.accepted.policy();
        let mut past = None;
        // Whether the policy observes is asked when it matters: it may have to ask the kernel.
        let against = |refused: Refused, past: &mut Option<Refused>| match *past {
            Some(_) => Ok(()),
            None if policy.observes() => {
                *past = Some(refused);
                Ok(())
            }
            None => Err(refused),
        };
        if policy.denies(client) {
            against(Refused::Denied, &mut past)?;
        }
        let limits = policy.limits_for(client);
        let permit = match admission.try_admit(client, &limits) {
            Ok(permit) => permit,
            Err(full) => {
                against(full.into(), &mut past)?;
                admission.admit_past(client, &limits)
            }
        };
        // The kernel keeps rates where it can, at the handshake.
        if past.is_none()
            && !policy.is_kept_below()
            && let Err(too_fast) = rates.spend(limits.source(client), &limits)
        {
            against(too_fast.into(), &mut past)?;
        }
        if let Some(reason) = past.map(Refused::label)
            && let Some(left_out) = log.admit(reason)
        {
            tracing::info!(%client, reason, left_out, "would refuse a connection");
        }
        Ok(permit)
    }
}

impl fmt::Debug for Seat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Seat").field("accepted", &self.accepted).finish_non_exhaustive()
    }
}

/// Who is at the other end of a connection. Clones are of the same connection, and don't keep it open.
#[derive(Clone, Debug)]
pub struct Guest {
    remote: SocketAddr,
    seat: Weak<Seat>,
}

impl Guest {
    /// The client's address; IPv4-mapped ones are given as IPv4.
    pub fn remote(&self) -> SocketAddr {
        self.remote
    }

    /// Takes one of its source's slots for the connection, if it has none yet; it is given back when the connection ends.
    ///
    /// Where the kernel's limits are in force there is room for whoever gets here, but for what changed since the
    /// handshake. Without the kernel's part (see [`Policy::is_kept_below`]) there is nothing but this; it then keeps
    /// `connection_rate` and `service_connection_rate`, too: a connection spends when it is admitted, and one that is refused does not.
    /// Where the policy only [observes](Policy::observes), everybody is admitted, and the log says, once a second for each reason, who
    /// would not have been.
    ///
    /// # Errors
    /// [`Refused`] says which limit is reached.
    pub fn admit(&self) -> Result<(), Refused> {
        let seat = self.seat.upgrade().ok_or(Refused::Gone)?;
        let mut permit = seat.permit.lock().unwrap_or_else(PoisonError::into_inner);
        if permit.is_none() {
            *permit = Some(seat.admit(self.remote.ip())?);
        }
        Ok(())
    }
}

/// Why there is no room for a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Its source is at its limit.
    #[error("too many connections from this address; {limit} at a time are allowed")]
    Source {
        /// `connections_per_source`, as it holds for this client.
        limit: u32,
    },
    /// `connections_total` or `connections_total_all` is reached.
    #[error("the service has no room for another connection at the moment")]
    Service,
    /// Its source opens connections faster than `connection_rate` and `connection_burst` allow.
    #[error("too many new connections from this address at once")]
    SourceRate,
    /// The service gets connections faster than `service_connection_rate` and `service_connection_burst` allow.
    #[error("too many new connections to this service at once")]
    ServiceRate,
    /// A rule denies its address.
    #[error("connections from this address are not allowed")]
    Denied,
    /// The connection has ended meanwhile.
    #[error("the connection has ended")]
    Gone,
}

impl Refused {
    /// What the log calls it.
    const fn label(self) -> &'static str {
        match self {
            Self::Source { .. } => "source_full",
            Self::Service => "service_full",
            Self::SourceRate => "source_rate",
            Self::ServiceRate => "service_rate",
            Self::Denied => "rule",
            Self::Gone => "gone",
        }
    }
}

impl From<Full> for Refused {
    fn from(full: Full) -> Self {
        match full {
            Full::Source(limit) => Self::Source { limit },
            Full::Service | Full::AllServices => Self::Service,
        }
    }
}

impl From<TooFast> for Refused {
    fn from(too_fast: TooFast) -> Self {
        match too_fast {
            TooFast::Source => Self::SourceRate,
            TooFast::Service => Self::ServiceRate,
        }
    }
}
