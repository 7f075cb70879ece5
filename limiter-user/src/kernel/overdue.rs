//! The end of slots that the stack has not confirmed in time, on behalf of who looks at the counts.
//!
//! The programs end them when packets come, and a daemon does every second. With neither, nobody is kept out by them: the SYN
//! that would be looks through them first. But they would still be shown.

use std::time::Duration;

use limiter_common::{
    Counter, LedgerEntry,
    ledger::{RESERVATION_NS, is_reservation},
};

use super::{KernelError, Pinned, control::Control, host, load, maps::Ledger, services::Services, sock_diag::Socket};

impl Pinned {
    /// Gives back the slots whose time to be confirmed is up, those too that no queue knows any more. Leaves that to the daemon
    /// if there is one.
    pub(super) fn end_overdue(&self, services: &Services) -> Result<(), KernelError> {
        if !services.have_unconfirmed()? || self.daemon().is_some() {
            return Ok(());
        }
        let now = host::monotonic();
        let mut overdue = Ledger::open(self.pins())?.entries()?;
        overdue.retain(|(_, entry)| is_overdue(entry, now));
        if overdue.is_empty() {
            return Ok(());
        }
        let control = Control::new(load::load_control(self.pins())?);
        for (connection, entry) in overdue {
            control.release_as(&Socket::new(connection, entry.owner), Counter::ClosedExpired)?;
        }
        Ok(())
    }
}

fn is_overdue(entry: &LedgerEntry, now: Duration) -> bool {
    is_reservation(entry.owner) && now >= Duration::from_nanos(entry.opened_ns.saturating_add(RESERVATION_NS))
}

#[cfg(test)]
mod tests {
    use limiter_common::ledger::{OWNER_REMOVED, reservation_owner};

    use super::*;

    #[test]
    fn what_is_reserved_is_overdue_after_its_time_and_nothing_else_ever_is() {
        const OPENED_NS: u64 = 1_000;
        let entry = |owner| LedgerEntry { owner, opened_ns: OPENED_NS, ..LedgerEntry::default() };
        let after = |ns| Duration::from_nanos(OPENED_NS + ns);
        let reserved = entry(reservation_owner(OPENED_NS));
        assert!(!is_overdue(&reserved, after(RESERVATION_NS - 1)));
        assert!(is_overdue(&reserved, after(RESERVATION_NS)));
        for owner in [7, OWNER_REMOVED] {
            assert!(!is_overdue(&entry(owner), after(1_000 * RESERVATION_NS)), "{owner}");
        }
    }
}
