//! The HTTP server of the admin address.

use std::{io, net::SocketAddr, os::fd::AsFd as _, sync::Arc, time::Duration};

use axum::{
    Extension, Json, Router,
    extract::{Request, State as Shared},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::{any, get},
};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use serde_json::json;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
};

use super::{Control, Metrics, Readiness, State, control};
use crate::gateway::{Ending, Handed, Label, Overload, Spare};

/// Connections that are served at the same time; more wait in the backlog.
const MOST_CONNECTIONS: usize = 64;

/// How long a request's head may take, and so how long a connection may be idle.
const HEAD_TIMEOUT: Duration = Duration::from_secs(15);

/// Longest head of a request.
const LONGEST_HEAD_BYTES: usize = 16 * 1024;

/// How long a shutdown waits for answers on their way.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);

/// How long those that were accepted just before another process took over may take to ask.
const LAST_REQUEST: Duration = Duration::from_secs(1);

/// How long to wait after an accept that failed, which is for lack of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Why the admin server can't start.
#[derive(Debug, thiserror::Error)]
#[error("can't listen on {address} for metrics, health and control: {error}; {}", advice(error, *address))]
pub struct BindError {
    address: SocketAddr,
    error: io::Error,
}

fn advice(error: &io::Error, address: SocketAddr) -> String {
    let port = address.port();
    match error.kind() {
        io::ErrorKind::AddrInUse => format!(
            "`ss -ltnp 'sport = :{port}'` shows who holds the port: stop it, or give another address with --admin (\"\" for none)"
        ),
        io::ErrorKind::AddrNotAvailable => {
            "no interface has this address (`ip address` lists those there are)".to_owned()
        }
        io::ErrorKind::PermissionDenied => format!("port {port} takes root; ports from 1024 on don't"),
        _ => "give another address with --admin (\"\" for none)".to_owned(),
    }
}

/// The admin server, bound; [`run`](Self::run) sets it going.
#[derive(Debug)]
pub struct Admin {
    listener: TcpListener,
    address: SocketAddr,
    router: Router,
    control: Option<Control>,
}

/// What a handler needs.
#[derive(Debug)]
struct Context {
    metrics: Metrics,
    readiness: Readiness,
    overload: Arc<Overload>,
    /// One scrape at a time: each reads the kernel's maps.
    scrape: Semaphore,
    control: Option<Control>,
    is_loopback: bool,
}

/// The admin address, taken before there is anything to show.
#[derive(Debug)]
pub struct Bound {
    listener: TcpListener,
    /// As it was configured.
    wanted: SocketAddr,
    address: SocketAddr,
}

impl Bound {
    /// A second hand on the socket, for the next process.
    ///
    /// # Errors
    ///
    /// That of the kernel, which is out of descriptors.
    pub fn spare(&self) -> io::Result<Spare> {
        Ok(Spare::new(Label::tcp(self.wanted), self.listener.as_fd().try_clone_to_owned()?))
    }

    /// The server that will show these, and let be controlled what `control` leads to.
    pub fn showing(
        self,
        metrics: Metrics,
        readiness: Readiness,
        overload: Arc<Overload>,
        control: Option<Control>,
    ) -> Admin {
        let Self { listener, address, .. } = self;
        let is_loopback = address.ip().to_canonical().is_loopback();
        let control_of = control.clone();
        let context =
            Context { metrics, readiness, overload, scrape: Semaphore::new(1), control: control_of, is_loopback };
        let router = Router::new()
            .route("/metrics", get(metrics_text))
            .route("/healthz", get(healthz))
            .route("/readyz", get(readyz))
            .route("/v1/{*call}", any(controlled))
            .with_state(Arc::new(context));
        Admin { listener, address, router, control }
    }
}

impl Admin {
    /// Binds `address`.
    ///
    /// # Errors
    ///
    /// [`BindError`] says why the address can't be had, and what to do.
    pub async fn bind(address: SocketAddr) -> Result<Bound, BindError> {
        Self::take(address, &mut Handed::default()).await
    }

    /// The same where the process before may have handed its socket over.
    ///
    /// # Errors
    ///
    /// As [`Self::bind`].
    pub async fn take(wanted: SocketAddr, handed: &mut Handed) -> Result<Bound, BindError> {
        let bind_error = |error| BindError { address: wanted, error };
        let listener = match handed.take_tcp(wanted) {
            Some(socket) => TcpListener::from_std(socket.into()),
            None => TcpListener::bind(wanted).await,
        }
        .map_err(bind_error)?;
        let address = listener.local_addr().map_err(bind_error)?;
        Ok(Bound { listener, wanted, address })
    }

