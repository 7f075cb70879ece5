//! New clients while the host runs short of something.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_tungstenite::tungstenite::Error;

use super::{
    support::*,
    tls::{self, Setup},
};
use crate::{
    config::{self, Messages, Route},
    gateway::{
        Metrics,
        overload::{Level, Overload, Readings, Sense, Signal},
    },
};

/// Memory in use, in percent.
#[derive(Clone, Default)]
pub struct Memory(Arc<AtomicU32>);

impl Memory {
    fn set(&self, percent: u32) {
        self.0.store(percent, Ordering::Relaxed);
    }
}

impl Sense for Memory {
    fn read(&mut self, _: &config::Overload) -> Readings {
        let mut readings = Readings::default();
        readings.set(Signal::Memory, Some(self.0.load(Ordering::Relaxed).into()));
        readings
    }
}

/// From 80 percent of the memory on some are turned away, from 95 on all.
pub fn watched() -> config::Gateway {
    config::Gateway { overload: config::Overload { memory: 80, ..config::Overload::OFF }, ..quiet() }
}

pub struct Strained {
    pub gateway: Running,
    pub memory: Memory,
    overload: Arc<Overload>,
}

pub fn start_strained(config: &config::Gateway) -> Strained {
    let memory = Memory::default();
    let overload = Arc::new(Overload::measured_by(memory.clone()));
    let mut metrics = Metrics::default();
    metrics.overload = Arc::clone(&overload);
    let gateway = start_counting(config, unlimited(), metrics);
    Strained { gateway, memory, overload }
}

impl Strained {
    pub async fn memory_is(&self, percent: u32, tenths: u64) {
        self.memory.set(percent);
        eventually("the level follows", || self.gateway.metric("limiter_overload_level") == tenths).await;
    }

    /// The status that a new client gets, and whether it is told when to come back.
    async fn answer(&self) -> (u16, bool) {
        match tokio_tungstenite::connect_async(self.gateway.url()).await {
            Ok(_) => (101, false),
            Err(Error::Http(response)) => (response.status().as_u16(), response.headers().contains_key("retry-after")),
            Err(e) => panic!("neither in nor refused: {e}"),
        }
    }
}

#[tokio::test]
async fn who_is_in_stays_in_and_new_clients_get_503_until_it_is_over() {
    let strained = start_strained(&watched());
    let mut inside = strained.gateway.connect().await;
    strained.memory_is(99, 10).await;
    assert_eq!(strained.overload.strain().because, Some("memory"));
    for _ in 0..20 {
        assert_eq!(strained.answer().await, (503, true));
    }
    echoes(&mut inside, "still here").await;
    assert_eq!(strained.gateway.metric("limiter_handshakes_total{result=\"overloaded\"}"), 20);
    // A tenth below where all were turned away, and not at once to the end.
    strained.memory_is(90, 10).await;
    strained.memory_is(10, 0).await;
    assert_eq!(strained.overload.strain().because, None);
    assert_eq!(strained.answer().await, (101, false));
    echoes(&mut inside, "still here").await;
}

#[tokio::test]
async fn at_first_only_some_are_turned_away() {
    let strained = start_strained(&watched());
    strained.memory_is(88, 5).await;
    let mut answers = Vec::new();
    for _ in 0..100 {
        answers.push(strained.answer().await.0);
    }
    let refused = answers.iter().filter(|status| **status == 503).count();
    // Half of them; further away than this is one in a hundred million.
    assert!((20..=80).contains(&refused), "{refused} of 100");
}

#[tokio::test]
async fn a_reload_that_looks_at_nothing_lets_everybody_in() {
    let strained = start_strained(&watched());
    strained.memory_is(99, 10).await;
    strained.gateway.settings.prepare(&quiet(), None).unwrap_or_else(|e| panic!("{e}")).commit();
    eventually("nobody is turned away", || strained.overload.level() == Level::NONE).await;
    assert_eq!(strained.answer().await.0, 101);
}

#[tokio::test]
async fn an_exempt_route_goes_on() {
    let exempt = Route {
        path: "/federation".into(),
        exact: false,
        host: None,
        upstream: None,
        auth: false,
        exempt: true,
        connections: 0,
        messages: Messages { rate: 0, ..Messages::default() },
    };
    let strained = start_strained(&config::Gateway { routes: vec![exempt], ..watched() });
    strained.memory_is(99, 10).await;
    assert_eq!(strained.answer().await, (503, true));
    let url = format!("{}federation", strained.gateway.url());
    let (mut client, _) = tokio_tungstenite::connect_async(url).await.unwrap();
    echoes(&mut client, "exempt").await;
}

#[tokio::test]
async fn the_answer_waits_for_the_question_but_not_for_long() {
    let strained = start_strained(&watched());
    strained.memory_is(99, 10).await;
    // Never asks, and is sent away without a word.
    let mut silent = TcpStream::connect(strained.gateway.addr).await.unwrap();
    let mut answer = Vec::new();
    timeout(PATIENCE, silent.read_to_end(&mut answer)).await.expect("the end").unwrap();
    assert!(answer.is_empty(), "{answer:?}");
    // Asks by halves, and gets the whole answer.
    let mut slow = TcpStream::connect(strained.gateway.addr).await.unwrap();
    slow.write_all(b"GET / HT").await.unwrap();
    timeout(PATIENCE, slow.read_to_end(&mut answer)).await.expect("an answer").unwrap();
    let answer = String::from_utf8(answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("\r\nretry-after: "), "{answer}");
    strained.gateway.policy.wait_closed(2).await;
}

#[tokio::test]
async fn when_nobody_gets_in_tls_is_not_begun() {
    let setup = Setup::new("localhost");
    let strained = start_strained(&config::Gateway { overload: watched().overload, ..setup.config() });
    strained.memory_is(99, 10).await;
    let mut client = TcpStream::connect(strained.gateway.addr).await.unwrap();
    // A record of a handshake; what is in it is not looked at.
    client.write_all(&[22, 3, 1, 0, 4, 1, 0, 0, 0]).await.unwrap();
    let mut answer = Vec::new();
    timeout(PATIENCE, client.read_to_end(&mut answer)).await.expect("an alert").unwrap();
    assert_eq!(answer, [21, 3, 3, 0, 2, 2, 80]);
    assert_eq!(strained.gateway.metric("limiter_tls_failures_total{reason=\"overloaded\"}"), 1);
    // Who does not speak TLS can be told.
    let answer = strained.gateway.raw(good_request("/").as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
}

#[tokio::test]
async fn as_long_as_some_get_in_the_others_are_told_in_tls() {
    let setup = Setup::new("localhost");
    let strained = start_strained(&config::Gateway { overload: watched().overload, ..setup.config() });
    strained.memory_is(94, 9).await;
    for _ in 0..200 {
        let client = setup.client(&rustls::version::TLS13);
        let mut stream = tls::connect(&strained.gateway, client, "localhost").await.expect("a TLS handshake");
        stream.write_all(good_request("/").as_bytes()).await.unwrap();
        let mut status = [0; 12];
        timeout(PATIENCE, stream.read_exact(&mut status)).await.expect("an answer").unwrap();
        if &status == b"HTTP/1.1 503" {
            return;
        }
        assert_eq!(&status, b"HTTP/1.1 101");
    }
    panic!("nine of ten should have been turned away, and nobody was");
}
