//! A domain without a guest system, and a repository of nothing but known points.

use std::collections::HashSet;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use vmbackup::block::{BlockSource, ExtentKind, read_all};
use vmbackup::control::Control;
use vmbackup::error::Result;
use vmbackup::journal::{Journals, Mode};
use vmbackup::platform::libvirt::{CheckpointMetadata, Libvirt, LibvirtOptions};
use vmbackup::platform::{
    Asked, BackupMode, KnownPoint, Platform, Quiesce, RecoverRequest, SnapshotRequest, VmSnapshot,
};
use vmbackup::vm::{ArtifactKind, PointId, ReadMode, Uuid};

use crate::support::{Outcome, TestEnv, libvirt};

/// The id of the repository the tests pretend to have.
pub(crate) const REPOSITORY: &str = "00c0ffee00000000";

/// A defined domain, gone with its guard.
pub(crate) struct Bare<'env> {
    pub(crate) env: &'env TestEnv,
    pub(crate) name: String,
    pub(crate) uuid: Uuid,
}

impl<'env> Bare<'env> {
    /// Defines a domain with the given disk elements (`@DIR@` is the test's directory) and
    /// starts it paused.
    pub(crate) fn start(env: &'env TestEnv, disks: &str) -> Self {
        let bare = Self::define(env, "", disks, "");
        bare.virsh(&["start", "--paused", &bare.name]).ok();
        bare
    }

    /// Defines a domain; `more` are further devices.
    pub(crate) fn define(env: &'env TestEnv, suffix: &str, disks: &str, more: &str) -> Self {
        libvirt::ensure_libvirt(env);
        let name = env.name(suffix);
        let uuid = Uuid::new_v4();
        let disks = disks.replace("@DIR@", &env.dir().to_string_lossy());
        let xml = format!(
            "<domain type='qemu'><name>{name}</name><uuid>{uuid}</uuid>\
             <memory unit='MiB'>32</memory><vcpu>1</vcpu>\
             <os><type arch='x86_64' machine='pc'>hvm</type></os>\
             <devices>{disks}{more}<memballoon model='none'/></devices></domain>"
        );
        let file = env.path(&format!("{name}.xml"));
        std::fs::write(&file, xml).expect("own directory");
        let bare = Self { env, name, uuid };
        bare.virsh(&["define", &file.to_string_lossy()]).ok();
        bare
    }

    pub(crate) fn virsh(&self, args: &[&str]) -> Outcome {
        libvirt::virsh(self.env, args)
    }

    /// Runs a `qemu-io` command on a disk through its device, as the guest would.
    pub(crate) fn io(&self, disk: usize, command: &str) {
        let line = format!(
            "qemu-io -d /machine/peripheral/virtio-disk{disk}/virtio-backend \"{command}\""
        );
        let outcome = self.virsh(&["qemu-monitor-command", "--hmp", &self.name, &line]).ok();
        assert!(!outcome.stdout.contains("rror"), "{outcome:?}");
    }

    /// Has QEMU do something to a bitmap of an image behind libvirt's back (`block-dirty-bitmap-remove`).
    pub(crate) fn change_bitmap(&self, command: &str, image: &str, name: &str) {
        let monitor = |command: serde_json::Value| {
            let args = ["qemu-monitor-command", &self.name, &command.to_string()];
            let said = self.virsh(&args).json();
            assert!(said["error"].is_null(), "{said}");
            said["return"].clone()
        };
        let nodes = monitor(serde_json::json!({ "execute": "query-named-block-nodes" }));
        let of_image = |node: &&serde_json::Value| {
            node["drv"] == "qcow2"
                && node["file"].as_str().is_some_and(|file| file.ends_with(image))
        };
        let node = nodes.as_array().expect("nodes").iter().find(of_image).expect("an open image");
        let mut arguments = serde_json::json!({ "node": node["node-name"], "name": name });
        if command == "block-dirty-bitmap-add" {
            arguments["persistent"] = true.into();
        }
        monitor(serde_json::json!({ "execute": command, "arguments": arguments }));
    }

    /// Whether a backup job is active.
    pub(crate) fn has_backup_job(&self) -> bool {
        libvirt::has_backup_job(self.env, &self.name)
    }

    /// Names of the checkpoints libvirt has metadata of.
    pub(crate) fn checkpoints(&self) -> Vec<String> {
        libvirt::checkpoints(self.env, &self.name)
    }

    /// The sockets of exports of ours that lie in the running domain's directory.
    pub(crate) fn sockets(&self) -> Vec<PathBuf> {
        libvirt::sockets(self.env, &self.name)
    }

    /// The bitmaps QEMU has on the named disk's node, asked of QEMU itself.
    pub(crate) fn bitmaps(&self) -> Vec<String> {
        libvirt::bitmaps(self.env, &self.name)
    }

    /// How many VMs have a journal.
    pub(crate) fn journals(&self) -> usize {
        std::fs::read_dir(self.env.path("state/journal")).expect("there").count()
    }

    pub(crate) fn options(&self) -> LibvirtOptions {
        LibvirtOptions {
            uri: Some(libvirt::URI.into()),
            domain: self.name.clone(),
            runtime_dir: self.env.path("run"),
            journals: Journals::new(self.env.path("state/journal"), None),
            metadata: CheckpointMetadata::Remove,
        }
    }

    pub(crate) async fn platform(&self) -> Libvirt {
        Libvirt::open(self.options()).await.expect("the domain is found")
    }

    /// The name of a point's checkpoint.
    pub(crate) fn checkpoint(&self, point: PointId) -> String {
        format!("vmb-{}-{}-{point}", &REPOSITORY[..8], self.uuid)
    }
}

