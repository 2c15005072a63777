//! What a restore put in place, until it is known whether it succeeded: then what was replaced is
//! removed, or put back.
//!
//! New images are locked as long: a domain that is started in between would run old memory or an
//! old description on new disks, and lose them when they are taken away again.
//!
//! The list of what is damaged belongs to the disks: it goes with them, and stays beside what stays.

use std::path::PathBuf;

use super::salvage;
use crate::block::file::Placed;
use crate::control::{Control, NoticeLevel};
use crate::error::{Error, Result};
use crate::image::ImageLock;
use crate::journal::{Phase, RestoreJournal};
use crate::vm::PointId;

/// Everything that has its name, in the order it got it; and the devices, which were written in
/// place.
pub(super) struct Outcome {
    point: PointId,
    placed: Vec<Placed>,
    /// What is damaged in the disks.
    list: Option<Placed>,
    devices: Vec<PathBuf>,
    locks: Vec<ImageLock>,
}

impl Outcome {
    /// Nothing yet, of this point.
    pub(super) fn new(point: PointId) -> Self {
        Self { point, placed: Vec::new(), list: None, devices: Vec::new(), locks: Vec::new() }
    }

    /// The same as [`Outcome::add`] for the list of what is damaged.
    pub(super) fn list(&mut self, placed: Placed) -> Result<()> {
        let synced = placed.sync();
        self.list = Some(placed);
        synced
    }

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
        for placed in self.placed.into_iter().chain(self.list).filter(Placed::replaces) {
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
        let new = new.iter().map(Placed::path).chain(self.devices.iter().map(PathBuf::as_path));
        let mut new: Vec<_> = new.map(|path| path.display().to_string()).collect();
        let mut restored: Result<()> = Ok(());
        for placed in replacing.into_iter().rev() {
            let path = placed.path().display().to_string();
            if let Err(error) = placed.put_back() {
                control.notice(NoticeLevel::Warning, error.in_one_line());
                restored = restored.and(Err(error));
                new.push(path);
            }
        }
        let stays = if new.is_empty() { Stays::Nothing } else { Stays::Some };
        match self.list.map(|list| end_list(list, stays, self.point)).transpose() {
            Ok(list) => new.extend(list.flatten().map(|list| list.display().to_string())),
            Err(error) => {
                control.notice(NoticeLevel::Warning, error.in_one_line());
                restored = restored.and(Err(error));
            }
        }
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

/// Whether a disk or file of a restore that failed stays.
#[derive(Clone, Copy)]
enum Stays {
    Nothing,
    Some,
}

/// What becomes of the list of a restore that failed: it stays beside disks that stay, and what it had
/// replaced is what it was. Where it is, if it stays.
fn end_list(list: Placed, stays: Stays, point: PointId) -> Result<Option<PathBuf>> {
    let path = list.path().to_owned();
    let read = || {
        let json = std::fs::read(&path);
        json.map_err(|e| Error::io(format!("cannot read {}", path.display()), e))
    };
    match (stays, list.replaces()) {
        (Stays::Some, false) => Ok(Some(path)),
        (Stays::Some, true) => {
            let beside = salvage::keep_beside(&path, &read()?, point)?;
            list.put_back()?;
            Ok(Some(beside))
        }
        (Stays::Nothing, true) => list.put_back().map(|()| None),
        (Stays::Nothing, false) => {
            let failed = |e| Error::io(format!("cannot remove {}", path.display()), e);
            std::fs::remove_file(&path).map_err(failed).map(|()| None)
        }
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
        let mut outcome = Outcome::new(PointId([0; 16]));
        fs::rename(&directory, &away).unwrap();
        outcome.add(placed).unwrap_err();
        fs::rename(&away, &directory).unwrap();
        let control = Control::new();
        let error = outcome.put_back(Error::new(Kind::Io, "no sync"), &control);
        assert!(error.to_string().contains("as it was"), "{error}");
        assert_eq!(fs::read(&name).unwrap(), b"old");
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 1);
    }

    /// The list was once no part of the outcome: it stayed, or the earlier one was lost, when nothing
    /// else of the restore was there, and the restore was refused then because the list was.
    #[test]
    fn the_list_stays_beside_what_stays_and_goes_with_all_else() {
        let control = Control::new();
        for (old, image) in [(false, false), (false, true), (true, false), (true, true)] {
            let base = tempfile::tempdir().unwrap();
            let place = |name: &str| {
                let (new, path) = (base.path().join(format!(".{name}")), base.path().join(name));
                fs::write(&new, "new").unwrap();
                Placed::place(&new, &path, Existing::Replace).unwrap()
            };
            let list = base.path().join("damaged.json");
            if old {
                fs::write(&list, "old").unwrap();
            }
            let mut outcome = Outcome::new(PointId([7; 16]));
            outcome.list(place("damaged.json")).unwrap();
            if image {
                outcome.add(place("vda.raw")).unwrap();
            }
            let error = outcome.put_back(Error::new(Kind::Io, "no domain"), &control).to_string();
            let mut left: Vec<_> = fs::read_dir(base.path())
                .unwrap()
                .map(|entry| {
                    let entry = entry.unwrap();
                    let name = entry.file_name().into_string().unwrap();
                    (name, fs::read_to_string(entry.path()).unwrap())
                })
                .collect();
            left.sort();
            let left: Vec<_> = left.iter().map(|(name, text)| (&**name, &**text)).collect();
            let beside = format!("damaged.json.restored-{}", PointId([7; 16]).short());
            let expected: &[(&str, &str)] = match (old, image) {
                (false, false) => &[],
                (true, false) => &[("damaged.json", "old")],
                (false, true) => &[("damaged.json", "new"), ("vda.raw", "new")],
                (true, true) => &[("damaged.json", "old"), (&beside, "new"), ("vda.raw", "new")],
            };
            assert_eq!(left, expected, "old {old}, image {image}: {error}");
            assert_eq!(error.contains("as it was"), !image, "{error}");
            assert_eq!(error.contains("damaged.json"), image, "{error}");
        }
    }
}
