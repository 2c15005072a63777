//! What is left of VMs that are gone: files of this machine.
//!
//! No guest of theirs waits, and the files may be where nothing answers: they come last, one VM after
//! the other, and a directory that does not answer is not asked again for the next.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use tokio::sync::Mutex;

use super::{Recover, Stopped, VmReport, failed, taken};
use crate::error::{Error, Kind, Result};
use crate::job::lock::VmLock;
use crate::journal::{Mode, Phase, Recovery};
use crate::platform::{look, remove_noted, scratch_answers};
use crate::vm::{PointId, VmIdentity};

/// What directories have answered, to a look or to a touch.
#[derive(Default)]
pub(super) struct Directories(Mutex<BTreeMap<(PathBuf, Mode), Result<()>>>);

impl Directories {
    /// Fails with [`Kind::Timeout`] if `directory` does not answer, or takes no writes where something
    /// is to be undone. Cancel-safe.
    pub(super) async fn answers(&self, directory: &Path, mode: Mode) -> Result<()> {
        // One question at a time: what is found is all that the others wait for.
        let mut known = self.0.lock().await;
        let key = (directory.to_owned(), mode);
        if !known.contains_key(&key) {
            let answer = match mode {
                Mode::Undo => scratch_answers(directory).await,
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

impl Recover<'_> {
    /// Recovers a VM that was found to be gone; `last` is the newest run its journal had then.
    pub(super) async fn gone(&self, report: VmReport, last: PointId) -> Result<VmReport> {
        let (_, control) = self.surroundings;
        control.check()?;
        let mut recovery = Recovery::new(self.mode);
        let recovered = self.files_of(&report, last, &mut recovery).await;
        control.check()?;
        let VmReport { uuid, name, .. } = report;
        let found = match recovered {
            Ok(()) => VmReport { name, uuid, items: Vec::new(), problem: None },
            Err(stopped) => failed(uuid, &name, &stopped),
        };
        // Also what was removed before something was in the way.
        let items = recovery.into_items().into_iter().chain(found.items).collect();
        Ok(VmReport { items, ..found })
    }

    async fn files_of(
        &self,
        VmReport { uuid, name, .. }: &VmReport,
        last: PointId,
        recovery: &mut Recovery,
    ) -> Result<(), Stopped> {
        let (env, control) = self.surroundings;
        let (host, platform) = (String::new(), String::new());
        let vm = VmIdentity { uuid: *uuid, name: name.clone(), host, platform };
        let wait = self.patience.left();
        let lock = VmLock::acquire_after(wait, &env.state_dir, &vm, "recovery", control);
        let _lock = lock.await.map_err(taken)?;
        let mut journal = env.journals().open(*uuid)?;
        if journal.earlier().last().is_some_and(|run| run.point != last) {
            let found = format!("another run has found VM '{name}' since");
            return Err(Stopped::AtWork(Error::new(Kind::Busy, found)));
        }
        for directory in journal.scratch_directories(|_| true) {
            control.run(self.directories.answers(directory, self.mode)).await?;
        }
        let files = [Phase::Scratch, Phase::Socket];
        let stay = control.run(remove_noted(&journal, &files, recovery)).await?;
        if recovery.undo(format!("journal of VM '{name}', which is gone")) {
            let runs: Vec<PointId> = journal.earlier().map(|run| run.point).collect();
            for point in runs {
                let stays = |phase: &Phase| files.contains(phase) && stay.contains(&point);
                let over: Vec<Phase> = Phase::ALL.into_iter().filter(|p| !stays(p)).collect();
                journal.undone(point, &over)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
