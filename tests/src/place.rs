//! Where limiter is installed: what an upgrade finds changed.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::Result;
use tempfile::TempDir;

use crate::{
    limiter::{Daemon, Limiter},
    process::Process,
};

/// A copy of the binary and a configuration file of its own, both to be replaced.
#[derive(Debug)]
pub struct Place {
    folder: TempDir,
}

impl Place {
    /// With a copy of the binary that is tested.
    pub fn new(limiter: &Limiter<'_>, config: &str) -> Result<Self> {
        let place = Self { folder: tempfile::tempdir()? };
        place.put_binary(limiter.binary())?;
        place.write(config)?;
        Ok(place)
    }

    /// The folder of both.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Where the binary is.
    pub fn binary(&self) -> PathBuf {
        self.folder.path().join("limiter")
    }

    /// Where the configuration is.
    pub fn config(&self) -> PathBuf {
        self.folder.path().join("limiter.toml")
    }

    /// Puts another file in the binary's place as a package manager does.
    pub fn put_binary(&self, from: &Path) -> Result<()> {
        let next = self.folder.path().join("next");
        fs::copy(from, &next)?;
        Ok(fs::rename(next, self.binary())?)
    }

    /// Puts another configuration in the place of the one that is there.
    pub fn write(&self, config: &str) -> Result<()> {
        Ok(fs::write(self.config(), config)?)
    }

    /// Starts `limiter run` and doesn't wait.
    pub fn start(&self, limiter: &Limiter<'_>, more: &[String]) -> Result<Process> {
        let mut arguments = vec!["run".to_owned(), "--config".to_owned(), self.config().display().to_string()];
        arguments.extend_from_slice(more);
        Process::start(&mut limiter.command_of(&self.binary(), arguments))
    }

    /// Starts `limiter run`, and waits until it is ready.
    pub fn run<'l>(&self, limiter: &'l Limiter<'_>, more: &[String]) -> Result<Daemon<'l>> {
        limiter.ready(self.start(limiter, more)?)
    }

    /// Puts a script in the binary's place.
    pub fn put_script(&self, script: &str) -> Result<()> {
        let next = self.folder.path().join("script");
        fs::write(&next, format!("#!/bin/sh\n{script}"))?;
        fs::set_permissions(&next, fs::Permissions::from_mode(0o755))?;
        Ok(fs::rename(next, self.binary())?)
    }
}
