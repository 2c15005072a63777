//! The names we give to things on a host, and how they are told from everybody else's.
//!
//! Pure. A checkpoint (and the bitmap of the same name on each disk) is called
//! `vmb-<8 hex of the repository id>-<domain uuid>-<point>`: each repository has its own chain on a
//! domain and touches only its own. Sockets and scratch files carry the point alone.

use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};
use crate::vm::{PointId, Uuid};

/// Longest path of a unix socket (`sun_path`, unix(7)), without the final NUL.
const SOCKET_PATH_MAX: usize = 107;

/// Characters of the domain name in its state directory (`VIR_DOMAIN_SHORT_NAME_MAX`).
const SHORT_NAME_CHARS: usize = 20;

/// The prefix of all checkpoints of one repository on one domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chain {
    prefix: String,
}

impl Chain {
    /// The chain of `repository` (its id in hex) on `domain`.
    pub(super) fn new(repository: &str, domain: Uuid) -> Result<Self> {
        let short = repository.get(..8).filter(|s| s.bytes().all(|b| b.is_ascii_hexdigit()));
        let short = short.ok_or_else(|| {
            Error::new(Kind::Internal, format!("repository id '{repository}' is not hexadecimal"))
        })?;
        Ok(Self { prefix: format!("vmb-{}-{domain}-", short.to_ascii_lowercase()) })
    }

    /// The checkpoint of a point.
    pub(super) fn checkpoint(&self, point: PointId) -> String {
        format!("{}{point}", self.prefix)
    }

    /// The point a name means, if the name is of this chain.
    pub(super) fn point(&self, name: &str) -> Option<PointId> {
        name.strip_prefix(&self.prefix)?.parse().ok()
    }
}

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
    fn a_chain_knows_its_own_and_nobody_elses() {
        let domain = Uuid::from_u128(7);
        let chain = Chain::new("ABCDEF0123456789", domain).unwrap();
        let point = PointId([0x5a; 16]);
        let name = chain.checkpoint(point);
        assert_eq!(
            name,
            "vmb-abcdef01-00000000-0000-0000-0000-000000000007-5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a"
        );
        assert_eq!(chain.point(&name), Some(point));
        assert_eq!(Chain::new("abcdef02", domain).unwrap().point(&name), None);
        assert_eq!(Chain::new("abcdef01", Uuid::from_u128(8)).unwrap().point(&name), None);
        assert_eq!(chain.point("virtnbdbackup.0"), None);
        assert!(Chain::new("abc", domain).is_err());
    }

    #[test]
    fn a_socket_carries_its_point() {
        let point = PointId([1; 16]);
        let path = socket_path(Path::new("/var/lib/libvirt/qemu/domain-12-x"), point).unwrap();
        assert_eq!(socket_point(path.to_str().unwrap()), Some(point));
        assert_eq!(socket_point("/tmp/other.sock"), None);
        assert!(socket_path(Path::new(&"/x".repeat(60)), point).is_err());
    }
}
