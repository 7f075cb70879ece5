//! Everything that is counted, in one registry.

use std::{fmt, sync::Arc};

use prometheus_client::{encoding::text, registry::Registry};

use super::{
    kernel::{KernelCollector, KernelState},
    process::ProcessCollector,
};

/// The prefix of every metric that is limiter's own.
const PREFIX: &str = "limiter";

/// The registry behind `/metrics`.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
}

impl Default for Metrics {
    /// With those of the process (`process_*`).
    fn default() -> Self {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(ProcessCollector));
        Self { registry }
    }
}

impl Metrics {
    /// Where limiter's own metrics are registered, by their name without the prefix `limiter_`.
    pub fn registry(&mut self) -> &mut Registry {
        self.registry.sub_registry_with_prefix(PREFIX)
    }

    /// Adds what the kernel holds, read anew at every scrape.
    pub fn add_kernel(&mut self, kernel: Arc<dyn KernelState>) {
        self.registry().register_collector(Box::new(KernelCollector::new(kernel)));
    }

    /// All of them, in the `OpenMetrics` text format. Reads the kernel's maps, so it may take milliseconds.
    pub(super) fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}
