//! What a global function is handed by a pointer, as kernels before 6.2 want it.

/// A copy of it on the function's own stack, to be a key of a map. The kernel takes it there, or in a packet or in a map;
/// wherever else the caller has it, only since 6.2.
///
/// # Safety
///
/// The pointer must be one that the verifier has checked: not null, and to a `T`.
#[inline(always)]
pub unsafe fn on_stack<T: Copy>(handed: *const T) -> T {
    // SAFETY: the caller vouches for the pointer. Volatile, because the compiler would do without the copy.
    unsafe { handed.read_volatile() }
}
