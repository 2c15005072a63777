//! Directories of this machine in which something may be left, and which may be where nothing answers:
//! a recovery asks each once, and waits no longer than some time for it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use tokio::sync::Mutex;

use crate::error::Result;
use crate::journal::Mode;
use crate::platform::{look, takes_writes};

/// What directories have answered, to a look or to a touch.
#[derive(Default)]
pub(in crate::job) struct Directories(Mutex<BTreeMap<(PathBuf, Mode), Result<()>>>);

impl Directories {
    /// Fails with [`Kind::Timeout`](crate::error::Kind::Timeout) if `directory` does not answer, or takes no writes where something
    /// is to be undone. Cancel-safe.
    pub(in crate::job) async fn answers(&self, directory: &Path, mode: Mode) -> Result<()> {
        // One question at a time: what is found is all that the others wait for.
        let mut known = self.0.lock().await;
        let key = (directory.to_owned(), mode);
        if !known.contains_key(&key) {
            let answer = match mode {
                Mode::Undo => takes_writes(directory).await,
                Mode::Look => {
                    let at = directory.to_owned();
                    look(directory, move || drop(at.symlink_metadata())).await
                }
            };
            known.insert(key.clone(), answer);
        }
        known[&key].as_ref().map_or_else(|hangs| Err(hangs.again()), |()| Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Error, Kind};

    #[tokio::test]
    async fn a_directory_is_asked_once() {
        let base = tempfile::tempdir().unwrap();
        let directories = Directories::default();
        let hangs = Error::new(Kind::Timeout, "it hung").hint("later");
        let key = (base.path().to_owned(), Mode::Undo);
        directories.0.lock().await.insert(key, Err(hangs));
        for _ in 0..2 {
            let error = directories.answers(base.path(), Mode::Undo).await.unwrap_err();
            assert_eq!(error.in_one_line(), "it hung (hint: later)");
            directories.answers(base.path(), Mode::Look).await.unwrap();
        }
        assert_eq!(directories.0.lock().await.len(), 2);
    }
}
