//! The ledger. Every change of a count is here, together with the entry that it belongs to.

use aya_ebpf::bindings::{BPF_EXIST, BPF_NOEXIST};
use limiter_common::{
    ConnectionKey, Counter, DenyReason, Endpoints, LedgerEntry, ServicePolicy, SourceKey, TagSecret,
    event::Stage,
    ledger::{
        FLAG_ADOPTED, FLAG_PAST_LIMIT, OWNER_REMOVED, RESERVATION_NS, Reservation, is_reservation, reservation_owner,
    },
    policy::{InForce, OnDeny, OnFull, ServiceState, at_limit},
    rule::Effective,
    user::Member,
};

use crate::{
    atomic,
    counters::{count, count_at},
    maps::{EEXIST, LEDGER, MEMBERS, RESERVATIONS, SERVICE_STATE, TAG_SECRET},
    policy, rates,
    report::{Refused, report_each},
    rules::limits_for,
    sources,
};

/// How often a step is tried again that met another CPU's half-done one.
const ATTEMPTS: usize = 4;

/// The key of a connection's entry.
#[inline(always)]
pub fn key_of(ends: &Endpoints) -> ConnectionKey {
    // There always is an element 0.
    ends.key(TAG_SECRET.get(0).unwrap_or(&TagSecret([0; 8])))
}

/// What came of a reservation.
pub enum Reserved {
    /// There is an entry for the connection now.
    Yes,
    /// There is one, and there should not: the limit was passed on a service that only observes.
    Observed(DenyReason),
    /// The ledger is full and the service lets connections pass then.
    Uncounted,
    /// There is none, and the connection is to be refused.
    Refused(DenyReason),
}

/// Reserves a slot for a connection whose handshake has just completed.
///
/// The count goes up first and is looked at afterwards, so of any number of CPUs that try at once exactly as many succeed
/// as there is room for.
#[inline(always)]
pub fn reserve(
    ends: &Endpoints,
    service: u16,
    policy: &ServicePolicy,
    limits: &Effective,
    state: *mut ServiceState,
    observe: bool,
    now_ns: u64,
) -> Reserved {
    let mut reason = None;
    let mut spent = false;
    let source = SourceKey::new(service, &ends.remote, policy.ipv4_prefix, policy.ipv6_prefix);
    let Ok(held_by_source) = sources::add(&source, state) else {
        return full(policy);
    };
    // SAFETY: the pointer comes from a look-up in an array; its elements stay.
    let held_by_service = unsafe { atomic::fetch_add(&raw mut (*state).connections, 1) };
    if limits.denied != 0 {
        reason = Some(DenyReason::Rule);
    } else if at_limit(held_by_source, limits.connections_per_source) {
        reason = Some(DenyReason::SourceLimit);
    } else if at_limit(held_by_service, limits.connections_total) {
        reason = Some(DenyReason::ServiceLimit);
    } else if limits.rate.is_limited() {
        if rates::spend(&source, &limits.rate, now_ns) {
            spent = true;
        } else {
            reason = Some(DenyReason::RateLimit);
        }
    }
    if let Some(reason) = reason
        && !observe
    {
        release_service(state);
        sources::subtract(&source, state);
        return Reserved::Refused(reason);
    }

    let owner = reservation_owner(now_ns);
    let key = key_of(ends);
    let entry = LedgerEntry { owner, opened_ns: now_ns, source, flags: 0, remote: ends.remote, local: ends.local };
    match insert(&key, &entry) {
        Ok(()) => {}
        Err(error) => {
            release_service(state);
            sources::subtract(&source, state);
            if spent {
                rates::give_back(&source, &limits.rate);
            }
            // Another CPU has just made the same entry; or another connection has the same key, and there is no room for
            // both.
            return if error == -EEXIST && is_for(&key, ends) { Reserved::Yes } else { full(policy) };
        }
    }
    count(service, Counter::OpenedReserved);
    // SAFETY: as above.
    unsafe { atomic::fetch_add(&raw mut (*state).unconfirmed, 1) };
    // A full queue loses its oldest reservation, which was confirmed long since unless every one of them is forged by
    // clients that hold a slot for it.
    let _ = RESERVATIONS.push(&Reservation { key, reserved: 0, owner, opened_ns: now_ns }, u64::from(BPF_EXIST));
    match reason {
        None => Reserved::Yes,
        Some(reason) => Reserved::Observed(reason),
    }
}

/// The stack has made a socket of that cookie for a connection. Confirms its reservation, or enters it where XDP did not
/// see the handshake.
#[inline(always)]
pub fn confirm(ends: &Endpoints, service: u16, in_force: InForce, cookie: u64, now_ns: u64) {
    // Once is enough: who is faster here is about the same socket, and has confirmed it.
    if !own(ends, service, cookie)
        && let Entered::ThereAlready = enter(ends, service, in_force, cookie, Counter::OpenedUnseen, now_ns)
    {
        own(ends, service, cookie);
    }
}

