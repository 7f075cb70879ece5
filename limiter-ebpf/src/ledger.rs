//! The ledger. Every change of a count is here, together with the entry that it belongs to.

use aya_ebpf::{
    bindings::{BPF_EXIST, BPF_NOEXIST},
    helpers::bpf_ktime_get_ns,
};
use limiter_common::{
    ConnectionKey, Counter, DenyReason, Endpoints, LedgerEntry, ServicePolicy, SourceKey, TagSecret, abi,
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
    maps::{EEXIST, LEDGER, MEMBERS, NEW_ENTRY, RESERVATIONS, SERVICE_STATE, TAG_SECRET},
    policy, rates,
    report::{Refused, report_each},
    rules::limits_for,
    sources,
};

/// How many reservations are looked through for each one that is made; more than one, so that the queue drains.
const EXPIRE_ON_RESERVE: usize = 2;

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
    let owner = reservation_owner(now_ns);
    let Some(entry) = NEW_ENTRY.get_ptr_mut(0) else { return full(policy) };
    // SAFETY: the pointer is into this CPU's element, and whoever else uses it runs where this can't be interrupted by it.
    let entry = unsafe {
        *entry = new_entry(ends, service, policy, owner, 0, now_ns);
        &*entry
    };
    let wide = wide_of(entry);
    let Some(held) = take(&entry.source, &wide, state) else { return full(policy) };
    let mut reason = past_limit(policy, limits, &held);
    let mut spent = false;
    if reason.is_none() {
        reason = spend(&entry.source, policy, limits, now_ns);
        spent = reason.is_none();
    }
    if let Some(reason) = reason
        && !observe
    {
        put_back(&entry.source, &wide, state, sources::subtract);
        return Reserved::Refused(reason);
    }

    let key = key_of(ends);
    match insert(&key, entry) {
        Ok(()) => {}
        Err(error) => {
            put_back(&entry.source, &wide, state, sources::subtract);
            if spent {
                give_back(&entry.source, policy, limits, state);
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
                        count_for_source(owner, &(*entry).source);
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
fn count_for_source(gone: u64, source: &SourceKey) {
    let Some(user) = leave_user(gone) else { return };
    // The entry is there, and so there is room for its source but in a map that is full to the last element; the audit
    // shows that as drift.
    let _ = sources::add(source);
    sources::subtract(&user);
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
    let mut entry = new_entry(ends, service, policy, cookie, 0, now_ns);
    let wide = wide_of(&entry);
    let Some(held) = take(&entry.source, &wide, state) else { return no_room(service, counter) };
    let limits = limits_for(&ends.remote, policy, in_force);
    let past = if policy.on_deny == OnDeny::Observe as u8 { None } else { past_limit(policy, &limits, &held) };
    entry.flags = match (counter, past) {
        (Counter::OpenedAdopted, _) => FLAG_ADOPTED,
        (_, Some(_)) => FLAG_PAST_LIMIT,
        (_, None) => 0,
    };
    if let Err(error) = insert(&key_of(ends), &entry) {
        put_back(&entry.source, &wide, state, sources::subtract);
        if error == -EEXIST {
            return Entered::ThereAlready;
        }
        return no_room(service, counter);
    }
    count(service, counter);
    if entry.flags & FLAG_PAST_LIMIT != 0
        && let Some(reason) = past
    {
        report_each(&Refused { connection: *ends, service, reason, stage: Stage::Open, observed: false });
    }
    Entered::Yes
}

/// An entry for a connection, which is nowhere yet.
#[inline(always)]
fn new_entry(
    ends: &Endpoints,
    service: u16,
    policy: &ServicePolicy,
    owner: u64,
    flags: u16,
    now_ns: u64,
) -> LedgerEntry {
    LedgerEntry {
        owner,
        opened_ns: now_ns,
        source: SourceKey::new(service, &ends.remote, policy.ipv4_prefix, policy.ipv6_prefix),
        flags,
        wide_prefix: policy.wide_prefix(&ends.remote),
        reserved: 0,
        remote: ends.remote,
        local: ends.local,
    }
}

/// The source of the wider tier that an entry counts against; with a prefix of 0 if there is none. Not an `Option`: what is
/// undefined in one reaches the verifier.
#[inline(always)]
fn wide_of(entry: &LedgerEntry) -> SourceKey {
    SourceKey::wide(entry.source.service, &entry.remote, entry.wide_prefix)
}

/// How many connections are held by each of what one more counts against.
struct Held {
    source: u64,
    wide_source: u64,
    service: u64,
    all: u64,
}

/// Counts one more connection everywhere, or, if there is no room for another source, nowhere.
#[inline(always)]
fn take(source: &SourceKey, wide: &SourceKey, state: *mut ServiceState) -> Option<Held> {
    let held_by_source = sources::add(source).ok()?;
    let wide_source = if wide.prefix == 0 {
        0
    } else if let Ok(held) = sources::add(wide) {
        held
    } else {
        sources::subtract(source);
        return None;
    };
    let all = match SERVICE_STATE.get_ptr_mut(abi::ALL_SERVICES) {
        // SAFETY: the pointer comes from a look-up in an array; its elements stay.
        Some(all) => unsafe { atomic::fetch_add(&raw mut (*all).connections, 1) },
        None => 0,
    };
    // SAFETY: as above.
    let service = unsafe { atomic::fetch_add(&raw mut (*state).connections, 1) };
    Some(Held { source: held_by_source, wide_source, service, all })
}

/// Takes back what [`take`] has counted, by [`sources::subtract`] or its like.
#[inline(always)]
fn put_back(source: &SourceKey, wide: &SourceKey, state: *mut ServiceState, subtract: impl Fn(&SourceKey)) {
    // SAFETY: the pointers come from look-ups in an array; its elements stay.
    unsafe {
        atomic::fetch_add(&raw mut (*state).connections, 1_u64.wrapping_neg());
        if let Some(all) = SERVICE_STATE.get_ptr_mut(abi::ALL_SERVICES) {
            atomic::fetch_add(&raw mut (*all).connections, 1_u64.wrapping_neg());
        }
    }
    if wide.prefix != 0 {
        subtract(wide);
    }
    subtract(source);
}

/// Which limit one more connection is past, if it is.
#[inline(always)]
fn past_limit(policy: &ServicePolicy, limits: &Effective, held: &Held) -> Option<DenyReason> {
    if limits.denied != 0 {
        Some(DenyReason::Rule)
    } else if at_limit(held.source, limits.connections_per_source) {
        Some(DenyReason::SourceLimit)
    } else if at_limit(held.wide_source, limits.connections_per_wide_source) {
        Some(DenyReason::WideSourceLimit)
    } else if limits.of_service == 0 {
        None
    } else if at_limit(held.service, policy.connections_total) {
        Some(DenyReason::ServiceLimit)
    } else if at_limit(held.all, policy.connections_total_all) {
        Some(DenyReason::TotalLimit)
    } else {
        None
    }
}

/// Takes the tokens that a new connection takes: one of its source's, and one of its service's. Both or none; says which
/// there was none of.
#[inline(always)]
fn spend(source: &SourceKey, policy: &ServicePolicy, limits: &Effective, now_ns: u64) -> Option<DenyReason> {
    if limits.rate.is_limited() && !rates::spend(source, &limits.rate, now_ns) {
        return Some(DenyReason::RateLimit);
    }
    if limits.of_service != 0
        && policy.service_rate.is_limited()
        && !rates::service_spend(source.service, &policy.service_rate, now_ns)
    {
        if limits.rate.is_limited() {
            rates::give_back(source, &limits.rate);
        }
        return Some(DenyReason::ServiceRateLimit);
    }
    None
}

/// Gives back what [`spend`] has taken.
#[inline(always)]
fn give_back(source: &SourceKey, policy: &ServicePolicy, limits: &Effective, state: *mut ServiceState) {
    if limits.rate.is_limited() {
        rates::give_back(source, &limits.rate);
    }
    if limits.of_service != 0 && policy.service_rate.is_limited() {
        rates::service_give_back(state, &policy.service_rate);
    }
}

/// Takes an entry out, if it has that owner. Of any number of hands that try, one succeeds.
#[inline(always)]
pub fn release(key: &ConnectionKey, owner: u64, counter: u32) -> bool {
    limiter_release(&raw const *key, owner, counter) != 0
}

/// [`release`] as a global function, which the verifier looks at once.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn limiter_release(key: *const ConnectionKey, owner: u64, counter: u32) -> u32 {
    if key.is_null() {
        return 0;
    }
    // SAFETY: the verifier has checked that this is what is behind the pointer.
    u32::from(take_out(unsafe { &*key }, owner, counter))
}

#[inline(always)]
fn take_out(key: &ConnectionKey, owner: u64, counter: u32) -> bool {
    let Some(entry) = LEDGER.get_ptr_mut(key) else { return false };
    // SAFETY: the pointer comes from a look-up in this map; the field is aligned.
    unsafe {
        // An owner is never used twice, so even if the element has got another key meanwhile, this fails.
        if !atomic::compare_exchange(&raw mut (*entry).owner, owner, OWNER_REMOVED) {
            return false;
        }
        // From here on the entry is ours alone.
        let (source, wide) = ((*entry).source, wide_of(&*entry));
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
        let service = source.service;
        if let Some(state) = SERVICE_STATE.get_ptr_mut(u32::from(service)) {
            // Whoever counts against a user has left his source, and not the wider one.
            let counted = if is_reservation(owner) { None } else { leave_user(owner) };
            put_back(counted.as_ref().unwrap_or(&source), &wide, state, sources::subtract_here);
            if is_reservation(owner) {
                atomic::fetch_add(&raw mut (*state).unconfirmed, 1_u64.wrapping_neg());
            }
        }
        count_at(service, counter);
    }
    true
}

/// Looks through reservations for each one that was made, in a global function: it comes after all else, with a stack of its
/// own. Returns 0; the kernel wants a number.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn limiter_expire() -> u32 {
    // SAFETY: the helper has no precondition.
    let now_ns = unsafe { bpf_ktime_get_ns() };
    for _ in 0..EXPIRE_ON_RESERVE {
        if !expire_one(now_ns) {
            break;
        }
    }
    0
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
