//! One configuration out of the file, the environment and the flags.

use std::{
    collections::BTreeSet,
    fs::File as FsFile,
    io::{self, Read},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::SystemTime,
};

use super::{
    AttachMode, Config, ConfigError, Listen, OnDeny, Service, Upstream,
    parse::{self, File},
    value,
};

/// Name of the service that stands for ports which the file gives no name.
pub const DEFAULT_SERVICE: &str = "default";

/// Longest file that is read: room for some hundred thousand rules.
const LONGEST_FILE_BYTES: u64 = 1 << 25;

/// Rules that are warned of by name; more are only counted.
const MOST_WARNINGS: usize = 10;

/// What the command line and the environment say; each value takes the place of the file's.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Overrides {
    /// In place of `kernel.interfaces`.
    pub interfaces: Option<Vec<String>>,
    /// In place of the ports of the service, see [`Config::resolve`].
    pub ports: Option<Vec<u16>>,
    /// In place of `gateway.listen`.
    pub listen: Option<Vec<Listen>>,
    /// In place of `gateway.upstream`.
    pub upstream: Option<Upstream>,
    /// In place of `connections_per_source` in `[limits]` and in every `[[service]]`.
    pub connections_per_source: Option<u32>,
    /// In place of `connections_total` in `[limits]` and in every `[[service]]`.
    pub connections_total: Option<u32>,
    /// In place of `connection_rate` in `[limits]` and in every `[[service]]`.
    pub connection_rate: Option<u32>,
    /// In place of `on_deny` in `[kernel]` and in every `[[service]]`.
    pub on_deny: Option<OnDeny>,
    /// In place of `kernel.attach_mode`.
    pub attach_mode: Option<AttachMode>,
    /// In place of `kernel.pin_path`.
    pub pin_path: Option<PathBuf>,
    /// In place of `admin.listen`; `Some(None)`: nowhere.
    pub admin: Option<Option<SocketAddr>>,
}

/// What the configuration is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A gateway, with or without the kernel's part.
    Run,
    /// The kernel's part alone, in front of a server that is not ours.
    Attach,
}

impl Config {
    /// The file of that path, checked, with nothing added to it.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        read_file(path).map(|file| file.config)
    }

    /// The same; and the files that it names are read as well, and are good.
    pub fn check_file(path: &Path) -> Result<Self, ConfigError> {
        parse::parse_with_files(path, &read_text(path)?).map(|file| file.config)
    }

    /// What is in force: the flags and the environment (`overrides`), else the file, else the defaults.
    ///
    /// The services that the result has, of which there is at least one:
    ///
    /// 1. Those of the file. `--port` stands for the ports of the only one, and is refused where there are several.
    /// 2. If the file has none: one named [`DEFAULT_SERVICE`], with the ports of `--port`.
    /// 3. Without `--port` either: the same with the ports that the gateway listens on. [`Purpose::Attach`] does that
    ///    only if a flag or the file names these, since it must not protect a port that nobody has mentioned.
    ///
    /// Under [`Purpose::Run`] the gateway listens on the ports of `--port` where neither a flag nor the file says
    /// otherwise, and each port that it listens on must be a service's.
    pub fn resolve(file: Option<&Path>, overrides: &Overrides, purpose: Purpose) -> Result<Self, ConfigError> {
        let file = file.map_or_else(|| Ok(File::default()), read_file)?;
        merge(file, overrides, purpose)
    }

    /// Adds the ports of sockets that were handed over to the service that stands for all that the gateway listens on, if
    /// there is that one.
    pub fn cover(&mut self, ports: &[u16]) {
        if let [service] = self.services.as_mut_slice()
            && service.name == DEFAULT_SERVICE
            && service.ports.is_empty()
        {
            let ports: BTreeSet<u16> = ports.iter().copied().collect();
            service.ports.extend(ports);
        }
    }

    /// What is legal, and probably not meant.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = self.warnings_of_rules();
        warnings.extend(self.warning_of_openness());
        warnings
    }

    /// The same as far as the kernel's part is concerned: the rules that have ended, and so are left out.
    pub fn warnings_of_rules(&self) -> Vec<String> {
        let now = SystemTime::now();
        let mut ended = self.rules.iter().filter(|rule| rule.has_ended(now));
        let mut warnings: Vec<_> = ended
            .by_ref()
            .take(MOST_WARNINGS)
            .map(|rule| {
                let at = rule.expires.map_or_else(String::new, |at| humantime::format_rfc3339_seconds(at).to_string());
                format!("rule: that for {} ended at {at} and is left out; take it out of the file", rule.cidr)
            })
            .collect();
        match ended.count() {
            0 => {}
            more => warnings.push(format!("rule: {more} more have ended and are left out")),
        }
        warnings
    }

    fn warning_of_openness(&self) -> Option<String> {
        let is_public = |address: &SocketAddr| match address.ip().to_canonical() {
            IpAddr::V4(ip) => !(ip.is_loopback() || ip.is_private() || ip.is_link_local()),
            IpAddr::V6(ip) => !(ip.is_loopback() || ip.is_unique_local() || ip.is_unicast_link_local()),
        };
        let gateway = &self.gateway;
        let public = gateway.listen.iter().filter_map(Listen::tcp).find(is_public);
        match (public, &gateway.upstream) {
            (Some(address), Upstream::Relay(_)) if gateway.auth.is_none() => Some(format!(
                "gateway.listen: whoever reaches {address} is led to the upstream, since clients need not show who they \
                 are: configure [gateway.auth], or listen on a private address, or leave it at that if the application \
                 sees to it"
            )),
            (Some(address), Upstream::Broadcast) if gateway.auth.is_none() => Some(format!(
                "gateway.listen: whoever reaches {address} can send to everybody in a room and hear what they say, since \
                 clients need not show who they are: configure [gateway.auth], or listen on a private address, or leave \
                 it at that if everybody is welcome"
            )),
            _ => None,
        }
    }

    /// Where the state is pinned: `given` (by flag or environment), else what the file says, else the default.
    pub fn pin_path(file: Option<&Path>, given: Option<&Path>) -> Result<PathBuf, ConfigError> {
        let config = file.map_or_else(|| Ok(Self::default()), Self::from_file)?;
        let pin_path = given.map_or(config.kernel.pin_path, Path::to_owned);
        check_pin_path(&pin_path)?;
        Ok(pin_path)
    }
}

