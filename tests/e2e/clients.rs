//! WebSocket clients and servers that are not ours: a browser, Python's websockets, Node's ws, tokio-tungstenite, openssl.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr},
    process::Stdio,
};

use anyhow::{Context, Result, ensure};
use futures_util::{SinkExt, StreamExt, future::try_join_all};
use limiter_tests::{
    foreign::{Kind, PAGE_ORIGIN},
    lab::{Client, Family, Lab},
    limiter::{Daemon, Limiter},
    process::Process,
    wait::SOON,
};
use serde_json::json;
use tempfile::TempDir;
use tokio_tungstenite::tungstenite::Message;

const V4: Family = Family::V4;

/// Where the application is, for the gateway.
const UPSTREAM: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 9000);

/// Each client with each application: messages of all kinds and sizes, fragments, pings, close codes both ways, and a message too
/// large.
macro_rules! conversations {
    ($($client:ident: $kind:ident),*) => {$(
        mod $client {
            use super::*;

            #[test]
            fn talks_to_the_built_in_echo() -> Result<()> {
                talk(Kind::$kind, None)
            }

            #[test]
            fn talks_to_a_python_application() -> Result<()> {
                talk(Kind::$kind, Some(Kind::Python))
            }

            #[test]
            fn talks_to_a_node_application() -> Result<()> {
                talk(Kind::$kind, Some(Kind::Node))
            }

            #[test]
            fn gets_as_many_connections_as_the_limit_allows() -> Result<()> {
                be_limited(Kind::$kind)
            }
        }
    )*};
}

conversations!(a_browser: Browser, a_python_client: Python, a_node_client: Node);

fn talk(client: Kind, application: Option<Kind>) -> Result<()> {
    let lab = Lab::new(1)?;
    let limiter = Limiter::new(&lab.server)?;
    let (_server, upstream): (Option<Process>, _) = match application {
        Some(kind) => (Some(kind.serves(&lab.server, UPSTREAM)?), format!("ws://{UPSTREAM}")),
        None => (None, "echo".to_owned()),
    };
    let config = format!("upstream = \"{upstream}\"\nallowed_origins = [\"{PAGE_ORIGIN}\"]");
    let _daemon = run(&lab, &limiter, 5, &config)?;
    let Client { namespace, .. } = &lab.clients[0];
    let url = format!("ws://{}/", lab.clients[0].service(V4));
    assert_eq!(client.does(namespace, "converse", &url, None)?, json!({ "converse": "ok" }));
    assert_eq!(client.does(namespace, "oversize", &url, None)?, json!({ "code": 1009 }));
    limiter.wait_empty()
}

fn be_limited(client: Kind) -> Result<()> {
    let lab = Lab::new(1)?;
    let limiter = Limiter::new(&lab.server)?;
    let _daemon = run(&lab, &limiter, 5, "upstream = \"echo\"")?;
    let url = format!("ws://{}/", lab.clients[0].service(V4));
    let outcome = client.does(&lab.clients[0].namespace, "crowd", &url, Some("7"))?;
    assert_eq!(outcome, json!({ "open": 5 }), "of 7");
    limiter.wait_empty()
}

#[test]
fn a_page_of_another_origin_does_not_get_in() -> Result<()> {
    let lab = Lab::new(1)?;
    let limiter = Limiter::new(&lab.server)?;
    let _daemon = run(&lab, &limiter, 5, "upstream = \"echo\"\nallowed_origins = [\"https://example.com\"]")?;
    let url = format!("ws://{}/", lab.clients[0].service(V4));
    let outcome = Kind::Browser.does(&lab.clients[0].namespace, "crowd", &url, Some("1"))?;
    assert_eq!(outcome, json!({ "open": 0 }));
    limiter.wait_empty()
}

/// Over TLS, with a key that the page shows in the only place where it can.
#[test]
fn a_page_logs_in_over_tls() -> Result<()> {
    let lab = Lab::new(1)?;
    let limiter = Limiter::new(&lab.server)?;
    let folder = TempDir::new()?;
    let keys = folder.path().join("keys.toml");
    let made = limiter.output([
        "key".as_ref(),
        "new".as_ref(),
        "--user".as_ref(),
        "alice".as_ref(),
        "--file".as_ref(),
        keys.as_os_str(),
    ])?;
    let config = format!(
        "upstream = \"echo\"\n{}\n[gateway.auth]\nsubprotocol = \"bearer\"\napi_keys = \"{}\"",
        certificate(&folder)?,
        keys.display()
    );
    let _daemon = run(&lab, &limiter, 5, &config)?;
    let client = &lab.clients[0];
    let url = format!("wss://{}/", client.service(V4));
    let outcome = Kind::Browser.does(&client.namespace, "login", &url, Some(made.trim()))?;
    assert_eq!(outcome, json!({ "protocol": "bearer" }));
    let refused = Kind::Browser.does(&client.namespace, "login", &url, Some("not-a-key"));
    assert!(refused.is_err(), "{refused:?}");
    limiter.wait_empty()
}

