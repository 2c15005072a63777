//! What is left of VMs that are gone: files of this machine.
//!
//! No guest of theirs waits, and the files may be where nothing answers: they come last, one VM after
//! the other, and a directory that does not answer is not asked again for the next.

use super::{Recover, Stopped, VmReport, failed, taken};
use crate::error::{Error, Kind, Result};
use crate::job::lock::VmLock;
use crate::journal::{Phase, Recovery};
use crate::platform::remove_noted;
use crate::vm::{PointId, VmIdentity};

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
        for directory in journal.scratch_directories() {
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
