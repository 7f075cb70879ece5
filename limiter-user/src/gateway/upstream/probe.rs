//! Health checks of the upstream servers.

use std::{convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::Empty;
use hyper::{
    Request, Uri,
    header::{CONNECTION, HOST, HeaderValue, USER_AGENT},
};
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{interval, sleep, timeout},
};

use super::{
    super::{Shared, application::Application},
    handshake::{Exchanged, exchange},
    server::Server,
    stream::{ClientTls, Stream},
};
use crate::config::{self, Place, Target};

/// Checks every server of the newest settings, for ever.
pub(in crate::gateway) async fn probe(mut current: watch::Receiver<Arc<Shared>>) -> Infallible {
    loop {
        let mut checks = JoinSet::new();
        {
            let shared = Arc::clone(&current.borrow_and_update());
            let health = &shared.config.health;
            for (target, server, tls) in servers(&shared) {
                if health.interval.is_zero() {
                    server.unchecked();
                } else {
                    checks.spawn(check_on(target, server, tls, health.clone()));
                }
            }
        }
        if current.changed().await.is_err() {
            // Nobody can change them any more.
            while checks.join_next().await.is_some() {}
            std::future::pending::<()>().await;
        }
    }
}

type Checked = (Target, Arc<Server>, Option<Arc<ClientTls>>);

/// Each server once, however many routes lead to it.
fn servers(shared: &Shared) -> Vec<Checked> {
    let mut all: Vec<Checked> = Vec::new();
    for application in shared.routes.applications() {
        let Application::Relay(upstreams) = application else { continue };
        for (target, server) in upstreams.servers() {
            if !all.iter().any(|(_, known, _)| Arc::ptr_eq(known, server)) {
                all.push((target.clone(), Arc::clone(server), upstreams.tls.clone()));
            }
        }
    }
    all
}

async fn check_on(target: Target, server: Arc<Server>, tls: Option<Arc<ClientTls>>, health: config::Health) {
    // Not all at the same moment.
    sleep(health.interval.mul_f64(fastrand::f64()).min(Duration::from_secs(1))).await;
    let mut ticks = interval(health.interval);
    loop {
        ticks.tick().await;
        let checked = timeout(health.timeout, check(&target, tls.as_deref(), &health)).await;
        server.checked(checked.unwrap_or_else(|_| Err("no answer in time".into())), &health);
    }
}

/// An error says what is wrong.
async fn check(target: &Target, tls: Option<&ClientTls>, health: &config::Health) -> Result<(), String> {
    let mut stream = Stream::connect(target, tls).await?;
    let Some(path) = &health.path else {
        _ = stream.end_tls().await;
        return Ok(());
    };
    let mut request = Request::new(Empty::<Bytes>::new());
    *request.uri_mut() = Uri::from(path.clone());
    let host = match &target.at {
        Place::Host(name, port) if name.contains(':') => format!("[{name}]:{port}"),
        Place::Host(name, port) => format!("{name}:{port}"),
        Place::Unix(_) => "localhost".to_owned(),
    };
    let headers = request.headers_mut();
    headers.insert(HOST, HeaderValue::from_str(&host).map_err(|error| error.to_string())?);
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    headers.insert(USER_AGENT, HeaderValue::from_static("limiter health check"));
    match exchange(stream, request).await {
        Ok(Exchanged::Refused { status, .. }) if status.is_success() => Ok(()),
        Ok(Exchanged::Refused { status, .. }) => Err(format!("it answers {status} to GET {path}")),
        Ok(Exchanged::Upgraded { .. }) => Err(format!("it answers 101 to GET {path}")),
        Err(error) => Err(format!("its answer to GET {path}: {error}")),
    }
}