#[test]
fn openssl_checks_the_certificate_of_each_version_of_tls() -> Result<()> {
    let lab = Lab::new(1)?;
    let limiter = Limiter::new(&lab.server)?;
    let folder = TempDir::new()?;
    let _daemon = run(&lab, &limiter, 5, &format!("upstream = \"echo\"\n{}", certificate(&folder)?))?;
    let client = &lab.clients[0];
    for version in ["-tls1_2", "-tls1_3"] {
        let mut openssl = client
            .namespace
            .command("openssl")
            .args(["s_client", "-quiet", "-no_ign_eof", version, "-connect", &client.service(V4).to_string()])
            .args(["-servername", "limiter.test", "-verify_hostname", "limiter.test", "-verify_return_error"])
            .args(["-alpn", "http/1.1", "-CAfile"])
            .arg(folder.path().join("cert.pem"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut to = openssl.stdin.take().context("stdin is piped")?;
        let mut from = openssl.stdout.take().context("stdout is piped")?;
        to.write_all(
            b"GET / HTTP/1.1\r\nHost: limiter.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
              Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        )?;
        // A Close frame; the answer is one, and then the end.
        to.write_all(&[0x88, 0x82, 0, 0, 0, 0, 0x03, 0xe8])?;
        let mut answer = Vec::new();
        from.read_to_end(&mut answer)?;
        ensure!(openssl.wait()?.success(), "{version}: openssl does not take the certificate");
        let text = String::from_utf8_lossy(&answer);
        assert!(text.starts_with("HTTP/1.1 101 "), "{version}: {text}");
        // (RFC 6455, 1.3.)
        assert!(text.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "{version}: {text}");
        assert!(answer.ends_with(&[0x88, 0x02, 0x03, 0xe8]), "{version}: {answer:?}");
    }
    let mut old = client.namespace.command("openssl");
    old.args(["s_client", "-tls1_1", "-cipher", "DEFAULT@SECLEVEL=0", "-connect", &client.service(V4).to_string()]);
    let ended = Process::start(&mut old)?.wait(SOON)?;
    assert!(!ended.status.success(), "TLS 1.1 is not to be had");
    limiter.wait_empty()
}

/// A thousand at once: none is refused, all are counted, each gets its own messages, and nothing is left.
#[test]
fn a_thousand_clients_at_once_are_served_and_counted() -> Result<()> {
    const CLIENTS: usize = 1000;
    let lab = Lab::new(2)?;
    let limiter = Limiter::new(&lab.server)?;
    let _daemon = run(&lab, &limiter, 500, "upstream = \"echo\"")?;
    let sides: Vec<_> = lab.clients.iter().map(|client| (&client.namespace, client.service(V4))).collect();
    let (limiter, lab) = (&limiter, &lab);
    std::thread::scope(|scope| {
        let barrier = std::sync::Arc::new(std::sync::Barrier::new(sides.len() + 1));
        let crowds: Vec<_> = sides
            .into_iter()
            .map(|(namespace, service)| {
                let barrier = std::sync::Arc::clone(&barrier);
                scope.spawn(move || namespace.enter(|| converse_all(service, CLIENTS / 2, &barrier)))
            })
            .collect();
        // All are open now.
        barrier.wait();
        let counted = lab.clients.iter().map(|client| limiter.held_by(client.address(V4))).collect::<Result<Vec<_>>>();
        barrier.wait();
        for crowd in crowds {
            crowd.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
        }
        assert_eq!(counted?, [500, 500]);
        anyhow::Ok(())
    })?;
    limiter.wait_empty()?;
    assert_eq!(limiter.counter("syn_source_limit")?, 0, "nobody was past the limit");
    Ok(())
}

/// Opens `count` connections at once, waits at the barrier twice, and closes them. Whatever happens, the barrier is reached.
fn converse_all(service: SocketAddr, count: usize, barrier: &std::sync::Barrier) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let opened = runtime.block_on(try_join_all((0..count).map(async |i| {
        let (mut socket, _) = tokio_tungstenite::connect_async(format!("ws://{service}/")).await?;
        for round in 0..3 {
            let text = Message::text(format!("client {i}, round {round}"));
            socket.send(text.clone()).await?;
            let answer = socket.next().await.context("the connection ended")??;
            ensure!(answer == text, "client {i} got {answer}");
        }
        anyhow::Ok(socket)
    })));
    barrier.wait();
    barrier.wait();
    runtime.block_on(try_join_all(opened?.into_iter().map(async |mut socket| {
        socket.close(None).await?;
        while socket.next().await.transpose()?.is_some() {}
        anyhow::Ok(())
    })))?;
    Ok(())
}

/// `limiter run` on the lab's port with that many connections per source; `gateway` goes on with the section [gateway].
fn run<'limiter>(
    lab: &Lab,
    limiter: &'limiter Limiter<'_>,
    connections_per_source: u32,
    gateway: &str,
) -> Result<Daemon<'limiter>> {
    let config = Limiter::config_file(&format!(
        "[limits]\nconnections_per_source = {connections_per_source}\nconnection_rate = 0\n\
         [gateway]\nlisten = [\"0.0.0.0:8080\"]\n{gateway}\n"
    ))?;
    let mut arguments = lab.interface_flags();
    arguments.extend(["--config".into(), config.path().display().to_string()]);
    limiter.run(arguments)
}

/// A certificate for limiter.test in a folder, and the section of the configuration that names it.
fn certificate(folder: &TempDir) -> Result<String> {
    let made = rcgen::generate_simple_self_signed(["limiter.test".to_owned()])?;
    let (cert, key) = (folder.path().join("cert.pem"), folder.path().join("key.pem"));
    std::fs::write(&cert, made.cert.pem())?;
    std::fs::write(&key, made.signing_key.serialize_pem())?;
    Ok(format!("[gateway.tls]\ncertificate = \"{}\"\nkey = \"{}\"", cert.display(), key.display()))
}
