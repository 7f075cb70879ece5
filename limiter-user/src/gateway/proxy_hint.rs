//! Notices a proxy that nobody has told us of: all its clients then count as one source.

use std::time::Duration;

use hyper::HeaderMap;

use super::{Shared, arrival::Endpoints, forwarded};
use crate::policy::Limits;

/// From this many sessions on it is worth a word that one source holds most of them.
const MANY: u32 = 10;

/// How often it is said.
const INTERVAL: Duration = Duration::from_mins(5);

/// Warns if the peer, whose request has just been admitted or refused, looks like a proxy and is not trusted.
pub(super) fn warn(shared: &Shared, endpoints: &Endpoints, headers: &HeaderMap, limits: &Limits) {
    let Some(header) = forwarded::proxy_header(headers) else { return };
    if endpoints.is_trusted(&shared.config) {
        return;
    }
    let peer = endpoints.remote.ip();
    let source = limits.source(peer);
    let (held, total) = shared.admission.held(source);
    let most = u64::from(held) * 2 > u64::from(total);
    let many = total >= MANY || (limits.connections_per_source != 0 && held >= limits.connections_per_source);
    if most
        && many
        && let Some(left_out) = shared.log.admit_every(INTERVAL, "proxy")
    {
        let entry = if endpoints.is_local { "unix".to_owned() } else { peer.to_string() };
        tracing::warn!(
            %source, held, total, header, left_out,
            "one source holds most connections, and its requests come through a proxy: all clients of that proxy share \
             one limit. If the proxy is yours, name it in the configuration: [gateway] trusted_proxies = [\"{entry}\"]",
        );
    }
}
