use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{Router, routing::any};
use hyper::{Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tower_layer::Layer as _;
use tower_service::Service as _;

use super::*;
use crate::policy::{Action, Connection, Fixed, Limits, Rule};

const PATIENCE: Duration = Duration::from_secs(20);

/// Limits that stay as they are, and how often the end of each connection was told.
struct Recorder {
    limits: Limits,
    closed: Mutex<HashMap<Connection, u32>>,
}

impl Recorder {
    fn new(per_source: u32, total: u32) -> Arc<Self> {
        let limits = Limits { connections_per_source: per_source, connections_total: total, ..Limits::default() };
        Arc::new(Self { limits, closed: Mutex::default() })
    }

    fn closed(&self) -> Vec<u32> {
        self.closed.lock().unwrap().values().copied().collect()
    }

    async fn wait_closed(&self, connections: usize) {
        let all = async {
            while self.closed().len() < connections {
                tokio::task::yield_now().await;
            }
        };
        timeout(PATIENCE, all).await.expect("the policy is told of each end");
        assert_eq!(self.closed(), vec![1; connections], "of each once");
    }
}

impl Policy for Recorder {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn closed(&self, connection: &Connection) {
        *self.closed.lock().unwrap().entry(*connection).or_default() += 1;
    }
}

async fn guard(policy: &Arc<Recorder>) -> Guard {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    Guard::new(listener, Arc::clone(policy) as Arc<dyn Policy>).unwrap()
}

/// An application that says "hello", and echoes one byte on an upgraded connection.
async fn serve(policy: &Arc<Recorder>) -> SocketAddr {
    async fn hello(mut request: axum::extract::Request) -> Response<axum::body::Body> {
        if !request.headers().contains_key(header::UPGRADE) {
            return Response::new("hello".into());
        }
        tokio::spawn(async move {
            let mut upgraded = TokioIo::new(hyper::upgrade::on(&mut request).await.unwrap());
            while let Ok(byte) = upgraded.read_u8().await {
                upgraded.write_u8(byte).await.unwrap();
            }
        });
        let mut response = Response::new(axum::body::Body::empty());
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        response.headers_mut().insert(header::UPGRADE, header::HeaderValue::from_static("echo"));
        response.headers_mut().insert(header::CONNECTION, header::HeaderValue::from_static("upgrade"));
        response
    }
    let guard = guard(policy).await;
    let address = guard.local_addr();
    let app = Router::new().route("/", any(hello)).layer(AdmitLayer);
    tokio::spawn(async move { axum::serve(guard, app.into_make_service_with_connect_info::<Guest>()).await });
    address
}

/// Sends a request and returns the head of the answer, and what has come of its body.
async fn ask(stream: &mut TcpStream, headers: &str) -> String {
    stream.write_all(format!("GET / HTTP/1.1\r\nhost: x\r\n{headers}\r\n").as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let whole = async {
        loop {
            answer.push(stream.read_u8().await.unwrap());
            let Some(end) = answer.windows(4).position(|four| four == b"\r\n\r\n") else { continue };
            let head = String::from_utf8(answer[..end].to_vec()).unwrap();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap_or("0");
            let mut body = vec![0; length.parse().unwrap()];
            stream.read_exact(&mut body).await.unwrap();
            break head + &String::from_utf8(body).unwrap();
        }
    };
    timeout(PATIENCE, whole).await.expect("an answer comes")
}

#[tokio::test]
async fn a_connection_takes_one_slot_however_many_requests_it_makes() {
    let policy = Recorder::new(1, 0);
    let address = serve(&policy).await;
    let mut first = TcpStream::connect(address).await.unwrap();
    for _ in 0..3 {
        assert!(ask(&mut first, "").await.starts_with("HTTP/1.1 200"));
    }
    let mut second = TcpStream::connect(address).await.unwrap();
    let refusal = ask(&mut second, "").await;
    assert!(refusal.starts_with("HTTP/1.1 429"), "{refusal}");
    assert!(refusal.contains("retry-after: ") && refusal.contains("application/problem+json"), "{refusal}");
    drop(first);
    policy.wait_closed(1).await;
    // The refused connection is closed by the answer.
    policy.wait_closed(2).await;
    let mut third = TcpStream::connect(address).await.unwrap();
    assert!(ask(&mut third, "").await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn an_upgraded_connection_keeps_its_slot_until_it_ends() {
    let policy = Recorder::new(0, 1);
    let address = serve(&policy).await;
    let mut upgraded = TcpStream::connect(address).await.unwrap();
    let answer = ask(&mut upgraded, "connection: upgrade\r\nupgrade: echo\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 101"), "{answer}");
    upgraded.write_u8(7).await.unwrap();
    assert_eq!(timeout(PATIENCE, upgraded.read_u8()).await.unwrap().unwrap(), 7);

    let mut other = TcpStream::connect(address).await.unwrap();
    assert!(ask(&mut other, "").await.starts_with("HTTP/1.1 503"), "the service is full");
    policy.wait_closed(1).await;
    drop(upgraded);
    policy.wait_closed(2).await;
    let mut third = TcpStream::connect(address).await.unwrap();
    assert!(ask(&mut third, "").await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn a_guest_does_not_keep_its_connection() {
    let policy = Recorder::new(1, 0);
    let mut guard = guard(&policy).await;
    let _client = TcpStream::connect(guard.local_addr()).await.unwrap();
    let _other = TcpStream::connect(guard.local_addr()).await.unwrap();
    let (stream, guest) = guard.accept().await;
    let (other, refused) = guard.accept().await;
    assert_eq!((guest.admit(), guest.clone().admit(), stream.guest().admit()), (Ok(()), Ok(()), Ok(())));
    assert_eq!(refused.admit(), Err(Refused::Source { limit: 1 }));
    drop(stream);
    policy.wait_closed(1).await;
    assert_eq!(guest.admit(), Err(Refused::Gone));
    assert_eq!(refused.admit(), Ok(()));
    drop(other);
    policy.wait_closed(2).await;
}

#[tokio::test]
async fn whom_a_rule_denies_is_refused_without_the_kernel_too() {
    let deny = Rule::new("127.0.0.0/8".parse().unwrap(), Action::Deny);
    let policy = Fixed::new(Limits::default(), &[deny]);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut guard = Guard::new(listener, Arc::new(policy)).unwrap();
    let _client = TcpStream::connect(guard.local_addr()).await.unwrap();
    let (_stream, guest) = guard.accept().await;
    assert_eq!(guest.admit(), Err(Refused::Denied));
}

/// A connection to a guard by limits that stay as they are, with both of its ends.
async fn guest_of(guard: &mut Guard) -> (TcpStream, Guarded, Guest) {
    let client = TcpStream::connect(guard.local_addr()).await.unwrap();
    let (stream, guest) = guard.accept().await;
    (client, stream, guest)
}

async fn fixed(policy: Fixed) -> Guard {
    Guard::new(TcpListener::bind("127.0.0.1:0").await.unwrap(), Arc::new(policy)).unwrap()
}

#[tokio::test]
async fn without_the_kernel_rates_are_kept_and_who_is_refused_spends_nothing() {
    // A token comes back in a second: some may meanwhile.
    let slow = Limits { connection_rate: 1, connection_burst: 2, connections_per_source: 0, ..Limits::default() };
    let service = Limits { service_connection_rate: 1, service_connection_burst: 2, ..Limits::default() };
    for (limits, refused) in [(slow, Refused::SourceRate), (service, Refused::ServiceRate)] {
        let mut guard = fixed(Fixed::new(limits, &[])).await;
        let mut held = Vec::new();
        let first = loop {
            let one = guest_of(&mut guard).await;
            match one.2.admit() {
                Ok(()) => held.push(one),
                Err(first) => break first,
            }
            assert!(held.len() < 1000, "no rate is kept");
        };
        assert!(held.len() >= 2, "{}", held.len());
        assert_eq!(first, refused);
        assert_eq!(
            guard.kept.admission.try_admit([127, 0, 0, 1].into(), &limits).map(drop),
            Ok(()),
            "nor takes a slot"
        );
        // One that is in asks as often as it likes.
        for _ in 0..100 {
            assert_eq!(held[0].2.admit(), Ok(()));
        }
    }
    // Whom the kernel has let in has spent there.
    let policy = Recorder::new(0, 0);
    let mut guard = guard(&policy).await;
    for _ in 0..policy.limits.connection_burst + 5 {
        assert_eq!(guest_of(&mut guard).await.2.admit(), Ok(()));
    }
}

#[tokio::test]
async fn where_the_policy_observes_everybody_is_admitted_and_counts() {
    let deny = Rule::new("127.0.0.0/8".parse().unwrap(), Action::Deny);
    let one = Limits { connections_per_source: 1, ..Limits::default() };
    let slow = Limits { connection_rate: 1, connection_burst: 1, ..Limits::default() };
    for (limits, rules) in [(Limits::default(), vec![deny]), (one, vec![]), (slow, vec![])] {
        let mut guard = fixed(Fixed::new(limits, &rules).observing(true)).await;
        let mut held = Vec::new();
        for _ in 0..4 {
            let one = guest_of(&mut guard).await;
            assert_eq!(one.2.admit(), Ok(()));
            held.push(one);
        }
        let source = limits.source([127, 0, 0, 1].into());
        assert_eq!(guard.kept.admission.held(source), (4, 4));
        drop(held);
        assert_eq!(guard.kept.admission.held(source), (0, 0));
    }
}

#[tokio::test]
async fn a_request_of_nobody_is_an_error_and_does_not_pass() {
    let inner = tower::service_fn(|_: Request<()>| async {
        Ok::<_, std::convert::Infallible>(Response::new(http_body_util::Full::<bytes::Bytes>::default()))
    });
    let answer = AdmitLayer.layer(inner).call(Request::new(())).await.unwrap();
    assert_eq!(answer.status(), StatusCode::INTERNAL_SERVER_ERROR);
}
