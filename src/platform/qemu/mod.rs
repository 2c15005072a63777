//! A QEMU with a monitor socket and no libvirt.
//!
//! One transaction gives the instant of all disks: it adds a bitmap to each (the checkpoint),
//! merges what changed since the base into a temporary one, and starts a `blockdev-backup` job
//! with `sync=none` per disk, which keeps what the guest overwrites in a raw scratch file. A
//! `snapshot-access` node on the job's filter reads the instant; QEMU's NBD server offers it on a
//! private unix socket.
//!
//! ```text
//!  guest ──► filter (job) ──► disk node [bitmaps]        writes: old content to scratch first
//!               │   └───────► scratch node ──► work directory/0.raw
//!               └── snapshot-access node ──► NBD export ──► work directory/nbd.sock ──► us
//! ```
//!
//! This order fails safe: when a job ends, whoever ended it, its snapshot-access node fails every
//! read (QEMU 7.2 and 10.0 do), and `still_valid` asks QEMU again after the last read.
//!
//! A monitor serves one client, so this holds it from the first question until it is dropped. A
//! run that dies leaves its jobs and exports in QEMU; they carry our names and the next run
//! removes them first (`reconcile`), with what the journal says. The caller keeps two runs on one
//! VM apart (`job` has a lock per VM): a leftover cannot be told from a run of somebody else's.
//!
//! A job that cannot keep old content fails the guest's write: QEMU 10.1 is the first whose jobs
//! can be told otherwise, which they always are where they can. Before that there are two ways to
//! keep a full scratch from hurting the guest. Scratch is watched, and the jobs are ended while
//! there is room (`watch`): always, and as good as the watch is fast. With `guest_first` the
//! guest's writes never fail for it and never wait longer than some seconds, whatever happens:
//! filters of our own take the place of the jobs, and the instant breaks instead (`filter`). What
//! that costs: a transaction cannot move devices, so the guest is paused for a moment where it has
//! several disks (`pause`), and what a killed run leaves lies between the guest and its disks until
//! the next command, or `recover`, takes it out. Therefore it is not the default.
//!
//! ```text
//!  guest ──► filter (ours) ──► disk node [bitmaps]       on-cbw-error=break-snapshot
//!               │   └────────► scratch node ──► work directory/0.raw
//!               └── snapshot-access node ──► NBD export ──► … as above
//! ```
//!
//! A scratch file system that hangs holds up whatever QEMU takes down: it is left alone then, but
//! for the jobs of one that is almost full (`teardown`).
//!
//! A filter that broke goes on, says nothing, and fails every read of the instant: so the instant
//! of every disk is read once more by `still_valid`, whichever way it was kept. One that is not
//! below its device any more would serve live data: that is asked for, too.
//!
//! With `guest_first` scratch is given back for what is stored ([`reclaim`]), as far as whoever reads
//! the instant says that it is done with it. Not without, although QEMU would (seen on 10.0 with jobs,
//! too): an instant that is read once only is worse where a base turns out to be damaged.
//!
//! Deliberately not here: QEMU before 7.0 (no `snapshot-access`), VMs on other hosts (the export is
//! a local socket). Bitmaps of lower layers of a backing chain are not merged: a disk that got an
//! overlay since its base is read in full.

mod agent;
mod checkpoint;
mod disks;
mod error;
mod filter;
mod graph;
mod instant;
mod migration;
mod names;
mod old_access;
mod open;
mod pause;
mod plan;
mod quiesce;
mod reclaim;
mod reconcile;
mod snapshot;
mod teardown;
mod watch;
mod work_dir;

use std::path::PathBuf;

use async_trait::async_trait;
use qmp::{Address, Features, Monitor};

pub use self::agent::AgentChannel;
use self::checkpoint::Base;
use self::disks::Disks;
use self::error::failed;
use self::migration::Settled;
pub use self::pause::PausedGuest;
use super::{
    BackupMode, Platform, RecoverRequest, SnapshotPlan, SnapshotRequest, VmSnapshot, told,
};
use crate::control::Control;
use crate::error::{Error, Kind, Result};
use crate::image::bitmap::BitmapNames;
use crate::journal::{Item, Journals, Recovery};
use crate::vm::{FullReason, Uuid, VmIdentity};

