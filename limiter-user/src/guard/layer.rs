//! Admission in front of a service that answers HTTP requests.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use axum::extract::ConnectInfo;
use bytes::Bytes;
use hyper::{Request, Response};
use tower_layer::Layer;
use tower_service::Service;

use super::{Guest, Refused};
use crate::gateway::{answer::Refusal, retry::Wait};

/// Puts [`Admit`] in front of a service.
#[derive(Clone, Copy, Debug, Default)]
pub struct AdmitLayer;

impl<S> Layer<S> for AdmitLayer {
    type Service = Admit<S>;

    fn layer(&self, inner: S) -> Admit<S> {
        Admit { inner }
    }
}

/// Takes a slot for the connection that a request comes on, or answers it: 403 if a rule denies its address, 429 if its source is at its
/// limit or too fast, 503 if the service is, the last two with Retry-After and a body (RFC 9457). The slot is the connection's until it ends, upgraded or not; more
/// requests on it take no more.
///
/// Who asks is in the request's extensions: a [`Guest`], or axum's `ConnectInfo<Guest>`. A request that has none is answered
/// with 500, for nobody would be limited then.
#[derive(Clone, Copy, Debug)]
pub struct Admit<S> {
    inner: S,
}

impl<S, Body, Answer> Service<Request<Body>> for Admit<S>
where
    S: Service<Request<Body>, Response = Response<Answer>>,
    S::Future: Send + 'static,
    Answer: From<Bytes> + Send + 'static,
    S::Error: Send + 'static,
{
    type Response = Response<Answer>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Answer>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let refusal = match guest(&request) {
            None => {
                tracing::error!(
                    "a request without a Guest in its extensions, so nobody can be limited; serve a Guard with \
                     into_make_service_with_connect_info::<Guest>(), or put the Guest there"
                );
                Refusal::Unguarded
            }
            Some(guest) => match guest.admit() {
                Ok(()) => return Box::pin(self.inner.call(request)),
                Err(Refused::Source { limit }) => Refusal::SourceFull(limit),
                Err(Refused::SourceRate) => Refusal::SourceRate,
                Err(Refused::ServiceRate) => Refusal::ServiceRate,
                Err(Refused::Denied) => Refusal::Denied,
                // Nobody is there to read it.
                Err(Refused::Service | Refused::Gone) => Refusal::ServiceFull,
            },
        };
        Box::pin(async move { Ok(refusal.response_as(Wait::alone)) })
    }
}

fn guest<B>(request: &Request<B>) -> Option<&Guest> {
    let extensions = request.extensions();
    extensions.get::<Guest>().or_else(|| extensions.get::<ConnectInfo<Guest>>().map(|ConnectInfo(guest)| guest))
}
