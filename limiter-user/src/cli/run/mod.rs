//! `limiter run`.

mod daemon;
mod open_files;
mod refusals;
mod signals;

use std::{collections::HashMap, sync::Arc};

use anyhow::Context as _;

use super::{
    Global, logging,
    settings::{self, GatewaySettings, KernelSettings},
};
use crate::{
    admin::{self, Admin, Readiness},
    config::{Config, Service},
    gateway::{self, Gateway},
    kernel::{Attached, Events, Pinned},
    policy::{Fixed, Policy},
};
use daemon::{Daemon, Refusals};
use signals::Signals;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    pub(super) kernel: KernelSettings,
    #[command(flatten)]
    pub(super) gateway: GatewaySettings,
}

pub(super) fn run(global: &Global, args: Args) -> anyhow::Result<()> {
    let config = settings::for_run(global, args.kernel, args.gateway)?;
    logging::start(&config.log)?;
    open_files::raise();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("can't start the threads")?;
    runtime.block_on(serve(&config))
}

async fn serve(config: &Config) -> anyhow::Result<()> {
    // Before anything is attached, so that no signal can end the process half-way.
    let signals = Signals::new()?;
    if config.kernel.interfaces.is_empty() {
        tracing::info!("no interface is configured: the gateway keeps the limits alone");
        let policies = config.services.iter().map(|service| (service.clone(), fixed(service))).collect();
        return start(config, policies, None).await?.run(signals).await;
    }

    let (mut attached, report) = Attached::attach(&config.kernel, &config.services)?;
    super::attach::log(&report);
    match start_attached(config, &mut attached).await {
        // Held until the end: it keeps other daemons off.
        Ok(daemon) => {
            let ended = daemon.run(signals).await;
            tracing::info!("the limits in the kernel stay in force; `limiter detach` removes them");
            drop(attached);
            ended
        }
        Err(error) if report.taken_over => Err(error),
        Err(error) => {
            // What was there before is what stays: nothing.
            if let Err(failed) = attached.detach() {
                tracing::error!(error = %failed, "can't take the kernel's part away again: use `limiter detach`");
            }
            Err(error)
        }
    }
}

async fn start_attached(config: &Config, attached: &mut Attached) -> anyhow::Result<Daemon> {
    let policies = attached
        .policies()?
        .into_iter()
        .map(|(service, policy)| (service, Arc::new(policy) as Arc<dyn Policy>))
        .collect();
    let pinned = Pinned::open(&config.kernel.pin_path)?;
    let events = attached.take_events();
    start(config, policies, Some((pinned, events))).await
}

fn fixed(service: &Service) -> Arc<dyn Policy> {
    Arc::new(Fixed(service.limits))
}

/// Binds everything; nothing is served yet.
async fn start(
    config: &Config,
    policies: Vec<(Service, Arc<dyn Policy>)>,
    kernel: Option<(Pinned, Option<Events>)>,
) -> anyhow::Result<Daemon> {
    let gateway_metrics = Arc::new(gateway::Metrics::default());
    let mut metrics = admin::Metrics::default();
    gateway_metrics.register(metrics.registry());

    let gateways = gateways(config, policies, &gateway_metrics)?;
    let mut refusals = None;
    if let Some((pinned, events)) = kernel {
        let services: HashMap<u32, String> = pinned.services()?.into_iter().map(|row| (row.index, row.name)).collect();
        refusals = events.map(|events| Refusals { events, services });
        metrics.add_kernel(Arc::new(pinned));
    }
    let readiness = Readiness::default();
    let admin = match config.admin.listen {
        Some(address) => Some(Admin::bind(address, metrics, readiness.clone()).await?),
        None => None,
    };
    Ok(Daemon { gateways, admin, readiness, refusals })
}

/// One gateway for each service that the gateway listens for: its limits are those of its port.
fn gateways(
    config: &Config,
    policies: Vec<(Service, Arc<dyn Policy>)>,
    metrics: &Arc<gateway::Metrics>,
) -> anyhow::Result<Vec<Gateway>> {
    let mut gateways = Vec::new();
    for (service, policy) in policies {
        let mut of_service = config.gateway.clone();
        of_service.listen.retain(|address| service.ports.contains(&address.port()));
        if of_service.listen.is_empty() {
            // A server of its own listens there.
            continue;
        }
        let gateway = Gateway::bind(&of_service, policy, Arc::clone(metrics))?;
        for address in gateway.local_addrs() {
            tracing::info!(%address, service = service.name, upstream = ?of_service.upstream, "listening");
        }
        gateways.push(gateway);
    }
    Ok(gateways)
}