impl Drop for Bare<'_> {
    fn drop(&mut self) {
        libvirt::remove_domain(self.env, &self.name);
    }
}

/// A qcow2 disk element for `vd<letter>`; makes the image.
pub(crate) fn qcow2(env: &TestEnv, letter: char, size: &str) -> String {
    image(env, letter, "qcow2", size)
}

/// A qcow2 disk element for `vda`, whose data is in vda.raw: a raw image by itself.
pub(crate) fn data_file(env: &TestEnv, size: &str) -> String {
    let (image, data) = (env.path("vda.qcow2"), env.path("vda.raw"));
    let options = format!("data_file={},data_file_raw=on", data.display());
    let image = image.to_string_lossy();
    env.run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &options, &image, size]).ok();
    // Before 10.10 libvirt knows of no data files, and gives this one to nobody.
    std::fs::set_permissions(&data, Permissions::from_mode(0o666)).expect("own file");
    format!(
        "<disk type='file' device='disk'><driver name='qemu' type='qcow2' discard='unmap'/>\
         <source file='{image}'/><target dev='vda' bus='virtio'/></disk>"
    )
}

/// A disk element of the given format; makes the image.
pub(crate) fn image(env: &TestEnv, letter: char, format: &str, size: &str) -> String {
    let path: PathBuf = env.path(&format!("vd{letter}.{format}"));
    env.run("qemu-img", &["create", "-q", "-f", format, &path.to_string_lossy(), size]).ok();
    format!(
        "<disk type='file' device='disk'><driver name='qemu' type='{format}' discard='unmap'/>\
         <source file='{}'/><target dev='vd{letter}' bus='virtio'/></disk>",
        path.display()
    )
}

/// A request of a first full backup of a point called `id`.
pub(crate) fn request(id: u8) -> SnapshotRequest {
    SnapshotRequest {
        mode: BackupMode::Auto,
        point: point(id),
        repository: REPOSITORY.to_owned(),
        known_points: Vec::new(),
        point_ids: HashSet::new(),
        repository_has_key: true,
        quiesce: Quiesce::Auto,
        freeze_budget: Duration::from_secs(10),
        scratch_dir: None,
        exclude_disks: Vec::new(),
        insecure_tcp: false,
        guest_first: false,
        guardian: None,
        clock: std::sync::Arc::new(vmbackup::clock::SystemClock),
    }
}

/// A recognisable point id, different in every test: scratch files of all share a directory.
pub(crate) fn point(id: u8) -> PointId {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    (std::thread::current().name(), std::process::id()).hash(&mut hasher);
    let mut bytes = [id; 16];
    bytes[..8].copy_from_slice(&hasher.finish().to_be_bytes());
    PointId(bytes)
}

/// What the repository would know of a snapshot after its commit.
pub(crate) fn known(point: PointId, snapshot: &dyn VmSnapshot) -> KnownPoint {
    let disks = snapshot.disks().iter().map(|disk| &disk.description);
    let xml = snapshot.artifacts().iter().find(|a| a.kind == ArtifactKind::CheckpointXml);
    KnownPoint {
        id: point,
        disks: disks.cloned().collect(),
        checkpoint_xml: xml.map(|a| String::from_utf8(a.bytes.clone()).expect("XML")),
    }
}

/// Takes a backup: reads every disk whole through its source, checks, commits.
pub(crate) async fn backup(
    bare: &Bare<'_>,
    request: &SnapshotRequest,
) -> Result<(KnownPoint, Vec<Taken>)> {
    let platform = bare.platform().await;
    let mut snapshot = platform.open_snapshot(request, &Control::new()).await?;
    let taken = take(&mut *snapshot).await;
    snapshot.still_valid().await?;
    let known = known(request.point, &*snapshot);
    snapshot.commit().await?;
    Ok((known, taken))
}

/// Recovers the domain, for a repository of which `snapshot` is a request. What was found, in lines.
pub(crate) async fn recover(bare: &Bare<'_>, snapshot: SnapshotRequest) -> String {
    let request = RecoverRequest { snapshot, repository: Asked::Yes, mode: Mode::Undo };
    let platform = bare.platform().await;
    let items = platform.recover(&request, &Control::new()).await.expect("recovers");
    items.into_iter().map(|item| item.what + "\n").collect()
}

/// One disk as a backup saw it.
#[derive(Debug)]
pub(crate) struct Taken {
    pub(crate) read: ReadMode,
    pub(crate) bytes: Vec<u8>,
    /// Ranges that are not Unchanged.
    pub(crate) changed: Vec<(u64, u64)>,
}

/// Reads every disk of a snapshot.
pub(crate) async fn take(snapshot: &mut dyn VmSnapshot) -> Vec<Taken> {
    let mut taken = Vec::new();
    for index in 0..snapshot.disks().len() {
        let source: Arc<dyn BlockSource> = snapshot.source(index).await.expect("opens");
        let range = source.geometry().range();
        let mut changed: Vec<(u64, u64)> = Vec::new();
        let mut at = 0;
        while at < range.end() {
            let rest = vmbackup::block::ByteRange::between(at, range.end());
            let map = source.extents(rest).await.expect("extents");
            for extent in map.iter().filter(|extent| extent.kind != ExtentKind::Unchanged) {
                match changed.last_mut() {
                    Some(last) if last.1 == extent.range.offset() => last.1 = extent.range.end(),
                    _ => changed.push((extent.range.offset(), extent.range.end())),
                }
            }
            at = map.end();
        }
        let bytes = read_all(&*source, 1 << 30).await.expect("reads");
        let read = snapshot.disks()[index].read.clone();
        taken.push(Taken { read, bytes, changed });
    }
    taken
}
