//! Cuts connections that got past XDP and past their limits.
//!
//! XDP sees what comes in by the interfaces that it is attached to. What comes another way is open before anybody is asked;
//! `sock_ops` enters it, and marks it if it is one too many. Such a one is closed here. The mark is for ever, the limit is
//! not: a marked connection stays if there is room for it by now, and one that was within its limits when it opened has no
//! mark, however low they are set later.

use std::{cmp::Reverse, net::IpAddr};

use limiter_common::{
    Counter, Endpoints, LedgerEntry, abi,
    ledger::{FLAG_PAST_LIMIT, OWNER_REMOVED, is_reservation},
    policy::OnDeny,
    rule::Effective,
};

use super::{
    Auditor, KernelError,
    audit::no_list,
    sock_diag::{Destroyed, Socket},
};

impl Auditor {
    /// Cuts those of these connections that are past their limits. Returns how many.
    pub fn cut(&mut self, connections: &[Endpoints]) -> Result<u64, KernelError> {
        let mut entries = Vec::new();
        for connection in connections {
            if let Some(entry) = self.ledger.get(connection)? {
                entries.push((*connection, entry));
            }
        }
        self.cut_past_limit(entries)
    }

    /// The same for entries of the ledger, newest first.
    pub(super) fn cut_past_limit(&mut self, mut entries: Vec<(Endpoints, LedgerEntry)>) -> Result<u64, KernelError> {
        if !self.can_destroy {
            return Ok(0);
        }
        entries.retain(|(_, entry)| {
            entry.flags & FLAG_PAST_LIMIT != 0 && entry.owner != OWNER_REMOVED && !is_reservation(entry.owner)
        });
        entries.sort_by_key(|(_, entry)| Reverse(entry.opened_ns));
        let cut = self.cut_newest_first(entries);
        self.sockets.let_go();
        cut
    }

    fn cut_newest_first(&mut self, entries: Vec<(Endpoints, LedgerEntry)>) -> Result<u64, KernelError> {
        let mut cut = 0;
        for (connection, entry) in entries {
            if !self.is_past_limit(connection.remote().ip(), &entry)? {
                continue;
            }
            // Where nobody is in a namespace any more, nobody has a connection.
            let Some(sockets) = self.sockets.of(connection.netns).map_err(no_list)? else { continue };
            match sockets.destroy(&Socket::new(connection, entry.owner)).map_err(no_list)? {
                Destroyed::Yes => {
                    self.control.count(&connection, Counter::CutPastLimit)?;
                    cut += 1;
                }
                Destroyed::Gone => {}
                Destroyed::Unsupported => {
                    self.can_destroy = false;
                    tracing::warn!(
                        "connections that come in past XDP and past the limits stay open: \
                         this kernel can't close them (CONFIG_INET_DIAG_DESTROY)"
                    );
                    break;
                }
            }
        }
        Ok(cut)
    }

    /// Whether a client may not be there at all, or there are more connections than there may be, of its source or of
    /// its service.
    fn is_past_limit(&self, client: IpAddr, entry: &LedgerEntry) -> Result<bool, KernelError> {
        let index = u32::from(entry.source.service);
        let policy = self.services.policy(index)?;
        if policy.name.is_empty() || policy.on_deny == OnDeny::Observe as u8 {
            return Ok(false);
        }
        let rule = self.rules.holding(client)?;
        let limits = Effective::new(&policy, rule.as_ref().map(|(_, rule)| rule));
        let past = |held: u64, limit: u32| limit != 0 && held > u64::from(limit);
        Ok(limits.denied != 0
            // How many a user may have is the gateway's to say.
            || (!entry.source.is_user() && past(self.sources.held(&entry.source)?, limits.connections_per_source))
            || match entry.wide_source() {
                Some(wide) => past(self.sources.held(&wide)?, limits.connections_per_wide_source),
                None => false,
            }
            || limits.of_service != 0
                && (past(self.services.state(index)?.connections, policy.connections_total)
                    || past(self.services.state(abi::ALL_SERVICES)?.connections, policy.connections_total_all)))
    }
}
