//! bpf-linker, pinned, in the project's own tools folder, and the LLVM library that it loads when it runs.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use super::compiler::Compiler;
use crate::{
    process::{output_of, run, say},
    workspace,
};

/// The last version that borrows LLVM from the compiler; later ones are linked against LLVM's development files.
const VERSION: &str = "0.10.3";

/// The LLVM whose functions that version calls. Bitcode of the compiler must be of the same.
pub const LLVM_MAJOR: u32 = 22;

/// The linker, if it is there in the right version.
pub fn installed() -> Option<PathBuf> {
    let path = path();
    (version_line(&path).ok()? == format!("bpf-linker {VERSION}")).then_some(path)
}

/// What `bpf-linker --version` says.
pub fn version_line(linker: &Path) -> Result<String> {
    output_of(Command::new(linker).arg("--version"))
}

/// The linker in the right version, installed if need be, with `compiler`'s LLVM beside it.
pub fn ensure(compiler: &Compiler) -> Result<PathBuf> {
    point_at_llvm_of(compiler)?;
    if let Some(path) = installed() {
        return Ok(path);
    }
    say(format_args!("installing bpf-linker {VERSION} into .tools: it links BPF objects (about a minute, once)"));
    run(workspace::cargo()
        .args(["install", "--quiet", "--locked", "bpf-linker", "--version", VERSION, "--root"])
        .arg(workspace::tools())
        // It is released with debug information, which only makes it slow to compile and ten times as large.
        .env("CARGO_PROFILE_RELEASE_DEBUG", "0"))?;
    installed().context("bpf-linker was installed, and can't be run")
}

/// The folder that holds the LLVM library and nothing else. bpf-linker takes the first library of that name that it finds on
/// its library path, of whatever version; where there is only one, it can't take the wrong one.
pub fn llvm_folder() -> PathBuf {
    workspace::tools().join("llvm")
}

fn path() -> PathBuf {
    workspace::tools().join("bin/bpf-linker")
}

/// The compiler's own LLVM: only that reads its bitcode for certain.
fn point_at_llvm_of(compiler: &Compiler) -> Result<()> {
    let library = llvm_of(&compiler.rustc)?;
    fs::create_dir_all(llvm_folder()).context("can't create .tools/llvm")?;
    let link = llvm_folder().join("libLLVM.so");
    if fs::read_link(&link).is_ok_and(|target| target == library) {
        return Ok(());
    }
    match fs::remove_file(&link) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).context("can't replace .tools/llvm/libLLVM.so");
        }
        _ => {}
    }
    symlink(&library, &link).context("can't link .tools/llvm/libLLVM.so")
}

fn llvm_of(rustc: &Path) -> Result<PathBuf> {
    let libraries = output_of(Command::new("ldd").arg(rustc).env_remove("LD_LIBRARY_PATH"))?;
    let library = parse_llvm_of(&libraries).with_context(|| {
        format!("{} has LLVM built in, and bpf-linker {VERSION} needs it as a shared library", rustc.display())
    })?;
    let library = fs::canonicalize(library).with_context(|| format!("can't follow {}", library.display()))?;
    ensure!(library.is_file(), "{} is no file", library.display());
    Ok(library)
}

/// `ldd` prints lines like `libLLVM.so.22.1 => /lib/x86_64-linux-gnu/libLLVM.so.22.1 (0x00007f3f16600000)`.
fn parse_llvm_of(ldd: &str) -> Option<&Path> {
    let line = ldd.lines().map(str::trim).find(|line| line.starts_with("libLLVM"))?;
    let (_, found) = line.split_once(" => ")?;
    let (path, _) = found.rsplit_once(" (")?;
    Some(Path::new(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llvm_is_found_in_what_ldd_prints() {
        let ldd = "\tlinux-vdso.so.1 (0x0000)\n\
            \tlibLLVM.so.22.1 => /lib/x86_64-linux-gnu/libLLVM.so.22.1 (0x00007f3f16600000)\n\
            \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x1)\n";
        assert_eq!(parse_llvm_of(ldd), Some(Path::new("/lib/x86_64-linux-gnu/libLLVM.so.22.1")));
        assert_eq!(parse_llvm_of("\tlibc.so.6 => /lib/libc.so.6 (0x1)\n"), None);
        assert_eq!(parse_llvm_of("\tlibLLVM.so.22.1 => not found\n"), None);
    }
}
