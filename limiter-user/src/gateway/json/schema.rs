//! The schemas that are in force.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
};

use super::strict::Strict;
use crate::{
    config::{Schema, SchemaError},
    gateway::{metrics::Metrics, watch::FileWatch},
};

/// A file with a schema.
pub(in crate::gateway) struct SchemaFile {
    path: PathBuf,
    schema: RwLock<Arc<Schema>>,
    watch: FileWatch,
}

/// The files that routes name, each read once.
#[derive(Default)]
pub(in crate::gateway) struct Schemas(HashMap<PathBuf, Arc<SchemaFile>>);

impl SchemaFile {
    fn new(path: &Path) -> Result<Self, SchemaError> {
        let watch = FileWatch::new([path.to_owned()]);
        Ok(Self { path: path.to_owned(), schema: RwLock::new(Arc::new(Schema::load(path)?)), watch })
    }

    /// Whether a text is JSON that fits.
    pub(super) fn fits(&self, text: &str) -> bool {
        let schema = Arc::clone(&self.schema.read().unwrap_or_else(PoisonError::into_inner));
        serde_json::from_str::<Strict>(text).is_ok_and(|strict| schema.fits(&strict.0))
    }

    /// Reads the file again. If it is no good, the old schema stays.
    fn reload(&self) -> Result<(), SchemaError> {
        let schema = Arc::new(Schema::load(&self.path)?);
        *self.schema.write().unwrap_or_else(PoisonError::into_inner) = schema;
        Ok(())
    }

    /// Looks at the file for ever, and takes a new schema into use. One that is no good is told, and the old one stays.
    pub(in crate::gateway) async fn watch(self: Arc<Self>, metrics: Arc<Metrics>) {
        let file = Arc::clone(&self);
        let tell = |reloaded: Result<(), SchemaError>| match reloaded {
            Ok(()) => {
                metrics.schema_reloaded("ok");
                tracing::info!(file = %self.path.display(), "the schema of messages has changed: the new one is in use");
            }
            Err(error) => {
                metrics.schema_reloaded("failed");
                tracing::error!(%error, "the schema of messages has changed and can't be used: the old one stays in use");
            }
        };
        self.watch.clone().run(move || file.reload(), tell).await;
    }
}

impl Schemas {
    /// The file at `path`, read if nobody has named it yet.
    pub(in crate::gateway) fn get(&mut self, path: &Path) -> Result<Arc<SchemaFile>, SchemaError> {
        if let Some(file) = self.0.get(path) {
            return Ok(Arc::clone(file));
        }
        let file = Arc::new(SchemaFile::new(path)?);
        self.0.insert(path.to_owned(), Arc::clone(&file));
        Ok(file)
    }

    /// All of them.
    pub(in crate::gateway) fn files(&self) -> impl Iterator<Item = &Arc<SchemaFile>> {
        self.0.values()
    }
}
