//! What the running kernel has of what not every supported one has. A test of such a feature asserts on a kernel without it what
//! is to happen then.

use std::{fs, process::Command};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::limiter::binary;

/// What newer kernels have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// What limiter can't do without.
    Everything,
    /// Links to TC.
    Tcx,
    /// Having the stack tell of the end of sockets that were open before.
    Watch,
    /// Seeing what is delivered to a listener, and in which namespace.
    Delivery,
    /// Telling how much of a receive buffer is for data (`scaling_ratio`): what a cookie's first window goes by.
    ScalingRatio,
    /// Running an XDP program on packets that then go their way (`BPF_F_TEST_XDP_LIVE_FRAMES`), for floods.
    LiveFrames,
    /// Telling how many instructions the verifier has looked at.
    VerifiedInstructions,
}

/// A feature, the kernel that brought it, and the check of `limiter doctor` that tells of it, if it matters to limiter, with what that
/// says where it is missing.
struct Needs {
    least: (u32, u32),
    doctor: Option<(&'static str, &'static str)>,
}

impl Feature {
    const fn needs(self) -> Needs {
        match self {
            Self::Everything => Needs { least: (5, 15), doctor: None },
            Self::Tcx => Needs { least: (6, 6), doctor: Some(("tc", "clsact")) },
            Self::Watch => Needs { least: (6, 12), doctor: Some(("open_before", "does not count")) },
            Self::Delivery => Needs { least: (6, 17), doctor: Some(("elsewhere", "counted once they are open")) },
            Self::ScalingRatio => Needs { least: (6, 6), doctor: None },
            Self::LiveFrames => Needs { least: (5, 18), doctor: None },
            Self::VerifiedInstructions => Needs { least: (5, 16), doctor: None },
        }
    }
}

/// Whether the running kernel lacks a feature, which is said then. `limiter doctor` must say the same.
pub fn lacks(feature: Feature) -> Result<bool> {
    let Needs { least, doctor } = feature.needs();
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let running = version(&release).with_context(|| format!("{release} is no version"))?;
    let is_missing = running < least;
    if let Some((check, words)) = doctor {
        let found = doctor_says(check)?;
        ensure!(
            found.contains(words) == is_missing,
            "doctor on Linux {running:?} says of {check}: {found}, and {feature:?} came with {least:?}"
        );
    }
    if is_missing {
        eprintln!("Linux {}.{} has no {feature:?}: what is without it is tested instead", running.0, running.1);
    }
    Ok(is_missing)
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.trim().split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// What a check of `limiter doctor` has found.
fn doctor_says(check: &str) -> Result<String> {
    let output = Command::new(binary()?).args(["doctor", "--json"]).output()?;
    let said: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("doctor printed no JSON: {}", String::from_utf8_lossy(&output.stderr)))?;
    let rows = said["checks"].as_array().context("doctor has checks")?;
    let row = rows.iter().find(|row| row["check"] == check).with_context(|| format!("doctor has no check {check}"))?;
    Ok(row["found"].as_str().context("it has found something")?.to_owned())
}

/// How `limiter status` names the hook of a program on TC: a link's, or a filter's where there are no links.
pub fn tc_hook() -> Result<&'static str> {
    Ok(if lacks(Feature::Tcx)? { "clsact" } else { "tcx" })
}
