//! What a restore put in place, until it is known whether it succeeded: then what was replaced is
//! removed, or put back.
//!
//! New images are locked as long: a domain that is started in between would run old memory or an
//! old description on new disks, and lose them when they are taken away again.

use std::path::PathBuf;

use crate::block::file::Placed;
use crate::control::{Control, NoticeLevel};
use crate::error::{Error, Result};
use crate::image::ImageLock;
use crate::journal::{Phase, RestoreJournal};

/// Everything that has its name, in the order it got it; and the devices, which were written in
/// place.
#[derive(Default)]
pub(super) struct Outcome {
    placed: Vec<Placed>,
    devices: Vec<PathBuf>,
    locks: Vec<ImageLock>,
}

impl Outcome {
    /// Remembers something that took its name, and makes that durable; it is remembered also
    /// when that fails, to be put back. Blocks as long as a sync takes.
    pub(super) fn add(&mut self, placed: Placed) -> Result<()> {
        let synced = placed.sync();
        self.placed.push(placed);
        synced
    }

    /// Remembers a device that was written: its old content is gone.
    pub(super) fn wrote(&mut self, device: PathBuf) {
        self.devices.push(device);
    }

    /// Holds a lock until the end.
    pub(super) fn hold(&mut self, lock: ImageLock) {
        self.locks.push(lock);
    }

    /// The restore succeeded: what was replaced goes. That some of it stays is no failure of the
    /// restore.
    pub(super) fn keep(self, journal: &RestoreJournal, control: &Control) {
        for placed in self.placed.into_iter().filter(Placed::replaces) {
            journal.before(Phase::Discard);
            if let Err(error) = placed.discard() {
                control.notice(NoticeLevel::Warning, error.in_one_line());
            }
            journal.after(Phase::Discard);
        }
    }

    /// The restore failed: what was replaced is what it was. What replaced nothing stays, hours of
    /// copying are in it; the error names it.
    pub(super) fn put_back(self, error: Error, control: &Control) -> Error {
        let (replacing, new): (Vec<_>, Vec<_>) =
            self.placed.into_iter().partition(Placed::replaces);
        let mut restored: Result<()> = Ok(());
        for placed in replacing.into_iter().rev() {
            if let Err(error) = placed.put_back() {
                control.notice(NoticeLevel::Warning, error.in_one_line());
                restored = restored.and(Err(error));
            }
        }
        let new = new.iter().map(Placed::path).chain(self.devices.iter().map(PathBuf::as_path));
        let new: Vec<_> = new.map(|path| path.display().to_string()).collect();
        let error = match restored {
            Ok(()) => error,
            Err(first) => {
                let error = error.context(first.to_string());
                match first.hint_text() {
                    Some(hint) => error.hint(hint),
                    None => error,
                }
            }
        };
        if new.is_empty() {
            return error.context("nothing was restored: what was there is as it was");
        }
        error.context(format!("the restore is not complete; this of it stays: {}", new.join(", ")))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::block::file::Existing;
    use crate::error::Kind;

    /// A failed sync of the directory once came out of the rename itself: what had replaced the old
    /// image by then was on no list.
    #[test]
    fn what_took_its_name_but_not_for_good_is_put_back() {
        let base = tempfile::tempdir().unwrap();
        let (directory, away) = (base.path().join("vm"), base.path().join("away"));
        fs::create_dir(&directory).unwrap();
        let (new, name) = (directory.join(".new"), directory.join("name"));
        fs::write(&new, "new").unwrap();
        fs::write(&name, "old").unwrap();
        let placed = Placed::place(&new, &name, Existing::Replace).unwrap();
        let mut outcome = Outcome::default();
        fs::rename(&directory, &away).unwrap();
        outcome.add(placed).unwrap_err();
        fs::rename(&away, &directory).unwrap();
        let control = Control::new();
        let error = outcome.put_back(Error::new(Kind::Io, "no sync"), &control);
        assert!(error.to_string().contains("as it was"), "{error}");
        assert_eq!(fs::read(&name).unwrap(), b"old");
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 1);
    }
}
