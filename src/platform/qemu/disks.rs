//! Which disks a QEMU has, and which of them are to be protected. Pure.
//!
//! Writable disks of devices that cannot be removed are protected, a writable firmware flash
//! (UEFI variables) among them; CD-ROM, floppy and read-only ones are recorded as left out.

use qmp::block::{Device, Node};

use super::names::sanitised;
use crate::error::{Error, Kind, Result};
use crate::platform::{EXCLUDED_BY_OPTION, SnapshotRequest, nothing_to_read};
use crate::vm::{DiskDescription, DiskLayer, ExcludedDisk};

/// A disk to be protected.
#[derive(Clone, Debug)]
pub(super) struct Disk {
    /// Its name: device id, else drive id, else node name.
    pub(super) name: String,
    /// QOM path of the device, if it has one.
    pub(super) qdev: Option<String>,
    /// The device's top node: what the guest sees, where bitmaps live.
    pub(super) node: Node,
    /// Whether other writers may share it, past the bitmaps of this QEMU.
    pub(super) shareable: bool,
}

impl Disk {
    /// Virtual size.
    pub(super) fn size_bytes(&self) -> u64 {
        self.node.image.virtual_size
    }

    /// How it is described in the manifest.
    pub(super) fn description(&self) -> DiskDescription {
        let layer = if self.is_decrypted() { DiskLayer::DecryptedLuks } else { DiskLayer::Plain };
        DiskDescription {
            name: self.name.clone(),
            size_bytes: self.size_bytes(),
            format: self.node.image.format.clone(),
            origin: self.node.file.clone(),
            layer,
            file: None,
        }
    }

    /// Whether QEMU decrypts it for the guest.
    fn is_decrypted(&self) -> bool {
        self.node.image.encrypted || self.node.drv == "luks"
    }

    /// Whether its image keeps bitmaps when QEMU ends: qcow2 of version 3 ("Cannot store dirty
    /// bitmaps in qcow2 v2", block/qcow2-bitmap.c).
    pub(super) fn keeps_bitmaps(&self) -> bool {
        let specific = self.node.image.format_specific.as_ref();
        let compat = specific.and_then(|s| s.pointer("/data/compat")?.as_str());
        self.node.drv == "qcow2" && compat != Some("0.10")
    }
}

/// All disks of a VM.
#[derive(Clone, Debug, Default)]
pub(super) struct Disks {
    /// To be protected, in QEMU's order.
    pub(super) protected: Vec<Disk>,
    /// Left out, and why.
    pub(super) excluded: Vec<ExcludedDisk>,
}

/// Sorts the devices of a VM. Fails where a name is asked for that no disk has, or a disk cannot
/// be read safely.
pub(super) fn sort(vm: &str, devices: Vec<Device>, request: &SnapshotRequest) -> Result<Disks> {
    let mut disks = Disks::default();
    let mut names = Vec::new();
    for device in devices {
        let Device { device, qdev, removable, inserted, .. } = device;
        // A drive without device is not the guest's.
        if qdev.is_none() && device.is_empty() {
            continue;
        }
        let Some(node) = inserted else { continue };
        let name = name_of(&device, qdev.as_deref(), &node);
        if names.contains(&name) {
            return Err(Error::new(Kind::Ambiguous, format!("two disks are named {name}"))
                .hint("give the devices ids of their own (-device …,id=NAME)"));
        }
        names.push(name.clone());
        let twin = disks.protected.iter().find(|disk| disk.node.name() == node.name());
        let reason = if request.exclude_disks.contains(&name) {
            Some(EXCLUDED_BY_OPTION.to_owned())
        } else if removable {
            Some("removable medium".to_owned())
        } else if node.ro {
            Some("read-only".to_owned())
        } else {
            twin.map(|twin| format!("the same node as {}", twin.name))
        };
        match reason {
            Some(reason) => disks.excluded.push(ExcludedDisk { name, reason }),
            None => disks.protected.push(Disk { name, qdev, node, shareable: false }),
        }
    }
    if let Some(unknown) = request.exclude_disks.iter().find(|name| !names.contains(name)) {
        let message = format!("no disk is named '{unknown}'; there are: {}", names.join(", "));
        return Err(Error::new(Kind::Usage, message));
    }
    if disks.protected.is_empty() {
        return Err(nothing_to_read(vm, &disks.excluded));
    }
    check(&disks.protected, request)?;
    Ok(disks)
}

fn check(protected: &[Disk], request: &SnapshotRequest) -> Result<()> {
    for disk in protected {
        if disk.node.active == Some(false) {
            return Err(Error::new(
                Kind::Busy,
                format!("disk {} is inactive: the VM was migrated away", disk.name),
            ));
        }
        if disk.is_decrypted() && !request.repository_has_key {
            return Err(Error::new(
                Kind::Unsupported,
                format!("disk {} is encrypted and the repository has no key", disk.name),
            )
            .hint("add a key to the repository (repo key add), or leave the disk out by name"));
        }
    }
    Ok(())
}