fn read_file(path: &Path) -> Result<File, ConfigError> {
    parse::parse(path, &read_text(path)?)
}

/// The text of a configuration file.
pub(super) fn read_text(path: &Path) -> Result<String, ConfigError> {
    let unreadable = |source| ConfigError::Unreadable { path: path.to_owned(), source };
    let mut text = String::new();
    FsFile::open(path)
        .and_then(|file| file.take(LONGEST_FILE_BYTES + 1).read_to_string(&mut text))
        .map_err(unreadable)?;
    if text.len() as u64 > LONGEST_FILE_BYTES {
        return Err(unreadable(io::Error::other(format!("it is longer than {LONGEST_FILE_BYTES} bytes"))));
    }
    Ok(text)
}

fn merge(file: File, overrides: &Overrides, purpose: Purpose) -> Result<Config, ConfigError> {
    let File { mut config, listen_given, certificates: _, upstream_tls: _, auth: _, token: _, schemas: _ } = file;
    let given = overrides.clone();
    let set_limits = |limits: &mut crate::policy::Limits| {
        limits.connections_per_source = given.connections_per_source.unwrap_or(limits.connections_per_source);
        limits.connections_total = given.connections_total.unwrap_or(limits.connections_total);
        limits.connection_rate = given.connection_rate.unwrap_or(limits.connection_rate);
    };

    let kernel = &mut config.kernel;
    kernel.interfaces = given.interfaces.unwrap_or_else(|| std::mem::take(&mut kernel.interfaces));
    kernel.attach_mode = given.attach_mode.unwrap_or(kernel.attach_mode);
    kernel.on_deny = given.on_deny.unwrap_or(kernel.on_deny);
    kernel.pin_path = given.pin_path.unwrap_or_else(|| std::mem::take(&mut kernel.pin_path));
    set_limits(&mut config.limits);
    for service in &mut config.services {
        set_limits(&mut service.limits);
        service.on_deny = given.on_deny.unwrap_or(service.on_deny);
    }
    let listen_named = listen_given || given.listen.is_some();
    if let Some(listen) = given.listen {
        config.gateway.listen = listen;
    } else if let (Some(ports), false) = (&given.ports, listen_given) {
        config.gateway.listen = ports.iter().map(|&port| Listen::Tcp((Ipv4Addr::UNSPECIFIED, port).into())).collect();
    }
    config.gateway.upstream = given.upstream.unwrap_or_else(|| config.gateway.upstream.clone());
    config.admin.listen = given.admin.unwrap_or(config.admin.listen);

    choose_services(&mut config, given.ports, listen_named, purpose)?;
    check(&config, purpose)?;
    Ok(config)
}

