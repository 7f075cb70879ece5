use std::{collections::BTreeMap, fmt::Write as _};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::oneshot,
    task::JoinHandle,
};

use super::{super::KernelState, *};
use crate::{
    kernel::{AttachedInterface, ChallengeRow, Counters, KernelError, ServiceRow, Status},
    policy::Limits,
};

/// A running admin server.
struct Running {
    address: SocketAddr,
    readiness: Readiness,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

impl Running {
    async fn start(metrics: Metrics) -> Self {
        let readiness = Readiness::default();
        let bound = Admin::bind(([127, 0, 0, 1], 0).into()).await.unwrap();
        let admin = bound.showing(metrics, readiness.clone(), Arc::default(), None);
        let address = admin.local_addr();
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(admin.run(async {
            let _ = stopped.await;
        }));
        Self { address, readiness, stop: Some(stop), task }
    }

    /// Status, head and body of the answer.
    async fn ask(&self, method: &str, path: &str) -> (u16, String, String) {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let request = format!("{method} {path} HTTP/1.1\r\nHost: limiter\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, head.to_lowercase(), body.to_owned())
    }

    async fn stop(mut self) {
        drop(self.stop.take());
        self.task.await.unwrap();
    }
}

/// A kernel that holds what it is told, or can't be read.
#[derive(Debug)]
struct Fake(Option<Status>);

impl KernelState for Fake {
    fn status(&self) -> Result<Status, KernelError> {
        self.0.clone().ok_or_else(|| KernelError::NotAttached { pin_path: "/p".into() })
    }

