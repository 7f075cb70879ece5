//! Whether a toolchain works: it compiles and links a small BPF program, and what comes out is looked at.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    process::output_of,
    recipe::{Recipe, bpf_target},
    workspace,
};

const MANIFEST: &str = r#"[package]
name = "probe"
version = "0.0.0"
edition = "2024"

# Not a member of the workspace that it lies in.
[workspace]
"#;

const PROGRAM: &str = r#"#![no_std]
#![no_main]

#[unsafe(no_mangle)]
#[unsafe(link_section = "xdp")]
pub extern "C" fn pass(_context: *const u8) -> u32 {
    2
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}
"#;

/// `e_machine` of a BPF object.
const EM_BPF: u16 = 247;

/// Compiles the program by the recipe.
///
/// # Errors
/// When that fails, or what comes out is no BPF object with type information.
pub fn compile(recipe: &Recipe) -> Result<()> {
    let folder = workspace::tools().join("probe");
    fs::create_dir_all(folder.join("src")).context("can't create .tools/probe")?;
    fs::write(folder.join("Cargo.toml"), MANIFEST)?;
    fs::write(folder.join("src/main.rs"), PROGRAM)?;

    let target_dir = folder.join("target");
    let object = target_dir.join(bpf_target()).join("release/probe");
    if object.exists() {
        fs::remove_file(&object)?;
    }
    output_of(recipe.command(&recipe.cargo, "build", &target_dir).current_dir(&folder))
        .context("the BPF toolchain was found and doesn't work")?;
    check(&object)?;
    fs::remove_dir_all(&folder).context("can't remove .tools/probe")
}

fn check(object: &Path) -> Result<()> {
    let bytes = fs::read(object).with_context(|| format!("can't read {}", object.display()))?;
    let machine = match bytes.get(18..20) {
        Some(&[low, high]) if bytes.starts_with(b"\x7fELF") => u16::from_ne_bytes([low, high]),
        _ => bail!("the toolchain made {}, which is no ELF object", object.display()),
    };
    ensure!(machine == EM_BPF, "the toolchain made an object for machine {machine}, not for BPF ({EM_BPF})");
    ensure!(
        bytes.windows(5).any(|window| window == b".BTF\0"),
        "the toolchain made a BPF object without type information (BTF)"
    );
    Ok(())
}
