//! The gateway when the process has no file descriptor left. A process of its own, because the limit holds for all of it.

#![expect(clippy::unwrap_used, reason = "all of it is a test, its helpers too")]

use std::{
    fs::File,
    io::{Read, Write},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use limiter::{
    config,
    gateway::{Gateway, Metrics},
    policy::{Fixed, Limits},
};
use prometheus_client::registry::Registry;
use socket2::{Domain, Socket, Type};

const CLIENTS: usize = 8;

#[test]
fn clients_wait_until_there_are_descriptors_again() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let _context = runtime.enter();
    let config = config::Gateway {
        listen: vec!["127.0.0.1:0".parse().unwrap()],
        // Else nobody would come as far as that.
        overload: config::Overload::OFF,
        ..config::Gateway::default()
    };
    let metrics = Arc::new(Metrics::default());
    let gateway = Gateway::bind(
        &config,
        Arc::new(Fixed::new(Limits { connection_rate: 0, ..Limits::default() }, &[])),
        Arc::clone(&metrics),
    )
    .unwrap();
    let addr = gateway.local_addrs()[0];
    runtime.spawn(gateway.run(std::future::pending()));
    serve_one(&Socket::new(Domain::IPV4, Type::STREAM, None).unwrap(), addr);

    let clients: Vec<Socket> = (0..CLIENTS).map(|_| Socket::new(Domain::IPV4, Type::STREAM, None).unwrap()).collect();
    let hoard = take_every_descriptor();
    for client in &clients {
        client.connect(&addr.into()).expect("the kernel completes the handshake without the gateway");
    }
    let began = Instant::now();
    while accept_errors(&metrics) < 3 {
        assert!(began.elapsed() < Duration::from_secs(20), "accept never failed");
        std::thread::sleep(Duration::from_millis(5));
    }
    let (errors, waited) = (accept_errors(&metrics), began.elapsed());
    assert!(u128::from(errors) <= waited.as_millis() / 50 + 3, "{errors} failures in {waited:?}: the loop spins");

    drop(hoard);
    for client in &clients {
        upgrade(client);
    }

    // Nothing is free but what one that leaves gives back, and the next is in at once: without that, it would wait until the loop
    // has rested.
    let waiting: Vec<Socket> = (0..CLIENTS).map(|_| Socket::new(Domain::IPV4, Type::STREAM, None).unwrap()).collect();
    let _hoard = take_every_descriptor();
    let mut shortest = Duration::MAX;
    for (leaving, next) in clients.iter().zip(&waiting) {
        let errors = accept_errors(&metrics);
        next.connect(&addr.into()).unwrap();
        let began = Instant::now();
        while accept_errors(&metrics) == errors {
            assert!(began.elapsed() < Duration::from_secs(20), "accept never failed");
            std::thread::yield_now();
        }
        let began = Instant::now();
        // Not closed, which would give a descriptor of this process back, too.
        leaving.shutdown(std::net::Shutdown::Both).unwrap();
        upgrade(next);
        shortest = shortest.min(began.elapsed());
    }
    assert!(shortest < Duration::from_millis(50), "each waited for {shortest:?} at least");
}

/// Lowers the limit to what is open, and opens what is left of it.
fn take_every_descriptor() -> Vec<File> {
    let limit = libc::rlimit { rlim_cur: 256, rlim_max: 256 };
    // SAFETY: setrlimit only reads the struct that it is given.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) }, 0);
    let mut hoard = Vec::new();
    loop {
        match File::open("/dev/null") {
            Ok(file) => hoard.push(file),
            Err(e) => {
                assert_eq!(e.raw_os_error(), Some(libc::EMFILE));
                return hoard;
            }
        }
    }
}

fn serve_one(client: &Socket, addr: SocketAddr) {
    client.connect(&addr.into()).unwrap();
    upgrade(client);
}

fn upgrade(mut client: &Socket) {
    client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    client
        .write_all(
            b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: \
              13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        )
        .unwrap();
    let mut status = [0; 12];
    client.read_exact(&mut status).unwrap();
    assert_eq!(&status, b"HTTP/1.1 101");
}

fn accept_errors(metrics: &Metrics) -> u32 {
    let mut registry = Registry::default();
    metrics.register(&mut registry);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    text.lines().find_map(|line| line.strip_prefix("accept_errors_total ")).unwrap().parse().unwrap()
}