/// The name a person gave, as stable as QEMU has one. Older QEMUs give the id alone, newer ones
/// the QOM path of the device or of its virtio backend (`/machine/peripheral/ID/virtio-backend`).
fn name_of(device: &str, qdev: Option<&str>, node: &Node) -> String {
    let id = qdev.and_then(|path| match path.strip_prefix("/machine/peripheral/") {
        Some(rest) => rest.split('/').next(),
        None => (!path.contains('/')).then_some(path),
    });
    let drive = (!device.is_empty()).then_some(device);
    let node = Some(node.name()).filter(|name| !name.starts_with('#') && !name.is_empty());
    let last = qdev.unwrap_or("disk").trim_start_matches("/machine/");
    sanitised(id.or(drive).or(node).unwrap_or(last))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::platform::{BackupMode, Quiesce};
    use crate::vm::PointId;
    use serde_json::{Value, json};

    pub(in crate::platform::qemu) fn request() -> SnapshotRequest {
        SnapshotRequest {
            mode: BackupMode::Auto,
            point: PointId([9; 16]),
            repository: "0123456789abcdef".into(),
            known_points: Vec::new(),
            point_ids: std::collections::HashSet::new(),
            repository_has_key: false,
            quiesce: Quiesce::Auto,
            freeze_budget: std::time::Duration::from_secs(10),
            scratch_dir: None,
            exclude_disks: Vec::new(),
            insecure_tcp: false,
            guest_first: false,
            guardian: None,
            clock: std::sync::Arc::new(crate::clock::SystemClock),
        }
    }

    pub(in crate::platform::qemu) fn device(qdev: &str, node: &str, more: Value) -> Device {
        let mut inserted = json!({
            "node-name": node, "drv": "qcow2", "ro": false, "file": "a.qcow2",
            "image": { "filename": "a.qcow2", "format": "qcow2", "virtual-size": 1_048_576 },
        });
        let Value::Object(more) = more else { panic!("members") };
        for (key, value) in more {
            inserted[key.as_str()] = value;
        }
        let device =
            json!({ "device": "", "qdev": qdev, "removable": false, "inserted": inserted });
        serde_json::from_value(device).unwrap()
    }

    #[test]
    fn names_are_ids_however_qemu_writes_them() {
        let node = device("x", "#block7", json!({})).inserted.unwrap();
        for (drive, qdev, name) in [
            ("", Some("/machine/peripheral/disk-a/virtio-backend"), "disk-a"),
            ("", Some("disk-a"), "disk-a"),
            ("virtio0", Some("/machine/peripheral-anon/device[0]/virtio-backend"), "virtio0"),
            ("", Some("/machine/peripheral-anon/device[1]"), "peripheral-anon_device_1_"),
            ("", Some("/machine/peripheral/../x"), "_."),
        ] {
            assert_eq!(name_of(drive, qdev, &node), name);
        }
    }

    #[test]
    fn writable_disks_are_protected_and_the_rest_is_named() {
        let mut cd = device("cd", "iso", json!({}));
        cd.removable = true;
        let devices = vec![
            device("a", "na", json!({})),
            cd,
            device("b", "nb", json!({ "ro": true })),
            device("twin", "na", json!({})),
            device("c", "nc", json!({})),
        ];
        let mut request = request();
        request.exclude_disks = vec!["c".into()];
        let disks = sort("vm", devices.clone(), &request).unwrap();
        assert_eq!(disks.protected.len(), 1);
        let excluded: Vec<_> =
            disks.excluded.iter().map(|e| (e.name.as_str(), e.reason.as_str())).collect();
        let expected = [
            ("cd", "removable medium"),
            ("b", "read-only"),
            ("twin", "the same node as a"),
            ("c", "excluded by option"),
        ];
        assert_eq!(excluded, expected);
        request.exclude_disks = vec!["d".into()];
        assert_eq!(sort("vm", devices, &request).unwrap_err().kind(), Kind::Usage);
    }

    #[test]
    fn an_encrypted_disk_needs_a_repository_with_a_key() {
        let image =
            json!({ "filename": "a", "format": "qcow2", "virtual-size": 1, "encrypted": true });
        let devices = vec![device("a", "na", json!({ "image": image }))];
        let mut request = request();
        assert_eq!(sort("vm", devices.clone(), &request).unwrap_err().kind(), Kind::Unsupported);
        request.repository_has_key = true;
        let disks = sort("vm", devices, &request).unwrap();
        assert_eq!(disks.protected[0].description().layer, DiskLayer::DecryptedLuks);
    }
}
