//! Whatever a service that is asked who may connect does with the question: each has one status, none takes longer than it may, and
//! nothing of it is left.

use std::{
    io::Write as _,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::{Instant, sleep, timeout},
};

use super::support::*;
use crate::config::{self, Auth, Forward, UserLimits};

/// What the service does with a connection.
#[derive(Clone, Copy, Debug)]
enum Deed {
    /// It reads the question, says this, and waits for the gateway to end the connection.
    Says(&'static str),
    /// The same, and closes.
    SaysAndCloses(&'static str),
    /// It says this without having read a byte, and closes, which the kernel does by a RST.
    SaysUnasked(&'static str),
    /// It says this a byte at a time.
    Drips(&'static str),
    /// It says this, then this again and again.
    Repeats(&'static str, &'static str),
    /// It takes the question and answers by a RST.
    Resets,
    /// It closes the port.
    IsGone,
}
use Deed::*;

const ALICE: &str = "HTTP/1.1 204 No Content\r\nX-User: alice\r\n\r\n";
const NO: &str = "HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno";

/// Longer than the shortest time, and less than it takes for the gateway to give up for another reason.
const DEADLINE: Duration = Duration::from_millis(400);

/// How often who answers unasked does so: it can't be had that each time it is before the question.
const TIMES: usize = 50;

/// How it ends: with this status, and at once, or only when the time that the service has is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ends {
    At(u16),
    Late,
}
use Ends::*;

const CASES: [(&str, Deed, Ends); 34] = [
    ("a yes", Says(ALICE), At(101)),
    ("a yes, and the end", SaysAndCloses(ALICE), At(101)),
    ("a yes to no question", SaysUnasked(ALICE), At(101)),
    ("a yes in single bytes", Drips(ALICE), At(101)),
    ("a yes in HTTP/1.0", SaysAndCloses("HTTP/1.0 200 OK\r\nX-User: alice\r\n\r\n"), At(101)),
    (
        "a yes with a body that does not come",
        Says("HTTP/1.1 200 OK\r\nX-User: alice\r\nContent-Length: 9\r\n\r\n"),
        At(101),
    ),
    ("a yes with a body that has no end", Repeats("HTTP/1.1 200 OK\r\nX-User: alice\r\n\r\n", "x"), At(101)),
    (
        "a yes with chunks that are none",
        Says("HTTP/1.1 200 OK\r\nX-User: a\r\nTransfer-Encoding: chunked\r\n\r\nzz"),
        At(101),
    ),
    (
        "a yes behind announcements",
        Says(
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nX-User: eve\r\n\r\nHTTP/1.1 204 Yes\r\nX-User: a\r\n\r\n",
        ),
        At(101),
    ),
    ("a no", Says(NO), At(403)),
    ("a no, and the end", SaysAndCloses(NO), At(403)),
    ("a no to no question", SaysUnasked(NO), At(403)),
    ("another no to no question", SaysUnasked("HTTP/1.1 401 Unauthorized\r\n\r\n"), At(401)),
    ("a no in single bytes", Drips(NO), At(403)),
    ("a no behind an announcement", Says("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 401 No\r\n\r\n"), At(401)),
    ("a no with a body that has no end", Repeats("HTTP/1.1 403 Forbidden\r\n\r\n", "no "), At(403)),
    (
        "a no with two lengths",
        Says("HTTP/1.1 403 Forbidden\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n"),
        At(403),
    ),
    ("neither", Says("HTTP/1.1 500 Oops\r\n\r\n"), At(503)),
    ("neither, to no question", SaysUnasked("HTTP/1.1 429 Too Many Requests\r\n\r\n"), At(503)),
    ("a yes to nobody", Says("HTTP/1.1 200 OK\r\nX-User: \r\n\r\n"), At(503)),
    (
        "another protocol",
        Says("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nX-User: alice\r\n\r\n"),
        At(503),
    ),
    ("announcements without end", Repeats("", "HTTP/1.1 103 Early Hints\r\n\r\n"), At(503)),
    ("lines without end", Repeats("HTTP/1.1 200 OK\r\n", "A: b\r\n"), At(503)),
    ("a line without end", Repeats("HTTP/1.1 200 OK\r\nX-User: ", "alice"), At(503)),
    ("what is not HTTP", Says("SSH-2.0-OpenSSH_9.2\r\n"), At(503)),
    ("what is not HTTP, to no question", SaysUnasked("220 mail.example ESMTP\r\n"), At(503)),
    ("zeros without end", Repeats("", "\0\0\0\0"), At(503)),
    ("HTTP/0.9", SaysAndCloses("alice"), At(503)),
    ("half a yes, and the end", SaysAndCloses("HTTP/1.1 204 No Content\r\nX-User: al"), At(503)),
    ("nothing, and the end", SaysAndCloses(""), At(503)),
    ("a RST", Resets, At(503)),
    ("nothing at all", Says(""), Late),
    ("half a yes", Says("HTTP/1.1 204 No Content\r\nX-User: alice\r\n"), Late),
    ("nobody there", IsGone, At(503)),
];

/// A service that does this with every connection; and how many it has open.
async fn serve(deed: Deed) -> (SocketAddr, Arc<AtomicU32>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let open: Arc<AtomicU32> = Arc::default();
    let counted = Arc::clone(&open);
    if let SaysUnasked(what) = deed {
        let listener = listener.into_std().unwrap();
        listener.set_nonblocking(false).unwrap();
        // A thread that is faster than the question, most of the time.
        std::thread::spawn(move || {
            for _ in 0..TIMES {
                let (mut stream, _) = listener.accept().unwrap();
                stream.write_all(what.as_bytes()).unwrap();
            }
        });
    } else if !matches!(deed, IsGone) {
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                counted.fetch_add(1, Ordering::Relaxed);
                let counted = Arc::clone(&counted);
                tokio::spawn(async move {
                    act(deed, stream).await;
                    counted.fetch_sub(1, Ordering::Relaxed);
                });
            }
        });
    }
    (addr, open)
}

