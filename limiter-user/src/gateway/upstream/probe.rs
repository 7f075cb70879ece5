//! Health checks of the upstream servers.

use std::{convert::Infallible, sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    task::JoinSet,
    time::{interval, sleep, timeout},
};

use super::{
    super::{
        Shared,
        application::Application,
        exchange::{Request, exchange},
    },
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
    let host = match &target.at {
        Place::Host(name, port) if name.contains(':') => format!("[{name}]:{port}"),
        Place::Host(name, port) => format!("{name}:{port}"),
        Place::Unix(_) => "localhost".to_owned(),
    };
    let mut request = Request::get(path);
    request.own("host", host.as_bytes());
    request.own("connection", b"close");
    request.own("user-agent", b"limiter health check");
    match exchange(&mut stream, request).await {
        Ok(answer) if answer.status.is_success() => Ok(()),
        Ok(answer) => Err(format!("it answers {} to GET {path}", answer.status)),
        Err(error) => Err(format!("its answer to GET {path}: {error}")),
    }
}
