//! `cargo xtask setup`: finds or installs what compiles the BPF programs, tries it, and writes the recipe for it.
//!
//! Which compiler: [`compiler`]. What is installed when there is none: [`install`]. The linker and its LLVM: [`linker`].
//! Whether they work together: [`probe`]. What the end to end tests need beside it: [`clients`].

pub mod clients;
mod compiler;
mod install;
mod linker;
mod probe;

pub use install::{apt_install, has_apt_package};

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context as _, Result};

use crate::{
    process::say,
    recipe::{RECIPE_PATH, Recipe},
    workspace,
};
use compiler::{Compiler, CoreLibrary};

#[derive(clap::Args)]
pub struct Args {
    /// Look for everything again, even when what was found before still works
    #[arg(long)]
    force: bool,
}

impl Args {
    /// Sets up, and says so when there was nothing to do.
    pub fn run(&self) -> Result<()> {
        if !self.force
            && let Some(recipe) = recipe_in_force()
        {
            say(format_args!("nothing to do: {}", recipe.fingerprint));
            return Ok(());
        }
        set_up()
    }
}

/// The recipe, setting up first what is missing. Silent when nothing is.
///
/// # Errors
/// When no BPF toolchain is found and none can be installed; the message says what to install.
pub fn ensure() -> Result<Recipe> {
    if let Some(recipe) = recipe_in_force() {
        return Ok(recipe);
    }
    set_up()?;
    Recipe::read(workspace::root()).with_context(|| format!("can't read {RECIPE_PATH}"))
}

/// The recipe, if the tools that it names are still the ones that were tried and the environment asks for no other.
fn recipe_in_force() -> Option<Recipe> {
    let recipe = Recipe::read(workspace::root()).ok()?;
    if compiler::overriding().is_some_and(|rustc| rustc != recipe.rustc) || !recipe.cargo.is_file() {
        return None;
    }
    let now = fingerprint(&recipe.rustc, &linker::installed()?).ok()?;
    (now == recipe.fingerprint && linker::llvm_folder().join("libLLVM.so").exists()).then_some(recipe)
}

fn set_up() -> Result<()> {
    fs::create_dir_all(workspace::tools()).context("can't create .tools")?;

    let compiler = match compiler::find()? {
        Some(compiler) => compiler,
        None => install::compiler()?,
    };
    say(format_args!("the BPF programs are compiled by {}: {}", compiler.rustc.display(), compiler.why));
    let linker = linker::ensure(&compiler)?;

    let recipe = recipe_for(&compiler, &linker)?;
    say("trying the toolchain on a small BPF program");
    probe::compile(&recipe)?;
    recipe.write(workspace::root()).with_context(|| format!("can't write {RECIPE_PATH}"))?;
    say(format_args!("it works; {RECIPE_PATH} says how: {}", recipe.fingerprint));
    Ok(())
}

fn recipe_for(compiler: &Compiler, linker: &Path) -> Result<Recipe> {
    let linker_flag = format!("linker={}", linker.display());
    let flags = [
        linker_flag.as_str(),
        // The kernel takes BTF only from the linker's hand, and the linker makes it from debug information.
        "link-arg=--btf",
        "debuginfo=2",
        // Atomics that fetch, 32-bit arithmetic and jumps; every kernel since 5.12 has them.
        "target-cpu=v3",
    ];
    Ok(Recipe {
        fingerprint: fingerprint(&compiler.rustc, linker)?,
        cargo: compiler.cargo.clone(),
        rustc: compiler.rustc.clone(),
        cargo_args: match compiler.core {
            CoreLibrary::Prebuilt => Vec::new(),
            CoreLibrary::Source => ["-Z", "build-std=core"].map(str::to_owned).into(),
        },
        env: BTreeMap::from([
            // aya-ebpf uses unstable features, which a stable compiler grants only when asked this way.
            ("RUSTC_BOOTSTRAP".to_owned(), "1".to_owned()),
            ("LD_LIBRARY_PATH".to_owned(), linker::llvm_folder().display().to_string()),
        ]),
        rustflags: flags.iter().flat_map(|flag| ["-C".to_owned(), (*flag).to_owned()]).collect(),
    })
}

/// The compiler and the linker in their own words.
fn fingerprint(rustc: &Path, linker: &Path) -> Result<String> {
    Ok(format!("{}, {}", compiler::version_line(rustc)?, linker::version_line(linker)?))
}
