//! SIGHUP: the configuration is read again, and all of it that can change while clients are connected is put in force; or,
//! if anything in it is wrong, nothing.

use std::{collections::HashMap, net::SocketAddr, sync::Arc, time::Duration};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};
use tokio::sync::watch;

use super::{Args, fixed};
use crate::{
    cli::{Global, Usage, exit, logging, settings},
    config::Config,
    gateway,
    kernel::{Control, Pinned, PolicyMark},
};

/// What it takes to read the configuration again, and whom to tell.
pub(super) struct Reloader {
    typed: Typed,
    /// What is in force.
    config: Config,
    gateways: Vec<RunningGateway>,
    kernel: Option<KernelSettings>,
    results: Family<ResultLabel, Counter>,
}

/// What was typed: flags go before the file at every reload, too.
pub(super) struct Typed {
    pub(super) global: Global,
    pub(super) args: Args,
    /// Ports that the gateway listens on, by whatever hand.
    pub(super) ports: Vec<u16>,
}

/// One gateway, and the addresses that it listens on.
pub(super) struct RunningGateway {
    pub(super) service: String,
    pub(super) listen: Vec<SocketAddr>,
    pub(super) settings: gateway::Settings,
}

/// What changes on the kernel's side.
pub(super) struct KernelSettings {
    pub(super) pinned: Arc<Pinned>,
    pub(super) control: Arc<Control>,
    /// How often the ledger is audited.
    pub(super) audit_interval: watch::Sender<Duration>,
    /// Names of services by their index.
    pub(super) names: watch::Sender<HashMap<u32, String>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabel {
    result: &'static str,
}

impl Reloader {
    pub(super) fn new(
        typed: Typed,
        config: Config,
        gateways: Vec<RunningGateway>,
        kernel: Option<KernelSettings>,
        registry: &mut Registry,
    ) -> Self {
        let results = Family::default();
        registry.register("config_reloads", "Times that the configuration was read again", results.clone());
        Self { typed, config, gateways, kernel, results }
    }

    /// How long the shutdown waits for clients, as it is in force.
    pub(super) fn drain_timeout(&self) -> Duration {
        self.config.gateway.drain_timeout
    }

    /// Reads it again, and says in the log what came of it. Blocks.
    pub(super) fn reload(&mut self) {
        match self.try_reload() {
            Ok(restart) => {
                for key in restart {
                    tracing::warn!(key, "it has changed, and takes a restart: the old value stays in force");
                }
                for warning in self.config.warnings() {
                    tracing::warn!("{warning}");
                }
                self.count("ok");
                tracing::info!("the configuration was read again and is in force");
            }
            Err(error) => {
                for problem in exit::messages(&error) {
                    tracing::error!("{problem}");
                }
                self.count("failed");
                tracing::error!(
                    "the configuration was read again and can't be used: the old one stays in force, whole"
                );
            }
        }
    }

    /// Tells whether the kernel's policy is still the one of now: see [`Self::restore_policy`].
    pub(super) fn policy_mark(&self) -> Option<PolicyMark> {
        self.kernel.as_ref().and_then(|kernel| kernel.pinned.policy_mark().ok())
    }

    /// Puts this process's configuration in force again in the kernel, if something else is there than at the time of the mark.
    /// Blocks for a moment.
    pub(super) fn restore_policy(&self, mark: Option<PolicyMark>) {
        let (Some(kernel), Some(mark)) = (&self.kernel, mark) else { return };
        if kernel.pinned.policy_mark().is_ok_and(|now| now == mark) {
            return;
        }
        let Config { services, rules, .. } = &self.config;
        let restored = kernel.pinned.put(services, rules, self.config.kernel.on_full);
        match restored.and_then(|_| kernel.pinned.put_delivery(&kernel.control, services)) {
            Ok(_) => tracing::warn!(
                "the new process had changed the kernel's policy: put back that of this one's configuration"
            ),
            Err(error) => tracing::error!(
                error = format!("{:#}", anyhow::Error::from(error)),
                "the new process has changed the kernel's policy, and this one's can't be put back: reload (SIGHUP)"
            ),
        }
    }

    fn count(&self, result: &'static str) {
        self.results.get_or_create(&ResultLabel { result }).inc();
    }

    /// Gives the keys whose new values are not in force.
    fn try_reload(&mut self) -> anyhow::Result<Vec<&'static str>> {
        let Typed { global, args, ports } = &self.typed;
        let mut config = settings::for_run(global, args.kernel.clone(), args.gateway.clone())?;
        config.cover(ports);
        let restart = keep_fixed(&self.config, &mut config);
        self.check_services(&config)?;

