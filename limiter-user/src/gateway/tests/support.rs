//! A running gateway, and clients for it.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::{SinkExt, StreamExt};
use prometheus_client::registry::Registry;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    sync::oneshot,
    task::JoinHandle,
    time::timeout,
};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream,
    tungstenite::{
        Message,
        protocol::{CloseFrame, frame::coding::CloseCode},
    },
};

use crate::{
    config,
    gateway::{DrainReport, Gateway, Metrics, Settings, admission::Admission},
    policy::{Connection, Limits, Policy, Source},
};

/// More than anything here takes; a test that waits this long has failed.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub type Client = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// A policy whose limits can be changed, and that keeps what it is told.
#[derive(Default)]
pub struct Recorder {
    limits: Mutex<Limits>,
    /// Addresses that a rule denies, and those that one lets past every limit.
    pub denied: Mutex<Vec<IpAddr>>,
    pub allowed: Mutex<Vec<IpAddr>>,
    /// Sources that the gateway had denied.
    pub convicted: Mutex<Vec<(Source, Duration)>>,
    closed: Mutex<HashMap<Connection, u32>>,
    /// Whether nobody below keeps rules and rates.
    pub is_alone: AtomicBool,
    /// Whether who would be refused is let in.
    pub observes: AtomicBool,
    /// The users of connections, in the order in which they were told.
    pub users: Mutex<Vec<(Connection, String)>>,
}

impl Policy for Recorder {
    fn limits(&self) -> Limits {
        *self.limits.lock().unwrap()
    }

    fn limits_for(&self, client: IpAddr) -> Limits {
        if self.allowed.lock().unwrap().contains(&client) { unlimited() } else { self.limits() }
    }

    fn is_kept_below(&self) -> bool {
        !self.is_alone.load(Ordering::Relaxed)
    }

    fn observes(&self) -> bool {
        self.observes.load(Ordering::Relaxed)
    }

    fn denies(&self, client: IpAddr) -> bool {
        self.denied.lock().unwrap().contains(&client)
    }

    fn authenticated(&self, connection: &Connection, user: &str) {
        assert!(!self.closed.lock().unwrap().contains_key(connection));
        self.users.lock().unwrap().push((*connection, user.to_owned()));
    }

    fn deny(&self, source: Source, time: Duration) -> bool {
        self.convicted.lock().unwrap().push((source, time));
        true
    }

    fn closed(&self, connection: &Connection) {
        *self.closed.lock().unwrap().entry(*connection).or_default() += 1;
    }
}

impl Recorder {
    pub fn set(&self, limits: Limits) {
        *self.limits.lock().unwrap() = limits;
    }

    /// How often the end of the connection of this client was told.
    pub fn closed(&self, client: SocketAddr) -> u32 {
        self.closed.lock().unwrap().iter().filter(|(c, _)| c.remote == client).map(|(_, n)| n).sum()
    }

    /// Waits until `n` connections have ended, and checks that each was told once.
    pub async fn wait_closed(&self, n: usize) {
        eventually("every connection is over", || self.closed.lock().unwrap().len() >= n).await;
        let closed = self.closed.lock().unwrap();
        assert_eq!(closed.len(), n);
        for (connection, times) in closed.iter() {
            assert_eq!(*times, 1, "{connection:?}");
            assert_ne!(connection.cookie, 0, "{connection:?}");
        }
    }
}

pub struct Running {
    pub addr: SocketAddr,
    pub policy: Arc<Recorder>,
    metrics: Arc<Metrics>,
    admission: Arc<Admission>,
    pub settings: Settings,
    stop: oneshot::Sender<()>,
    ended: JoinHandle<DrainReport>,
}

/// Settings whose timeouts are beyond every test, on a free port of 127.0.0.1.
pub fn quiet() -> config::Gateway {
    config::Gateway {
        listen: vec!["127.0.0.1:0".parse().unwrap()],
        handshake_timeout: PATIENCE,
        messages: config::Messages { rate: 0, ..config::Messages::default() },
        // Other tests load the host.
        overload: config::Overload::OFF,
        ..config::Gateway::default()
    }
}

