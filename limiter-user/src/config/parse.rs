//! From the text of a file to a checked configuration.

use std::{
    cell::RefCell,
    collections::HashMap,
    ops::Range,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use limiter_common::{abi::MAX_SERVICES, policy::SERVICE_NAME_BYTES};
use toml::de::DeTable;

use super::{
    Admin, AdminToken, Config, ConfigError, Gateway, Kernel, Log, Messages, Push, RuleAction, Schema, Service,
    auth_parse::{self, AuthSpans},
    messages, overload,
    read::{Fault, Item, Report, Section},
    resolve::uncovered_listen,
    route,
    setting::GREATEST_CONNECTION_RATE,
    tls, upstream_parse,
    value::{self, TrustedProxy},
};
use crate::policy::{Action, Cidr, Limits, OwnLimits, Rule};

/// Most connections that a ledger may hold: about 2 GiB of kernel memory.
pub(super) const LARGEST_LEDGER: u32 = 1 << 24;

/// Most rules that there may be: some GiB of kernel memory.
pub(super) const MOST_RULES: u32 = 1 << 24;

/// An audit reads the whole ledger: one after the other would be all that the host does.
const SHORTEST_AUDIT_INTERVAL: Duration = Duration::from_millis(100);

/// More SYNs than one host answers.
const GREATEST_CHALLENGE_THRESHOLD: u32 = 100_000_000;

/// Less would close clients that are only a moment late.
const SHORTEST_QUEUE_BYTES: u64 = 4 * 1024;

/// More than any client has a use for.
const LONGEST_QUEUE_BYTES: u64 = 1 << 30;

/// A file, checked by itself.
#[derive(Clone, Debug, Default)]
pub(super) struct File {
    pub(super) config: Config,
    /// Whether the file says where the gateway listens.
    pub(super) listen_given: bool,
    /// Where the file names each certificate, in the order of [`Tls::files`](super::Tls::files).
    pub(super) certificates: Vec<Range<usize>>,
    /// Where it has `[gateway.upstream_tls]`.
    pub(super) upstream_tls: Range<usize>,
    /// Where it names the files of `[gateway.auth]`.
    pub(super) auth: AuthSpans,
    /// Where it names `admin.token_file`.
    pub(super) token: Option<Range<usize>>,
    /// Where it names each schema.
    pub(super) schemas: Vec<(Range<usize>, PathBuf)>,
}

/// Checks a whole file. `path` is for the messages.
pub(super) fn parse(path: &Path, text: &str) -> Result<File, ConfigError> {
    let report = Report::new(path, text);
    let (table, syntax) = DeTable::parse_recoverable(text);
    for error in &syntax {
        report.add(&error.span().unwrap_or(0..0), error.message());
    }
    // What a broken file seems to say is not worth a complaint.
    let file = if syntax.is_empty() { file(&report, table.get_ref()) } else { File::default() };
    match report.problems() {
        problems if problems.is_empty() => Ok(file),
        problems => Err(ConfigError::Invalid(problems)),
    }
}

/// Checks a whole file and the files that it names.
pub(super) fn parse_with_files(path: &Path, text: &str) -> Result<File, ConfigError> {
    let file = parse(path, text)?;
    let report = Report::new(path, text);
    let named = file.config.gateway.tls.iter().flat_map(super::Tls::files);
    for (span, (files, name)) in file.certificates.iter().zip(named) {
        if let Err(error) = files.load(name) {
            report.add(span, format!("gateway.tls: {error}"));
        }
    }
    if let Err(error) = file.config.gateway.upstream_tls.check_files() {
        report.add(&file.upstream_tls, format!("gateway.upstream_tls: {error}"));
    }
    for (span, problem) in file.config.gateway.auth.iter().flat_map(|auth| auth_parse::check_files(auth, &file.auth)) {
        report.add(&span, problem);
    }
    if let (Some(span), Some(path)) = (&file.token, &file.config.admin.token_file)
        && let Err(error) = AdminToken::load(path)
    {
        report.add(span, format!("admin.token_file: {error}"));
    }
    for (span, path) in &file.schemas {
        if let Err(error) = Schema::load(path) {
            report.add(span, format!("gateway.messages.schema: {error}"));
        }
    }
    match report.problems() {
        problems if problems.is_empty() => Ok(file),
        problems => Err(ConfigError::Invalid(problems)),
    }
}

fn file(report: &Report, table: &DeTable) -> File {
    let mut config = Config::default();
    let mut root = Section::root(report, table);
    kernel(root.section("kernel"), &mut config.kernel);
    let mut section = root.section("limits");
    limits(&mut section, &mut config.limits);
    section.read("connections_total_all", &mut config.limits.connections_total_all, connections);
    section.finish();
    let base = Service { limits: config.limits, on_deny: config.kernel.on_deny, ..Service::new("", Vec::new()) };
    config.services = services(report, root.sections("service"), &base);
    config.rules = rules(
        report,
        root.sections("rule"),
        config.limits.connection_burst,
        config.kernel.max_rules,
        SystemTime::now(),
    );
    let Places { listen, certificates, upstream_tls, auth, schemas } =
        gateway(report, root.section("gateway"), &mut config.gateway);
    let (admin_listen, token) = admin(root.section("admin"), &mut config.admin);
    log(root.section("log"), &mut config.log);
    root.finish();

    if let (Some(span), Some(message)) = (&listen, uncovered_listen(&config)) {
        report.add(span, message);
    }
    if let (Some(span), Some(address)) = (admin_listen.or(listen.clone()), config.admin.listen)
        && address.port() != 0
        && config.gateway.listen.contains(&address.into())
    {
        report.add(&span, format!("admin.listen: the gateway listens on {address} too"));
    }
    File { config, listen_given: listen.is_some(), certificates, upstream_tls, auth, token, schemas }
}

fn kernel(mut section: Section, kernel: &mut Kernel) {
    section
        .read("interfaces", &mut kernel.interfaces, |item| value::list(item, value::interface, "network interfaces"));
    section.read("attach_mode", &mut kernel.attach_mode, value::choice);
    section.read("on_deny", &mut kernel.on_deny, value::choice);
    section.read("on_full", &mut kernel.on_full, value::choice);
    section.read("pin_path", &mut kernel.pin_path, value::absolute_path);
    section.read("max_connections", &mut kernel.max_connections, |item| {
        value::integer(item, 1..=LARGEST_LEDGER, "connections")
    });
    section.read("max_rules", &mut kernel.max_rules, |item| value::integer(item, 1..=MOST_RULES, "rules"));
    section.read("audit_interval", &mut kernel.audit_interval, |item| {
        let interval = value::duration(item, Duration::ZERO, value::LONGEST)?;
        if !interval.is_zero() && interval < SHORTEST_AUDIT_INTERVAL {
            return Err(Fault::new(item, r#"expected "0s" (never), or 100ms at least"#));
        }
        Ok(interval)
    });
    section.read("challenge", &mut kernel.challenge, value::choice);
    section.read("challenge_threshold", &mut kernel.challenge_threshold, |item| {
        value::integer(item, 2..=GREATEST_CHALLENGE_THRESHOLD, "SYNs per second")
    });
    section.read("challenge_timestamps", &mut kernel.challenge_timestamps, value::boolean);
    section.read("debug_log", &mut kernel.debug_log, value::boolean);
    section.finish();
}

fn limits(section: &mut Section, limits: &mut Limits) {
    section.read("connections_per_source", &mut limits.connections_per_source, connections);
    let mut places = HashMap::new();
    let wide = section.read("connections_per_wide_source", &mut limits.connections_per_wide_source, connections);
    places.insert("connections_per_wide_source", wide);
    section.read("connections_total", &mut limits.connections_total, connections);
    section.read("connection_rate", &mut limits.connection_rate, connection_rate);
    section.read("connection_burst", &mut limits.connection_burst, connection_burst);
    section.read("service_connection_rate", &mut limits.service_connection_rate, connection_rate);
    section.read("service_connection_burst", &mut limits.service_connection_burst, connection_burst);
    let narrow = section.read("ipv4_prefix", &mut limits.ipv4_prefix, |item| value::integer(item, 1..=32, "bits"));
    let wide = section.read("wide_ipv4_prefix", &mut limits.wide_ipv4_prefix, |item| {
        value::integer(item, 0..=31, "bits; 0: no wider source")
    });
    places.insert("wide_ipv4_prefix", wide.or(narrow));
    let narrow = section.read("ipv6_prefix", &mut limits.ipv6_prefix, |item| value::integer(item, 1..=128, "bits"));
    let wide = section.read("wide_ipv6_prefix", &mut limits.wide_ipv6_prefix, |item| {
        value::integer(item, 0..=127, "bits; 0: no wider source")
    });
    places.insert("wide_ipv6_prefix", wide.or(narrow));
    // What a service takes over from [limits] was complained of there; if nothing is here to point at, it is no fault of
    // this section.
    if let Err((key, why)) = limits.check()
        && let Some(Some(span)) = places.remove(key)
    {
        section.complain(&span, key, &why);
    }
}

fn services(report: &Report, sections: Vec<(Range<usize>, Section)>, base: &Service) -> Vec<Service> {
    let mut services = Vec::new();
    let mut names: HashMap<String, usize> = HashMap::new();
    let mut ports: HashMap<u16, String> = HashMap::new();
    let mut sockets = Sockets::default();
    for (place, (span, mut section)) in sections.into_iter().enumerate() {
        let mut service = base.clone();
        // Whether the keys are there is asked before they are read: a wrong value is one complaint, not two.
        for key in ["name", "port"] {
            if section.item(key).is_none() {
                report.add(&span, format!("service.{key}: every [[service]] needs a {key}"));
            }
        }
        let name = section.read("name", &mut service.name, service_name);
        let port = section.read("port", &mut service.ports, value::ports);
        let socket_port = section.read("socket_port", &mut service.socket_ports, value::ports);
        let namespaces = section.read("namespaces", &mut service.namespaces, value::choice);
        limits(&mut section, &mut service.limits);
        section.read("on_deny", &mut service.on_deny, value::choice);
        section.finish();

        if let Some(span) = name
            && let Some(other) = names.insert(service.name.clone(), report.line(span.start))
        {
            report.add(&span, format!("service.name: line {other} has a service {:?} already", service.name));
        }
        let mut shares_port = false;
        for &number in &service.ports {
            if let (Some(span), Some(other)) = (&port, ports.insert(number, service.name.clone())) {
                report.add(span, format!("service.port: {number} is a port of the service {other:?} already"));
                shares_port = true;
            }
        }
        // What is the default is as good as not said.
        if service.socket_ports.iter().all(|number| service.ports.contains(number))
            && service.socket_ports.len() == service.ports.len()
        {
            service.socket_ports.clear();
        }
        let at = socket_port.or(namespaces).or(port);
        if let (Some(span), Some(complaint), false) = (at, sockets.add(&service), shares_port) {
            report.add(&span, complaint);
        }
        if place == MAX_SERVICES as usize {
            report.add(&span, format!("service: there may be {MAX_SERVICES} services at most"));
        }
        services.push(service);
    }
    services
}

/// Which service counts sockets of a port, in the namespace that limiter works in and in the others.
#[derive(Default)]
struct Sockets {
    here: HashMap<u16, String>,
    elsewhere: HashMap<u16, String>,
}

impl Sockets {
    /// What to say if a socket would be counted for two services.
    fn add(&mut self, service: &Service) -> Option<String> {
        let key = if service.socket_ports.is_empty() { "port" } else { "socket_port" };
        let mut complaint = None;
        for (ports, known, place) in [
            (service.ports_here(), &mut self.here, "on the host"),
            (service.ports_elsewhere(), &mut self.elsewhere, "in other namespaces"),
        ] {
            for &number in ports {
                let Some(other) = known.insert(number, service.name.clone()) else { continue };
                complaint.get_or_insert_with(|| {
                    format!(
                        "service.{key}: sockets at {number} {place} are counted for the service {other:?} already: give one of the \
                         two other ports, or other namespaces"
                    )
                });
            }
        }
        complaint
    }
}

/// `burst`: how many connections at once where a rule says only how many per second. `most`: how many rules there may be that
/// have not ended by `now`.
fn rules(report: &Report, sections: Vec<(Range<usize>, Section)>, burst: u32, most: u32, now: SystemTime) -> Vec<Rule> {
    let mut held = 0;
    let mut rules = Vec::with_capacity(sections.len());
    let mut seen: HashMap<Cidr, usize> = HashMap::with_capacity(sections.len());
    for (span, mut section) in sections {
        if section.item("cidr").is_none() {
            report.add(&span, "rule.cidr: every [[rule]] needs a cidr");
        }
        let (mut cidr, mut action) = (None, None);
        let mut own = OwnLimits::default();
        let (mut own_rate, mut own_burst) = (None, None);
        let place = section.read("cidr", &mut cidr, |item| value::cidr(item).map(Some));
        let action_at = section.read("action", &mut action, |item| value::choice::<RuleAction>(item).map(Some));
        section.read("connections_per_source", &mut own.connections_per_source, |item| connections(item).map(Some));
        section.read("connections_per_wide_source", &mut own.connections_per_wide_source, |item| {
            connections(item).map(Some)
        });
        section.read("connection_rate", &mut own_rate, |item| connection_rate(item).map(Some));
        let burst_at = section.read("connection_burst", &mut own_burst, |item| connection_burst(item).map(Some));
        let mut expires = None;
        section.read("expires", &mut expires, |item| value::time(item).map(Some));
        let given =
            ["action", "connections_per_source", "connections_per_wide_source", "connection_rate", "connection_burst"]
                .map(|key| section.item(key).is_some());
        section.finish();

        let [acts, limits @ ..] = given;
        if let (Some(at), true) = (&action_at, limits.contains(&true)) {
            report.add(at, "rule.action: whom it allows or denies has no limits: leave out the one or the other");
        }
        if !acts && !limits.contains(&true) {
            report.add(&span, r#"rule: it says nothing; give it action = "allow" or "deny", or a limit"#);
        }
        if let (Some(at), None) = (&burst_at, own_rate) {
            report.add(at, "rule.connection_burst: it goes with a connection_rate");
        }
        own.rate = own_rate.map(|rate| (rate, own_burst.unwrap_or(burst)));
        let Some(cidr) = cidr else { continue };
        if let (Some(at), Some(other)) = (place, seen.insert(cidr, span.start)) {
            let line = report.line(other);
            report.add(&at, format!("rule.cidr: line {line} has a rule for {cidr} already"));
        }
        let action = match action {
            Some(RuleAction::Allow) => Action::Allow,
            Some(RuleAction::Deny) => Action::Deny,
            None => Action::Limit(own),
        };
        let rule = Rule { cidr, action, expires };
        if !rule.has_ended(now) {
            // Of all that are too many, the first is enough to say so.
            if held == most {
                report.add(&span, format!("rule: there may be {most} rules at most (kernel.max_rules)"));
            }
            held = held.saturating_add(1);
        }
        rules.push(rule);
    }
    rules
}

fn connections(item: &Item) -> Result<u32, Fault> {
    value::integer(item, 0..=u32::MAX, "connections; 0: any number")
}

fn connection_rate(item: &Item) -> Result<u32, Fault> {
    value::integer(item, 0..=GREATEST_CONNECTION_RATE, "new connections per second; 0: any number")
}

fn connection_burst(item: &Item) -> Result<u32, Fault> {
    value::integer(item, 1..=GREATEST_CONNECTION_RATE, "new connections at once")
}

fn service_name(item: &Item) -> Result<String, Fault> {
    let name = value::text(item, "a name")?;
    if name.is_empty() || name.len() > SERVICE_NAME_BYTES {
        let found = name.len();
        return Err(Fault::new(item, format!("found {found} bytes, expected 1 to {SERVICE_NAME_BYTES}")));
    }
    if name.trim() != name || name.chars().any(char::is_control) {
        return Err(Fault::new(item, "a name neither begins nor ends with a space, nor has a control character"));
    }
    Ok(name.to_owned())
}

/// Where `[gateway]` has what is looked at once more.
struct Places {
    /// A good `listen`.
    listen: Option<Range<usize>>,
    certificates: Vec<Range<usize>>,
    upstream_tls: Range<usize>,
    auth: AuthSpans,
    /// Each schema.
    schemas: Vec<(Range<usize>, PathBuf)>,
}

fn gateway(report: &Report, mut section: Section, gateway: &mut Gateway) -> Places {
    let listen = section.read("listen", &mut gateway.listen, |item| {
        let addresses = value::list(item, value::listen, "addresses")?;
        if addresses.is_empty() { Err(Fault::new(item, "expected at least one address")) } else { Ok(addresses) }
    });
    section.read("upstream", &mut gateway.upstream, upstream_parse::upstream);
    let upstream_tls = upstream_parse::tls(&mut section, &mut gateway.upstream_tls);
    upstream_parse::health(section.section("health"), &mut gateway.health);
    section.read("unix_mode", &mut gateway.unix_mode, value::mode);
    section.read("reuse_port", &mut gateway.reuse_port, value::boolean);
    let mut proxies = Vec::new();
    section.read("trusted_proxies", &mut proxies, |item| {
        value::list(item, value::trusted_proxy, "addresses and networks")
    });
    for proxy in proxies {
        match proxy {
            TrustedProxy::Network(network) => gateway.trusted_proxies.push(network),
            TrustedProxy::Unix => gateway.trusts_unix = true,
        }
    }
    let proxy_protocol = section.read("proxy_protocol", &mut gateway.proxy_protocol, value::boolean);
    if let Some(span) = proxy_protocol
        && gateway.proxy_protocol
        && section
            .item("trusted_proxies")
            .is_none_or(|item| item.get_ref().as_array().is_some_and(|list| list.is_empty()))
    {
        let advice = "without trusted_proxies there is nobody to take a PROXY header from: name the proxies there";
        section.complain(&span, "proxy_protocol", advice);
    }
    section.read("allowed_origins", &mut gateway.allowed_origins, |item| value::list(item, value::origin, "origins"));
    let positive = |item: &Item| value::duration(item, Duration::from_millis(1), value::LONGEST);
    let any = |item: &Item| value::duration(item, Duration::ZERO, value::LONGEST);
    section.read("handshake_timeout", &mut gateway.handshake_timeout, positive);
    section.read("idle_timeout", &mut gateway.idle_timeout, any);
    section.read("ping_interval", &mut gateway.ping_interval, any);
    section.read("pong_timeout", &mut gateway.pong_timeout, positive);
    section.read("max_lifetime", &mut gateway.max_lifetime, any);
    section.read("drain_timeout", &mut gateway.drain_timeout, any);
    let schemas = RefCell::new(Vec::new());
    let read_messages = |section: Section, messages: &mut Messages| {
        let at = messages::parse(section, messages);
        schemas.borrow_mut().extend(at.zip(messages.schema.clone()));
    };
    read_messages(section.section("messages"), &mut gateway.messages);
    push(section.section("push"), &mut gateway.push);
    overload::parse(section.section("overload"), &mut gateway.overload);
    let certificates = tls::parse(&mut section, &mut gateway.tls);
    let auth = auth_parse::parse(&mut section, !gateway.allowed_origins.is_empty(), &mut gateway.auth);
    let has_auth = gateway.auth.is_some();
    gateway.routes = route::parse(report, &mut section, &gateway.messages, has_auth, read_messages);
    section.finish();
    Places { listen, certificates, upstream_tls, auth, schemas: schemas.into_inner() }
}

fn push(mut section: Section, push: &mut Push) {
    section.read("queue", &mut push.queue, |item| value::size(item, SHORTEST_QUEUE_BYTES..=LONGEST_QUEUE_BYTES));
    section.finish();
}

/// Gives the places of a good `listen` and a good `token_file`.
fn admin(mut section: Section, admin: &mut Admin) -> (Option<Range<usize>>, Option<Range<usize>>) {
    let listen = section.read("listen", &mut admin.listen, value::optional_address);
    let token = section.read("token_file", &mut admin.token_file, value::optional_path);
    section.finish();
    (listen, token)
}

fn log(mut section: Section, log: &mut Log) {
    section.read("level", &mut log.level, value::log_filter);
    section.read("format", &mut log.format, value::choice);
    section.finish();
}

#[cfg(test)]
#[path = "parse_tests.rs"]
mod tests;
