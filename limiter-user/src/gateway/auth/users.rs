//! The users that have a session, and how many each may have.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use prometheus_client::metrics::gauge::Gauge;
use tokio::{sync::Notify, time::Instant};

use crate::config::{OnExcess, UserLimits};

/// The time in which attempts are counted.
const WINDOW: Duration = Duration::from_mins(1);

/// With fewer accounts than this, it isn't worth looking for those that nobody uses any more.
const SWEEP_FROM: usize = 1024;

/// What sessions are counted against: a user, or one key of a user.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Account {
    pub(super) user: Arc<str>,
    /// The [id](crate::config::ApiKey::id) of an API key, each of which counts by itself.
    pub(super) key: Option<[u8; 32]>,
}

/// Why a user gets no session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Crowded {
    /// It has as many as it may have.
    Connections(u32),
    /// It tried too often; it may again after this time.
    Attempts(Duration),
}

/// Every account that has a session, or had an attempt lately.
#[derive(Default)]
pub(super) struct Users {
    accounts: Mutex<Accounts>,
}

#[derive(Default)]
struct Accounts {
    by_name: HashMap<Account, State>,
    /// From this many on, those that are not used are looked for.
    sweep_at: usize,
}

#[derive(Default)]
struct State {
    /// Oldest first.
    sessions: VecDeque<Arc<Eviction>>,
    /// When the last attempts were, oldest first; never more than the limit.
    attempts: VecDeque<Instant>,
}

/// Tells a session that another one takes its place.
#[derive(Default)]
struct Eviction(Notify);

/// One session's place among those of its account; dropping it makes room.
#[must_use]
pub(in crate::gateway) struct Seat {
    users: Arc<Users>,
    account: Account,
    limits: UserLimits,
    eviction: Arc<Eviction>,
    /// How many accounts have a session.
    present: Gauge,
}

impl Users {
    /// Takes a place, if there is one. Where the newer replaces the older, there always is: nobody has to leave before
    /// [`Seat::take_over`].
    ///
    /// What counts as an attempt has shown who it is, so nobody can use up another's. `present` is kept at how many
    /// accounts have a session.
    pub(super) fn enter(
        self: &Arc<Self>,
        account: Account,
        limits: UserLimits,
        present: Gauge,
        now: Instant,
    ) -> Result<Seat, Crowded> {
        let mut accounts = self.accounts();
        accounts.sweep(now);
        let state = accounts.by_name.entry(account.clone()).or_default();
        state.forget_attempts(now);
        if let Some(wait) = state.wait(limits.attempts_per_minute, now) {
            return Err(Crowded::Attempts(wait));
        }
        let held = u32::try_from(state.sessions.len()).unwrap_or(u32::MAX);
        if limits.on_excess == OnExcess::Refuse && limits.connections != 0 && held >= limits.connections {
            return Err(Crowded::Connections(limits.connections));
        }
        if limits.attempts_per_minute != 0 {
            state.attempts.push_back(now);
        }
        let eviction = Arc::<Eviction>::default();
        state.sessions.push_back(Arc::clone(&eviction));
        if state.sessions.len() == 1 {
            present.inc();
        }
        drop(accounts);
        Ok(Seat { users: Arc::clone(self), account, limits, eviction, present })
    }

    fn leave(&self, seat: &Seat) {
        let mut accounts = self.accounts();
        let Some(state) = accounts.by_name.get_mut(&seat.account) else { return };
        let before = state.sessions.len();
        state.sessions.retain(|session| !Arc::ptr_eq(session, &seat.eviction));
        if before != 0 && state.sessions.is_empty() {
            seat.present.dec();
        }
        if state.sessions.is_empty() && state.attempts.is_empty() {
            accounts.by_name.remove(&seat.account);
        }
    }

    fn accounts(&self) -> MutexGuard<'_, Accounts> {
        // Nothing under the lock can panic half way.
        self.accounts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Accounts {
    /// Forgets accounts that have neither a session nor an attempt that counts, when there are twice as many as were left
    /// the last time. So memory follows those who come, and each of them pays for a few.
    fn sweep(&mut self, now: Instant) {
        if self.by_name.len() < self.sweep_at.max(SWEEP_FROM) {
            return;
        }
        self.by_name.retain(|_, state| {
            state.forget_attempts(now);
            !(state.sessions.is_empty() && state.attempts.is_empty())
        });
        self.sweep_at = self.by_name.len() * 2;
        self.by_name.shrink_to(self.sweep_at);
    }
}

impl State {
    fn forget_attempts(&mut self, now: Instant) {
        while self.attempts.front().is_some_and(|at| now.saturating_duration_since(*at) >= WINDOW) {
            self.attempts.pop_front();
        }
    }

    /// How long until there may be another attempt, if not now.
    fn wait(&self, limit: u32, now: Instant) -> Option<Duration> {
        let first_to_go = self.attempts.len().checked_sub(usize::try_from(limit).unwrap_or(usize::MAX))?;
        let at = self.attempts.get(first_to_go).filter(|_| limit != 0)?;
        Some(WINDOW.saturating_sub(now.saturating_duration_since(*at)))
    }
}

impl Seat {
    /// Has the oldest sessions of the account leave that are too many. Called when the new session is sure to begin.
    pub(in crate::gateway) fn take_over(&self) {
        let limit = usize::try_from(self.limits.connections).unwrap_or(usize::MAX);
        if limit == 0 {
            return;
        }
        let mut accounts = self.users.accounts();
        let Some(state) = accounts.by_name.get_mut(&self.account) else { return };
        // Nobody has to leave for one that came later and may yet come to nothing.
        let Some(older) = state.sessions.iter().position(|session| Arc::ptr_eq(session, &self.eviction)) else {
            return;
        };
        for oldest in state.sessions.drain(..(older + 1).saturating_sub(limit)) {
            // It stays told if the session is only about to begin.
            oldest.0.notify_one();
        }
    }

    /// Completes when another session takes this one's place.
    pub(super) async fn replaced(&self) {
        self.eviction.0.notified().await;
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.users.leave(self);
    }
}

#[cfg(test)]
#[path = "users_tests.rs"]
mod tests;
