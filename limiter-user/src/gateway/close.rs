//! How a session ends: why, what each side is told, and how long it is waited for.

use std::time::Duration;

use tokio_tungstenite::tungstenite::protocol::{CloseFrame, frame::coding::CloseCode};

use super::{messages::Violation, overload::Overload};

/// How long the Close frame may take to leave.
pub(super) const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a client that is told to close may take to do so.
pub(super) const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Close code of a client that is not who it was any more.
const UNAUTHENTICATED: u16 = 4401;

/// Close code of a session that another one of the same user takes the place of.
const REPLACED: u16 = 4409;

/// Why a session ends.
#[derive(Debug)]
pub(super) enum End {
    /// The client closes.
    Client(Option<CloseFrame>),
    /// The client's connection broke, or ended without a Close frame.
    Lost,
    /// The client sent what is no WebSocket frame (1002), or text that is no UTF-8 (1007); with what is wrong.
    Malformed(CloseCode, &'static str),
    /// The client broke a limit on messages.
    Violation(Violation),
    /// No message either way for `idle_timeout`.
    Idle,
    /// Open for `max_lifetime`.
    TooOld,
    /// A ping was not answered within `pong_timeout`.
    NoPong,
    /// The client does not take what it is sent.
    SlowConsumer,
    /// The client's token has expired.
    Expired,
    /// What the client has shown is not good any more.
    Revoked,
    /// A newer session of the same user takes its place.
    Replaced,
    /// Whoever may publish to the client's user has it closed, with this.
    Kicked(Box<Kick>),
    /// The gateway is being shut down.
    Draining,
    /// The upstream closes.
    Upstream(Option<CloseFrame>),
    /// The upstream's connection broke, or it does not take what it is sent.
    UpstreamGone,
    /// The upstream sent what can't be passed on.
    UpstreamMalformed,
}

/// What whoever may publish to a user has its sessions closed with.
#[derive(Clone, Debug)]
pub(super) struct Kick {
    pub(super) frame: CloseFrame,
    /// Whether each is told when to come back, behind the reason.
    pub(super) may_come_back: bool,
}

impl Kick {
    /// Who gives no reason leaves the words to the gateway, and with a code that says that it is only for now (1012, 1013), the hint.
    pub(super) fn new(code: u16, reason: Option<&str>) -> Self {
        let frame = CloseFrame { code: CloseCode::from(code), reason: reason.unwrap_or("disconnected").into() };
        let may_come_back = reason.is_none() && matches!(frame.code, CloseCode::Restart | CloseCode::Again);
        Self { frame, may_come_back }
    }
}

impl End {
    /// What metrics and logs call it.
    pub(super) fn label(&self) -> &'static str {
        match self {
            Self::Client(_) => "client",
            Self::Lost => "lost",
            Self::Malformed(..) => "malformed",
            Self::Violation(violation) => violation.label(),
            Self::Idle => "idle",
            Self::TooOld => "too_old",
            Self::NoPong => "no_pong",
            Self::SlowConsumer => "slow_consumer",
            Self::Expired => "expired",
            Self::Revoked => "revoked",
            Self::Replaced => "replaced",
            Self::Kicked(_) => "kicked",
            Self::Draining => "draining",
            Self::Upstream(_) => "upstream",
            Self::UpstreamGone => "upstream_gone",
            Self::UpstreamMalformed => "upstream_malformed",
        }
    }

    /// Whether the client broke a limit or the protocol.
    pub(super) fn is_abuse(&self) -> bool {
        matches!(self, Self::Malformed(..) | Self::Violation(_) | Self::SlowConsumer)
    }

    /// The Close frame for the client. Who loses its session together with others is told when to come back.
    pub(super) fn for_client(&self, overload: &Overload) -> Option<CloseFrame> {
        let (code, reason) = match self {
            Self::Client(frame) | Self::Upstream(frame) => return frame.clone(),
            Self::Kicked(kick) if !kick.may_come_back => return Some(kick.frame.clone()),
            Self::Kicked(kick) => (kick.frame.code, kick.frame.reason.as_str()),
            Self::Lost => return None,
            Self::Malformed(code, reason) => (*code, *reason),
            Self::Violation(violation) => violation.close(),
            Self::Idle => (CloseCode::Away, "idle"),
            Self::TooOld => (CloseCode::Away, "open for as long as it may be"),
            Self::NoPong => (CloseCode::Away, "no answer to ping"),
            Self::SlowConsumer => (CloseCode::Policy, "too slow to receive"),
            Self::Expired => (CloseCode::Library(UNAUTHENTICATED), "token expired"),
            Self::Revoked => (CloseCode::Library(UNAUTHENTICATED), "not authenticated any more"),
            Self::Replaced => (CloseCode::Library(REPLACED), "replaced by a newer login"),
            Self::Draining => (CloseCode::Away, "server is shutting down"),
            Self::UpstreamGone => (CloseCode::Restart, "application went away"),
            Self::UpstreamMalformed => (CloseCode::Error, "application error"),
        };
        let reason = match self {
            // As far as it gets here, one who is kicked may come back.
            Self::TooOld | Self::Draining | Self::UpstreamGone | Self::Kicked(_) => {
                format!("{reason}; reconnect in {} s", overload.reconnect_after()).into()
            }
            _ => reason.into(),
        };
        Some(CloseFrame { code, reason })
    }

    /// Whether the reader stopped where no frame begins, or before one that will not be read: there is no Close frame to be
    /// found in what follows.
    pub(super) fn loses_frames(&self) -> bool {
        matches!(self, Self::Malformed(..) | Self::Violation(Violation::TooBig | Violation::FrameTooBig))
    }

    /// The Close frame for the upstream.
    pub(super) fn for_upstream(&self) -> Option<CloseFrame> {
        let (code, reason) = match self {
            Self::Client(frame) | Self::Upstream(frame) => return frame.clone(),
            Self::UpstreamMalformed => (CloseCode::Protocol, "malformed or oversized message"),
            // Its client's faults are none of its own: to the upstream the client has gone away.
            _ => (CloseCode::Away, "client went away"),
        };
        Some(CloseFrame { code, reason: reason.into() })
    }
}
