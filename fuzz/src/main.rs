//! The fuzzer, with one of the targets of `limiter::fuzz`: `cargo xtask fuzz` builds it in its own way and runs it.

#![cfg_attr(limiter_fuzz, no_main)]

#[cfg(limiter_fuzz)]
mod engine {
    use std::sync::LazyLock;

    use limiter::fuzz::{TARGETS, Target};

    /// The one that is fuzzed.
    static TARGET: LazyLock<Target> = LazyLock::new(|| {
        let asked = std::env::var("LIMITER_FUZZ_TARGET").unwrap_or_default();
        let found = TARGETS.into_iter().find(|(name, _)| *name == asked);
        let names = TARGETS.map(|(name, _)| name);
        found.unwrap_or_else(|| panic!("LIMITER_FUZZ_TARGET is {asked:?}, and the targets are {names:?}")).1
    });

    libfuzzer_sys::fuzz_target!(|data: &[u8]| TARGET(data));
}

#[cfg(not(limiter_fuzz))]
fn main() -> std::process::ExitCode {
    eprintln!("fuzz: built without what a fuzzer needs; run `cargo xtask fuzz`");
    std::process::ExitCode::FAILURE
}
