//! limiter itself, as an administrator has it: the binary, run inside the server's namespace.

use std::{
    env,
    ffi::OsStr,
    fs,
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Once,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tempfile::NamedTempFile;

use crate::{
    bpf,
    lab::{Family, Lab, PORT},
    netns::Namespace,
    process::{Ended, Process},
    successor::{Successor, end_processes, kill},
    wait::{SOON, eventually, eventually_equal},
};

/// Longest that any command may take; only a hang comes near it.
const COMMAND_LIMIT: Duration = Duration::from_secs(30);

/// Where the pin paths of all tests are.
const BPFFS: &str = "/sys/fs/bpf";

/// Begins the name of each pin path, followed by the process id and a number.
const PIN_PREFIX: &str = "limiter-test-";

/// limiter in one server's namespace, with a pin path of its own. Detached when this is dropped.
#[derive(Debug)]
pub struct Limiter<'lab> {
    server: &'lab Namespace,
    binary: PathBuf,
    pin_path: PathBuf,
    /// Features of the kernel that it is to take for missing.
    without: &'static str,
}

impl<'lab> Limiter<'lab> {
    /// Nothing is attached yet.
    pub fn new(server: &'lab Namespace) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        static REMOVE_LEFTOVERS: Once = Once::new();
        bpf::require_bpffs()?;
        REMOVE_LEFTOVERS.call_once(remove_leftovers);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let pin_path = Path::new(BPFFS).join(format!("{PIN_PREFIX}{}-{number}", std::process::id()));
        Ok(Self { server, binary: binary()?, pin_path, without: "" })
    }

    /// The same on a kernel that lacks something: `btf`, `tcx`, `watch` or `destroy`, or several, separated by commas.
    #[must_use]
    pub fn without(mut self, features: &'static str) -> Self {
        self.without = features;
        self
    }

    /// Where it pins.
    pub fn pin_path(&self) -> &Path {
        &self.pin_path
    }

    /// The binary.
    pub fn binary(&self) -> &Path {
        &self.binary
    }

    /// A command of this limiter's, with its pin path.
    pub fn command<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Command {
        self.command_of(&self.binary, arguments)
    }

    /// The same, with another copy of the binary.
    pub fn command_of<S: AsRef<OsStr>>(&self, binary: &Path, arguments: impl IntoIterator<Item = S>) -> Command {
        let mut command = self.server.command(binary);
        // What the tester's shell has set is not what is tested.
        for (name, _) in env::vars_os() {
            if name.as_encoded_bytes().starts_with(b"LIMITER_") {
                command.env_remove(name);
            }
        }
        command.env("LIMITER_TEST_WITHOUT", self.without);
        command.args(arguments).arg("--pin-path").arg(&self.pin_path);
        command
    }

    /// Runs a command to its end, whatever that is.
    pub fn outcome<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Result<Ended> {
        Process::start(&mut self.command(arguments))?.wait(COMMAND_LIMIT)
    }

    /// Runs a command that must succeed, and returns what it printed.
    pub fn output<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Result<String> {
        let arguments: Vec<_> = arguments.into_iter().map(|argument| argument.as_ref().to_owned()).collect();
        let ended = self.outcome(&arguments)?;
        ensure!(ended.status.success(), "limiter {arguments:?}: {}: {}", ended.status, ended.stderr.trim());
        Ok(ended.stdout)
    }

    /// Runs a command that must succeed, with `--json`.
    pub fn json(&self, verb: &str) -> Result<Value> {
        let output = self.output([verb, "--json"])?;
        serde_json::from_str(&output).with_context(|| format!("limiter {verb} --json printed no JSON: {output}"))
    }

    /// `limiter attach`.
    pub fn attach<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Result<()> {
        self.output(with_verb("attach", arguments))?;
        Ok(())
    }

    /// `limiter attach` to every interface of the lab's server, for its one service, with a limit per source and, unless
    /// `more` says otherwise, none on how fast connections are opened.
    pub fn protect(&self, lab: &Lab, connections_per_source: u32, more: &[&str]) -> Result<()> {
        let mut arguments = lab.interface_flags();
        arguments.extend(["--port".into(), PORT.to_string()]);
        arguments.extend(["--connections-per-source".into(), connections_per_source.to_string()]);
        if !more.contains(&"--connection-rate") {
            arguments.extend(["--connection-rate".into(), "0".into()]);
        }
        arguments.extend(more.iter().map(|&argument| argument.to_owned()));
        self.attach(arguments)
    }

