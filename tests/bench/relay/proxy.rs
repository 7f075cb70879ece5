//! The proxies under test: started, and asked what they cost.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use limiter_tests::process::Process;
use tempfile::TempDir;

use super::PROXY_CPU;

/// Connections that a proxy may need to hold.
const MAX_CONNECTIONS: usize = 9_900;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Limiter,
    HaProxy,
    Nginx,
}

/// What a proxy is to lead to.
#[derive(Clone, Copy)]
pub struct Upstreams {
    /// Everybody,
    pub echo: SocketAddr,
    /// but for those that ask for `/flood`, if there is this.
    pub flood: Option<SocketAddr>,
}

/// A running proxy; ended when it is dropped.
pub struct Proxy {
    process: Process,
    pub addr: SocketAddr,
    _folder: TempDir,
}

/// Installs the proxies that aren't there.
pub fn install_missing() -> Result<()> {
    let missing: Vec<&str> =
        ["haproxy", "nginx"].into_iter().filter(|name| !Path::new("/usr/sbin").join(name).exists()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    eprintln!("installing {} with apt-get, to compare with", missing.join(" and "));
    for arguments in [&["update", "--quiet"][..], &["install", "--yes", "--quiet", "--no-install-recommends"]] {
        let mut command = Command::new("apt-get");
        command.args(arguments);
        if arguments[0] == "install" {
            command.args(&missing);
        }
        let ended = command.output().context("cannot run apt-get; install haproxy and nginx by hand")?;
        ensure!(ended.status.success(), "{command:?}: {}", String::from_utf8_lossy(&ended.stderr));
    }
    Ok(())
}

impl Proxy {
    /// Starts a proxy to those upstreams on a port of its own, and waits until it takes connections.
    pub fn start(kind: Kind, upstreams: Upstreams) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let addr = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        let file = folder.path().join("proxy.conf");
        let (text, program, arguments): (String, String, Vec<String>) = match kind {
            Kind::Limiter => {
                let program = std::env::var("LIMITER_BIN").context("LIMITER_BIN does not name the limiter")?;
                let arguments = ["run".into(), "--config".into(), file.display().to_string()].to_vec();
                (limiter_config(addr, upstreams), program, arguments)
            }
            Kind::HaProxy => {
                let arguments = ["-db".into(), "-f".into(), file.display().to_string()].to_vec();
                (haproxy_config(addr, upstreams), "/usr/sbin/haproxy".into(), arguments)
            }
            Kind::Nginx => {
                let prefix = folder.path().display().to_string();
                let arguments = ["-p".into(), prefix, "-c".into(), file.display().to_string()].to_vec();
                (nginx_config(addr, upstreams), "/usr/sbin/nginx".into(), arguments)
            }
        };
        fs::write(&file, text)?;
        let mut command = Command::new("prlimit");
        command.args(["--nofile=20000:20000", "taskset", "--cpu-list", &PROXY_CPU.to_string(), &program]);
        let process = Process::start(command.args(arguments))?;
        for _ in 0..500 {
            if TcpStream::connect(addr).is_ok() {
                return Ok(Self { process, addr, _folder: folder });
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!("{program} does not listen on {addr}")
    }

    /// CPU time that it has used so far.
    pub fn cpu(&self) -> Result<Duration> {
        self.processes()?.iter().map(|id| cpu_of(*id)).sum()
    }

    /// Memory that is its own, in bytes: what it has written to, without the code.
    pub fn memory(&self) -> Result<u64> {
        self.processes()?.iter().map(|id| anonymous_memory(*id)).sum()
    }

    /// It and its workers. (`prlimit` and `taskset` have become the program.)
    fn processes(&self) -> Result<Vec<u32>> {
        let own = self.process.id();
        let children = fs::read_to_string(format!("/proc/{own}/task/{own}/children"))?;
        let children: Result<Vec<u32>, _> = children.split_whitespace().map(str::parse).collect();
        Ok([vec![own], children?].concat())
    }
}

/// Of all threads that there are, to the nanosecond; utime and stime of proc(5) are in hundredths of a second.
fn cpu_of(id: u32) -> Result<Duration> {
    let threads = fs::read_dir(format!("/proc/{id}/task"))?;
    threads
        .map(|thread| {
            // One that ends just now takes its time along.
            let Ok(times) = fs::read_to_string(thread?.path().join("schedstat")) else { return Ok(Duration::ZERO) };
            let on_cpu = times.split_whitespace().next().context("nothing in schedstat")?;
            Ok(Duration::from_nanos(on_cpu.parse()?))
        })
        .sum()
}

fn anonymous_memory(id: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{id}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("no RssAnon in /proc/…/status")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
}

/// Every limit on messages is on, and none is reached. The number of descriptors is what ends the number of connections here, so that
/// nobody is to be turned away before.
fn limiter_config(addr: SocketAddr, Upstreams { echo, flood }: Upstreams) -> String {
    let flood = flood.map_or_else(String::new, |flood| {
        format!("[[gateway.route]]\npath = \"/flood\"\nupstream = \"ws://{flood}\"\n")
    });
    format!(
        "[limits]\nconnections_per_source = 0\nconnections_total = 0\nconnection_rate = 0\n[gateway]\nlisten = [\"{addr}\"]\n\
         upstream = \"ws://{echo}\"\n[gateway.messages]\nmax_size = \"64KiB\"\nrate = 4000000000\nwindow = \
         \"1m\"\n[gateway.overload]\ndescriptors = 0\n{flood}[admin]\nlisten = \"\"\n[log]\nlevel = \"warn\"\n"
    )
}

fn haproxy_config(addr: SocketAddr, Upstreams { echo, flood }: Upstreams) -> String {
    let (choice, backend) = flood.map_or_else(Default::default, |flood| {
        ("  use_backend flood if { path /flood }\n", format!("backend flood\n  server flood {flood}\n"))
    });
    format!(
        "global\n  maxconn {MAX_CONNECTIONS}\n  nbthread 1\ndefaults\n  mode http\n  timeout connect 5s\n  timeout client 1h\n  \
         timeout server 1h\n  timeout tunnel 1h\nfrontend clients\n  bind {addr}\n{choice}  default_backend upstream\nbackend \
         upstream\n  server upstream {echo}\n{backend}"
    )
}

/// Without a master, whose workers would go on when it is ended.
fn nginx_config(addr: SocketAddr, Upstreams { echo, flood }: Upstreams) -> String {
    // When fifteen of sixteen are taken, it closes those that wait for their request.
    let connections = 4 * MAX_CONNECTIONS;
    let location = |path: &str, upstream| {
        format!(
            "    location {path} {{\n      proxy_pass http://{upstream};\n      proxy_http_version 1.1;\n      proxy_set_header \
             Upgrade $http_upgrade;\n      proxy_set_header Connection upgrade;\n      proxy_read_timeout 1h;\n      \
             proxy_send_timeout 1h;\n    }}\n"
        )
    };
    let flood = flood.map_or_else(String::new, |flood| location("/flood", flood));
    let all = location("/", echo);
    format!(
        "daemon off;\nmaster_process off;\nuser root;\npid nginx.pid;\nerror_log stderr error;\nevents {{ worker_connections \
         {connections}; }}\nhttp {{\n  access_log off;\n  client_body_temp_path body;\n  proxy_temp_path proxy;\n  \
         fastcgi_temp_path fastcgi;\n  uwsgi_temp_path uwsgi;\n  scgi_temp_path scgi;\n  server {{\n    listen {addr} \
         backlog=4096;\n{flood}{all}  }}\n}}\n"
    )
}
