//! The names we give to things on a host, and how they are told from everybody else's.
//!
//! Pure. Sockets and scratch files carry the point. Checkpoints and their bitmaps are named by
//! [`BitmapNames`](crate::image::bitmap::BitmapNames), without the disk: libvirt wants the bitmap of
//! each disk to be called as the checkpoint (`qemuCheckpointPrepare`).

use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};
use crate::vm::PointId;

/// Longest path of a unix socket (`sun_path`, unix(7)), without the final NUL.
const SOCKET_PATH_MAX: usize = 107;

/// Characters of the domain name in its state directory (`VIR_DOMAIN_SHORT_NAME_MAX`).
const SHORT_NAME_CHARS: usize = 20;

/// The socket of a run's exports: in the domain's own state directory, where security drivers let
/// QEMU create it (virt-aa-helper.c grants rw below `domain-<id>-<shortname>/`), or where we say.
pub(super) fn socket_path(directory: &Path, point: PointId) -> Result<PathBuf> {
    let path = directory.join(format!("vmb-{point}.sock"));
    if path.as_os_str().len() > SOCKET_PATH_MAX {
        return Err(Error::new(
            Kind::Unsupported,
            format!("socket path {} is longer than {SOCKET_PATH_MAX} bytes", path.display()),
        ));
    }
    Ok(path)
}

/// The point a socket path of ours carries.
pub(super) fn socket_point(path: &str) -> Option<PointId> {
    let file = Path::new(path).file_name()?.to_str()?;
    file.strip_prefix("vmb-")?.strip_suffix(".sock")?.parse().ok()
}

/// The scratch file of one disk of a run.
pub(super) fn scratch_path(directory: &Path, point: PointId, disk: &str) -> PathBuf {
    directory.join(format!("vmb-{point}-{disk}.scratch"))
}

/// The state directory of a running domain below the driver's (`virDomainDefGetShortName`).
pub(super) fn domain_dir(qemu_dir: &Path, id: u32, name: &str) -> PathBuf {
    let short: String = name.chars().take(SHORT_NAME_CHARS).collect();
    qemu_dir.join(format!("domain-{id}-{short}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_carries_its_point() {
        let point = PointId([1; 16]);
        let path = socket_path(Path::new("/var/lib/libvirt/qemu/domain-12-x"), point).unwrap();
        assert_eq!(socket_point(path.to_str().unwrap()), Some(point));
        assert_eq!(socket_point("/tmp/other.sock"), None);
        assert!(socket_path(Path::new(&"/x".repeat(60)), point).is_err());
    }
}
