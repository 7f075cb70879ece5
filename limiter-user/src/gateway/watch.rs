//! Files that are read again when they change.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::{task::spawn_blocking, time::interval};

/// How often the files are looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);

/// Notices that files have changed. Made before they are read for the first time, so that no change is missed.
#[derive(Clone, Debug)]
pub(crate) struct FileWatch {
    paths: Vec<PathBuf>,
    loaded: Fingerprint,
    /// Another state, seen once: somebody may be in the middle of writing.
    changing: Option<Fingerprint>,
}

/// What changes when a file is written or replaced; `None` for one that can't be looked at.
type Fingerprint = Vec<Option<(SystemTime, u64, u64)>>;

impl FileWatch {
    pub(crate) fn new(paths: impl IntoIterator<Item = PathBuf>) -> Self {
        let paths: Vec<PathBuf> = paths.into_iter().collect();
        let loaded = fingerprint(&paths);
        Self { paths, loaded, changing: None }
    }

    /// Whether they have changed since they were last said to have, and not since the last look. Said once, whether they
    /// are any good or not.
    pub(super) fn changed(&mut self) -> bool {
        let seen = fingerprint(&self.paths);
        if seen == self.loaded {
            self.changing = None;
            return false;
        }
        if self.changing.as_ref() != Some(&seen) {
            self.changing = Some(seen);
            return false;
        }
        self.changing = None;
        self.loaded = seen;
        true
    }

    /// Looks at the files for ever. `reload` reads them anew, and `tell` is given what came of it.
    pub(crate) async fn run<T: Send + 'static>(
        self,
        reload: impl Fn() -> T + Send + Sync + 'static,
        tell: impl Fn(T) + Send,
    ) {
        let reload = Arc::new(reload);
        let mut ticks = interval(LOOK_INTERVAL);
        let mut watch = self;
        loop {
            ticks.tick().await;
            let reload = Arc::clone(&reload);
            let looked = spawn_blocking(move || {
                let reloaded = watch.changed().then(|| reload());
                (watch, reloaded)
            });
            // It does not panic; if it did, what is in hand would stay.
            let Ok((next, reloaded)) = looked.await else { return };
            watch = next;
            if let Some(reloaded) = reloaded {
                tell(reloaded);
            }
        }
    }
}

fn fingerprint(paths: &[PathBuf]) -> Fingerprint {
    let look = |path| {
        let file = fs::metadata(path).ok()?;
        Some((file.modified().ok()?, file.ino(), file.len()))
    };
    paths.iter().map(look).collect()
}
