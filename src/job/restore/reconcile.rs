//! What a restore that was killed left, undone or brought to its end.
//!
//! ```text
//!  nothing defined yet ─► undo: the old ones get their names back, the new ones are removed
//!  defined, or all in place ─► forward: the old ones are removed
//! ```
//!
//! By the journal of that restore ([`crate::journal::restore`]), whose VM's lock is held. Somebody may
//! have begun to use what he found: a file is touched only if it is the recorded one, was not written
//! since, and nobody holds it. If that is not so of one of them, all stay, and it is said what is what.
//! A complete image that replaced nothing is never removed, and neither is one without which there
//! would be none. The list of what is damaged stays beside the disks that stay, and only there.
//!
//! The files may be where nothing answers: their directories are asked first, and nothing is waited for
//! without end.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::{domain, salvage};
use crate::block::file::{FileStamp, Placed};
use crate::control::Control;
use crate::error::{Error, Kind, Result, with_causes};
use crate::image::ImageLock;
use crate::job::directories::Directories;
use crate::job::lock::VmLock;
use crate::job::{Env, Surroundings};
use crate::journal::{Abandoned, Action, Mode, Placing, Recovery, RestoreJournal, Step};
use crate::platform::{tell, work_in};
use crate::vm::{PointId, Uuid, VmIdentity};

/// Who keeps others from the VM meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::job) enum Lock {
    /// The caller has its lock.
    Held,
    /// It is taken here; if another run has it, that one has done this.
    Take,
}

/// Undoes what killed restores of points of `vm` left, and says so. What cannot be undone now keeps
/// nobody from anything.
pub(in crate::job) async fn before_run(vm: &VmIdentity, lock: Lock, env: &Env, control: &Control) {
    let mut recovery = Recovery::new(Mode::Undo);
    let result = of_vm(vm.uuid, lock, (env, control), &mut recovery).await;
    tell(recovery.into_items(), control);
    if let Err(error) = result {
        let text = format!("what killed restores left stays: {}", with_causes(&error));
        control.notice(crate::control::NoticeLevel::Warning, text);
    }
}

/// The same for one VM, as `recovery` says.
async fn of_vm(
    vm: Uuid,
    lock: Lock,
    (env, control): Surroundings<'_>,
    recovery: &mut Recovery,
) -> Result<()> {
    let directories = Directories::default();
    for abandoned in env.journals().abandoned_restores()? {
        if let Abandoned::Restore(journal) = abandoned
            && journal.run().vm.uuid == vm
        {
            one(journal, lock, (env, control, &directories), recovery).await?;
        }
    }
    Ok(())
}

/// Reconciles one restore. Fails with [`Kind::Timeout`] where a file system it wrote to does not answer.
/// Not cancel-safe, but watches the control while it waits for an answer; begun again, it goes on.
pub(in crate::job) async fn one(
    mut journal: RestoreJournal,
    lock: Lock,
    (env, control, answers): (&Env, &Control, &Directories),
    recovery: &mut Recovery,
) -> Result<()> {
    let what = {
        let run = journal.run();
        format!("the killed restore of point {} of VM '{}'", run.point.short(), run.vm.name)
    };
    let lock = match lock {
        Lock::Held => None,
        Lock::Take => match VmLock::acquire(&env.state_dir, &journal.run().vm, "recovery") {
            Ok(lock) => Some(lock),
            Err(error) if error.kind() == Kind::Busy => {
                recovery.note(Action::Kept, format!("files of {what}: {error}"));
                return Ok(());
            }
            Err(error) => return Err(error),
        },
    };
    let direction = match direction(&journal).await {
        Ok(direction) => direction,
        Err(error) => {
            let text = format!("files of {what}, until libvirt answers: {}", with_causes(&error));
            recovery.note(Action::Kept, text);
            return Ok(());
        }
    };
    let mode = recovery.mode();
    let directories = directories(journal.steps());
    for directory in &directories {
        control.run(answers.answers(directory, mode)).await?;
    }
    if direction == Direction::Undo && recovery.changes() {
        // Whatever anybody defines meanwhile.
        journal.note(Step::Undo)?;
    }
    let work = move || {
        // As long as it works, however long anybody waits for it.
        let _lock = lock;
        let mut found = Recovery::new(mode);
        let settled = settle(journal, direction, &what, &mut found);
        (found, settled)
    };
    let directory = directories.into_iter().next().unwrap_or_default();
    let (found, settled) = work_in(&directory, mode, work).await?;
    recovery.add(found);
    settled
}

