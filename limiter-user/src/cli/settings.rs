//! The flags that stand for keys of the configuration.

use std::{net::SocketAddr, path::Path};

use super::Global;
use crate::config::{AttachMode, Config, ConfigError, Listen, OnDeny, Overrides, Purpose, Upstream};

/// Flags of the kernel's side.
#[derive(Clone, Debug, Default, clap::Args)]
pub(super) struct KernelSettings {
    /// A network interface whose connections are limited (repeatable)
    #[arg(long = "interface", short, value_name = "NAME", env = "LIMITER_INTERFACE", value_delimiter = ',')]
    interfaces: Option<Vec<String>>,
    /// A TCP port that is protected (repeatable)
    #[arg(
        long = "port",
        short,
        value_name = "PORT",
        env = "LIMITER_PORT",
        value_delimiter = ',',
        value_parser = clap::value_parser!(u16).range(1..)
    )]
    ports: Option<Vec<u16>>,
    /// Connections that one source may hold; 0: any number [default: 20]
    #[arg(long, value_name = "COUNT", env = "LIMITER_CONNECTIONS_PER_SOURCE", allow_negative_numbers = true)]
    connections_per_source: Option<u32>,
    /// Connections that a service may hold in all; 0: any number [default: 10000]
    #[arg(long, value_name = "COUNT", env = "LIMITER_CONNECTIONS_TOTAL", allow_negative_numbers = true)]
    connections_total: Option<u32>,
    /// New connections per second that one source may open; 0: any number [default: 10]
    #[arg(
        long,
        value_name = "COUNT",
        env = "LIMITER_CONNECTION_RATE",
        allow_negative_numbers = true,
        value_parser = clap::value_parser!(u32).range(..=1_000_000)
    )]
    connection_rate: Option<u32>,
    /// What the SYN of a source at its limit gets [default: drop]
    #[arg(long, value_enum, value_name = "ACTION", env = "LIMITER_ON_DENY")]
    on_deny: Option<OnDeny>,
    /// Where packets are seen: by XDP in the driver or in the network stack, or by TC [default: auto]
    #[arg(long, value_enum, value_name = "MODE", env = "LIMITER_ATTACH_MODE")]
    attach_mode: Option<AttachMode>,
}

/// Flags of the gateway's side.
#[derive(Clone, Debug, Default, clap::Args)]
pub(super) struct GatewaySettings {
    /// Where the gateway listens: an address, unix:PATH, systemd or fd:NAME (repeatable) [default: 0.0.0.0:8080]
    #[arg(long, value_name = "ADDRESS", env = "LIMITER_LISTEN", value_delimiter = ',')]
    listen: Option<Vec<Listen>>,
    #[arg(
        long,
        value_name = "URL|echo|broadcast",
        help = "What stands behind the gateway: echo, broadcast, or a URL such as ws://127.0.0.1:9000 [default: echo]",
        env = "LIMITER_UPSTREAM"
    )]
    upstream: Option<Upstream>,
    /// The address for metrics and health; an empty one for none [default: 127.0.0.1:9180]
    #[arg(long, value_name = "ADDRESS", env = "LIMITER_ADMIN", value_parser = AdminAddress::parse)]
    admin: Option<AdminAddress>,
}

/// An address, or none. A type of its own, because clap takes `Option<Option<_>>` for a flag whose value may be missing.
#[derive(Clone, Copy, Debug)]
struct AdminAddress(Option<SocketAddr>);

impl AdminAddress {
    fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Ok(Self(None));
        }
        let expected = r#"expected an address and a port, such as 127.0.0.1:9180, or "" for none"#;
        text.parse().map(|address| Self(Some(address))).map_err(|_| expected.to_owned())
    }
}

/// The configuration of `run`.
pub(super) fn for_run(
    global: &Global,
    kernel: KernelSettings,
    gateway: GatewaySettings,
) -> Result<Config, ConfigError> {
    let overrides = Overrides {
        listen: gateway.listen,
        upstream: gateway.upstream,
        admin: gateway.admin.map(|AdminAddress(address)| address),
        ..overrides(global, kernel)
    };
    Config::resolve(global.config(), &overrides, Purpose::Run)
}

/// The configuration of `attach`.
pub(super) fn for_attach(global: &Global, kernel: KernelSettings) -> Result<Config, ConfigError> {
    Config::resolve(global.config(), &overrides(global, kernel), Purpose::Attach)
}

fn overrides(global: &Global, kernel: KernelSettings) -> Overrides {
    Overrides {
        interfaces: kernel.interfaces,
        ports: kernel.ports,
        connections_per_source: kernel.connections_per_source,
        connections_total: kernel.connections_total,
        connection_rate: kernel.connection_rate,
        on_deny: kernel.on_deny,
        attach_mode: kernel.attach_mode,
        pin_path: global.pin_path.as_deref().map(Path::to_owned),
        ..Overrides::default()
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::super::{Cli, Command, run};
    use super::*;

    fn run_config(arguments: &[&str]) -> Config {
        let cli = Cli::try_parse_from([&["limiter", "run"], arguments].concat()).unwrap();
        let Command::Run(run::Args { kernel, gateway }) = cli.command else { panic!("not run") };
        for_run(&cli.global, kernel, gateway).unwrap()
    }

    #[test]
    fn every_flag_of_run_reaches_its_key() {
        let config = run_config(&[
            "--interface",
            "eth0",
            "--interface",
            "eth1",
            "--port",
            "81",
            "--listen",
            "127.0.0.1:81",
            "--upstream",
            "ws://127.0.0.1:9000",
            "--connections-per-source",
            "1",
            "--connections-total",
            "2",
            "--connection-rate",
            "3",
            "--on-deny",
            "observe",
            "--attach-mode",
            "generic",
            "--pin-path",
            "/p",
            "--admin",
            "",
        ]);
        assert_eq!(config.kernel.interfaces, ["eth0", "eth1"]);
        assert_eq!(config.services.len(), 1);
        let service = &config.services[0];
        assert_eq!(service.ports, [81]);
        assert_eq!((service.limits.connections_per_source, service.limits.connections_total), (1, 2));
        assert_eq!(service.limits.connection_rate, 3);
        assert_eq!(service.on_deny, OnDeny::Observe);
        assert_eq!(config.kernel.attach_mode, AttachMode::Generic);
        assert_eq!(config.kernel.pin_path, Path::new("/p"));
        assert_eq!(config.gateway.listen, ["127.0.0.1:81".parse().unwrap()]);
        assert_eq!(config.gateway.upstream, "ws://127.0.0.1:9000".parse().unwrap());
        assert_eq!(config.admin.listen, None);
    }

    #[test]
    fn without_flags_run_has_the_defaults() {
        let config = run_config(&[]);
        assert_eq!(Config { services: Vec::new(), ..config }, Config::default());
    }
}