/// A route for what is below a path, with the application and the limits of everything else.
pub fn route(path: &str) -> config::Route {
    config::Route {
        path: path.into(),
        exact: false,
        host: None,
        upstream: None,
        auth: true,
        exempt: false,
        connections: 0,
        messages: quiet().messages,
    }
}

pub fn unlimited() -> Limits {
    Limits { connections_per_source: 0, connections_total: 0, ..Limits::default() }
}

pub fn start(config: &config::Gateway) -> Running {
    start_with(config, unlimited())
}

pub fn start_with(config: &config::Gateway, limits: Limits) -> Running {
    start_counting(config, limits, Metrics::default())
}

/// With metrics that have something of their own.
pub fn start_counting(config: &config::Gateway, limits: Limits, metrics: Metrics) -> Running {
    let policy = Arc::new(Recorder::default());
    policy.set(limits);
    let metrics = Arc::new(metrics);
    let gateway = Gateway::bind(config, Arc::clone(&policy) as Arc<dyn Policy>, Arc::clone(&metrics)).unwrap();
    let addr = gateway.local_addrs()[0];
    let admission = Arc::clone(&gateway.current.borrow().admission);
    let settings = gateway.settings();
    let (stop, stopped) = oneshot::channel();
    let ended = tokio::spawn(gateway.run(async {
        _ = stopped.await;
    }));
    Running { addr, policy, metrics, admission, settings, stop, ended }
}

impl Running {
    pub fn url(&self) -> String {
        format!("ws://{}/", self.addr)
    }

    pub async fn connect(&self) -> Client {
        tokio_tungstenite::connect_async(self.url()).await.unwrap().0
    }

    /// One sample of the metrics, by its name and labels; 0 if it isn't there.
    pub fn metric(&self, sample: &str) -> u64 {
        self.sampler()(sample)
    }

    /// `metric`, for when the gateway is gone.
    pub fn sampler(&self) -> impl Fn(&str) -> u64 + use<> {
        sampler(&self.metrics)
    }

    /// All the metrics as they are written, also for when the gateway is gone.
    pub fn exposition(&self) -> impl Fn() -> String + use<> {
        exposition(&self.metrics)
    }

    /// Who is let in, also for when the gateway is gone.
    pub fn admission(&self) -> Arc<Admission> {
        Arc::clone(&self.admission)
    }

    /// Waits until no slot is taken.
    pub async fn wait_released(&self) {
        eventually("every slot is free", || self.admission.total() == 0).await;
    }

    /// Begins the drain; what `stopped` then waits for.
    pub fn begin_stop(self) -> JoinHandle<DrainReport> {
        self.stop.send(()).unwrap();
        self.ended
    }

    /// Drops the running gateway as it is.
    pub fn begin_abort(self) {
        self.ended.abort();
    }

    pub async fn stop(self) -> DrainReport {
        timeout(PATIENCE, self.begin_stop()).await.expect("the gateway ends").unwrap()
    }

    /// Sends raw bytes on a connection of their own and returns all that comes back until the end.
    pub async fn raw(&self, request: &[u8]) -> String {
        self.raw_of("a request", request).await
    }

    /// The same of a case that has a name. What comes back is read while more is sent, as it must be where that is long.
    pub async fn raw_of(&self, case: &str, request: &[u8]) -> String {
        let mut stream = TcpStream::connect(self.addr).await.unwrap();
        let (mut read, mut write) = stream.split();
        let mut answer = Vec::new();
        let both = async { tokio::join!(write.write_all(request), read.read_to_end(&mut answer)) };
        let (sent, ended) = timeout(PATIENCE, both).await.unwrap_or_else(|_| panic!("{case}: no end"));
        sent.and(ended.map(|_| ())).unwrap_or_else(|e| panic!("{case}: {e}; an answer may be lost so"));
        // Frames may follow the head.
        String::from_utf8_lossy(&answer).into_owned()
    }
}