        // Everything that can fail comes before anything is changed; of what is changed, the kernel's part first, since that
        // can still be refused, in one step.
        let filter = logging::filter(&config.log.level)?;
        let mut prepared = Vec::new();
        for running in &self.gateways {
            // With the kernel's part, the gateway reads its limits there.
            let service = config.services.iter().find(|service| service.name == running.service);
            let policy = service.filter(|_| self.kernel.is_none()).map(|service| fixed(service, &config));
            prepared.push(running.settings.prepare(&config.gateway, policy)?);
        }
        if let Some(kernel) = &self.kernel {
            let placed = kernel.pinned.put(&config.services, &config.rules, config.kernel.on_full)?;
            match kernel.pinned.put_delivery(&kernel.control, &config.services) {
                Ok(delivery) => delivery.warning().iter().for_each(|warning| tracing::warn!("{warning}")),
                // The limits hold without it, if less exactly.
                Err(error) => tracing::warn!("{:#}", anyhow::Error::from(error)),
            }
            kernel.names.send_replace(placed.into_iter().map(|(index, service)| (index, service.name)).collect());
            kernel.audit_interval.send_replace(config.kernel.audit_interval);
        }
        prepared.into_iter().for_each(gateway::PreparedSettings::commit);
        logging::change(filter);
        self.config = config;
        Ok(restart)
    }

    /// That each gateway's addresses still belong to the service that they belong to now.
    fn check_services(&self, config: &Config) -> Result<(), Usage> {
        for running in &self.gateways {
            for address in &running.listen {
                let owner = config.services.iter().find(|service| service.ports_here().contains(&address.port()));
                if owner.is_none_or(|service| service.name != running.service) {
                    let now = owner.map_or_else(|| "no service".to_owned(), |service| format!("{:?}", service.name));
                    return Err(Usage(format!(
                        "service: the gateway listens on {address} for {:?}, and the port would belong to {now}: that \
                         takes a restart",
                        running.service
                    )));
                }
            }
        }
        Ok(())
    }
}

/// Puts the values in force in the place of new ones that take a restart. Gives the keys where that makes a difference.
fn keep_fixed(old: &Config, new: &mut Config) -> Vec<&'static str> {
    let mut restart = Vec::new();
    let (old_kernel, new_kernel) = (&old.kernel, &mut new.kernel);
    keep("kernel.interfaces", &old_kernel.interfaces, &mut new_kernel.interfaces, &mut restart);
    keep("kernel.attach_mode", &old_kernel.attach_mode, &mut new_kernel.attach_mode, &mut restart);
    keep("kernel.pin_path", &old_kernel.pin_path, &mut new_kernel.pin_path, &mut restart);
    keep("kernel.max_connections", &old_kernel.max_connections, &mut new_kernel.max_connections, &mut restart);
    keep("kernel.max_rules", &old_kernel.max_rules, &mut new_kernel.max_rules, &mut restart);
    keep("kernel.challenge", &old_kernel.challenge, &mut new_kernel.challenge, &mut restart);
    let threshold = &mut new_kernel.challenge_threshold;
    keep("kernel.challenge_threshold", &old_kernel.challenge_threshold, threshold, &mut restart);
    let timestamps = &mut new_kernel.challenge_timestamps;
    keep("kernel.challenge_timestamps", &old_kernel.challenge_timestamps, timestamps, &mut restart);
    keep("kernel.debug_log", &old_kernel.debug_log, &mut new_kernel.debug_log, &mut restart);
    keep("gateway.listen", &old.gateway.listen, &mut new.gateway.listen, &mut restart);
    keep("gateway.unix_mode", &old.gateway.unix_mode, &mut new.gateway.unix_mode, &mut restart);
    keep("gateway.reuse_port", &old.gateway.reuse_port, &mut new.gateway.reuse_port, &mut restart);
    keep("admin.listen", &old.admin.listen, &mut new.admin.listen, &mut restart);
    keep("admin.token_file", &old.admin.token_file, &mut new.admin.token_file, &mut restart);
    keep("log.format", &old.log.format, &mut new.log.format, &mut restart);
    restart
}

fn keep<T: Clone + PartialEq>(key: &'static str, old: &T, new: &mut T, restart: &mut Vec<&'static str>) {
    if old != new {
        new.clone_from(old);
        restart.push(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{AttachMode, ChallengeMode};

    #[test]
    fn what_takes_a_restart_stays_and_is_named() {
        let old = Config::default();
        let mut new = old.clone();
        assert_eq!(keep_fixed(&old, &mut new), Vec::<&str>::new());
        new.kernel.attach_mode = AttachMode::Generic;
        new.kernel.max_rules = 7;
        new.kernel.challenge = ChallengeMode::Auto;
        new.kernel.challenge_threshold = 5;
        new.kernel.challenge_timestamps = true;
        new.gateway.listen = vec!["127.0.0.1:1".parse().unwrap()];
        new.admin.listen = None;
        new.admin.token_file = Some("/t".into());
        new.gateway.drain_timeout = Duration::from_secs(1);
        new.kernel.audit_interval = Duration::from_secs(1);
        let named = [
            "kernel.attach_mode",
            "kernel.max_rules",
            "kernel.challenge",
            "kernel.challenge_threshold",
            "kernel.challenge_timestamps",
            "gateway.listen",
            "admin.listen",
            "admin.token_file",
        ];
        assert_eq!(keep_fixed(&old, &mut new), named);
        let mut expected = old;
        expected.gateway.drain_timeout = Duration::from_secs(1);
        expected.kernel.audit_interval = Duration::from_secs(1);
        assert_eq!(new, expected, "everything else is new");
    }
}