/// Makes a socket the owner of its connection's entry. `false` if there is no entry.
#[inline(always)]
fn own(ends: &Endpoints, service: u16, cookie: u64) -> bool {
    let key = key_of(ends);
    // SAFETY: the pointers come from look-ups in these maps; the fields are aligned.
    unsafe {
        for _ in 0..ATTEMPTS {
            let Some(entry) = LEDGER.get_ptr_mut(&key) else { return false };
            if !(*entry).is_of(ends) {
                count(service, Counter::LedgerFull);
                return true;
            }
            let owner = atomic::load(&raw const (*entry).owner);
            // Another instance of this program has been here already (during an upgrade there are two).
            if owner == cookie {
                return true;
            }
            // An owner that is neither a reservation nor on its way out is an older socket of the same addresses, whose
            // end nobody told: its slot goes to the new one.
            if owner != OWNER_REMOVED && atomic::compare_exchange(&raw mut (*entry).owner, owner, cookie) {
                // Its port may be another service's by now.
                if let Some(state) = SERVICE_STATE.get_ptr_mut(u32::from((*entry).source.service)) {
                    if is_reservation(owner) {
                        atomic::fetch_add(&raw mut (*state).unconfirmed, 1_u64.wrapping_neg());
                    } else {
                        count_for_source(owner, &(*entry).source, state);
                    }
                }
                return true;
            }
        }
    }
    false
}

/// The slot of a socket that is gone has a new owner: if it counted against a user, it is its source's again.
#[inline(always)]
fn count_for_source(gone: u64, source: &SourceKey, state: *mut ServiceState) {
    let Some(user) = leave_user(gone) else { return };
    // The entry is there, and so there is room for its source but in a map that is full to the last element; the audit
    // shows that as drift.
    let _ = sources::add(source, state);
    sources::subtract(&user, state);
}

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
        let Some(state) = SERVICE_STATE.get_ptr_mut(u32::from(source.service)) else { return Assigned::NotThere };
        if sources::add(&user, state).is_err() {
            return Assigned::Full;
        }
        if let Err(error) = MEMBERS.insert(&owner, member, u64::from(BPF_NOEXIST)) {
            sources::subtract(&user, state);
            return if error == -EEXIST { Assigned::Already } else { Assigned::Full };
        }
        if atomic::compare_exchange(owner_field, owner, owner) {
            sources::subtract(&source, state);
            count(source.service, Counter::CountedForUser);
            return Assigned::Yes;
        }
        // It was taken out meanwhile, by somebody who has seen the member and given the user's slot back, or has not.
        let left = if MEMBERS.remove(&owner).is_ok() { user } else { source };
        sources::subtract(&left, state);
        Assigned::NotThere
    }
}

/// The user that the connection of a socket counts against, which it does no longer. `None`: it counts against its source.
#[inline(always)]
fn leave_user(owner: u64) -> Option<SourceKey> {
    let member = MEMBERS.get_ptr(&owner)?;
    // SAFETY: the pointer comes from a look-up in this map. If the element is gone, what is read here is not used.
    let user = unsafe { (*member).source };
    MEMBERS.remove(&owner).ok().map(|()| user)
}

/// What came of entering a connection that is open already.
pub enum Entered {
    /// There is an entry now.
    Yes,
    /// Somebody else was faster.
    ThereAlready,
    /// The ledger has no room for it.
    Full,
}

/// Enters a connection that is open already on behalf of user space.
#[inline(always)]
pub fn adopt(ends: &Endpoints, service: u16, in_force: InForce, cookie: u64, counter: Counter, now_ns: u64) -> Entered {
    if LEDGER.get_ptr(&key_of(ends)).is_some() {
        return Entered::ThereAlready;
    }
    enter(ends, service, in_force, cookie, counter, now_ns)
}

/// Enters a connection that is open already, whatever the limits say. One that is past them is marked and reported, so that
/// it is cut; but not one that was open before there were limits.
#[inline(always)]
fn enter(ends: &Endpoints, service: u16, in_force: InForce, cookie: u64, counter: Counter, now_ns: u64) -> Entered {
    let (Some(policy), Some(state)) =
        (policy::of_service(service, in_force), SERVICE_STATE.get_ptr_mut(u32::from(service)))
    else {
        return Entered::Full;
    };
    let source = SourceKey::new(service, &ends.remote, policy.ipv4_prefix, policy.ipv6_prefix);
    let Ok(held_by_source) = sources::add(&source, state) else { return no_room(service, counter) };
    // SAFETY: the pointer comes from a look-up in an array; its elements stay.
    let held_by_service = unsafe { atomic::fetch_add(&raw mut (*state).connections, 1) };
    let limits = limits_for(&ends.remote, policy, in_force);
    let past = past_limit(policy, &limits, held_by_source, held_by_service);
    let flags = match (counter, past) {
        (Counter::OpenedAdopted, _) => FLAG_ADOPTED,
        (_, Some(_)) => FLAG_PAST_LIMIT,
        (_, None) => 0,
    };
    let entry = LedgerEntry { owner: cookie, opened_ns: now_ns, source, flags, remote: ends.remote, local: ends.local };
    if let Err(error) = insert(&key_of(ends), &entry) {
        release_service(state);
        sources::subtract(&source, state);
        if error == -EEXIST {
            return Entered::ThereAlready;
        }
        return no_room(service, counter);
    }
    count(service, counter);
    if flags & FLAG_PAST_LIMIT != 0
        && let Some(reason) = past
    {
        report_each(&Refused { connection: *ends, service, reason, stage: Stage::Open, observed: false });
    }
    Entered::Yes
}

