//! A service that is asked who may connect.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{io::AsyncWriteExt, net::TcpListener};

use super::{relays, support::*};
use crate::config::{self, Auth, Forward, UserLimits};

/// A service that gives one answer to everybody, which can be changed, and keeps what it was asked.
#[derive(Clone)]
pub struct Service {
    addr: SocketAddr,
    answer: Arc<Mutex<String>>,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Service {
    pub async fn start(answer: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let service = Self {
            addr: listener.local_addr().unwrap(),
            answer: Arc::new(Mutex::new(answer.to_owned())),
            asked: Arc::default(),
        };
        let serving = service.clone();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let service = serving.clone();
                tokio::spawn(async move {
                    let head = read_head(&mut stream).await;
                    service.asked.lock().unwrap().push(head);
                    let answer = service.answer.lock().unwrap().clone();
                    if answer.is_empty() {
                        std::future::pending::<()>().await;
                    }
                    // The gateway is free to leave in the middle of it.
                    _ = stream.write_all(answer.as_bytes()).await;
                });
            }
        });
        service
    }

    pub fn answers(&self, answer: &str) {
        answer.clone_into(&mut self.answer.lock().unwrap());
    }

    pub fn config(&self) -> config::Gateway {
        let url = format!("http://{}/check?x=1", self.addr).parse().unwrap();
        let forward = Forward { url, timeout: Duration::from_secs(1), user_header: "X-User".into() };
        let users = UserLimits { attempts_per_minute: 0, connections: 0, ..UserLimits::default() };
        config::Gateway { auth: Some(Auth { forward: Some(forward), users, ..Auth::default() }), ..quiet() }
    }
}

pub const ALICE: &str = "HTTP/1.1 204 No Content\r\nX-User: alice\r\n\r\n";

#[tokio::test]
async fn whom_the_service_lets_in_has_the_name_that_it_gives() {
    let service = Service::start(ALICE).await;
    let (gateway, request) = relays::relay_with(service.config(), "", |_server| std::future::pending()).await;
    let request_text = good_request("/chat?room=1").replace(
        "\r\n\r\n",
        "\r\nCookie: session=c\r\nX-Original-URI: /evil\r\nX-Forwarded-For: 203.0.113.1\r\nX-Limiter-User: root\r\nX_Original_URI: \
         /evil\r\nX_Forwarded_For: 203.0.113.1\r\nX_Own: theirs\r\n\r\n",
    );
    let mut stream = tokio::net::TcpStream::connect(gateway.addr).await.unwrap();
    stream.write_all(request_text.as_bytes()).await.unwrap();
    assert!(read_head(&mut stream).await.starts_with("HTTP/1.1 101 "));
    assert_eq!(request.await.unwrap().headers()["x-limiter-user"], "alice");

    let asked = service.asked.lock().unwrap()[0].to_ascii_lowercase();
    assert!(asked.starts_with("get /check?x=1 http/1.1\r\n"), "{asked}");
    for line in [
        "cookie: session=c",
        "x_own: theirs",
        "x-original-uri: /chat?room=1",
        "x-original-method: get",
        "x-forwarded-uri: /chat?room=1",
        "x-forwarded-host: localhost",
        "x-forwarded-proto: http",
        "x-forwarded-for: 127.0.0.1",
        "connection: close",
        &format!("host: {}", service.addr),
    ] {
        assert_eq!(asked.matches(&format!("\r\n{line}\r\n")).count(), 1, "{line} in {asked}");
    }
    for gone in ["evil", "203.0.113.1", "root", "upgrade:"] {
        assert!(!asked.contains(gone), "{gone} in {asked}");
    }
}

#[tokio::test]
async fn a_refusal_is_passed_on_and_any_other_answer_is_503() {
    let service = Service::start("").await;
    let gateway = start(&service.config());
    let endless = format!("HTTP/1.1 200 OK\r\nX-User: {}", "a".repeat(100_000));
    for (given, status, result) in [
        (
            "HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"x\"\r\nContent-Length: 0\r\n\r\n",
            401,
            "auth_refused",
        ),
        ("HTTP/1.1 403 Forbidden\r\nContent-Length: 99999999999\r\n\r\nno", 403, "auth_refused"),
        ("HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n", 503, "auth_unavailable"),
        ("HTTP/1.1 302 Found\r\nLocation: /login\r\nContent-Length: 0\r\n\r\n", 503, "auth_unavailable"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 503, "auth_unavailable"),
        ("HTTP/1.1 200 OK\r\nX-User: a\r\nX-User: b\r\nContent-Length: 0\r\n\r\n", 503, "auth_unavailable"),
        ("nonsense\r\n\r\n", 503, "auth_unavailable"),
        (&endless, 503, "auth_unavailable"),
        // Never an answer.
        ("", 503, "auth_unavailable"),
    ] {
        service.answers(given);
        let count = || gateway.metric(&format!("limiter_handshakes_total{{result=\"{result}\"}}"));
        let before = count();
        let answer = gateway.raw(good_request("/").as_bytes()).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{given}: {answer}");
        assert!(answer.contains("application/problem+json"), "{answer}");
        assert_eq!(answer.contains("Basic realm"), given.contains("Basic realm"), "{answer}");
        assert_eq!(answer.contains("retry-after"), status == 503, "{answer}");
        assert_eq!(count(), before + 1, "{given}");
    }
    gateway.wait_released().await;
}

#[tokio::test]
async fn a_session_that_the_service_does_not_want_any_more_is_closed_with_4401() {
    let service = Service::start(ALICE).await;
    let mut config = service.config();
    config.auth.as_mut().unwrap().reauth_interval = Duration::from_secs(1);
    let gateway = start(&config);
    let mut client = gateway.connect().await;
    // A service that is down takes nobody with it.
    service.answers("HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n");
    let asked = || service.asked.lock().unwrap().len();
    eventually("it was asked again, twice", || asked() >= 3).await;
    echoes(&mut client, "still here").await;
    service.answers("HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(next_close(&mut client).await, (4401, "not authenticated any more".into()));

    service.answers(ALICE);
    let mut client = gateway.connect().await;
    service.answers(&ALICE.replace("alice", "bob"));
    assert_eq!(next_close(&mut client).await.0, 4401, "it is somebody else now");
}
