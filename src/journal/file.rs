//! The file of a journal: read with a bound, replaced as a whole, durable when a write returns.

use std::fs::{self, DirBuilder, File, Metadata, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Run;
use crate::error::{Error, Result};
use crate::vm::{PointId, Uuid};

/// Version of the file. A newer one is not understood, and counts as unreadable.
const VERSION: u32 = 1;
/// Largest file read: a run with hundreds of disks takes some ten KiB.
const FILE_BYTES_MAX: u64 = 4 << 20;
/// Most runs kept: each is one that could not be undone entirely.
pub(super) const RUNS_MAX: usize = 32;
/// Tells one boot from another (random(4)).
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

#[derive(Serialize)]
struct Written<'a> {
    version: u32,
    runs: &'a [&'a Run],
}

#[derive(Deserialize)]
struct Stored {
    version: u32,
    runs: Vec<Run>,
}

/// The runs in a file, and whether it is there and makes no sense.
pub(super) fn read(path: &Path) -> Result<(Vec<Run>, bool)> {
    let failed = |e| Error::io(format!("cannot read {}", path.display()), e);
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok((Vec::new(), false)),
        Err(error) => return Err(failed(error)),
    };
    let mut text = Vec::new();
    file.take(FILE_BYTES_MAX).read_to_end(&mut text).map_err(failed)?;
    match serde_json::from_slice::<Stored>(&text) {
        Ok(Stored { version: VERSION, runs }) => Ok((runs, false)),
        Ok(Stored { version, .. }) => {
            tracing::warn!(path = %path.display(), version, "a journal of another version");
            Ok((Vec::new(), true))
        }
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "a journal makes no sense");
            Ok((Vec::new(), true))
        }
    }
}

/// Replaces the file; no runs is no file.
pub(super) fn write(path: &Path, runs: &[&Run]) -> Result<()> {
    let failed = |e| Error::io(format!("cannot write {}", path.display()), e);
    let directory = path.parent().expect("a journal is in a directory");
    if runs.is_empty() {
        return match fs::remove_file(path) {
            Ok(()) => sync(directory).map_err(failed),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(Error::io(format!("cannot remove {}", path.display()), error)),
        };
    }
    let text = serde_json::to_vec(&Written { version: VERSION, runs });
    let text = text.expect("a journal is text, numbers and bytes");
    let replace = || {
        make(directory)?;
        let new = path.with_extension("new");
        let mut options = OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(&text)?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        sync(directory)
    };
    replace().map_err(failed)
}

/// Makes the directory, for good.
pub(super) fn make(directory: &Path) -> io::Result<()> {
    if directory.is_dir() {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    directory.parent().map_or(Ok(()), sync)
}

/// Whether `file` is the one that `path` names now.
pub(super) fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let here = file.metadata()?;
    match fs::metadata(path) {
        Ok(there) => Ok((here.dev(), here.ino()) == (there.dev(), there.ino())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

pub(super) fn sync(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

/// The VMs with a file in `directory`.
pub(super) fn list(directory: &Path) -> Result<Vec<Uuid>> {
    let failed = |e| Error::io(format!("cannot look into {}", directory.display()), e);
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let name = entry.map_err(failed)?.file_name();
        let stem = name.to_str().and_then(|name| name.strip_suffix(".json"));
        found.extend(stem.and_then(|stem| stem.parse::<Uuid>().ok()));
    }
    found.sort();
    Ok(found)
}

/// Whether a file or directory is one that a run on `point` made: its name says so.
pub(super) fn is_of(path: &Path, point: PointId) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    name.starts_with("vmb-") && name.contains(&point.short())
}

/// Removes the file or directory that `data` is of. Somebody else may have done that.
pub(super) fn remove(path: &Path, data: &Metadata) -> io::Result<()> {
    let removed = if data.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match removed {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Gives a journal that makes no sense the name `….unreadable`.
pub(super) fn set_aside(path: &Path) -> Result<()> {
    let failed = |e| Error::io(format!("cannot rename {}", path.display()), e);
    let directory = path.parent().expect("a journal is in a directory");
    fs::rename(path, path.with_extension("unreadable")).map_err(failed)?;
    sync(directory).map_err(failed)
}

/// This boot; empty where the system does not tell.
pub(super) fn boot_id() -> String {
    fs::read_to_string(BOOT_ID).map(|text| text.trim().to_owned()).unwrap_or_default()
}
