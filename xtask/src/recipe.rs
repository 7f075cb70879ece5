//! The recipe for compiling the BPF programs: which cargo, with which arguments, environment and compiler flags.
//!
//! `cargo xtask setup` writes it, the build script of limiter-user executes it (it includes this file as a module, which is
//! why nothing but std is used here), and `cargo xtask lint` runs clippy by it. Whatever has to be found out or decided is
//! decided in `setup`; here is only what was decided.

use std::{
    collections::BTreeMap,
    env,
    ffi::OsString,
    fmt::Write as _,
    fs, io,
    path::{Path, PathBuf},
    process::Command,
};

/// Where the recipe lies, relative to the top of the repository.
pub const RECIPE_PATH: &str = ".tools/bpf-toolchain";

/// Raised whenever the meaning of the file changes; a recipe of another format is refused and written anew by `setup`.
const FORMAT: &str = "1";

/// How the BPF programs are compiled on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recipe {
    /// The compiler and the linker as they named themselves when `setup` tried them. Another answer means another tool.
    pub fingerprint: String,
    /// The cargo that drives the build.
    pub cargo: PathBuf,
    /// The compiler that knows the BPF target.
    pub rustc: PathBuf,
    /// Arguments of `cargo build` besides the package, the profile and the target.
    pub cargo_args: Vec<String>,
    /// What the environment must say in addition.
    pub env: BTreeMap<String, String>,
    /// Flags for every crate of the BPF target.
    pub rustflags: Vec<String>,
}

impl Recipe {
    /// Reads the recipe below the top of the repository.
    ///
    /// # Errors
    /// `NotFound` when `setup` has not run yet, `InvalidData` when the file is of another format or damaged.
    pub fn read(root: &Path) -> io::Result<Self> {
        Self::parse(&fs::read_to_string(root.join(RECIPE_PATH))?).map_err(|reason| {
            io::Error::new(io::ErrorKind::InvalidData, format!("{RECIPE_PATH} is not usable: {reason}"))
        })
    }

    /// One `key = value` a line; a key may come several times.
    fn parse(text: &str) -> Result<Self, String> {
        let mut recipe = Self {
            fingerprint: String::new(),
            cargo: PathBuf::new(),
            rustc: PathBuf::new(),
            cargo_args: Vec::new(),
            env: BTreeMap::new(),
            rustflags: Vec::new(),
        };
        let mut format = None;
        for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let (key, value) = line.split_once(" = ").ok_or_else(|| format!("no ` = ` in {line:?}"))?;
            match key {
                "format" => format = Some(value),
                "fingerprint" => value.clone_into(&mut recipe.fingerprint),
                "cargo" => recipe.cargo = value.into(),
                "rustc" => recipe.rustc = value.into(),
                "cargo-arg" => recipe.cargo_args.push(value.to_owned()),
                "env" => {
                    let (name, value) = value.split_once('=').ok_or_else(|| format!("no `=` in {line:?}"))?;
                    recipe.env.insert(name.to_owned(), value.to_owned());
                }
                "rustflag" => recipe.rustflags.push(value.to_owned()),
                _ => return Err(format!("unknown key {key:?}")),
            }
        }
        if format != Some(FORMAT) {
            return Err(format!("format {} where {FORMAT} is wanted", format.unwrap_or("unknown")));
        }
        if recipe.cargo.as_os_str().is_empty() || recipe.rustc.as_os_str().is_empty() {
            return Err("cargo or rustc is missing".to_owned());
        }
        Ok(recipe)
    }

    /// A cargo subcommand for the BPF target: `build`, or what a cargo plugin such as cargo-clippy adds.
    ///
    /// The environment is cleaned first: what an outer cargo, clippy or rustdoc set for the host (its flags, its wrappers, its
    /// compiler) must not reach the BPF build.
    #[must_use]
    pub fn command(&self, program: &Path, subcommand: &str, target_dir: &Path) -> Command {
        let mut command = Command::new(program);
        for (name, _) in env::vars_os().filter(|(name, _)| is_of_outer_build(name)) {
            command.env_remove(name);
        }
        command
            .env("CARGO", &self.cargo)
            .env("RUSTC", &self.rustc)
            .env("CARGO_ENCODED_RUSTFLAGS", self.rustflags.join("\x1f"))
            .envs(&self.env)
            .arg(subcommand)
            .args(["--release", "--target", bpf_target()])
            .arg("--target-dir")
            .arg(target_dir)
            .args(&self.cargo_args);
        command
    }
}

