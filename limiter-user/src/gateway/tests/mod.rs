//! The gateway with real sockets on loopback.

mod admissions;
mod answers;
mod auth;
mod bad_requests;
mod broadcast;
mod drains;
mod forward_auth;
mod handshakes;
mod liveness;
mod malformed;
mod message_limits;
mod origins;
mod overloads;
mod proxies;
mod proxy_headers;
mod relayed_frames;
mod relays;
mod routes;
mod schemas;
mod sessions;
mod settings;
mod storm;
mod support;
mod tls;
mod unix;
mod upstreams;
