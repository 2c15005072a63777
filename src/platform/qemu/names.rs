//! The names we give to things in a QEMU and on its host, and how they are told from others'.
//!
//! Pure. Two sorts:
//!
//! - *Checkpoints* stay: a bitmap named as [`BitmapNames`](crate::image::bitmap::BitmapNames) say,
//!   with the disk, so that an image that was moved to another place in the VM does not bring a
//!   bitmap along that would be believed there.
//! - *Temporary things* of one run (nodes, jobs, exports, merged bitmaps) are named
//!   `vmb-<kind>-<8 hex of the point>-<number of the disk>`: whatever of them is found when a run
//!   begins was left behind by one that died. QEMU limits node names to 31 characters
//!   (`BlockDriverState.node_name`).

use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};
use crate::vm::{PointId, Uuid};

/// Longest path of a unix socket (`sun_path`, unix(7)), without the final NUL.
const SOCKET_PATH_MAX: usize = 107;

/// The sorts of temporary things.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Temp {
    /// The node over a scratch file, and the file.
    Scratch,
    /// The job.
    Job,
    /// The job's filter node.
    Filter,
    /// The node that reads the instant.
    Snapshot,
    /// The export.
    Export,
    /// The merged bitmap.
    Changes,
    /// The copy-before-write filter, where there is no job.
    Guard,
    /// The node that says that we paused the guest.
    Pause,
}

impl Temp {
    fn word(self) -> &'static str {
        match self {
            Self::Scratch => "scr",
            Self::Job => "job",
            Self::Filter => "flt",
            Self::Snapshot => "snp",
            Self::Export => "exp",
            Self::Changes => "chg",
            Self::Guard => "cbw",
            Self::Pause => "pse",
        }
    }

    /// The name for a disk of a run.
    pub(super) fn name(self, point: PointId, disk: usize) -> String {
        format!("vmb-{}-{}-{disk}", self.word(), point.short())
    }

    /// Whether a name is of this sort, of whichever run.
    pub(super) fn is(self, name: &str) -> bool {
        let rest = name.strip_prefix("vmb-").and_then(|rest| rest.strip_prefix(self.word()));
        let Some((point, disk)) = rest.and_then(|r| r.strip_prefix('-')?.split_once('-')) else {
            return false;
        };
        point.len() == 8
            && point.bytes().all(|byte| byte.is_ascii_hexdigit())
            && !disk.is_empty()
            && disk.bytes().all(|byte| byte.is_ascii_digit())
    }
}

/// The directory of a run below the scratch directory: scratch files and the socket.
pub(super) fn work_dir(base: &Path, domain: Uuid, point: PointId) -> PathBuf {
    base.join(format!("vmb-{domain}-{}", point.short()))
}

/// Whether a directory name is that of a run on `domain`.
pub(super) fn is_work_dir(name: &str, domain: Uuid) -> bool {
    let point = name.strip_prefix(&format!("vmb-{domain}-"));
    point.is_some_and(|p| p.len() == 8 && p.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// The socket of a run's exports.
pub(super) fn socket_path(work_dir: &Path) -> Result<PathBuf> {
    let path = work_dir.join("nbd.sock");
    if path.as_os_str().len() > SOCKET_PATH_MAX {
        let what = format!("socket path {} is longer than {SOCKET_PATH_MAX} bytes", path.display());
        return Err(Error::new(Kind::Usage, what).hint("give a shorter scratch directory"));
    }
    Ok(path)
}

/// A disk name of harmless characters, not hidden and no directory: it becomes part of file names.
pub(super) fn sanitised(name: &str) -> String {
    let keep = |(at, c): (usize, char)| {
        let harmless = c.is_ascii_alphanumeric() || "_-".contains(c) || (c == '.' && at > 0);
        if harmless { c } else { '_' }
    };
    name.chars().enumerate().map(keep).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::bitmap::BitmapNames;

    #[test]
    fn temporary_names_fit_a_node_name_and_are_recognised() {
        let all = [
            Temp::Scratch,
            Temp::Job,
            Temp::Filter,
            Temp::Snapshot,
            Temp::Export,
            Temp::Changes,
            Temp::Guard,
            Temp::Pause,
        ];
        for kind in all {
            let name = kind.name(PointId([0xab; 16]), 1234);
            assert!(name.len() <= 31, "{name}");
            for other in all {
                assert_eq!(other.is(&name), other == kind);
            }
        }
        for foreign in ["vmb-scr", "vmb-scr-xyz-1", "vmb-scr-abababab-", "vmb-scratch", "scr"] {
            assert!(!Temp::Scratch.is(foreign), "{foreign}");
        }
        // A checkpoint of a repository whose id begins like a kind is none of them.
        let names = BitmapNames::new("abcdef01", Uuid::nil()).unwrap().of_disk("0");
        assert!(all.iter().all(|kind| !kind.is(&names.of_point(PointId([0; 16])))));
    }

    #[test]
    fn a_run_directory_belongs_to_its_domain() {
        let domain = Uuid::from_u128(9);
        let dir = work_dir(Path::new("/var/tmp"), domain, PointId([1; 16]));
        let name = dir.file_name().unwrap().to_str().unwrap();
        assert!(is_work_dir(name, domain) && !is_work_dir(name, Uuid::nil()));
        assert!(socket_path(&dir).is_ok());
        assert!(socket_path(Path::new(&"/x".repeat(60))).is_err());
    }
}
