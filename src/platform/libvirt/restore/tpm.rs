//! TPM state unpacked to where libvirt looks for it.
//!
//! The state is swapped in whole: a directory beside the right place is filled, synced and exchanged
//! with what is there, so that one whole state is there at every moment. The old one is kept until
//! the caller discards it. libvirt gives the files to the user its swtpm runs
//! as at each start (`qemuTPMEmulatorCreateStorage`, libvirt 9.0), and sets up a new TPM only where
//! there is no directory.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use crate::block::file::{Existing, Placed};
use crate::error::{Error, Kind, Result};
use crate::journal::{Phase, RestoreJournal, Step};
use crate::platform::libvirt::artifacts::untar;

/// Makes `dir` hold the files of `archive`, a TPM state artefact. Replaces what is there: whoever
/// calls has asked whether it may, syncs the name, and decides what becomes of it. Blocks.
pub fn put(dir: &Path, archive: &[u8], journal: &mut RestoreJournal) -> Result<Placed> {
    let failed =
        |error| Error::io(format!("cannot restore the TPM state to {}", dir.display()), error);
    let files = untar(archive).map_err(|reason| {
        Error::new(Kind::Corrupt, format!("the stored TPM state cannot be unpacked: {reason}"))
    })?;
    let parent = dir.parent().ok_or_else(|| failed(std::io::ErrorKind::InvalidInput.into()))?;
    if !parent.exists() {
        journal.note(Step::Directory { path: parent.to_owned() })?;
    }
    let temporary = journal.temporary(dir)?;
    // libvirt's own mode for the directory of a domain: its TPM may be of another user.
    DirBuilder::new().recursive(true).mode(0o711).create(parent).map_err(failed)?;
    let fresh = tempfile::Builder::new()
        .prefix(temporary.file_name().expect("it has one"))
        .rand_bytes(0)
        // libvirt's own for the files of a TPM, whose owner it sets at each start.
        .permissions(Permissions::from_mode(0o700))
        .tempdir_in(parent)
        .map_err(failed)?;
    for (name, bytes) in files {
        let mut options = OpenOptions::new();
        let file = options.write(true).create_new(true).mode(0o600).open(fresh.path().join(name));
        let mut file = file.map_err(failed)?;
        file.write_all(bytes).and_then(|()| file.sync_all()).map_err(failed)?;
    }
    sync(fresh.path()).map_err(failed)?;
    journal.place(fresh.path(), dir)?;
    journal.before(Phase::Place);
    let placed = Placed::place(fresh.path(), dir, Existing::Replace)?;
    journal.after(Phase::Place);
    // Under its name is nothing now, or the old state, which is not ours to remove here.
    let _ = fresh.keep();
    Ok(placed)
}

fn sync(dir: &Path) -> std::io::Result<()> {
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::journal::{Journals, RestoreRun};
    use crate::platform::libvirt::artifacts::tar_directory;
    use crate::vm::{PointId, Uuid, VmIdentity};

    fn journal() -> RestoreJournal {
        let text = String::new;
        let vm = VmIdentity { uuid: Uuid::nil(), name: text(), host: text(), platform: text() };
        let run = RestoreRun::new(PointId([1; 16]), vm);
        Journals::new("/nonexistent".into(), None).unkept_restore(run, 1)
    }

    #[test]
    fn what_was_packed_takes_the_place_of_what_is_there() {
        let base = tempfile::tempdir().unwrap();
        let from = base.path().join("from");
        fs::create_dir(&from).unwrap();
        fs::write(from.join("tpm2-00.permall"), [7; 700]).unwrap();
        let archive = tar_directory(&from).unwrap();
        let dir = base.path().join("uuid/tpm2");
        put(&dir, &archive, &mut journal()).unwrap().discard().unwrap();
        fs::write(dir.join("stale"), "x").unwrap();
        put(&dir, &archive, &mut journal()).unwrap().discard().unwrap();
        assert_eq!(fs::read(dir.join("tpm2-00.permall")).unwrap(), [7; 700]);
        assert!(!dir.join("stale").exists());
        assert_eq!(
            fs::read_dir(dir.parent().unwrap()).unwrap().count(),
            1,
            "nothing is left beside"
        );
    }

    #[test]
    fn the_old_state_is_whole_and_can_be_put_back() {
        let base = tempfile::tempdir().unwrap();
        let (from, dir) = (base.path().join("from"), base.path().join("uuid/tpm2"));
        for directory in [&from, &dir] {
            fs::create_dir_all(directory).unwrap();
        }
        fs::write(from.join("tpm2-00.permall"), "new").unwrap();
        fs::write(dir.join("tpm2-00.permall"), "old").unwrap();
        let placed = put(&dir, &tar_directory(&from).unwrap(), &mut journal()).unwrap();
        assert_eq!(fs::read(dir.join("tpm2-00.permall")).unwrap(), b"new");
        placed.put_back().unwrap();
        assert_eq!(fs::read(dir.join("tpm2-00.permall")).unwrap(), b"old");
        assert_eq!(fs::read_dir(dir.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn a_damaged_archive_changes_nothing() {
        let base = tempfile::tempdir().unwrap();
        let dir = base.path().join("tpm2");
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("state"), "old").unwrap();
        let mut evil = vec![0; 1024];
        evil[..5].copy_from_slice(b"../ab");
        for archive in [&b"short"[..], &evil] {
            assert_eq!(put(&dir, archive, &mut journal()).unwrap_err().kind(), Kind::Corrupt);
        }
        assert_eq!(fs::read(dir.join("state")).unwrap(), b"old");
    }
}