/// Which limit a connection is past that is open already, where limits are kept. How fast it followed others is not
/// looked at: what is open costs by being open.
#[inline(always)]
fn past_limit(
    policy: &ServicePolicy,
    limits: &Effective,
    held_by_source: u64,
    held_by_service: u64,
) -> Option<DenyReason> {
    if policy.on_deny == OnDeny::Observe as u8 {
        None
    } else if limits.denied != 0 {
        Some(DenyReason::Rule)
    } else if at_limit(held_by_source, limits.connections_per_source) {
        Some(DenyReason::SourceLimit)
    } else if at_limit(held_by_service, limits.connections_total) {
        Some(DenyReason::ServiceLimit)
    } else {
        None
    }
}

/// Takes an entry out, if it has that owner. Of any number of hands that try, one succeeds.
#[inline(always)]
pub fn release(key: &ConnectionKey, owner: u64, counter: u32) -> bool {
    let Some(entry) = LEDGER.get_ptr_mut(key) else { return false };
    // SAFETY: the pointer comes from a look-up in this map; the field is aligned.
    unsafe {
        // An owner is never used twice, so even if the element has got another key meanwhile, this fails.
        if !atomic::compare_exchange(&raw mut (*entry).owner, owner, OWNER_REMOVED) {
            return false;
        }
        // From here on the entry is ours alone.
        let source = (*entry).source;
        let mut removed = false;
        for _ in 0..ATTEMPTS {
            if LEDGER.remove(key).is_ok() {
                removed = true;
                break;
            }
        }
        if !removed {
            // The kernel was busy with this bucket each time: give it back, for a later hand.
            atomic::compare_exchange(&raw mut (*entry).owner, OWNER_REMOVED, owner);
            return false;
        }
        if let Some(state) = SERVICE_STATE.get_ptr_mut(u32::from(source.service)) {
            let counted = if is_reservation(owner) { None } else { leave_user(owner) };
            match counted {
                Some(user) => sources::subtract(&user, state),
                None => sources::subtract(&source, state),
            }
            release_service(state);
            if is_reservation(owner) {
                atomic::fetch_add(&raw mut (*state).unconfirmed, 1_u64.wrapping_neg());
            }
        }
        count_at(source.service, counter);
    }
    true
}

/// Looks at the oldest reservation: forgets it if it was confirmed, takes it out if its time is up. `false` if it was
/// neither, or there was none.
#[inline(always)]
pub fn expire_one(now_ns: u64) -> bool {
    let Ok(Some(reservation)) = RESERVATIONS.pop() else { return false };
    let pending = match LEDGER.get_ptr(&reservation.key) {
        // SAFETY: the pointer comes from a look-up in this map; the field is aligned.
        Some(entry) => unsafe { atomic::load(&raw const (*entry).owner) == reservation.owner },
        None => false,
    };
    if !pending {
        return true;
    }
    if now_ns.wrapping_sub(reservation.opened_ns) < RESERVATION_NS || now_ns < reservation.opened_ns {
        // Not due. It goes to the end of the queue, which costs the order and nothing else.
        let _ = RESERVATIONS.push(&reservation, u64::from(BPF_EXIST));
        return false;
    }
    release(&reservation.key, reservation.owner, Counter::ClosedExpired as u32);
    true
}

#[inline(always)]
fn insert(key: &ConnectionKey, entry: &LedgerEntry) -> Result<(), i32> {
    LEDGER.insert(key, entry, u64::from(BPF_NOEXIST))
}

/// Whether the entry of that key is that connection's.
#[inline(always)]
fn is_for(key: &ConnectionKey, ends: &Endpoints) -> bool {
    // SAFETY: the pointer comes from a look-up; an element that got another key meanwhile has an address of its own.
    LEDGER.get_ptr(key).is_some_and(|entry| unsafe { (*entry).is_of(ends) })
}

#[inline(always)]
fn release_service(state: *mut ServiceState) {
    // SAFETY: the pointer comes from a look-up in an array; its elements stay.
    unsafe { atomic::fetch_add(&raw mut (*state).connections, 1_u64.wrapping_neg()) };
}

/// A connection that is let pass is counted as such when it is open, by [`no_room`].
#[inline(always)]
fn full(policy: &ServicePolicy) -> Reserved {
    if policy.on_full == OnFull::Closed as u8 { Reserved::Refused(DenyReason::LedgerFull) } else { Reserved::Uncounted }
}

/// Notes that a connection is open and has no entry: once for each, and not whenever the audit tries again.
#[inline(always)]
fn no_room(service: u16, counter: Counter) -> Entered {
    if let Counter::OpenedUnseen = counter {
        count(service, Counter::LedgerFull);
    }
    Entered::Full
}