/// See [`Config::resolve`].
fn choose_services(
    config: &mut Config,
    ports: Option<Vec<u16>>,
    listen_named: bool,
    purpose: Purpose,
) -> Result<(), ConfigError> {
    match (config.services.as_mut_slice(), ports) {
        ([], ports) => {
            let ports = match ports {
                Some(ports) => ports,
                None if listen_named || purpose == Purpose::Run => {
                    let ports: BTreeSet<u16> =
                        config.gateway.listen.iter().filter_map(Listen::tcp).map(|address| address.port()).collect();
                    ports.into_iter().collect()
                }
                None => {
                    return Err(ConfigError::invalid(
                        "no port to protect: name it with --port, or give the file a [[service]]",
                    ));
                }
            };
            config.services.push(Service {
                limits: config.limits,
                on_deny: config.kernel.on_deny,
                ..Service::new(DEFAULT_SERVICE, ports)
            });
        }
        ([service], Some(ports)) => service.ports = ports,
        (_, Some(_)) => {
            return Err(ConfigError::invalid(
                "--port doesn't say which service it is for: the file has several; change their ports there",
            ));
        }
        (_, None) => {}
    }
    Ok(())
}

/// What the file can't be blamed for alone.
fn check(config: &Config, purpose: Purpose) -> Result<(), ConfigError> {
    for name in &config.kernel.interfaces {
        value::check_interface(name).map_err(ConfigError::invalid)?;
    }
    refuse_twice(&config.kernel.interfaces, "the interface")?;
    for service in &config.services {
        refuse_twice(&service.ports, "the port")?;
        if service.ports.contains(&0) {
            return Err(ConfigError::invalid("port 0 can't be protected: name the port that the server listens on"));
        }
    }
    check_pin_path(&config.kernel.pin_path)?;
    if purpose == Purpose::Attach {
        if config.kernel.interfaces.is_empty() {
            return Err(ConfigError::invalid(
                "no interface to attach to: name it with --interface, or in the file as kernel.interfaces",
            ));
        }
        return Ok(());
    }
    refuse_twice(&config.gateway.listen, "the gateway's address")?;
    if let Some(address) = config.gateway.listen.iter().filter_map(Listen::tcp).find(|address| address.port() == 0) {
        return Err(ConfigError::invalid(format!("the gateway can't listen on {address}: limits need a known port")));
    }
    let is_handed_over = |listen: &Listen| matches!(listen, Listen::Systemd | Listen::Named(_));
    if !config.kernel.interfaces.is_empty()
        && config.services.iter().all(|service| service.ports.is_empty())
        && !config.gateway.listen.iter().any(is_handed_over)
    {
        return Err(ConfigError::invalid(
            "kernel.interfaces: the gateway listens on unix sockets alone, of which the kernel's programs see nothing: leave the \
             interfaces out, or give the file a [[service]] with a port",
        ));
    }
    if let Some(message) = uncovered_listen(config) {
        return Err(ConfigError::invalid(message));
    }
    if config.admin.listen.is_none() && config.admin.token_file.is_some() {
        return Err(ConfigError::invalid(
            "admin.token_file is of no use without an address: name one as admin.listen (or with --admin), or leave it out",
        ));
    }
    match config.admin.listen {
        Some(admin) if admin.port() != 0 && config.gateway.listen.contains(&admin.into()) => {
            Err(ConfigError::invalid(format!("the gateway and the admin server can't both listen on {admin}")))
        }
        _ => Ok(()),
    }
}

fn check_pin_path(path: &Path) -> Result<(), ConfigError> {
    if path.is_absolute() {
        return Ok(());
    }
    Err(ConfigError::invalid(format!("the pin path {} is not an absolute path", path.display())))
}

fn refuse_twice<T: Ord + ToString>(values: &[T], what: &str) -> Result<(), ConfigError> {
    let mut seen = BTreeSet::new();
    match values.iter().find(|value| !seen.insert(*value)) {
        Some(value) => Err(ConfigError::invalid(format!("{what} {} is given twice", value.to_string()))),
        None => Ok(()),
    }
}

/// What to say if the gateway listens on a port that no service has.
pub(super) fn uncovered_listen(config: &Config) -> Option<String> {
    let covered = |address: &SocketAddr| {
        config.services.is_empty()
            || config.services.iter().any(|service| service.ports_here().contains(&address.port()))
    };
    config.gateway.listen.iter().filter_map(Listen::tcp).find(|address| !covered(address)).map(|address| {
        let port = address.port();
        format!(
            "gateway.listen: no [[service]] counts sockets at port {port} on the host, so {address} would have no limits: \
             add it to a service, or listen elsewhere"
        )
    })
}

#[cfg(test)]
#[path = "resolve_tests.rs"]
mod tests;
