//! `limiter run`.

mod audits;
mod daemon;
mod hand_over;
mod interfaces;
mod kernel_side;
mod open_files;
mod refusals;
mod reload;
mod signals;

#[cfg(test)]
pub(crate) use open_files::raise as raise_open_files;

use std::{collections::HashMap, sync::Arc};

use anyhow::{Context as _, bail};

use super::{
    Global, Usage, logging,
    settings::{self, GatewaySettings, KernelSettings as KernelFlags},
};
use crate::{
    admin::{self, Admin, Control, Readiness},
    config::{Config, OnDeny, Service},
    gateway::{self, AllServices, Gateway, Handed, Place, Sockets},
    kernel::{Attached, Pinned},
    policy::{Fixed, Policy},
};
use daemon::Daemon;
use hand_over::{Inheritance, Program, Succession};
use kernel_side::{KernelSide, Refusals};
use reload::{KernelSettings, Reloader, RunningGateway, Typed};
use signals::Signals;
use tokio::sync::watch;

/// What signals do, for the help.
pub(super) const SIGNALS: &str = "Signals: SIGTERM and SIGINT close the sessions and end it, a second one at once; SIGHUP reads the \
     configuration again; SIGUSR2 upgrades it: the binary that is in its place by now is started and takes over, and nobody is refused.";

#[derive(Clone, Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    pub(super) kernel: KernelFlags,
    #[command(flatten)]
    pub(super) gateway: GatewaySettings,
}

pub(super) fn run(global: &Global, args: Args) -> anyhow::Result<()> {
    let program = Program::this();
    let inheritance = Inheritance::take()?;
    let config = settings::for_run(global, args.kernel.clone(), args.gateway.clone())?;
    logging::start(&config.log)?;
    open_files::raise();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("can't start the threads")?;
    let typed = Typed { global: global.clone(), args, ports: Vec::new() };
    runtime.block_on(serve(&config, typed, program, inheritance))
}