/// The gateway is free to leave in the middle of it.
async fn act(deed: Deed, mut stream: TcpStream) {
    let head = read_head(&mut stream).await;
    assert!(head.starts_with("GET /check HTTP/1.1\r\n"), "{head}");
    match deed {
        Says(what) => _ = stream.write_all(what.as_bytes()).await,
        SaysAndCloses(what) => return stream.write_all(what.as_bytes()).await.unwrap(),
        Drips(what) => {
            for byte in what.bytes() {
                _ = stream.write_all(&[byte]).await;
                sleep(Duration::from_millis(1)).await;
            }
        }
        Repeats(first, again) => {
            _ = stream.write_all(first.as_bytes()).await;
            let again = again.repeat(1000);
            while stream.write_all(again.as_bytes()).await.is_ok() {}
            return;
        }
        Resets => return socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap(),
        SaysUnasked(_) | IsGone => unreachable!("they read nothing"),
    }
    // Until the gateway ends it, however it does so.
    _ = timeout(PATIENCE, stream.read(&mut [0])).await.expect("the gateway lets go of the connection");
}

#[tokio::test]
async fn each_has_its_status_in_time_and_leaves_nothing() {
    for (case, deed, ends) in CASES {
        let (addr, open) = serve(deed).await;
        // A time that is over says nothing of one that is not.
        let patience = if ends == Late { DEADLINE } else { PATIENCE / 2 };
        let url = format!("http://{addr}/check").parse().unwrap();
        let forward = Forward { url, timeout: patience, user_header: "X-User".into() };
        let users = UserLimits { attempts_per_minute: 0, connections: 0, ..UserLimits::default() };
        let auth = Auth { forward: Some(forward), users, ..Auth::default() };
        let gateway = start(&config::Gateway { auth: Some(auth), ..quiet() });
        // With a long question, and without one. Who is let in closes.
        let long = good_request("/").replace("\r\n\r\n", &format!("\r\nCookie: {}\r\n\r\n", "c".repeat(12_000)));
        let times = if matches!(deed, SaysUnasked(_)) { TIMES } else { 2 };
        for request in [good_request("/"), long].iter().cycle().take(times) {
            let began = Instant::now();
            let answer = gateway.raw_of(case, &[request.as_bytes(), &frame(0x88, &[])].concat()).await;
            let status = if let At(status) = ends { status } else { 503 };
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{case}: {answer}");
            assert!(began.elapsed() < PATIENCE / 2, "{case}: only when its time was over");
            assert!(ends != Late || began.elapsed() >= DEADLINE, "{case}: before its time was over");
            assert!(answer.matches("HTTP/1.1").count() == 1 && !answer.contains("alice"), "{case}: {answer}");
        }
        let result = match ends {
            At(101) => "accepted",
            At(401 | 403) => "auth_refused",
            At(_) | Late => "auth_unavailable",
        };
        assert_eq!(gateway.metric(&format!("limiter_handshakes_total{{result=\"{result}\"}}")), times as u64, "{case}");
        eventually(case, || open.load(Ordering::Relaxed) == 0).await;
        gateway.policy.wait_closed(times).await;
        gateway.wait_released().await;
        gateway.stop().await;
    }
}
