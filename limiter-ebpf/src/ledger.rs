//! The ledger. A count changes here together with the entry that it belongs to; but for a connection that moves to its user,
//! which is in [`crate::members`].

use aya_ebpf::bindings::{BPF_EXIST, BPF_NOEXIST};
use limiter_common::{
    ConnectionKey, Counter, DenyReason, Endpoints, LedgerEntry, ServicePolicy, SourceKey, TagSecret,
    event::Stage,
    ledger::{FLAG_ADOPTED, FLAG_PAST_LIMIT, OWNER_REMOVED, Reservation, is_reservation, reservation_owner},
    policy::{InForce, OnDeny, OnFull, ServiceState},
    rule::Effective,
};

use crate::{
    atomic,
    counters::{count, count_at},
    flows,
    handed::on_stack,
    maps::{EEXIST, LEDGER, NEW_ENTRY, RESERVATIONS, SERVICE_STATE, TAG_SECRET},
    members::{count_for_source, leave_user},
    policy,
    report::{Refused, report_each},
    rules::limits_for,
    sources::{self, NotAdded},
    tally::{give_back, past_limit, put_back, spend, take},
};

/// How often a step is tried again that met another CPU's half-done one.
const ATTEMPTS: usize = 4;

/// The key of a connection's entry.
#[inline(always)]
pub fn key_of(ends: &Endpoints) -> ConnectionKey {
    // There always is an element 0.
    ends.key(TAG_SECRET.get(0).unwrap_or(&TagSecret([0; 13])))
}

/// What came of a reservation.
pub enum Reserved {
    /// There is an entry for the connection now.
    Yes,
    /// There is one, and there should not: the limit was passed on a service that only observes.
    Observed(DenyReason),
    /// It could not be entered, and passes: the ledger is full and the service lets connections pass then, or there may be room and
    /// other CPUs were in the way.
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
    let Some(entry) = NEW_ENTRY.get_ptr_mut(0) else { return not_entered(policy, NotAdded::Full) };
    // SAFETY: the pointer is into this CPU's element, and whoever else uses it runs where this can't be interrupted by it.
    let entry = unsafe {
        *entry = new_entry(ends, service, policy, owner, 0, now_ns);
        &*entry
    };
    let wide = wide_of(entry);
    let held = match take(&entry.source, &wide, state) {
        Ok(held) => held,
        Err(why) => return not_entered(policy, why),
    };
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
            return match error {
                _ if error != -EEXIST => not_entered(policy, NotAdded::from_error(error)),
                _ if is_for(&key, ends) => Reserved::Yes,
                _ => not_entered(policy, NotAdded::Full),
            };
        }
    }
    count(service, Counter::OpenedReserved);
    // SAFETY: as above.
    unsafe { atomic::fetch_add(&raw mut (*state).unconfirmed, 1) };
    // There is room for one of each entry. Should it be full nevertheless, of those that were confirmed since, it loses the oldest one.
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

/// What came of entering a connection that is open already.
pub enum Entered {
    /// There is an entry now.
    Yes,
    /// Somebody else was faster.
    ThereAlready,
    /// There is none: the ledger has no room for it, or other CPUs were in the way.
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
    let key = key_of(ends);
    let wide = wide_of(&entry);
    let held = match take(&entry.source, &wide, state) {
        Ok(held) => held,
        Err(why) => return left_out(service, counter, why),
    };
    // From here on the ends are those of the entry: the stack has no room for two of them.
    let limits = limits_for(&entry.remote, policy, in_force);
    let past = if policy.on_deny == OnDeny::Observe as u8 { None } else { past_limit(policy, &limits, &held) };
    entry.flags = match (counter, past) {
        (Counter::OpenedAdopted, _) => FLAG_ADOPTED,
        (_, Some(_)) => FLAG_PAST_LIMIT,
        (_, None) => 0,
    };
    if let Err(error) = insert(&key, &entry) {
        put_back(&entry.source, &wide, state, sources::subtract);
        if error == -EEXIST {
            return Entered::ThereAlready;
        }
        return left_out(service, counter, NotAdded::from_error(error));
    }
    count(service, counter);
    if entry.flags & FLAG_PAST_LIMIT != 0
        && let Some(reason) = past
    {
        report_each(&Refused { connection: &entry.ends(&key), service, reason, stage: Stage::Open, observed: false });
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
    flags: u8,
    now_ns: u64,
) -> LedgerEntry {
    LedgerEntry {
        owner,
        opened_ns: now_ns,
        source: SourceKey::new(service, &ends.remote, policy.ipv4_prefix, policy.ipv6_prefix),
        flags,
        wide_prefix: policy.wide_prefix(&ends.remote),
        local_port: ends.local_port,
        remote: ends.remote,
        local: ends.local,
        netns: ends.netns,
    }
}

/// The source of the wider tier that an entry counts against; with a prefix of 0 if there is none. Not an `Option`: what is
/// undefined in one reaches the verifier.
#[inline(always)]
fn wide_of(entry: &LedgerEntry) -> SourceKey {
    SourceKey::wide(entry.source.service, &entry.remote, entry.wide_prefix)
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
    u32::from(take_out(&unsafe { on_stack(key) }, owner, counter))
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
        flows::forget(key);
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

/// What becomes of a connection that could not be entered. One that is let pass is entered when it is open, or counted as left
/// out then ([`left_out`]).
#[inline(always)]
fn not_entered(policy: &ServicePolicy, why: NotAdded) -> Reserved {
    if matches!(why, NotAdded::Full) && policy.on_full == OnFull::Closed as u8 {
        Reserved::Refused(DenyReason::LedgerFull)
    } else {
        Reserved::Uncounted
    }
}

/// Notes that a connection is open and has no entry: once for each, and not whenever the audit tries again.
#[inline(always)]
fn left_out(service: u16, counter: Counter, why: NotAdded) -> Entered {
    if let Counter::OpenedUnseen = counter {
        count(service, if matches!(why, NotAdded::Full) { Counter::LedgerFull } else { Counter::LedgerBusy });
    }
    Entered::Full
}
