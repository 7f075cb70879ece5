//! The harness of the end to end tests: network namespaces, plain and raw TCP clients, a TCP server that knows nothing of
//! limiter, and limiter itself as a process.
//!
//! Whatever a test makes belongs to its process and goes with it: namespaces have no name (they live as long as a
//! descriptor of theirs is open), child processes are killed with the thread that started them, and what is pinned on
//! the bpffs carries the process id, so that the next run removes what a killed one left.

pub mod bare;
pub mod bpf;
pub mod frame;
pub mod lab;
pub mod limiter;
pub mod monitor;
pub mod netns;
pub mod process;
pub mod program;
pub mod raw;
pub mod segment;
pub mod state;
pub mod tcp;
pub mod wait;
pub mod websocket;

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
