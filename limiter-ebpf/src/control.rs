//! What user space asks for. The "packet" is a [`Request`], the return value an [`answer`].

use core::mem;

use aya_ebpf::{helpers::bpf_ktime_get_ns, programs::XdpContext};
use limiter_common::{
    Counter,
    control::{EXPIRE_BATCH, Request, answer, op},
};

use crate::ledger;

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
            if ledger::release(&request.key, request.owner, request.counter) { answer::DONE } else { answer::NOT_THERE }
        }
        op::EXPIRE => {
            // SAFETY: the helper has no precondition.
            let now_ns = unsafe { bpf_ktime_get_ns() };
            for _ in 0..EXPIRE_BATCH {
                if !ledger::expire_one(now_ns) {
                    return answer::DONE;
                }
            }
            answer::AGAIN
        }
        _ => answer::MALFORMED,
    }
}
