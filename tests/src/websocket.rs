//! WebSocket clients.

use std::{
    net::{IpAddr, SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use socket2::{Domain, Socket, Type};
use tungstenite::{
    Error, HandshakeError, Message, WebSocket,
    client::IntoClientRequest,
    protocol::{CloseFrame, frame::coding::CloseCode},
};

use crate::netns::Namespace;

/// A blocking client that gives up after [`PATIENCE`].
pub type Client = WebSocket<TcpStream>;

/// How long a client waits for any one thing.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// What came of a handshake.
#[derive(Debug)]
pub enum Handshake {
    /// The connection is a WebSocket.
    Open(Box<Client>),
    /// The gateway answered something else.
    Refused(Box<tungstenite::http::Response<Option<Vec<u8>>>>),
}

/// Connects and makes the handshake.
pub fn handshake(namespace: &Namespace, from: Option<IpAddr>, server: SocketAddr) -> Result<Handshake> {
    let stream = namespace.enter(|| connect(from, server)).with_context(|| format!("cannot connect to {server}"))?;
    upgrade(stream, server)
}

/// Makes the handshake on a connection.
pub fn upgrade(stream: TcpStream, server: SocketAddr) -> Result<Handshake> {
    upgrade_with(stream, server, &[])
}

/// The same, with more headers.
pub fn upgrade_with(stream: TcpStream, server: SocketAddr, headers: &[(&'static str, &str)]) -> Result<Handshake> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut request = format!("ws://{server}/").into_client_request()?;
    for (name, value) in headers {
        request.headers_mut().insert(*name, value.parse().context("no header value")?);
    }
    match tungstenite::client(request, stream) {
        Ok((client, _)) => Ok(Handshake::Open(Box::new(client))),
        Err(HandshakeError::Failure(Error::Http(response))) => Ok(Handshake::Refused(response)),
        Err(error) => bail!("the handshake failed: {error}"),
    }
}

/// Connects and makes a handshake that must succeed.
pub fn open(namespace: &Namespace, server: SocketAddr) -> Result<Client> {
    match handshake(namespace, None, server)? {
        Handshake::Open(client) => Ok(*client),
        Handshake::Refused(response) => bail!("the handshake was answered by {}", describe(&response)),
    }
}

/// Sends a text and waits until the same text comes back.
pub fn echo(client: &mut Client, text: &str) -> Result<()> {
    client.send(Message::text(text)).context("cannot send")?;
    loop {
        match client.read().context("no echo")? {
            Message::Ping(_) | Message::Pong(_) => {}
            Message::Text(echo) => {
                ensure!(echo.as_str() == text, "sent {text:?}, got {echo:?}");
                return Ok(());
            }
            other => bail!("sent {text:?}, got {other:?}"),
        }
    }
}

/// Reads until the server closes, and returns its close code.
pub fn close_code(client: &mut Client) -> Result<u16> {
    loop {
        match client.read() {
            Ok(Message::Close(Some(CloseFrame { code, .. }))) => return Ok(code.into()),
            Ok(Message::Close(None)) => return Ok(CloseCode::Status.into()),
            Ok(_) => {}
            Err(error) => return Err(error).context("the connection ended without a close frame"),
        }
    }
}

/// Status and headers.
pub fn describe(response: &tungstenite::http::Response<Option<Vec<u8>>>) -> String {
    format!("{} {:?}", response.status(), response.headers())
}

fn connect(from: Option<IpAddr>, server: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(server), Type::STREAM, None)?;
    if let Some(from) = from {
        socket.bind(&SocketAddr::new(from, 0).into())?;
    }
    socket.connect_timeout(&server.into(), PATIENCE)?;
    Ok(socket.into())
}
