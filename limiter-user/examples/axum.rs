//! An axum application with limiter inside: `/` is a page, `/echo` a WebSocket, and at most 20 connections per source get
//! past the layer; more are answered with 429.
//!
//!     cargo run --example axum
//!
//! For the kernel's limits beneath it, attach as `examples/tungstenite.rs` does, or run `limiter attach` beside it.

use std::sync::Arc;

use anyhow::Context as _;
use axum::{
    Router,
    body::Body,
    extract::Request,
    http::{Response, StatusCode},
    routing::{any, get},
};
use futures_util::StreamExt as _;
use hyper_util::rt::TokioIo;
use limiter::{
    guard::{AdmitLayer, Guard, Guest},
    policy::Fixed,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{handshake::server::create_response_with_body, protocol::Role},
};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let listener = tokio::net::TcpListener::bind("0.0.0.0:8080").await.context("can't listen")?;
    let guard = Guard::new(listener, Arc::new(Fixed::default()))?;
    let app = Router::new()
        // What a layer is put on is what it holds for: the page below is served to everybody.
        .route("/echo", any(echo).layer(AdmitLayer))
        .route("/", get(|| async { "connect to /echo\n" }));
    axum::serve(guard, app.into_make_service_with_connect_info::<Guest>()).await?;
    Ok(())
}

/// What axum's own `WebSocketUpgrade` does, which is another crate more.
async fn echo(mut request: Request) -> Result<Response<Body>, StatusCode> {
    let response = create_response_with_body(&request, Body::empty).map_err(|_| StatusCode::BAD_REQUEST)?;
    tokio::spawn(async move {
        let Ok(upgraded) = hyper::upgrade::on(&mut request).await else { return };
        let socket = WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, None).await;
        let (write, read) = socket.split();
        let _ = read.forward(write).await;
    });
    Ok(response)
}
