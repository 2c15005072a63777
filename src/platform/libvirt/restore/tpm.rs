//! TPM state unpacked to where libvirt looks for it.
//!
//! The state is swapped in whole: a directory beside the right place is filled, synced and renamed.
//! What was there is removed only after that. libvirt gives the files to the user its swtpm runs
//! as at each start (`qemuTPMEmulatorCreateStorage`, libvirt 9.0), and sets up a new TPM only where
//! there is no directory.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use crate::error::{Error, Kind, Result};
use crate::platform::libvirt::artifacts::untar;

/// Makes `dir` hold the files of `archive`, a TPM state artefact. Replaces what is there: whoever
/// calls has asked whether it may. Blocks.
pub fn put(dir: &Path, archive: &[u8]) -> Result<()> {
    let failed =
        |error| Error::io(format!("cannot restore the TPM state to {}", dir.display()), error);
    let files = untar(archive).map_err(|reason| {
        Error::new(Kind::Corrupt, format!("the stored TPM state cannot be unpacked: {reason}"))
    })?;
    let parent = dir.parent().ok_or_else(|| failed(std::io::ErrorKind::InvalidInput.into()))?;
    // libvirt's own mode for the directory of a domain: its TPM may be of another user.
    DirBuilder::new().recursive(true).mode(0o711).create(parent).map_err(failed)?;
    let fresh = tempfile::Builder::new().prefix(".tpm-").tempdir_in(parent).map_err(failed)?;
    for (name, bytes) in files {
        let mut options = OpenOptions::new();
        let file = options.write(true).create_new(true).mode(0o600).open(fresh.path().join(name));
        let mut file = file.map_err(failed)?;
        file.write_all(bytes).and_then(|()| file.sync_all()).map_err(failed)?;
    }
    sync(fresh.path()).map_err(failed)?;
    let old = tempfile::Builder::new().prefix(".tpm-old-").tempdir_in(parent).map_err(failed)?;
    if dir.symlink_metadata().is_ok() {
        fs::rename(dir, old.path().join("state")).map_err(failed)?;
    }
    fs::rename(fresh.path(), dir).map_err(failed)?;
    // Its name is taken over: nothing is left to remove under the old one.
    let _ = fresh.keep();
    sync(parent).map_err(failed)?;
    old.close().map_err(failed)
}

fn sync(dir: &Path) -> std::io::Result<()> {
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::libvirt::artifacts::tar_directory;

    #[test]
    fn what_was_packed_takes_the_place_of_what_is_there() {
        let base = tempfile::tempdir().unwrap();
        let from = base.path().join("from");
        fs::create_dir(&from).unwrap();
        fs::write(from.join("tpm2-00.permall"), [7; 700]).unwrap();
        let archive = tar_directory(&from).unwrap();
        let dir = base.path().join("uuid/tpm2");
        put(&dir, &archive).unwrap();
        fs::write(dir.join("stale"), "x").unwrap();
        put(&dir, &archive).unwrap();
        assert_eq!(fs::read(dir.join("tpm2-00.permall")).unwrap(), [7; 700]);
        assert!(!dir.join("stale").exists());
        assert_eq!(
            fs::read_dir(dir.parent().unwrap()).unwrap().count(),
            1,
            "nothing is left beside"
        );
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
            assert_eq!(put(&dir, archive).unwrap_err().kind(), Kind::Corrupt);
        }
        assert_eq!(fs::read(dir.join("state")).unwrap(), b"old");
    }
}
