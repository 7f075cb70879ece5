//! What of the kernel limiter does without where it is missing; and a way for tests to have it missing.

use std::{env, sync::OnceLock};

/// Names features, separated by commas, that are to be taken for missing. For tests of what happens then.
const HIDDEN: &str = "LIMITER_TEST_WITHOUT";

/// Something that not every supported kernel has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// The kernel's types, in /sys/kernel/btf/vmlinux (`CONFIG_DEBUG_INFO_BTF`).
    Btf,
    /// Links to TC (kernel 6.6).
    Tcx,
    /// Having the stack tell of the end of sockets that were open before (kernel 6.12).
    Watch,
    /// Seeing what is delivered to a listener, and in which namespace (kernel 6.17).
    Delivery,
    /// Closing sockets from outside (`CONFIG_INET_DIAG_DESTROY`).
    Destroy,
}

impl Feature {
    const fn name(self) -> &'static str {
        match self {
            Self::Btf => "btf",
            Self::Tcx => "tcx",
            Self::Watch => "watch",
            Self::Delivery => "delivery",
            Self::Destroy => "destroy",
        }
    }

    /// Whether it is to be taken for missing.
    pub fn is_hidden(self) -> bool {
        static LIST: OnceLock<String> = OnceLock::new();
        let list = LIST.get_or_init(|| env::var(HIDDEN).unwrap_or_default());
        list.split(',').any(|name| name == self.name())
    }
}
