//! Calls to the admin address of a limiter that runs.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use anyhow::Context as _;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{
    Request, StatusCode,
    client::conn::http1,
    header::{AUTHORIZATION, CONTENT_TYPE, HOST},
};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::{net::TcpStream, time::timeout};

use super::Global;
use crate::config::{AdminToken, AdminTokenError, Config};

/// How long an answer may take.
const TIMEOUT: Duration = Duration::from_secs(15);

/// Longest answer that is read.
const LONGEST_ANSWER_BYTES: usize = 1 << 20;

/// Why a call came to nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum ControlError {
    #[error(
        "nothing answers at the admin address {address}: {error}; is `limiter run` running, and is that its admin.listen?"
    )]
    NotRunning { address: SocketAddr, error: io::Error },
    #[error("{0}")]
    Token(#[from] AdminTokenError),
    #[error("{address} refuses: {detail} ({status})")]
    Refused { address: SocketAddr, status: StatusCode, detail: String },
    #[error("what answers at {address} is no limiter: {problem}")]
    Strange { address: SocketAddr, problem: String },
    #[error("{address} does not answer in time")]
    Late { address: SocketAddr },
}

impl ControlError {
    /// Whether somebody else could do it.
    pub(super) fn is_lack_of_privilege(&self) -> bool {
        match self {
            Self::Refused { status, .. } => *status == StatusCode::UNAUTHORIZED,
            Self::Token(AdminTokenError::Unreadable { error, .. }) => error.kind() == io::ErrorKind::PermissionDenied,
            _ => false,
        }
    }
}

/// Where to call, and with what.
#[derive(Debug)]
pub(super) struct Control {
    address: SocketAddr,
    token_file: PathBuf,
}

impl Control {
    /// As the configuration has it, and `address` if there is one. `None`: it has no token.
    pub(super) fn of(global: &Global, address: Option<SocketAddr>) -> anyhow::Result<Option<Self>> {
        let admin = match global.config() {
            Some(file) => Config::from_file(file)?.admin,
            None => Config::default().admin,
        };
        Ok(match (address.or(admin.listen), admin.token_file) {
            (Some(address), Some(token_file)) => Some(Self { address: reachable(address), token_file }),
            _ => None,
        })
    }

    /// Calls, and gives the document of the answer.
    pub(super) fn call(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        let secret = AdminToken::secret(&self.token_file).map_err(ControlError::from)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("can't start what it takes to call")?;
        let address = self.address;
        let answered = runtime.block_on(async { timeout(TIMEOUT, self.try_call(path, body, &secret)).await });
        Ok(answered.map_err(|_| ControlError::Late { address })??)
    }

    async fn try_call(&self, path: &str, body: &Value, secret: &str) -> Result<Value, ControlError> {
        let address = self.address;
        let strange = |problem: String| ControlError::Strange { address, problem };
        let stream = TcpStream::connect(address).await.map_err(|error| ControlError::NotRunning { address, error })?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| strange(error.to_string()))?;
        let request = Request::post(path)
            .header(HOST, address.to_string())
            .header(AUTHORIZATION, format!("Bearer {secret}"))
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body.to_string())))
            .map_err(|error| strange(error.to_string()))?;
        let exchange = async move {
            let response = sender.send_request(request).await.map_err(|error| strange(error.to_string()))?;
            let status = response.status();
            let body = Limited::new(response.into_body(), LONGEST_ANSWER_BYTES).collect().await;
            let body = body.map_err(|error| strange(error.to_string()))?.to_bytes();
            let document: Value = serde_json::from_slice(&body).map_err(|_| strange(format!("it answers {status}")))?;
            if status.is_success() {
                return Ok(document);
            }
            let detail = document["detail"].as_str().unwrap_or("it does not say why").to_owned();
            Err(ControlError::Refused { address, status, detail })
        };
        // Polled here rather than in a task of its own. It ends when the sender is gone or the other side hangs up; what is wrong
        // with it is what the exchange fails by.
        let (answer, _) = tokio::join!(exchange, connection);
        answer
    }
}

/// An address that one can connect to.
fn reachable(mut address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(ip) if ip.is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
        _ => {}
    }
    address
}