/// The registry name of this platform.
pub const NAME: &str = "qemu";

/// Where the host's name is.
const HOSTNAME_FILE: &str = "/proc/sys/kernel/hostname";
/// Where scratch goes if nobody says: on disk, local, and where any QEMU may write.
const SCRATCH_DIR: &str = "/var/tmp";
/// Says how a VM gets a UUID; QEMU's own is all zero if it was given none.
const NAME_CONTEXT: &str = "vmbackup 2026-11 uuid of a VM known by its name";

/// How to reach a QEMU.
#[derive(Clone, Debug)]
pub struct QemuOptions {
    /// Its monitor socket.
    pub monitor: PathBuf,
    /// The host's end of its guest agent channel.
    pub agent: Option<PathBuf>,
    /// What to call it, if not by its own `-name`.
    pub name: Option<String>,
    /// Where it is written down what a run has to undo.
    pub journals: Journals,
}

/// One running QEMU.
pub struct Qemu {
    monitor: Monitor,
    features: Features,
    options: QemuOptions,
    identity: VmIdentity,
}

impl Qemu {
    /// Connects to the monitor and holds it.
    ///
    /// [`Kind::Busy`] when another client holds it; [`Kind::Usage`] when nothing identifies the
    /// VM. Cancel-safe.
    pub async fn connect(options: QemuOptions) -> Result<Self> {
        let path = options.monitor.display();
        let what = format!("cannot use the QEMU monitor {path}");
        let address = Address::Unix(options.monitor.clone());
        let monitor = Monitor::connect(&address, qmp::Options::default())
            .await
            .map_err(failed(what.clone()))?;
        let schema = monitor.query_schema().await.map_err(failed(what.clone()))?;
        let uuid = monitor.query_uuid().await.map_err(failed(what.clone()))?;
        let name = monitor.query_name().await.map_err(failed(what))?;
        let identity = identity(&uuid, name, &options)?;
        Ok(Self { monitor, features: schema.features(), options, identity })
    }

    /// What a run begins with: the VM as it is, and what becomes of each disk.
    async fn survey(&self, request: &SnapshotRequest) -> Result<Survey> {
        let vm = &self.identity.name;
        let ask = |what: &str| failed(format!("cannot ask VM '{vm}' for its {what}"));
        let devices = self.monitor.query_block().await.map_err(ask("disks"))?;
        let nodes = self.monitor.query_named_block_nodes().await.map_err(ask("block nodes"))?;
        let mut disks = disks::sort(vm, devices, request)?;
        for disk in &mut disks.protected {
            let Some(qdev) = &disk.qdev else { continue };
            // Devices without the property cannot be shared.
            let shared = self.monitor.qom_get(qdev, "share-rw").await;
            disk.shareable = shared.is_ok_and(|value| value == true);
        }
        let names = BitmapNames::new(&request.repository, self.identity.uuid)?;
        let bases =
            disks.protected.iter().map(|d| checkpoint::base(d, &nodes, &names, request)).collect();
        Ok(Survey { disks, names, bases })
    }

    /// Why no instant can be taken of this VM now, whatever the disks are; else what is known of
    /// its migrations.
    async fn check_state(&self) -> Result<Settled> {
        let vm = &self.identity.name;
        if !self.features.snapshot_access || !self.features.backup_filter_node_name {
            let (major, minor, _) = self.monitor.greeting().version.number;
            return Err(Error::new(
                Kind::Unsupported,
                format!("the QEMU of VM '{vm}' ({major}.{minor}) cannot export an instant"),
            )
            .hint("QEMU 7.2 or newer is needed"));
        }
        Settled::ask(&self.monitor, vm).await
    }
}

/// Where the work directories of runs are.
fn scratch_base(request: &SnapshotRequest) -> PathBuf {
    request.scratch_dir.clone().unwrap_or_else(|| PathBuf::from(SCRATCH_DIR))
}

/// The VM as it is.
struct Survey {
    disks: Disks,
    names: BitmapNames,
    /// By protected disk.
    bases: Vec<Result<Base, FullReason>>,
}

