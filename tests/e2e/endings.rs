//! The last that the gateway says to a client is in the segment that ends the connection, and not in one before it: where many
//! connections come and go, that is a packet, and a client's answer to it, less for each.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::Arc,
};

use anyhow::{Context, Result, ensure};
use limiter_tests::{
    both_families,
    capture::Capture,
    lab::{Client, Family, Lab},
    limiter::Limiter,
    segment::{Segment, flags},
    wait::SOON,
};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned, pki_types::ServerName};

both_families!(
    a_refusal_leaves_with_the_end,
    a_close_frame_leaves_with_the_end,
    in_tls_too_the_last_leaves_with_the_end
);

const LISTEN: &str = "0.0.0.0:8080,[::]:8080";

/// Ends of each kind. The kernel holds a segment back for a fifth of a second, so on a busy machine one may leave before its end comes,
/// but not most.
const TIMES: usize = 10;

const PLAIN: &str = "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";

const HANDSHAKE: &str = "GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
                         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";

/// Frames with a mask of zeros: 1000; one with an opcode that there is not.
const CLOSE: &[u8] = b"\x88\x82\0\0\0\0\x03\xe8";
const MALFORMED: &[u8] = b"\x83\x80\0\0\0\0";

fn a_refusal_leaves_with_the_end(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let limiter = Limiter::new(&lab.server)?;
    let _daemon = limiter.run(["--listen", LISTEN])?;
    most_end_with(&lab.clients[0], family, |mut stream| {
        stream.write_all(PLAIN.as_bytes())?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        ensure!(answer.starts_with(b"HTTP/1.1 426 "), "{:?}", String::from_utf8_lossy(&answer));
        Ok(Box::new(move |last: &Segment| last.payload == answer))
    })
}

/// One that answers the client's, and one that is the gateway's own; by an application of the gateway, and by one behind it.
fn a_close_frame_leaves_with_the_end(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let listener = lab.server.enter(|| TcpListener::bind("127.0.0.1:0"))?;
    let upstream = format!("ws://{}", listener.local_addr()?);
    // It ends with the test's process.
    let _serving = lab.server.spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            let Ok(mut websocket) = tungstenite::accept(stream) else { return };
            // A Close frame is answered meanwhile.
            while websocket.read().is_ok() {}
        }
    })?;
    for upstream in ["echo", &upstream] {
        let config = Limiter::config_file(&format!("[gateway]\nupstream = \"{upstream}\"\n"))?;
        let limiter = Limiter::new(&lab.server)?;
        let _daemon = limiter.run(["--listen", LISTEN, "--config", &config.path().display().to_string()])?;
        for frame in [CLOSE, MALFORMED] {
            most_end_with(&lab.clients[0], family, |mut stream| {
                shake_hands(&mut stream)?;
                stream.write_all(frame)?;
                let mut answer = Vec::new();
                stream.read_to_end(&mut answer)?;
                ensure!(answer.first() == Some(&0x88), "{answer:?}");
                Ok(Box::new(move |last: &Segment| last.payload == answer))
            })
            .with_context(|| format!("{upstream}, {frame:?}"))?;
        }
    }
    Ok(())
}

/// Whose end has a word of its own, which is there as well.
fn in_tls_too_the_last_leaves_with_the_end(family: Family) -> Result<()> {
    let lab = Lab::new(1)?;
    let folder = tempfile::tempdir()?;
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
    let (certificate, key) = (folder.path().join("cert.pem"), folder.path().join("key.pem"));
    std::fs::write(&certificate, made.cert.pem())?;
    std::fs::write(&key, made.signing_key.serialize_pem())?;
    let config = Limiter::config_file(&format!(
        "[gateway.tls]\ncertificate = \"{}\"\nkey = \"{}\"\n",
        certificate.display(),
        key.display()
    ))?;
    let limiter = Limiter::new(&lab.server)?;
    let _daemon = limiter.run(["--listen", LISTEN, "--config", &config.path().display().to_string()])?;

    let mut roots = RootCertStore::empty();
    roots.add(made.cert.der().clone())?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let tls = Arc::new(tls.with_root_certificates(roots).with_no_client_auth());
    for request in [PLAIN, HANDSHAKE] {
        most_end_with(&lab.clients[0], family, |stream| {
            let connection = ClientConnection::new(Arc::clone(&tls), ServerName::try_from("localhost")?)?;
            let mut stream = StreamOwned::new(connection, stream);
            if request == PLAIN {
                stream.write_all(PLAIN.as_bytes())?;
            } else {
                shake_hands(&mut stream)?;
                stream.write_all(CLOSE)?;
            }
            // An end without the word of TLS would be an error.
            ensure!(stream.read_to_end(&mut Vec::new())? > 0, "nothing was said");
            // What was said, and the alert that ends it.
            Ok(Box::new(|last: &Segment| records(&last.payload) == Some(2)))
        })?;
    }
    Ok(())
}

/// How many records of TLS these bytes are; `None` if they are not a whole number of them.
fn records(mut bytes: &[u8]) -> Option<usize> {
    let mut count = 0;
    while !bytes.is_empty() {
        let length = usize::from(u16::from_be_bytes([*bytes.get(3)?, *bytes.get(4)?]));
        bytes = bytes.get(5 + length..)?;
        count += 1;
    }
    Some(count)
}

fn shake_hands(stream: &mut (impl Read + Write)) -> Result<()> {
    stream.write_all(HANDSHAKE.as_bytes())?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.extend(byte);
    }
    ensure!(head.starts_with(b"HTTP/1.1 101 "), "{:?}", String::from_utf8_lossy(&head));
    Ok(())
}

/// Makes connections one after the other, has each come to its end, and looks for the gateway's FIN: the segment that has it must be as
/// what comes of `act` says, for most of them.
fn most_end_with(
    client: &Client,
    family: Family,
    act: impl Fn(TcpStream) -> Result<Box<dyn Fn(&Segment) -> bool>>,
) -> Result<()> {
    let service = client.service(family);
    let mut alone = Vec::new();
    for _ in 0..TIMES {
        let capture = Capture::new(client)?;
        let stream = client.namespace.enter(|| TcpStream::connect(service))?;
        stream.set_read_timeout(Some(SOON))?;
        let local: SocketAddr = stream.local_addr()?;
        let is_last = act(stream)?;
        let segments = capture.up_to_the_end(service, local, SOON)?;
        let last = segments.last().context("it returns the end")?;
        ensure!(last.flags & flags::FIN != 0, "the connection was reset: {segments:?}");
        if !is_last(last) {
            alone.push(segments);
        }
    }
    ensure!(
        alone.len() < TIMES / 2,
        "the last segment of {} of {TIMES} does not have the last words: {alone:?}",
        alone.len()
    );
    Ok(())
}