/// Gives one sample of metrics, by its name and labels; 0 if it isn't there.
pub fn sampler(metrics: &Metrics) -> impl Fn(&str) -> u64 + use<> {
    let text = exposition(metrics);
    move |sample| {
        let text = text();
        let line = text.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
        line.map_or(0, |value| value.parse().unwrap())
    }
}

/// All the metrics as they are written.
pub fn exposition(metrics: &Metrics) -> impl Fn() -> String + use<> {
    let mut registry = Registry::with_prefix("limiter");
    metrics.register(&mut registry);
    move || {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        text
    }
}

/// The address that a client's connection comes from.
pub fn address(client: &Client) -> SocketAddr {
    match client.get_ref() {
        MaybeTlsStream::Plain(stream) => stream.local_addr().unwrap(),
        _ => unreachable!("these clients don't use TLS"),
    }
}

/// The next message that is not a control frame; a Close is one.
pub async fn next<S: AsyncRead + AsyncWrite + Unpin>(client: &mut WebSocketStream<S>) -> Message {
    loop {
        match timeout(PATIENCE, client.next()).await.expect("a message").expect("not the end").unwrap() {
            Message::Ping(_) | Message::Pong(_) => {}
            message => return message,
        }
    }
}

/// The code and reason of the Close that comes next, which is answered.
pub async fn next_close<S: AsyncRead + AsyncWrite + Unpin>(client: &mut WebSocketStream<S>) -> (u16, String) {
    match next(client).await {
        Message::Close(Some(frame)) => {
            // The library has the answer ready; where the gateway is gone already, nobody waits for it.
            _ = client.flush().await;
            (frame.code.into(), frame.reason.to_string())
        }
        other => panic!("expected a Close frame, got {other:?}"),
    }
}

/// A close that is all its sessions' at once: its code, and its reason without the hint, which has to be there, when to come back.
pub fn without_hint((code, reason): (u16, String)) -> (u16, String) {
    let (reason, hint) = reason.split_once("; reconnect in ").expect("a hint when to come back");
    let seconds: u16 = hint.strip_suffix(" s").unwrap().parse().unwrap();
    assert!(seconds > 0, "{hint}");
    (code, reason.to_owned())
}

pub async fn echoes<S: AsyncRead + AsyncWrite + Unpin>(client: &mut WebSocketStream<S>, text: &str) {
    client.send(Message::text(text)).await.unwrap();
    assert_eq!(next(client).await, Message::text(text));
}

pub fn close(code: u16, reason: &str) -> Message {
    Message::Close(Some(CloseFrame { code: CloseCode::from(code), reason: reason.to_owned().into() }))
}

/// Waits for a condition.
pub async fn eventually(what: &str, condition: impl Fn() -> bool) {
    timeout(PATIENCE, async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await
    .unwrap_or_else(|_| panic!("waited in vain until {what}"));
}

/// A handshake that is accepted (its key is that of RFC 6455).
pub fn good_request(path: &str) -> String {
    format!(
        "GET {path} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: \
         13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
}

/// Reads an HTTP head, and not a byte more.
pub async fn read_head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(timeout(PATIENCE, stream.read_u8()).await.expect("a byte").unwrap());
    }
    String::from_utf8(head).unwrap()
}

/// A connection after its handshake, to write frames by hand.
pub async fn shaken(gateway: &Running) -> TcpStream {
    let mut stream = TcpStream::connect(gateway.addr).await.unwrap();
    stream.write_all(good_request("/").as_bytes()).await.unwrap();
    assert!(read_head(&mut stream).await.starts_with("HTTP/1.1 101 "));
    stream
}

/// A client's frame with a mask of zeros; `first` is FIN, RSV and opcode. Payloads up to 125 bytes.
pub fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let length = u8::try_from(payload.len()).unwrap();
    assert!(length <= 125);
    [&[first, 0x80 | length, 0, 0, 0, 0], payload].concat()
}