impl Survey {
    /// `NoBase` if an incremental was asked for and no disk has one.
    fn check_mode(&self, mode: BackupMode) -> Result<()> {
        if mode != BackupMode::Incremental || self.bases.iter().any(Result::is_ok) {
            return Ok(());
        }
        let why = self.disks.protected.iter().zip(&self.bases).filter_map(|(disk, base)| {
            base.as_ref().err().map(|reason| format!("{}: {}", disk.name, reason.describe()))
        });
        let why: Vec<_> = why.collect();
        Err(Error::new(
            Kind::NoBase,
            format!("no disk can be read incrementally ({})", why.join("; ")),
        )
        .hint("take a full backup, or use 'backup', which decides by itself"))
    }
}

fn identity(uuid: &str, name: Option<String>, options: &QemuOptions) -> Result<VmIdentity> {
    let uuid = uuid.parse::<Uuid>().map_err(|error| {
        Error::new(Kind::Protocol, format!("QEMU says its UUID is '{uuid}'")).source(error)
    })?;
    // `-name guest=foo,…` comes back as the name alone.
    let name = options.name.clone().or(name).filter(|name| !name.is_empty());
    let (uuid, name) = match (uuid.is_nil(), name) {
        (false, name) => (uuid, name.unwrap_or_else(|| uuid.to_string())),
        (true, Some(name)) => (uuid_of_name(&name), name),
        (true, None) => {
            let what = format!("nothing identifies the VM at {}", options.monitor.display());
            return Err(Error::new(Kind::Usage, what)
                .hint("start QEMU with -uuid (or -name), or give --name"));
        }
    };
    let host = std::fs::read_to_string(HOSTNAME_FILE)
        .map_err(|error| Error::io("cannot read the host's name", error))?;
    Ok(VmIdentity { uuid, name, host: host.trim().to_owned(), platform: NAME.into() })
}

/// A UUID for a VM that has none: the same for the same name, different from any random one
/// (version 8, RFC 9562).
fn uuid_of_name(name: &str) -> Uuid {
    let hash = blake3::derive_key(NAME_CONTEXT, name.as_bytes());
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hash[..16]);
    bytes[6] = (bytes[6] & 0x0f) | 0x80;
    bytes[8] = (bytes[8] & 0x3f) | 0x80;
    Uuid::from_bytes(bytes)
}

#[async_trait]
impl Platform for Qemu {
    async fn identify(&self) -> Result<VmIdentity> {
        Ok(self.identity.clone())
    }

    async fn plan(&self, request: &SnapshotRequest) -> Result<SnapshotPlan> {
        plan::plan(self, request).await
    }

    async fn recover(&self, request: &RecoverRequest, control: &Control) -> Result<Vec<Item>> {
        control.set_phase("looking at the VM");
        let mut journal = self.options.journals.open(self.identity.uuid)?;
        let mut recovery = Recovery::new(request.mode);
        let found = (&mut recovery, control);
        let done = reconcile::reconcile(self, &mut journal, request, found).await;
        told(done, recovery, control)
    }

    async fn open_snapshot(
        &self,
        request: &SnapshotRequest,
        control: &Control,
    ) -> Result<Box<dyn VmSnapshot>> {
        open::open(self, request, control).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(name: Option<&str>) -> QemuOptions {
        QemuOptions {
            monitor: "/run/vm.sock".into(),
            agent: None,
            name: name.map(str::to_owned),
            journals: Journals::new("/nonexistent".into(), None),
        }
    }

    #[test]
    fn a_vm_is_its_uuid_else_its_name_else_nobody() {
        let given = "c0ffee00-0000-4000-8000-000000000001";
        let nil = "00000000-0000-0000-0000-000000000000";
        let vm = identity(given, Some("foo".into()), &options(None)).unwrap();
        assert_eq!((vm.uuid.to_string().as_str(), vm.name.as_str()), (given, "foo"));
        assert_eq!(identity(given, None, &options(None)).unwrap().name, given);
        let named = identity(nil, Some("foo".into()), &options(None)).unwrap();
        assert_eq!(identity(nil, None, &options(Some("foo"))).unwrap().uuid, named.uuid);
        assert_ne!(identity(nil, None, &options(Some("bar"))).unwrap().uuid, named.uuid);
        assert_eq!(identity(nil, None, &options(None)).unwrap_err().kind(), Kind::Usage);
    }
}