/// The directories that a restore wrote to.
fn directories(steps: &[Step]) -> BTreeSet<PathBuf> {
    let made = steps.iter().filter_map(|step| match step {
        Step::Directory { path: made } | Step::Temporary { temporary: made } => Some(made),
        // What gets its place is beside it.
        _ => None,
    });
    made.filter_map(|made| made.parent()).map(Path::to_owned).collect()
}

/// Touches its files, or looks at them.
fn settle(
    journal: RestoreJournal,
    direction: Direction,
    what: &str,
    recovery: &mut Recovery,
) -> Result<()> {
    let point = journal.run().point;
    let mut left = Left { steps: journal.steps(), point, what, recovery };
    let settled = match direction {
        Direction::Undo => left.undo()?,
        Direction::Forward => left.forward()?,
    };
    if settled && recovery.changes() { journal.remove() } else { Ok(()) }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Undo,
    Forward,
}

/// Where it goes. An error when libvirt has to be asked and does not answer.
async fn direction(journal: &RestoreJournal) -> Result<Direction> {
    let has = |wanted: &Step| journal.steps().contains(wanted);
    if has(&Step::Undo) {
        return Ok(Direction::Undo);
    }
    if has(&Step::Discard) {
        return Ok(Direction::Forward);
    }
    let defined = journal.steps().iter().find_map(|step| match step {
        Step::Define { uri, uuid, before } => Some((uri, *uuid, before)),
        _ => None,
    });
    let Some((uri, uuid, before)) = defined else { return Ok(Direction::Undo) };
    // The same description as before fits the old images as well as the new ones.
    let is_as_before = domain::definition(uri, uuid).await? == *before;
    Ok(if is_as_before { Direction::Undo } else { Direction::Forward })
}

/// What is left, being looked at.
struct Left<'a> {
    steps: &'a [Step],
    point: PointId,
    what: &'a str,
    recovery: &'a mut Recovery,
}

/// Where the two of a [`Placing`] are now.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    /// The new one has the name; the old one is here, if there is one.
    Placed(Option<PathBuf>),
    /// The new one has its temporary name.
    Waiting,
    /// Neither: somebody has moved or removed it.
    Elsewhere,
}