    /// Starts `limiter run`, and waits until it is ready.
    pub fn run<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Result<Daemon<'_>> {
        self.ready(self.start(arguments)?)
    }

    /// The same with every interface of the lab's server, and this configuration.
    pub fn run_on(&self, lab: &Lab, config: &NamedTempFile) -> Result<Daemon<'_>> {
        let mut arguments = lab.interface_flags();
        arguments.extend(["--config".into(), config.path().display().to_string()]);
        self.run(arguments)
    }

    /// [`Self::protect`]s the lab's server by a limiter of its own.
    pub fn protecting(lab: &'lab Lab, connections_per_source: u32) -> Result<Self> {
        let limiter = Self::new(&lab.server)?;
        limiter.protect(lab, connections_per_source, &[])?;
        Ok(limiter)
    }

    /// Waits until a `limiter run` that was started is ready.
    pub fn ready(&self, process: Process) -> Result<Daemon<'_>> {
        let mut daemon = Daemon { process, limiter: self };
        eventually(SOON, "limiter run was ready", || {
            ensure!(daemon.process.is_running()?, "limiter run ended at once: {}", daemon.process.stderr());
            Ok(http_get(self.server, "/readyz").is_ok_and(|(status, _)| status == 200))
        })?;
        Ok(daemon)
    }

    /// Starts `limiter run` and doesn't wait.
    pub fn start<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Result<Process> {
        Process::start(&mut self.command(with_verb("run", arguments)))
    }

    /// A configuration file. It is removed when it is dropped.
    pub fn config_file(text: &str) -> Result<NamedTempFile> {
        let mut file = tempfile::Builder::new().prefix("limiter-test-").suffix(".toml").tempfile()?;
        file.write_all(text.as_bytes())?;
        Ok(file)
    }

    /// `limiter detach`.
    pub fn detach(&self) -> Result<()> {
        self.output(["detach"])?;
        Ok(())
    }

    /// `limiter limit set KEY=VALUE`.
    pub fn set_limit(&self, key: &str, value: u32) -> Result<()> {
        self.output(["limit", "set", &format!("{key}={value}")])?;
        Ok(())
    }

    /// How many connections the source of `client` holds, as `limiter sources` says.
    pub fn held_by(&self, client: IpAddr) -> Result<u64> {
        let source = Family::source(client);
        let report = self.json("sources")?;
        rows(&report, "sources")?
            .iter()
            .filter(|row| row["source"] == *source)
            .map(|row| row["connections"].as_u64().with_context(|| format!("no connections in {row}")))
            .sum()
    }

    /// Waits until the source of `client` holds `count` connections.
    pub fn wait_held(&self, client: IpAddr, count: u64) -> Result<()> {
        self.wait_held_within(SOON, client, count)
    }

    /// Waits until the source of `client` holds `count` connections, at most for `limit`.
    pub fn wait_held_within(&self, limit: Duration, client: IpAddr, count: u64) -> Result<()> {
        let what = format!("{client} holds {count} connections in `limiter sources`");
        self.explained(eventually_equal(limit, &what, &count, || self.held_by(client)))
    }

    /// The remote addresses in the ledger, as `limiter connections` says.
    pub fn ledger(&self) -> Result<Vec<SocketAddr>> {
        let report = self.json("connections")?;
        rows(&report, "connections")?
            .iter()
            .map(|row| {
                let remote = row["remote"].as_str().with_context(|| format!("no remote in {row}"))?;
                remote.parse().with_context(|| format!("no address and port: {remote}"))
            })
            .collect()
    }

    /// Waits until nothing is counted any more: no connection in the ledger, no source, no service that holds one.
    pub fn wait_empty(&self) -> Result<()> {
        let empty = (Vec::new(), Vec::new(), 0, 0);
        let outcome =
            eventually_equal(SOON, "(ledger, sources, ledger entries, connections) are empty", &empty, || {
                let status = self.json("status")?;
                let connections = rows(&status, "services")?
                    .iter()
                    .filter_map(|service| service["connections"].as_u64())
                    .sum::<u64>();
                let entries = status["ledger_entries"].as_u64().context("status says how many entries there are")?;
                let sources = rows(&self.json("sources")?, "sources")?.clone();
                Ok((self.ledger()?, sources, entries, connections))
            });
        self.explained(outcome)
    }

    /// With a failure, what is in the ledger and which sockets there are.
    fn explained(&self, outcome: Result<()>) -> Result<()> {
        outcome.with_context(|| {
            let ledger = self.output(["connections"]).unwrap_or_else(|error| format!("{error:#}\n"));
            let sockets = self.server.command("ss").args(["-tanoe", "--no-header"]).output();
            let sockets =
                sockets.map_or_else(|error| error.to_string(), |ss| String::from_utf8_lossy(&ss.stdout).into());
            format!("in the ledger:\n{ledger}sockets of the server:\n{sockets}")
        })
    }

    /// A counter, summed over all services.
    pub fn counter(&self, name: &str) -> Result<u64> {
        self.counters([name]).map(|[value]| value)
    }

    /// The same of several, of one moment.
    pub fn counters<const N: usize>(&self, names: [&str; N]) -> Result<[u64; N]> {
        let status = self.json("status")?;
        let services = rows(&status, "services")?;
        let mut values = [0; N];
        for (value, name) in values.iter_mut().zip(names) {
            for service in services {
                let counted = service["counters"][name].as_u64();
                *value += counted.with_context(|| format!("no counter {name} in {service}"))?;
            }
        }
        Ok(values)
    }
}