    /// The address that it listens on.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `shutdown` completes, and then until the answers on their way are written, but not for long.
    pub async fn run(self, shutdown: impl Future<Output = ()>) {
        self.run_until(async {
            shutdown.await;
            Ending::Drain
        })
        .await;
    }

    /// The same, where `ending` also says whether another process accepts from then on: then whoever was accepted before may still ask.
    pub async fn run_until(self, ending: impl Future<Output = Ending>) {
        let Self { listener, router, control, .. } = self;
        // Ends when it is dropped.
        let mut watching = JoinSet::new();
        if let Some(control) = control {
            watching.spawn(control.watch());
        }
        let room = Arc::new(Semaphore::new(MOST_CONNECTIONS));
        let graceful = GracefulShutdown::new();
        let mut connections = JoinSet::new();
        let mut ending = std::pin::pin!(ending);
        let ending = loop {
            tokio::select! {
                ending = &mut ending => break ending,
                (stream, peer, permit) = accept(&listener, &room) => {
                    let router = router.clone().layer(Extension(peer));
                    let connection = http1::Builder::new()
                        .timer(TokioTimer::new())
                        .header_read_timeout(HEAD_TIMEOUT)
                        .max_buf_size(LONGEST_HEAD_BYTES)
                        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
                    let connection = graceful.watch(connection);
                    connections.spawn(async move {
                        // A client that hangs up or sends nonsense is its own affair.
                        let _ = connection.await;
                        drop(permit);
                    });
                }
                Some(_) = connections.join_next() => {}
            }
        };
        drop(listener);
        if ending == Ending::HandOver {
            // A shutdown closes those that have not asked yet.
            let all = async { while connections.join_next().await.is_some() {} };
            let _ = tokio::time::timeout(LAST_REQUEST, all).await;
        }
        // What is not done by then is cut off with the tasks.
        let _ = tokio::time::timeout(SHUTDOWN_TIMEOUT, graceful.shutdown()).await;
    }
}

/// The next connection, once there is room for it.
async fn accept(listener: &TcpListener, room: &Arc<Semaphore>) -> (TcpStream, SocketAddr, OwnedSemaphorePermit) {
    loop {
        let Ok(permit) = Arc::clone(room).acquire_owned().await else {
            // It fails only if somebody closes the semaphore, and nobody does.
            std::future::pending::<()>().await;
            continue;
        };
        match listener.accept().await {
            Ok((stream, peer)) => return (stream, peer, permit),
            Err(error) => {
                tracing::warn!(%error, "can't accept a connection for metrics and health");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn metrics_text(Shared(context): Shared<Arc<Context>>) -> Response {
    // It fails only if somebody closes the semaphore, and nobody does.
    let _turn = context.scrape.acquire().await;
    let scrape = tokio::task::spawn_blocking({
        let context = Arc::clone(&context);
        move || context.metrics.encode()
    });
    if let Ok(Ok(text)) = scrape.await {
        ([(header::CONTENT_TYPE, OPENMETRICS)], text).into_response()
    } else {
        tracing::error!("the metrics could not be written");
        StatusCode::INTERNAL_SERVER_ERROR.into_response()
    }
}

async fn controlled(
    Shared(context): Shared<Arc<Context>>,
    Extension(peer): Extension<SocketAddr>,
    request: Request,
) -> Response {
    control::answer(context.control.as_ref(), context.is_loopback, peer, request).await
}

/// Overload does not make it dead, nor unready: it serves those that are in, and most often some more.
async fn healthz(Shared(context): Shared<Arc<Context>>) -> Json<serde_json::Value> {
    let strain = context.overload.strain();
    let overload = json!({ "refused_share": strain.refused_share, "because": strain.because });
    Json(json!({ "alive": true, "overload": overload }))
}

async fn readyz(Shared(context): Shared<Arc<Context>>) -> (StatusCode, Json<serde_json::Value>) {
    let state = context.readiness.get();
    let reason = match state {
        State::Ready => return (StatusCode::OK, Json(json!({ "ready": true, "state": state }))),
        State::Starting => "it is starting: not listening yet, or the kernel's part is not attached yet",
        State::Draining => "it is shutting down, and waits for its clients to close",
    };
    (StatusCode::SERVICE_UNAVAILABLE, Json(json!({ "ready": false, "state": state, "reason": reason })))
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
