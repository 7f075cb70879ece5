//! What user space asks for. The "packet" is a [`Request`], the return value an [`answer`].

use core::mem;

use aya_ebpf::{helpers::bpf_ktime_get_ns, programs::XdpContext};
use limiter_common::{
    Counter, Endpoints,
    control::{Request, answer, op},
    policy::InForce,
};

use crate::{
    admission,
    counters::count_at,
    expiry,
    ledger::{self, Entered},
    members::{self, Assigned},
    policy::{in_force, service_of_socket, service_on},
};

/// Serves one request.
#[inline(always)]
pub fn serve(ctx: &XdpContext) -> u32 {
    let start = ctx.data();
    if start + mem::size_of::<Request>() > ctx.data_end() {
        return answer::MALFORMED;
    }
    // SAFETY: the bounds were checked, a test run's packet starts on a multiple of eight, and every bit pattern is a
    // request.
    let request = unsafe { &*(start as *const Request) };
    match request.op {
        op::RELEASE if request.counter < Counter::ALL.len() as u32 => {
            if ledger::release(&ledger::key_of(&request.connection), request.owner, request.counter) {
                answer::DONE
            } else {
                answer::NOT_THERE
            }
        }
        op::EXPIRE => {
            // SAFETY: the helper has no precondition.
            let now_ns = unsafe { bpf_ktime_get_ns() };
            if expiry::expire_batch(now_ns) { answer::AGAIN } else { answer::DONE }
        }
        op::ADOPT => {
            let counter = match request.counter {
                number if number == Counter::OpenedAdopted as u32 => Counter::OpenedAdopted,
                number if number == Counter::OpenedAudit as u32 => Counter::OpenedAudit,
                _ => return answer::MALFORMED,
            };
            let in_force = in_force();
            let Some(service) = service_of(&request.connection, in_force) else { return answer::NOT_THERE };
            // SAFETY: the helper has no precondition.
            let now_ns = unsafe { bpf_ktime_get_ns() };
            match ledger::adopt(&request.connection, service, in_force, request.owner, counter, now_ns) {
                Entered::Yes => answer::DONE,
                Entered::ThereAlready => answer::THERE_ALREADY,
                Entered::Full => answer::FULL,
            }
        }
        op::COUNT if request.counter < Counter::ALL.len() as u32 => {
            let Some(service) = service_of(&request.connection, in_force()) else { return answer::NOT_THERE };
            count_at(service, request.counter);
            answer::DONE
        }
        op::COUNT_FOR_USER => {
            match members::count_for_user(&ledger::key_of(&request.connection), request.owner, &request.member) {
                Assigned::Yes => answer::DONE,
                Assigned::Already => answer::THERE_ALREADY,
                Assigned::NotThere => answer::NOT_THERE,
                Assigned::Full => answer::FULL,
            }
        }
        op::JUDGE => {
            let in_force = in_force();
            let Some(service) = service_on(request.connection.local_port, in_force) else { return answer::NOT_THERE };
            let reason = admission::judge(&request.connection, service, in_force);
            answer::ADMITTED + reason.map_or(0, |reason| reason as u32)
        }
        _ => answer::MALFORMED,
    }
}

/// The service that counts the socket of a connection.
#[inline(always)]
fn service_of(connection: &Endpoints, in_force: InForce) -> Option<u16> {
    service_of_socket(connection.local_port, connection.netns, in_force)
}