impl Left<'_> {
    fn placings(&self) -> Vec<Placing> {
        let placing = |step: &Step| match step {
            Step::Place(placing) => Some(placing.clone()),
            _ => None,
        };
        self.steps.iter().filter_map(placing).collect()
    }

    /// Everything as it was; whether nothing is left to do.
    fn undo(&mut self) -> Result<bool> {
        let placings = self.placings();
        let (mut back, mut locks, mut used) = (Vec::new(), Vec::new(), None);
        for placing in &placings {
            if let Found::Placed(Some(old)) = find(placing)? {
                match unused(&placing.path, &placing.new)? {
                    Ok(lock) => locks.push(lock),
                    Err(why) => used = Some((placing.path.clone(), why)),
                }
                back.push((placing, old));
            }
        }
        if let Some((path, why)) = used {
            for (placing, old) in back {
                self.keep_both(placing, &old);
            }
            let text = format!("{} of {}: {why}", path.display(), self.what);
            self.recovery.note(Action::Kept, text);
            return Ok(false);
        }
        let disks_stay = self.leaves_disks(&placings)?;
        for (placing, old) in back.into_iter().rev() {
            let path = placing.path.display();
            let text = format!("{path} of {}: what it had replaced is back", self.what);
            if self.recovery.undo(text) {
                if disks_stay && salvage::is_list(&placing.path) {
                    self.keep_list(&placing.path)?;
                }
                Placed::found(placing.path.clone(), old).put_back()?;
            }
        }
        drop(locks);
        for placing in &placings {
            if find(placing)? == Found::Placed(None) {
                let path = placing.path.display();
                if !disks_stay
                    && salvage::is_list(&placing.path)
                    && unused(&placing.path, &placing.new)?.is_ok()
                {
                    if self.recovery.undo(format!("{path} of {}", self.what)) {
                        remove(&placing.path)?;
                    }
                    continue;
                }
                let text =
                    format!("{path}, which is complete and replaced nothing, of {}", self.what);
                self.recovery.note(Action::Adopted, text);
            }
        }
        let settled = self.temporaries(&placings)?;
        self.directories();
        self.devices();
        Ok(settled)
    }

    /// Whether undoing leaves anything besides a list of what is damaged.
    fn leaves_disks(&self, placings: &[Placing]) -> Result<bool> {
        for placing in placings.iter().filter(|placing| !salvage::is_list(&placing.path)) {
            if find(placing)? == Found::Placed(None) {
                return Ok(true);
            }
        }
        Ok(self.steps.iter().any(|step| matches!(step, Step::Overwrite { .. })))
    }

    /// Keeps a list beside its name, which another gets back.
    fn keep_list(&mut self, list: &Path) -> Result<()> {
        let failed = |e| Error::io(format!("cannot read {}", list.display()), e);
        let json = std::fs::read(list).map_err(failed)?;
        let beside = salvage::keep_beside(list, &json, self.point)?;
        let text = format!("{}, what is damaged in what stays, of {}", beside.display(), self.what);
        self.recovery.note(Action::Adopted, text);
        Ok(())
    }

    /// What was replaced goes; whether nothing is left to do.
    fn forward(&mut self) -> Result<bool> {
        let placings = self.placings();
        let mut settled = true;
        for placing in &placings {
            let Found::Placed(Some(old)) = find(placing)? else { continue };
            let stamp = placing.old.expect("something was replaced");
            let Ok(_lock) = unused(&old, &stamp)? else {
                self.keep_both(placing, &old);
                settled = false;
                continue;
            };
            let path = placing.path.display();
            if self.recovery.undo(format!("what {path} of {} had replaced", self.what)) {
                Placed::found(placing.path.clone(), old).discard()?;
            }
        }
        Ok(self.temporaries(&placings)? && settled)
    }

    /// Removes what has a temporary name and is new; whether nothing has one any more.
    fn temporaries(&mut self, placings: &[Placing]) -> Result<bool> {
        let mut settled = true;
        for step in self.steps {
            let Step::Temporary { temporary } = step else { continue };
            let placing = placings.iter().find(|placing| placing.temporary == *temporary);
            if let Some(placing) = placing {
                settled &= self.old_one(placing)?;
            }
            let Some(there) = stamp(temporary)? else { continue };
            if placing.is_some_and(|placing| !placing.new.is_of_same_file(&there)) {
                continue;
            }
            // What was not complete has no stamp: nobody has any use for it.
            let expected = placing.map_or(there, |placing| placing.new);
            match unused(temporary, &expected)? {
                Ok(_lock) => {
                    let text = format!("{} of {}", temporary.display(), self.what);
                    if self.recovery.undo(text) {
                        remove(temporary)?;
                    }
                }
                Err(why) => {
                    let text = format!("{} of {}: {why}", temporary.display(), self.what);
                    self.recovery.note(Action::Kept, text);
                    settled = false;
                }
            }
        }
        Ok(settled)
    }

    /// Looks at what was replaced, where it is still beside its name; whether it is not.
    fn old_one(&mut self, placing: &Placing) -> Result<bool> {
        let aside = Placed::aside(&placing.temporary);
        let named = stamp(&placing.path)?;
        for place in [&placing.temporary, &aside] {
            let Some(there) = stamp(place)? else { continue };
            if placing.new.is_of_same_file(&there) {
                continue;
            }
            if named.is_some_and(|named| named.is_of_same_file(&there)) {
                // Its second name.
                if self.recovery.undo(format!("{} of {}", place.display(), self.what)) {
                    remove(place)?;
                }
                continue;
            }
            // Told already, or would be gone by now, where the new one has the name.
            if find(placing)? == Found::Elsewhere {
                self.keep_both(placing, place);
            }
            return Ok(false);
        }
        Ok(true)
    }

    /// Removes the directory that was made for it, if nothing is in it.
    fn directories(&mut self) {
        for step in self.steps {
            if let Step::Directory { path } = step
                && self.recovery.changes()
            {
                // Not empty, or gone: it is somebody's now.
                let _ = std::fs::remove_dir(path);
            }
        }
    }

    fn devices(&mut self) {
        for step in self.steps {
            if let Step::Overwrite { path } = step {
                let text = format!(
                    "device {}, overwritten at least in part by {}: what it held is lost",
                    path.display(),
                    self.what
                );
                self.recovery.note(Action::Kept, text);
            }
        }
    }

    fn keep_both(&mut self, placing: &Placing, old: &Path) {
        let (path, old) = (placing.path.display(), old.display());
        let text = format!(
            "what {path} of {} had replaced, as {old}: 'mv {old} {path}' puts it back while no VM \
             uses it; remove it if you do not need it",
            self.what
        );
        self.recovery.note(Action::Kept, text);
    }
}

