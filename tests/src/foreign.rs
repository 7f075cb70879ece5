//! WebSocket clients and servers that are not ours: a browser, Python's websockets and Node's ws. `cargo xtask test` installs
//! them; what they do is in tests/clients.

use std::{
    env,
    ffi::OsString,
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    sync::mpsc,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    netns::Namespace,
    process::Process,
    wait::{SOON, eventually},
};

/// Longest that a client takes, its start included: a browser on a busy machine needs half of it.
const PATIENCE: Duration = Duration::from_mins(1);

/// Whose WebSocket it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Headless Chromium with tests/clients/browser/page.html.
    Browser,
    /// Python with websockets.
    Python,
    /// Node with ws.
    Node,
}

impl Kind {
    /// Has a client do `what` at `url`, from inside a namespace, and returns what came of it.
    pub fn does(self, namespace: &Namespace, what: &str, url: &str, argument: Option<&str>) -> Result<Value> {
        let outcome = match self {
            Self::Browser => browse(namespace, what, url, argument)?,
            Self::Python | Self::Node => {
                let mut command = self.script(namespace, "client");
                command.args([what, url]).args(argument);
                let ended = Process::start(&mut command)?.wait(PATIENCE)?;
                ensure!(ended.status.success(), "{self:?} {what}: {}\n{}", ended.status, ended.stderr);
                serde_json::from_str(&ended.stdout).with_context(|| format!("no JSON: {:?}", ended.stdout))?
            }
        };
        ensure!(outcome.get("error").is_none(), "{self:?} {what}: {outcome}");
        Ok(outcome)
    }

    /// Starts a server that sends each message back, and waits until it listens.
    ///
    /// # Errors
    /// For a browser, which serves nothing.
    pub fn serves(self, namespace: &Namespace, address: SocketAddr) -> Result<Process> {
        ensure!(self != Self::Browser, "a browser serves nothing");
        let mut command = self.script(namespace, "server");
        command.args([address.ip().to_string(), address.port().to_string()]);
        let mut server = Process::start(&mut command)?;
        eventually(PATIENCE, "the server listens", || {
            ensure!(server.is_running()?, "{self:?} ended: {}", server.stderr());
            Ok(server.stdout().contains("ready"))
        })?;
        Ok(server)
    }

    fn script(self, namespace: &Namespace, name: &str) -> Command {
        let (program, folder, file, variable, libraries) = match self {
            Self::Node => ("node", "node", format!("{name}.cjs"), "NODE_PATH", "node/node_modules"),
            _ => ("python3", "python", format!("{name}.py"), "PYTHONPATH", "python"),
        };
        let mut command = namespace.command(program);
        command.arg(top().join("tests/clients").join(folder).join(file));
        command.env(variable, top().join(".tools/clients").join(libraries));
        // No folder of compiled files beside the script.
        command.env("PYTHONDONTWRITEBYTECODE", "1");
        command
    }
}

/// The top of the repository.
fn top() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// The address of the page in each browser; what a server sees as its origin.
pub const PAGE_ORIGIN: &str = "http://127.0.0.1:8001";

const PAGE_PORT: u16 = 8001;

/// Opens the page in a browser of its own and waits for what it posts.
fn browse(namespace: &Namespace, what: &str, url: &str, argument: Option<&str>) -> Result<Value> {
    let listener = namespace.enter(|| TcpListener::bind((Ipv4Addr::LOCALHOST, PAGE_PORT)))?;
    let (outcomes, outcome) = mpsc::channel();
    let page = std::fs::read(top().join("tests/clients/browser/page.html"))?;
    // Serves until the outcome is posted; a connection that breaks is the browser's affair.
    std::thread::spawn(move || {
        let posted = listener.incoming().map_while(Result::ok).find_map(|stream| answer(stream, &page).ok().flatten());
        // The next page in this namespace has the same address.
        drop(listener);
        if let Some(posted) = posted {
            // Nobody waits for it any more if the test has failed.
            _ = outcomes.send(posted);
        }
    });
    // Before the browser, so that it goes after it.
    let profile = Profile(TempDir::new()?);
    let address =
        format!("{PAGE_ORIGIN}/?what={what}&url={}&argument={}", encoded(url), encoded(argument.unwrap_or_default()));
    let mut command = namespace.command(browser()?);
    command.args([
        "--headless",
        // Root has no sandbox, and the page is ours.
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        // Certificates are checked by another test.
        "--ignore-certificate-errors",
    ]);
    command.arg(format!("--user-data-dir={}", profile.0.path().display())).arg(address);
    for variable in ["HOME", "TMPDIR", "XDG_RUNTIME_DIR"] {
        command.env(variable, profile.0.path());
    }
    let mut browser = Process::start(&mut command)?;
    let mut posted = None;
    eventually(PATIENCE, "the page in the browser has come to an end", || {
        ensure!(browser.is_running()?, "the browser ended");
        posted = outcome.try_recv().ok();
        Ok(posted.is_some())
    })?;
    let posted = posted.context("it was posted")?;
    serde_json::from_slice(&posted).with_context(|| format!("no JSON: {}", String::from_utf8_lossy(&posted)))
}

/// The folder of a browser. Its helper processes end a moment after it, and may still write there.
struct Profile(TempDir);

impl Drop for Profile {
    fn drop(&mut self) {
        let path = self.0.path();
        // What can't be removed is only a folder of a test.
        _ = eventually(SOON, "the browser's folder is gone", || {
            _ = std::fs::remove_dir_all(path);
            Ok(!path.exists())
        });
    }
}

fn browser() -> Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let names = ["chromium", "chromium-browser", "google-chrome"].map(OsString::from);
    let found =
        env::split_paths(&path).flat_map(|folder| names.clone().map(|name| folder.join(name))).find(|p| p.is_file());
    match found {
        Some(path) => Ok(path),
        None => bail!("there is no chromium on PATH; `cargo xtask test` installs it on Debian"),
    }
}

/// Answers one request: the page, or nothing for what is posted, which is given back.
fn answer(mut stream: TcpStream, page: &[u8]) -> Result<Option<Vec<u8>>> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut request = String::new();
    reader.read_line(&mut request)?;
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        match line.trim().split_once(':') {
            Some((name, value)) if name.eq_ignore_ascii_case("content-length") => length = value.trim().parse()?,
            Some(_) => {}
            None => break,
        }
    }
    let (body, posted) = if request.starts_with("POST") {
        let mut posted = vec![0; length];
        reader.read_exact(&mut posted)?;
        (&[][..], Some(posted))
    } else {
        (page, None)
    };
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    )?;
    stream.write_all(body)?;
    Ok(posted)
}

/// Percent encoding of all that has a meaning in a query.
fn encoded(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' => char::from(byte).to_string(),
            _ => format!("%{byte:02X}"),
        })
        .collect()
}