    fn rules(&self) -> Result<Vec<(&'static str, u64)>, KernelError> {
        Ok(vec![("allow", 1), ("deny", 200), ("limit", 0)])
    }
}

fn status() -> Status {
    Status {
        pin_path: "/p".into(),
        abi: 1,
        daemon: None,
        accounting: "socket",
        counts_on_delivery: None,
        interfaces: vec![AttachedInterface {
            name: Some("eth0".into()),
            index: 2,
            mode: "native",
            hook: "xdp",
            why: None,
        }],
        syncookies_before: None,
        timestamps_before: None,
        services: vec![ServiceRow {
            index: 0,
            name: "ch\"at".into(),
            ports: vec![8080],
            socket_ports: vec![8080],
            namespaces: "host",
            on_deny: "drop",
            limits: Limits::default(),
            challenge: ChallengeRow::default(),
            connections: 3,
            counters: Counters(BTreeMap::from([
                ("syn_admitted", 5),
                ("syn_source_limit", 7),
                ("handshake_unproven", 2),
                ("closed_gateway", 4),
                ("closed_audit", 1),
            ])),
        }],
        ledger_entries: 3,
        ledger_size: 1000,
        sources: 2,
        audited: None,
        drift: 6,
        rules_size: 500,
        rules_full: 4,
        headers_unreadable: 9,
        repairs: 1,
    }
}

async fn with_kernel(kernel: Option<Status>) -> Running {
    let mut metrics = Metrics::default();
    metrics.add_kernel(Arc::new(Fake(kernel)));
    Running::start(metrics).await
}

#[tokio::test]
async fn metrics_of_the_kernel_and_the_process_are_openmetrics() {
    let running = with_kernel(Some(status())).await;
    let (code, head, body) = running.ask("GET", "/metrics").await;
    assert_eq!(code, 200);
    assert!(head.contains("content-type: application/openmetrics-text; version=1.0.0"), "{head}");
    for line in [
        "limiter_kernel_up 1",
        "limiter_connections{service=\"ch\\\"at\"} 3",
        "limiter_sources 2",
        "limiter_ledger_size 1000",
        "limiter_connections_per_source_limit{service=\"ch\\\"at\"} 20",
        "limiter_kernel_attached{interface=\"eth0\",mode=\"native\"} 1",
        "limiter_syn_total{service=\"ch\\\"at\",verdict=\"admitted\",reason=\"\"} 5",
        "limiter_syn_total{service=\"ch\\\"at\",verdict=\"denied\",reason=\"source_limit\"} 7",
        "limiter_ack_total{service=\"ch\\\"at\",verdict=\"passed\",reason=\"unproven\"} 2",
        "limiter_connections_opened_total{service=\"ch\\\"at\",by=\"xdp\"} 0",
        "limiter_connections_closed_total{service=\"ch\\\"at\",reason=\"gateway\"} 4",
        "limiter_ack_total{service=\"ch\\\"at\",verdict=\"denied\",reason=\"ledger_full\"} 0",
        "limiter_syn_total{service=\"ch\\\"at\",verdict=\"observed\",reason=\"rule\"} 0",
        "limiter_rules{action=\"deny\"} 200",
        "limiter_ledger_drift 6",
        "limiter_ledger_repairs_total{service=\"ch\\\"at\",kind=\"removed\"} 1",
        "limiter_connections_cut_total{service=\"ch\\\"at\"} 0",
        "limiter_ledger_full_total{service=\"ch\\\"at\"} 0",
        "limiter_ledger_busy_total{service=\"ch\\\"at\"} 0",
        "limiter_events_lost_total{service=\"ch\\\"at\"} 0",
    ] {
        assert!(body.lines().any(|found| found == line), "{line} is not in\n{body}");
    }
    assert!(body.ends_with("# EOF\n"));

    let value = |name: &str| -> f64 {
        let line = body.lines().find(|line| line.starts_with(&format!("{name} "))).unwrap_or_else(|| panic!("{name}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    assert!(value("process_open_fds") >= 3.0 && value("process_open_fds") <= value("process_max_fds"));
    assert!(value("process_resident_memory_bytes") > 1e6);
    assert!(value("process_cpu_seconds_total") >= 0.0);
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs_f64();
    // Both ends are whole ticks, and the boot time a whole second.
    let age = now - value("process_start_time_seconds");
    assert!((-2.0..3600.0).contains(&age), "started {age} s ago");
    running.stop().await;
}

#[tokio::test]
async fn no_metric_is_described_twice_beside_the_gateway() {
    let mut metrics = Metrics::default();
    metrics.add_kernel(Arc::new(Fake(Some(status()))));
    crate::gateway::Metrics::default().register(metrics.registry());
    let text = metrics.encode().unwrap();
    let mut described: Vec<_> = text.lines().filter(|line| line.starts_with("# TYPE ")).collect();
    let all = described.len();
    described.sort_unstable();
    described.dedup();
    assert!(all > 20, "{text}");
    assert_eq!(described.len(), all, "{text}");
}

#[tokio::test]
async fn a_kernel_that_cannot_be_read_fails_no_scrape() {
    let running = with_kernel(None).await;
    let (code, _, body) = running.ask("GET", "/metrics").await;
    assert_eq!(code, 200);
    assert!(body.contains("limiter_kernel_up 0\n") && body.contains("process_open_fds "), "{body}");
    assert!(!body.contains("limiter_connections"), "{body}");
    running.stop().await;
}

#[tokio::test]
async fn readiness_follows_the_process_and_health_does_not() {
    let running = Running::start(Metrics::default()).await;
    for (state, expected) in [(State::Starting, "starting"), (State::Ready, "ready"), (State::Draining, "draining")] {
        running.readiness.set(state);
        let (code, head, body) = running.ask("GET", "/readyz").await;
        let document: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert!(head.contains("content-type: application/json"), "{head}");
        assert_eq!(document["state"], expected);
        let ready = state == State::Ready;
        assert_eq!((code, document["ready"].as_bool()), (if ready { 200 } else { 503 }, Some(ready)));
        assert_eq!(document["reason"].is_string(), !ready);
        assert_eq!(running.ask("GET", "/healthz").await.0, 200);
    }
    running.stop().await;
}

#[tokio::test]
async fn only_get_and_head_of_known_paths_are_answered() {
    let running = Running::start(Metrics::default()).await;
    let (code, _, body) = running.ask("HEAD", "/metrics").await;
    assert_eq!((code, body.as_str()), (200, ""));
    for method in ["POST", "PUT", "DELETE", "OPTIONS"] {
        let (code, head, _) = running.ask(method, "/metrics").await;
        assert_eq!(code, 405, "{method}");
        assert!(head.contains("allow: get,head"), "{head}");
    }
    for path in ["/", "/metrics/", "/../etc/passwd"] {
        assert_eq!(running.ask("GET", path).await.0, 404, "{path}");
    }
    running.stop().await;
}

#[tokio::test]
async fn nonsense_and_endless_heads_end_their_connection_only() {
    let running = Running::start(Metrics::default()).await;
    let mut endless = String::from("GET / HTTP/1.1\r\n");
    for number in 0..200 {
        write!(endless, "X-{number}: {}\r\n", "a".repeat(1000)).unwrap();
    }
    for nonsense in ["\0\u{1}\u{2}\r\n\r\n", &endless] {
        let mut stream = TcpStream::connect(running.address).await.unwrap();
        // The server may close while this is being written.
        let _ = stream.write_all(nonsense.as_bytes()).await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
    }
    assert_eq!(running.ask("GET", "/healthz").await.0, 200);
    running.stop().await;
}

#[tokio::test]
async fn more_clients_than_there_is_room_for_are_served_in_turn() {
    let running = Running::start(Metrics::default()).await;
    let mut idle = Vec::new();
    for _ in 0..MOST_CONNECTIONS {
        idle.push(TcpStream::connect(running.address).await.unwrap());
    }
    // Every place is taken by a client that says nothing; when one leaves, the next is served.
    let next = running.ask("GET", "/healthz");
    let leave = async {
        tokio::task::yield_now().await;
        idle.pop();
    };
    let ((code, ..), ()) = tokio::join!(next, leave);
    assert_eq!(code, 200);
    running.stop().await;
}

#[tokio::test]
async fn a_port_in_use_is_said_with_what_to_do() {
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap();
    let error = Admin::bind(address).await.unwrap_err().to_string();
    assert!(error.contains(&address.to_string()) && error.contains("in use") && error.contains("--admin"), "{error}");
}

#[tokio::test]
async fn a_shutdown_does_not_wait_for_idle_clients() {
    let running = Running::start(Metrics::default()).await;
    let mut idle = TcpStream::connect(running.address).await.unwrap();
    assert_eq!(running.ask("GET", "/healthz").await.0, 200);
    let begun = std::time::Instant::now();
    running.stop().await;
    assert!(begun.elapsed() < SHUTDOWN_TIMEOUT * 2);
    assert_eq!(idle.read(&mut [0; 1]).await.unwrap_or(0), 0, "the connection is closed");
}
