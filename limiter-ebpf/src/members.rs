//! Which user a connection counts against, if its client has shown the gateway who it is.

use aya_ebpf::bindings::BPF_NOEXIST;
use limiter_common::{ConnectionKey, Counter, SourceKey, ledger::is_reservation, user::Member};

use crate::{
    atomic,
    counters::count,
    maps::{EEXIST, LEDGER, MEMBERS},
    sources,
};

/// What came of having a connection count against a user.
pub enum Assigned {
    /// It does.
    Yes,
    /// It did before.
    Already,
    /// There is no such entry, or it has another owner.
    NotThere,
    /// There is no room for the user.
    Full,
}

/// Has a connection count against a user instead of its source.
///
/// The member that is noted for the socket says which of the two its slot is given back to. Whoever takes the entry out
/// makes it its own first and looks for the member then; here the member is noted first and the owner looked at then, by
/// an atomic operation that orders the two. So if both come at once, at least one sees the other, and which count is
/// whose is decided by who removes the member.
#[inline(always)]
pub fn count_for_user(key: &ConnectionKey, owner: u64, member: &Member) -> Assigned {
    let Some(entry) = LEDGER.get_ptr_mut(key) else { return Assigned::NotThere };
    // SAFETY: the pointer comes from a look-up in this map; the field is aligned. The element may get another key at any
    // time, but never this owner again.
    unsafe {
        let owner_field = &raw mut (*entry).owner;
        let source = (*entry).source;
        if is_reservation(owner) || !atomic::compare_exchange(owner_field, owner, owner) {
            return Assigned::NotThere;
        }
        // It is still there, so this was its source.
        let user = member.source;
        if user.service != source.service || !user.is_user() {
            return Assigned::NotThere;
        }
        if sources::add(&user).is_err() {
            return Assigned::Full;
        }
        if let Err(error) = MEMBERS.insert(&owner, member, u64::from(BPF_NOEXIST)) {
            sources::subtract(&user);
            return if error == -EEXIST { Assigned::Already } else { Assigned::Full };
        }
        if atomic::compare_exchange(owner_field, owner, owner) {
            sources::subtract(&source);
            count(source.service, Counter::CountedForUser);
            return Assigned::Yes;
        }
        // It was taken out meanwhile, by somebody who has seen the member and given the user's slot back, or has not.
        let left = if MEMBERS.remove(&owner).is_ok() { user } else { source };
        sources::subtract(&left);
        Assigned::NotThere
    }
}

/// The user that the connection of a socket counts against, which it does no longer. `None`: it counts against its source.
#[inline(always)]
pub fn leave_user(owner: u64) -> Option<SourceKey> {
    let member = MEMBERS.get_ptr(&owner)?;
    // SAFETY: the pointer comes from a look-up in this map. If the element is gone, what is read here is not used.
    let user = unsafe { (*member).source };
    MEMBERS.remove(&owner).ok().map(|()| user)
}

/// The slot of a socket that is gone has a new owner: if it counted against a user, it is its source's again.
#[inline(always)]
pub fn count_for_source(gone: u64, source: &SourceKey) {
    let Some(user) = leave_user(gone) else { return };
    // The entry is there, and so there is room for its source but in a map that is full to the last element; the audit
    // shows that as drift.
    let _ = sources::add(source);
    sources::subtract(&user);
}
