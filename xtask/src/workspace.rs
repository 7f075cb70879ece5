//! Where things lie: the top of the repository, its tools, the cargo that runs this.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

/// The top of the repository.
pub fn root() -> &'static Path {
    // This crate lies one folder below the top.
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// The folder of what `setup` installs; never on the user's PATH, never in git.
pub fn tools() -> PathBuf {
    root().join(".tools")
}

/// The cargo that started this (`cargo xtask` sets it), at the top of the repository.
pub fn cargo() -> Command {
    let mut command = Command::new(cargo_path());
    command.current_dir(root());
    command
}

/// See [`cargo`].
pub fn cargo_path() -> PathBuf {
    env::var_os("CARGO").map_or_else(|| PathBuf::from("cargo"), PathBuf::from)
}