fn find(placing: &Placing) -> Result<Found> {
    let is = |path: &Path, wanted: &FileStamp| -> Result<bool> {
        Ok(stamp(path)?.is_some_and(|found| found.is_of_same_file(wanted)))
    };
    if is(&placing.path, &placing.new)? {
        let aside = Placed::aside(&placing.temporary);
        for place in [&placing.temporary, &aside] {
            if let Some(old) = &placing.old
                && is(place, old)?
            {
                return Ok(Found::Placed(Some(place.clone())));
            }
        }
        return Ok(Found::Placed(None));
    }
    let waiting = is(&placing.temporary, &placing.new)?;
    Ok(if waiting { Found::Waiting } else { Found::Elsewhere })
}

fn stamp(path: &Path) -> Result<Option<FileStamp>> {
    FileStamp::of(path).map_err(|e| Error::io(format!("cannot examine {}", path.display()), e))
}

/// A lock that keeps VMs from a file that is as it was recorded; or why it is not touched.
fn unused(path: &Path, recorded: &FileStamp) -> Result<Result<Option<ImageLock>, String>> {
    let failed = |e| Error::io(format!("cannot examine {}", path.display()), e);
    let is_file = path.symlink_metadata().map_err(failed)?.is_file();
    let lock = match is_file.then(|| ImageLock::acquire_to_write(path)).transpose() {
        Ok(lock) => lock,
        Err(error) if error.kind() == Kind::Busy => return Ok(Err(error.to_string())),
        Err(error) => return Err(error),
    };
    // After the lock: whoever had it until now may have written.
    if stamp(path)? == Some(*recorded) {
        return Ok(Ok(lock));
    }
    Ok(Err("it was used since".to_owned()))
}

