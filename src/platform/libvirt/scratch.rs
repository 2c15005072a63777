//! Where scratch and sockets go, and the watch that gives the backup up before the guest suffers.
//!
//! While a pull job runs, QEMU copies what the guest is about to overwrite into scratch files. A
//! full scratch file system does not break the snapshot: it fails the *guest's* write, and the
//! default `werror=enospc` stops the guest (seen on libvirt 11.3, QEMU 10.0). libvirt has no way to
//! break the snapshot instead, so the watch ends the job while there is room left.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::connection::{DomainHandle, Host};
use super::ffi::{DomainEvent, Events};
use super::job;
use super::names::domain_dir;
use super::survey::Survey;
use crate::error::{Error, Kind, Result};
use crate::platform::SnapshotRequest;
use crate::vm::PointId;

/// How often free space is looked at: a disk written at 1 GB/s fills the reserve in a second.
const POLL: Duration = Duration::from_millis(250);

/// Space that must stay free: a tenth of the file system, within these bounds.
const RESERVE_BYTES_MIN: u64 = 1 << 20;
const RESERVE_BYTES_MAX: u64 = 1 << 30;

/// The directories of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Places {
    /// Scratch files.
    pub(super) scratch: PathBuf,
    /// The NBD socket.
    pub(super) socket: PathBuf,
}

impl Places {
    /// Chooses them: scratch as asked for or in the driver's state directory, which QEMU owns on
    /// every distribution; the socket in the domain's own directory below it, where AppArmor and
    /// SELinux let QEMU create it. A session daemon's QEMU is the user's own: `runtime_dir`.
    pub(super) fn choose(
        host: &Host,
        survey: &Survey,
        name: &str,
        request: &SnapshotRequest,
        runtime_dir: &Path,
    ) -> Self {
        let qemu_dir = host.qemu_dir();
        let scratch = request.scratch_dir.clone().or_else(|| qemu_dir.clone());
        let socket = match (&qemu_dir, survey.id) {
            (Some(dir), Some(id)) => domain_dir(dir, id, name),
            (Some(dir), None) => dir.clone(),
            (None, _) => runtime_dir.to_owned(),
        };
        Self { scratch: scratch.unwrap_or_else(|| runtime_dir.to_owned()), socket }
    }
}

/// Size and free bytes of the file system a directory is on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Space {
    pub(super) free_bytes: u64,
    size_bytes: u64,
}

impl Space {
    /// Asks the file system.
    pub(super) fn of(directory: &Path) -> Result<Self> {
        let stat = rustix::fs::statvfs(directory).map_err(|errno| {
            Error::io(format!("cannot use scratch directory {}", directory.display()), errno.into())
                .hint("name a local directory that QEMU may write to with --scratch-dir")
        })?;
        Ok(Self {
            free_bytes: stat.f_bavail.saturating_mul(stat.f_frsize),
            size_bytes: stat.f_blocks.saturating_mul(stat.f_frsize),
        })
    }

    /// Whether the reserve is touched.
    pub(super) fn is_low(self) -> bool {
        self.free_bytes < (self.size_bytes / 10).clamp(RESERVE_BYTES_MIN, RESERVE_BYTES_MAX)
    }
}

/// The error of a scratch directory that has no room.
pub(super) fn no_room(directory: &Path) -> Error {
    Error::new(
        Kind::NoSpace,
        format!("scratch directory {} is almost full; the guest comes first", directory.display()),
    )
    .hint("free space there, or name a larger local directory with --scratch-dir")
}

/// Whether a directory is on a network file system, where scratch stalls the guest with the
/// network (magic numbers of `linux/magic.h`: NFS, SMB2, CIFS, Ceph).
pub(super) fn is_remote(directory: &Path) -> bool {
    const REMOTE: [i64; 4] = [0x6969, 0xfe53_4d42, 0xff53_4d42, 0x00c3_6400];
    rustix::fs::statfs(directory).is_ok_and(|stat| REMOTE.contains(&stat.f_type))
}

/// Looks after a job until dropped.
pub(super) struct Watch {
    lost: Arc<Mutex<Option<Error>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Watch {
    /// Watches the job of `point`; `local_scratch` is the directory when it is on this machine.
    pub(super) fn start(
        domain: DomainHandle,
        events: Events,
        point: PointId,
        local_scratch: Option<PathBuf>,
    ) -> Self {
        let lost = Arc::new(Mutex::new(None));
        let task = tokio::spawn(watch(domain, events, point, local_scratch, Arc::clone(&lost)));
        Self { lost, task }
    }

    /// Why the job was lost, if it was; said once.
    pub(super) fn take_lost(&self) -> Option<Error> {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

async fn watch(
    domain: DomainHandle,
    mut events: Events,
    point: PointId,
    local_scratch: Option<PathBuf>,
    lost: Arc<Mutex<Option<Error>>>,
) {
    let mut tick = tokio::time::interval(POLL);
    let error = loop {
        tokio::select! {
            event = events.receiver.recv() => match event {
                None => return,
                Some(DomainEvent::JobCompleted(status)) => {
                    // It may be the end of a job before ours.
                    let ours = job::active(&domain).await;
                    if !matches!(&ours, Ok(Some(active)) if active.point == Some(point)) {
                        break ended(&domain, status.error);
                    }
                }
            },
            _ = tick.tick() => if let Some(directory) = &local_scratch
                && Space::of(directory).is_ok_and(Space::is_low)
            {
                if let Err(error) = job::end(&domain).await {
                    tracing::error!(?error, "scratch is almost full and the job does not end");
                }
                break no_room(directory);
            },
        }
    };
    *lost.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
}

/// The error of a job that ended before we ended it.
pub(super) fn ended(domain: &DomainHandle, reason: Option<String>) -> Error {
    let name = &domain.name;
    let why = reason.unwrap_or_else(|| "the domain stopped, or somebody ended the job".into());
    Error::new(Kind::SnapshotLost, format!("the backup job of domain '{name}' ended early: {why}"))
        .hint("nothing of it is kept; start the backup again")
}