/// What `setup` writes; the build script of limiter-user, which includes this file, only reads.
#[allow(dead_code, reason = "used by xtask alone")]
impl Recipe {
    /// Writes the recipe below the top of the repository; a reader sees the old one or the new one, never half of one.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn write(&self, root: &Path) -> io::Result<()> {
        let path = root.join(RECIPE_PATH);
        let unfinished = path.with_extension("new");
        fs::write(&unfinished, self.to_text())?;
        fs::rename(unfinished, path)
    }

    fn to_text(&self) -> String {
        let mut text = String::from("# How the BPF programs are compiled here. Written by `cargo xtask setup`.\n");
        let mut line = |key: &str, value: &str| {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{key} = {value}");
        };
        line("format", FORMAT);
        line("fingerprint", &self.fingerprint);
        line("cargo", &self.cargo.to_string_lossy());
        line("rustc", &self.rustc.to_string_lossy());
        self.cargo_args.iter().for_each(|arg| line("cargo-arg", arg));
        self.env.iter().for_each(|(name, value)| line("env", &format!("{name}={value}")));
        self.rustflags.iter().for_each(|flag| line("rustflag", flag));
        text
    }
}

/// The target of BPF programs for this machine's kernel, which has this machine's byte order.
#[must_use]
pub const fn bpf_target() -> &'static str {
    if cfg!(target_endian = "big") { "bpfeb-unknown-none" } else { "bpfel-unknown-none" }
}

/// Whether a variable belongs to the build that this program runs in, and not to the user's settings.
fn is_of_outer_build(name: &OsString) -> bool {
    const USER: [&str; 8] = [
        "CARGO_HOME",
        "CARGO_HTTP_",
        "CARGO_NET_",
        "CARGO_REGISTRY_",
        "CARGO_REGISTRIES_",
        "CARGO_TERM_",
        "CARGO_MAKEFLAGS",
        "RUSTUP_HOME",
    ];
    const OUTER: [&str; 5] = ["CARGO", "RUST", "CLIPPY_", "DEP_", "LD_LIBRARY_PATH"];
    let Some(name) = name.to_str() else { return false };
    OUTER.iter().any(|prefix| name.starts_with(prefix)) && !USER.iter().any(|prefix| name.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Recipe {
        Recipe {
            fingerprint: "rustc 1.96.0 / bpf-linker 0.10.3".to_owned(),
            cargo: "/usr/bin/cargo".into(),
            rustc: "/usr/bin/rustc".into(),
            cargo_args: vec!["-Z".to_owned(), "build-std=core".to_owned()],
            env: BTreeMap::from([("RUSTC_BOOTSTRAP".to_owned(), "1".to_owned())]),
            rustflags: vec!["-C".to_owned(), "link-arg=--btf".to_owned()],
        }
    }

    #[test]
    fn recipe_survives_writing_and_reading() {
        assert_eq!(Recipe::parse(&example().to_text()), Ok(example()));
    }

    #[test]
    fn recipe_of_another_format_is_refused() {
        let text = example().to_text().replace("format = 1", "format = 0");
        assert_eq!(Recipe::parse(&text), Err("format 0 where 1 is wanted".to_owned()));
    }

    #[test]
    fn half_a_recipe_is_refused() {
        assert_eq!(Recipe::parse("format = 1\n"), Err("cargo or rustc is missing".to_owned()));
    }

    #[test]
    fn outer_build_is_kept_out_and_user_settings_are_kept() {
        for name in [
            "RUSTC",
            "RUSTFLAGS",
            "RUSTC_WORKSPACE_WRAPPER",
            "CARGO_ENCODED_RUSTFLAGS",
            "CARGO_PKG_NAME",
            "CLIPPY_ARGS",
        ] {
            assert!(is_of_outer_build(&name.into()), "{name}");
        }
        for name in ["CARGO_HOME", "CARGO_HTTP_PROXY", "RUSTUP_HOME", "CARGO_TERM_COLOR", "PATH"] {
            assert!(!is_of_outer_build(&name.into()), "{name}");
        }
    }
}
