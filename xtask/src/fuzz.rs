//! `cargo xtask fuzz`: looks for input that breaks a property of limiter's (`limiter::fuzz`), for a bounded time.
//!
//! By libFuzzer, with stable Rust: the compiler's part of it is a pass of LLVM that any rustc can be told to make
//! (xtask/instrument).

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    process::{run, say},
    setup,
    workspace::{self, HOST_PACKAGES},
};

#[derive(clap::Args)]
pub struct Args {
    /// The target; all of them, one after the other, if none is named
    target: Option<String>,

    /// How long each is fuzzed
    #[arg(long, default_value_t = 60, value_name = "N")]
    seconds: u32,

    /// Only try this input, as one that failed
    #[arg(long, value_name = "FILE", requires = "target")]
    input: Option<PathBuf>,
}

impl Args {
    /// Builds the fuzzer and runs it.
    ///
    /// # Errors
    /// When an input breaks a property: libFuzzer has shown it, and it is kept.
    pub fn run(&self) -> Result<()> {
        let known = targets()?;
        let chosen = match &self.target {
            None => known,
            Some(name) if known.contains(name) => vec![name.clone()],
            Some(name) => bail!("there is no target {name}: they are {}", known.join(", ")),
        };
        setup::ensure()?;
        let fuzzer = build()?;
        if let (Some(input), Some(target)) = (&self.input, &self.target) {
            let input = std::path::absolute(input).context("the current folder is gone")?;
            return run(of(&fuzzer, target).arg(input));
        }
        let failed: Vec<&str> =
            chosen.iter().filter(|target| !self.holds(&fuzzer, target)).map(String::as_str).collect();
        ensure!(
            failed.is_empty(),
            "an input was found that breaks {}: libFuzzer has shown it above, and `cargo xtask fuzz TARGET --input FILE` \
             tries it again",
            failed.join(", ")
        );
        Ok(())
    }

    /// Fuzzes one target, from its seeds and from what was found interesting before.
    fn holds(&self, fuzzer: &Path, target: &str) -> bool {
        say(format_args!("fuzzing {target} for {} s", self.seconds));
        let fuzzed = made(target).and_then(|(found, failed)| {
            run(of(fuzzer, target)
                .arg(format!("-max_total_time={}", self.seconds))
                .arg(format!("-artifact_prefix={}/", failed.display()))
                .args(["-timeout=10", "-rss_limit_mb=2048", "-max_len=4096", "-print_final_stats=1", "-verbosity=0"])
                .arg(found)
                .arg(seeds(target)))
        });
        if let Err(error) = &fuzzed {
            say(format_args!("{target}: {error:#}"));
        }
        fuzzed.is_ok()
    }
}

/// The fuzzer with one target.
fn of(fuzzer: &Path, target: &str) -> Command {
    let mut command = Command::new(fuzzer);
    command.env("LIMITER_FUZZ_TARGET", target).env("RUST_BACKTRACE", "1").current_dir(workspace::root());
    command
}

/// The folder of a target's seeds, in git.
fn seeds(target: &str) -> PathBuf {
    workspace::root().join("fuzz/corpus").join(target)
}

/// Each target has a folder of seeds; a test of limiter-user holds the two lists together.
fn targets() -> Result<Vec<String>> {
    let folder = workspace::root().join("fuzz/corpus");
    let entries = fs::read_dir(&folder).with_context(|| format!("can't read {}", folder.display()))?;
    let mut names = Vec::new();
    for entry in entries {
        names.extend(entry?.file_name().into_string());
    }
    names.sort();
    Ok(names)
}

/// The folders of what was found interesting, and of what fails.
fn made(target: &str) -> Result<(PathBuf, PathBuf)> {
    let folder = workspace::root().join("target/fuzz").join(target);
    let folders = (folder.join("found"), folder.join("failed"));
    for folder in [&folders.0, &folders.1] {
        fs::create_dir_all(folder).with_context(|| format!("can't make {}", folder.display()))?;
    }
    Ok(folders)
}

/// Names the packages that other builds name, so that cargo takes the dependencies with the same features.
fn build() -> Result<PathBuf> {
    run(workspace::cargo()
        .arg("build")
        .args(HOST_PACKAGES)
        .args(["--bin", "fuzz", "--features", "limiter-fuzz/engine"])
        .env("RUSTC_WORKSPACE_WRAPPER", workspace::root().join("xtask/instrument")))?;
    let binary = workspace::artifacts(false)?.join("fuzz");
    ensure!(binary.is_file(), "cargo built the fuzzer, and it is not at {}", binary.display());
    Ok(binary)
}