fn remove(path: &Path) -> Result<()> {
    let is_dir = path.symlink_metadata().is_ok_and(|data| data.is_dir());
    let removed = if is_dir { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
    removed.map_err(|e| Error::io(format!("cannot remove {}", path.display()), e))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::block::file::Existing;

    const WHAT: &str = "the killed restore of point 0 of VM 'foo'";

    /// A directory with the image "old", and what a restore of "new" noted before it placed it.
    fn begun() -> (tempfile::TempDir, Placing, Vec<Step>) {
        let base = tempfile::tempdir().unwrap();
        let (path, temporary) = (base.path().join("image"), base.path().join(".image.1.part"));
        fs::write(&path, "old").unwrap();
        fs::write(&temporary, "new").unwrap();
        let new = stamp(&temporary).unwrap().unwrap();
        let old = stamp(&path).unwrap();
        let placing = Placing { temporary: temporary.clone(), path, new, old };
        let steps = vec![Step::Temporary { temporary }, Step::Place(placing.clone())];
        (base, placing, steps)
    }

    fn place(placing: &Placing) {
        let _ = Placed::place(&placing.temporary, &placing.path, Existing::Replace).unwrap();
    }

    fn run(steps: &[Step], direction: Direction) -> bool {
        let mut recovery = Recovery::new(Mode::Undo);
        let point = PointId([7; 16]);
        let mut left = Left { steps, point, what: WHAT, recovery: &mut recovery };
        match direction {
            Direction::Undo => left.undo().unwrap(),
            Direction::Forward => left.forward().unwrap(),
        }
    }

    fn content(base: &tempfile::TempDir) -> Vec<String> {
        let entries = fs::read_dir(base.path()).unwrap().flatten();
        let mut content: Vec<_> =
            entries.map(|entry| fs::read_to_string(entry.path()).unwrap()).collect();
        content.sort();
        content
    }

    #[test]
    fn it_is_undone_before_and_after_the_new_one_has_its_name() {
        for placed in [false, true] {
            let (base, placing, steps) = begun();
            if placed {
                place(&placing);
            }
            for _ in 0..2 {
                assert!(run(&steps, Direction::Undo));
                assert_eq!(content(&base), ["old"]);
            }
        }
    }

    #[test]
    fn what_was_replaced_goes_when_it_was_defined() {
        let (base, placing, steps) = begun();
        place(&placing);
        fs::write(&placing.path, "new and used").unwrap();
        for _ in 0..2 {
            assert!(run(&steps, Direction::Forward));
            assert_eq!(content(&base), ["new and used"]);
        }
    }

    #[test]
    fn the_second_name_that_a_file_system_without_exchange_needs_goes() {
        let (base, placing, steps) = begun();
        fs::hard_link(&placing.path, Placed::aside(&placing.temporary)).unwrap();
        assert!(run(&steps, Direction::Undo));
        assert_eq!(content(&base), ["old"]);
        let (base, placing, steps) = begun();
        fs::hard_link(&placing.path, Placed::aside(&placing.temporary)).unwrap();
        fs::rename(&placing.temporary, &placing.path).unwrap();
        assert!(run(&steps, Direction::Undo));
        assert_eq!(content(&base), ["old"]);
    }

    #[test]
    fn an_image_that_was_used_or_is_held_stays_and_so_does_the_old_one() {
        let (base, placing, steps) = begun();
        place(&placing);
        let held = ImageLock::acquire(&placing.path).unwrap();
        assert!(!run(&steps, Direction::Undo));
        assert_eq!(content(&base), ["new", "old"]);
        drop(held);
        fs::write(&placing.path, "new and used").unwrap();
        assert!(!run(&steps, Direction::Undo));
        assert_eq!(content(&base), ["new and used", "old"]);
        // The old one is in use: nobody takes it away.
        let held = ImageLock::acquire(&placing.temporary).unwrap();
        assert!(!run(&steps, Direction::Forward));
        assert_eq!(content(&base), ["new and used", "old"]);
        drop(held);
    }

    #[test]
    fn a_complete_image_that_replaced_nothing_and_what_others_made_stays() {
        let (base, mut placing, _) = begun();
        fs::remove_file(&placing.path).unwrap();
        placing.old = None;
        place(&placing);
        let temporary = placing.temporary.clone();
        let steps = [Step::Temporary { temporary }, Step::Place(placing.clone())];
        assert!(run(&steps, Direction::Undo));
        assert_eq!(content(&base), ["new"]);
        // Somebody put something else there, and moved ours away.
        let (base, placing, steps) = begun();
        place(&placing);
        fs::rename(&placing.path, base.path().join("moved")).unwrap();
        fs::write(&placing.path, "foreign").unwrap();
        assert!(!run(&steps, Direction::Undo));
        assert_eq!(content(&base), ["foreign", "new", "old"]);
    }

    #[test]
    fn the_list_of_what_is_damaged_stays_beside_disks_that_stay_and_goes_without() {
        for (old, image) in [(false, false), (false, true), (true, false), (true, true)] {
            let base = tempfile::tempdir().unwrap();
            let mut steps = Vec::new();
            for name in ["damaged.json", "vda.raw"] {
                let path = base.path().join(name);
                let temporary = base.path().join(format!(".{name}.1.part"));
                fs::write(&temporary, "new").unwrap();
                if old && name == "damaged.json" {
                    fs::write(&path, "old").unwrap();
                }
                let new = stamp(&temporary).unwrap().unwrap();
                let old = stamp(&path).unwrap();
                steps.push(Step::Temporary { temporary: temporary.clone() });
                let placing = Placing { temporary, path, new, old };
                steps.push(Step::Place(placing.clone()));
                if image || name == "damaged.json" {
                    place(&placing);
                }
            }
            assert!(run(&steps, Direction::Undo));
            let expected: &[&str] = match (old, image) {
                (false, false) => &[],
                (true, false) => &["old"],
                (false, true) => &["new", "new"],
                (true, true) => &["new", "new", "old"],
            };
            assert_eq!(content(&base), expected, "old {old}, image {image}");
        }
    }
}
