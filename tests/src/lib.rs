//! The harness of the end to end tests: network namespaces, plain and raw TCP clients, a TCP server that knows nothing of
//! limiter, and limiter itself as a process.
//!
//! Whatever a test makes belongs to its process and goes with it: namespaces have no name (they live as long as a
//! descriptor of theirs is open), child processes are killed with the thread that started them (and what these have started is found by its pin path), and what is pinned on
//! the bpffs carries the process id, so that the next run removes what a killed one left.

pub mod bare;
pub mod bpf;
pub mod capture;
pub mod container;
pub mod fixture;
pub mod flood;
pub mod foreign;
pub mod frame;
pub mod info;
pub mod kernel;
pub mod lab;
pub mod limiter;
pub mod monitor;
pub mod netns;
pub mod place;
pub mod process;
pub mod program;
pub mod raw;
pub mod segment;
pub mod shape;
pub mod stack;
pub mod state;
pub mod successor;
pub mod tcp;
pub mod tun;
pub mod wait;
pub mod websocket;

/// How many of something a test takes: so many that the whole suite runs in minutes on two cores, or in full, with
/// `LIMITER_TEST_FULL` set (`cargo xtask test --full`).
pub fn scaled<T>(normally: T, in_full: T) -> T {
    if std::env::var_os("LIMITER_TEST_FULL").is_some() { in_full } else { normally }
}

/// Makes two tests, `ipv4` and `ipv6`, of each function that takes a [`lab::Family`] and returns a `Result`.
#[macro_export]
macro_rules! both_families {
    ($($name:ident),* $(,)?) => {$(
        mod $name {
            #[test]
            fn ipv4() -> anyhow::Result<()> {
                super::$name($crate::lab::Family::V4)
            }

            #[test]
            fn ipv6() -> anyhow::Result<()> {
                super::$name($crate::lab::Family::V6)
            }
        }
    )*};
}