impl Drop for Limiter<'_> {
    fn drop(&mut self) {
        end_processes(|path| path == self.pin_path);
        if self.pin_path.exists()
            && let Err(error) = self.detach()
        {
            eprintln!("cannot detach: {error:#}; removing {}", self.pin_path.display());
            remove_pins(&self.pin_path);
        }
    }
}

/// A running `limiter run`. Killed when this is dropped; what it pinned stays until its [`Limiter`] is dropped.
#[derive(Debug)]
pub struct Daemon<'limiter> {
    process: Process,
    limiter: &'limiter Limiter<'limiter>,
}

impl Daemon<'_> {
    /// The process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Asks it to end, without waiting for that.
    pub fn begin_shutdown(&self) -> Result<()> {
        self.process.signal(libc::SIGTERM)
    }

    /// Has the process of that id, this one or one that has taken its place, hand over to a new one, and waits until it has.
    pub fn hand_over(&self, id: u32) -> Result<Successor> {
        const SAID: &str = "handed over to the new process";
        let said = || -> Vec<String> {
            self.process.stderr().lines().filter(|line| line.contains(SAID)).map(str::to_owned).collect()
        };
        let before = said().len();
        kill(id, libc::SIGUSR2)?;
        let mut successor = None;
        eventually(SOON, "it was handed over", || {
            successor = said().get(before).and_then(|line| line.split("pid=").nth(1)?.trim().parse().ok());
            Ok(successor.is_some())
        })?;
        Ok(Successor::new(successor.context("waited for")?))
    }

    /// Waits for its end.
    pub fn wait(self) -> Result<Ended> {
        self.process.wait(COMMAND_LIMIT)
    }

    /// Ends it by SIGKILL.
    pub fn kill(self) -> Result<()> {
        self.process.kill()
    }

    /// Status of GET at its admin address.
    pub fn http_status(&self, path: &str) -> Option<u16> {
        Some(self.http_get(path)?.0)
    }

    /// Status and body of GET at its admin address; `None` if nobody answers.
    pub fn http_get(&self, path: &str) -> Option<(u16, String)> {
        http_get(self.limiter.server, path).ok()
    }
}

/// The rows of a report, which is an object with one list.
fn rows<'a>(report: &'a Value, name: &str) -> Result<&'a Vec<Value>> {
    report[name].as_array().with_context(|| format!("no list `{name}` in {report}"))
}

fn with_verb<S: AsRef<OsStr>>(verb: &str, arguments: impl IntoIterator<Item = S>) -> Vec<std::ffi::OsString> {
    let mut all = vec![verb.into()];
    all.extend(arguments.into_iter().map(|argument| argument.as_ref().to_owned()));
    all
}

/// Status and body of GET at the admin address of whoever runs there.
pub fn http_get(server: &Namespace, path: &str) -> Result<(u16, String)> {
    // The default of [admin].
    let address = SocketAddr::from(([127, 0, 0, 1], 9180));
    let mut stream = server.enter(|| TcpStream::connect_timeout(&address, SOON)).context("cannot connect")?;
    stream.set_read_timeout(Some(SOON))?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).context("cannot ask")?;
    let mut response = String::new();
    stream.read_to_string(&mut response).with_context(|| format!("no answer but {response:?}"))?;
    let (head, body) = response.split_once("\r\n\r\n").with_context(|| format!("no answer: {response:?}"))?;
    let status = head.split_ascii_whitespace().nth(1).context("no status")?;
    Ok((status.parse()?, body.to_owned()))
}

/// `LIMITER_BIN`, or the binary that cargo has built next to this test.
pub(crate) fn binary() -> Result<PathBuf> {
    let binary = if let Some(binary) = env::var_os("LIMITER_BIN") {
        PathBuf::from(binary)
    } else {
        let test = env::current_exe()?;
        // target/PROFILE/deps/TEST
        let profile = test.ancestors().nth(2).context("a test has a folder above its own")?;
        profile.join("limiter")
    };
    if !binary.is_file() {
        bail!("no limiter at {}: build it (cargo build -p limiter-user), or set LIMITER_BIN", binary.display());
    }
    Ok(fs::canonicalize(binary)?)
}

/// What processes that are no more have left pinned, and those that still work on it.
fn remove_leftovers() {
    let of_the_dead = |path: &Path| {
        let name = path.strip_prefix(BPFFS).ok().and_then(Path::to_str);
        let owner = name.and_then(|name| name.strip_prefix(PIN_PREFIX)?.split_once('-'));
        owner.is_some_and(|(pid, _)| !Path::new("/proc").join(pid).exists())
    };
    end_processes(of_the_dead);
    let Ok(entries) = fs::read_dir(BPFFS) else { return };
    for entry in entries.flatten() {
        if of_the_dead(&entry.path()) {
            remove_pins(&entry.path());
        }
    }
}

fn remove_pins(folder: &Path) {
    if let Err(error) = fs::remove_dir_all(folder) {
        eprintln!("cannot remove {}: {error}", folder.display());
    }
}