async fn serve(config: &Config, typed: Typed, program: Program, inheritance: Inheritance) -> anyhow::Result<()> {
    // Before anything is attached, so that no signal can end the process half-way.
    let signals = Signals::new()?;
    let Inheritance { sockets: mut handed, admin: handed_admin, lock, predecessor } = inheritance;
    let sockets = Sockets::take_among(&config.gateway, &mut handed)?;
    let ports: Vec<u16> = sockets.places().filter_map(Place::tcp).map(|address| address.port()).collect();
    let mut config = config.clone();
    config.cover(&ports);
    let (config, typed) = (&config, Typed { ports, ..typed });
    let succession = Succession::new(program, predecessor, handed);
    let addresses = Addresses::take(config, sockets, handed_admin, succession).await?;
    for warning in config.warnings() {
        tracing::warn!("{warning}");
    }
    if config.kernel.interfaces.is_empty() {
        tracing::info!("no interface is configured: the gateway keeps the limits alone");
        let policies = config.services.iter().map(|service| (service.name.clone(), fixed(service, config))).collect();
        return addresses.open(policies, None, config, typed)?.run(signals, None).await;
    }

    let (mut attached, report) = Attached::attach_after(&config.kernel, &config.services, &config.rules, lock)?;
    super::attach::log(&report);
    // Before anybody new is let in, so that it is clear who was there before.
    super::attach::log_adopted(super::attach::adopt_open(&attached, !config.kernel.audit_interval.is_zero()));
    match open_attached(config, addresses, &mut attached, typed) {
        Ok(daemon) => daemon.run(signals, Some(attached)).await,
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

fn open_attached(
    config: &Config,
    addresses: Addresses,
    attached: &mut Attached,
    typed: Typed,
) -> anyhow::Result<Daemon> {
    let policies = attached
        .policies()?
        .into_iter()
        .map(|(service, policy)| (service.name, Arc::new(policy) as Arc<dyn Policy>))
        .collect();
    let pinned = Pinned::open(&config.kernel.pin_path)?;
    let (names, services) = watch::channel(pinned.services()?.into_iter().map(|row| (row.index, row.name)).collect());
    let refusals = attached.take_events().map(|events| Refusals { events, services });
    let (audit_interval, intervals) = watch::channel(config.kernel.audit_interval);
    let side = KernelSide {
        refusals,
        control: attached.control(),
        debug_log: attached.take_debug_log(),
        auditor: attached.auditor()?,
        keeper: attached.keeper()?,
        challenges: attached.challenges()?,
        audit_interval: intervals,
    };
    let settings = KernelSettings { pinned: Arc::new(pinned), control: attached.control(), audit_interval, names };
    addresses.open(policies, Some((side, settings)), config, typed)
}

fn fixed(service: &Service, config: &Config) -> Arc<dyn Policy> {
    Arc::new(Fixed::new(service.limits, &config.rules).observing(service.on_deny == OnDeny::Observe))
}

/// Every address of the daemon, taken before anything is done to the host: what can't be had is known by then.
struct Addresses {
    /// One gateway for each service that the gateway listens for, with the service's name.
    gateways: Vec<(String, gateway::Reserved)>,
    admin: Option<admin::Bound>,
    control: Option<Control>,
    succession: Succession,
}

impl Addresses {
    async fn take(
        config: &Config,
        mut sockets: Sockets,
        mut handed_admin: Handed,
        mut succession: Succession,
    ) -> anyhow::Result<Self> {
        const KEEP: &str = "can't keep a socket for an upgrade";
        succession.keep_sockets(sockets.spares().context(KEEP)?);
        let mut gateways = Vec::new();
        for (i, service) in config.services.iter().enumerate() {
            // A unix socket has no port that would say whose it is.
            let of_service = sockets.split_off(|place| match place.tcp() {
                Some(address) => service.ports_here().contains(&address.port()),
                None => i == 0,
            });
            // Without one, a server of its own listens there.
            if !of_service.is_empty() {
                gateways.push((service.name.clone(), Gateway::reserve_on(&config.gateway, of_service)?));
            }
        }
        if let Some(place) = sockets.places().next() {
            bail!(Usage(format!(
                "gateway.listen: {place}, which was handed over, would have no limits, since no [[service]] has its port: add \
                 it to one"
            )));
        }
        let admin = match config.admin.listen {
            Some(address) => Some(Admin::take(address, &mut handed_admin).await?),
            None => None,
        };
        succession.keep_admin(admin.as_ref().map(admin::Bound::spare).transpose().context(KEEP)?, handed_admin);
        let control = match &config.admin.token_file {
            Some(path) => Some(Control::new(path).context("admin.token_file")?),
            None => None,
        };
        Ok(Self { gateways, admin, control, succession })
    }

    /// Lets clients connect. `policies`: by the service's name.
    fn open(
        mut self,
        mut policies: HashMap<String, Arc<dyn Policy>>,
        kernel: Option<(KernelSide, KernelSettings)>,
        config: &Config,
        typed: Typed,
    ) -> anyhow::Result<Daemon> {
        let gateway_metrics = Arc::new(gateway::Metrics::default());
        let mut metrics = admin::Metrics::default();
        gateway_metrics.register(metrics.registry());

        let all = AllServices::default();
        let mut gateways = Vec::new();
        let mut running = Vec::new();
        for (service, reserved) in self.gateways {
            let policy = policies.remove(&service).with_context(|| format!("the service {service} has no policy"))?;
            let gateway = reserved.open_among(policy, Arc::clone(&gateway_metrics), all.clone())?;
            for address in gateway.places() {
                tracing::info!(%address, service, "listening");
            }
            let listen = gateway.local_addrs().to_vec();
            if let Some(control) = &mut self.control {
                control.lead_to(gateway.push());
            }
            running.push(RunningGateway { service, listen, settings: gateway.settings() });
            gateways.push(gateway);
        }
        let (kernel, kernel_settings) = kernel.unzip();
        if let Some(KernelSettings { pinned, .. }) = &kernel_settings {
            metrics.add_kernel(Arc::clone(pinned) as Arc<dyn admin::KernelState>);
        }
        let reloader = Reloader::new(typed, config.clone(), running, kernel_settings, metrics.registry());
        let readiness = Readiness::default();
        let admin =
            self.admin.map(|bound| bound.showing(metrics, readiness.clone(), gateway_metrics.overload(), self.control));
        Ok(Daemon { gateways, admin, readiness, kernel, reloader, succession: self.succession })
    }
}
