//! Compiles the BPF programs (limiter-ebpf) and leaves the object in `OUT_DIR/limiter.bpf.o`, to be included as bytes.
//!
//! How they are compiled on this machine was found out by `cargo xtask setup`; this only executes the recipe it left.

// Shared with xtask, which writes what this reads.
#[path = "../xtask/src/recipe.rs"]
mod recipe;

use std::{
    env, fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    process::exit,
};

use recipe::{RECIPE_PATH, Recipe, bpf_target};

/// The crate of the programs, and the name of its binary.
const PACKAGE: &str = "limiter-ebpf";
const BINARY: &str = "limiter";

fn main() {
    // Cargo sets both for every build script.
    let manifest_dir = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let root = manifest_dir.parent().expect("the crate lies in the workspace");

    for input in ["limiter-ebpf", "limiter-common", "Cargo.toml", "Cargo.lock", RECIPE_PATH] {
        println!("cargo::rerun-if-changed={}", root.join(input).display());
    }
    match Recipe::read(root) {
        Ok(recipe) => build(&recipe, root, &out_dir),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            println!(
                "cargo::error=there is no BPF toolchain to compile limiter-ebpf with yet: run `cargo xtask setup`"
            );
        }
        Err(error) => println!("cargo::error={error}: run `cargo xtask setup`"),
    }
}

fn build(recipe: &Recipe, root: &Path, out_dir: &Path) {
    // A target folder of its own: the outer cargo holds the lock of the usual one.
    let target_dir = out_dir.join("bpf");
    let mut command = recipe.command(&recipe.cargo, "build", &target_dir);
    command.args(["--package", PACKAGE]).current_dir(root);

    match command.status() {
        Ok(status) if status.success() => {}
        Ok(status) => {
            // Cargo shows what the compiler said (this script's stderr) below this line.
            println!(
                "cargo::error=compiling the BPF programs (limiter-ebpf) failed ({status}); the compiler's words follow"
            );
            exit(1);
        }
        Err(error) => {
            println!(
                "cargo::error={} can't be started ({error}): run `cargo xtask setup` to find the BPF toolchain again",
                recipe.cargo.display()
            );
            return;
        }
    }

    let object = target_dir.join(bpf_target()).join("release").join(BINARY);
    if let Err(error) = fs::copy(&object, out_dir.join("limiter.bpf.o")) {
        println!("cargo::error=can't copy the BPF object {}: {error}", object.display());
    }
}
