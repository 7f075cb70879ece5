//! The API keys that are in force.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
};

use super::super::watch::FileWatch;
use crate::config::{ApiKey, ApiKeyError, ApiKeys};

/// A file of API keys.
pub(super) struct KeyFile {
    path: PathBuf,
    keys: RwLock<Arc<ApiKeys>>,
    watch: FileWatch,
}

impl KeyFile {
    pub(super) fn new(path: &Path) -> Result<Self, ApiKeyError> {
        let watch = FileWatch::new([path.to_owned()]);
        Ok(Self { path: path.to_owned(), keys: RwLock::new(Arc::new(ApiKeys::load(path)?)), watch })
    }

    /// Reads the file again. If it is no good, the old keys stay.
    pub(super) fn reload(&self) -> Result<(), ApiKeyError> {
        let keys = Arc::new(ApiKeys::load(&self.path)?);
        *self.keys.write().unwrap_or_else(PoisonError::into_inner) = keys;
        Ok(())
    }

    pub(super) fn watch(&self) -> FileWatch {
        self.watch.clone()
    }

    /// The key that a client shows.
    pub(super) fn find(&self, shown: &str) -> Option<ApiKey> {
        self.keys().find(shown).cloned()
    }

    /// Whether the key of this hash is still in force.
    pub(super) fn knows(&self, digest: &[u8; 32]) -> bool {
        self.keys().by_digest(digest).is_some()
    }

    fn keys(&self) -> Arc<ApiKeys> {
        Arc::clone(&self.keys.read().unwrap_or_else(PoisonError::into_inner))
    }
}
