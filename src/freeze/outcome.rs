//! What a freeze was worth: the level of a point and the reason it is lower. Pure.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::line::Ended;
use crate::vm::{Consistency, Quiescence};

/// A file system mounted in the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileSystem {
    /// The device (`vda1`), by which one that is mounted twice is known to be one.
    pub device: String,
    /// Where.
    pub mount_point: String,
    /// Type (`ext4`, `NTFS`).
    pub kind: String,
}

impl FileSystem {
    /// Whether a freeze has to reach it.
    ///
    /// Not those that cannot change, and not the firmware's partition: FAT cannot be frozen (no
    /// `freeze_fs` in Linux fs/fat) and is on every UEFI guest, where nothing but an update of the
    /// boot loader writes to it. To call all those guests inconsistent would make the level
    /// worthless.
    fn counts(&self) -> bool {
        let kind = self.kind.to_ascii_lowercase();
        let fixed = ["squashfs", "erofs", "iso9660", "udf", "cdfs", "romfs", "cramfs"];
        let firmware = ["/boot/efi", "/efi", "/boot", "System Reserved"];
        let is_fat = kind.starts_with("fat") || kind == "vfat" || kind == "msdos";
        let is_firmware = is_fat && firmware.contains(&self.mount_point.as_str());
        !fixed.contains(&kind.as_str()) && !is_firmware
    }
}

/// Why a freeze of `count` file systems did not reach all, if it did not.
///
/// The agent counts, it does not name: what is mounted and cannot be frozen, or had been frozen by
/// somebody else, is passed over in silence (qga/commands-linux.c, qmp_guest_fsfreeze_do_freeze_list
/// ignores EOPNOTSUPP and EBUSY).
pub(super) fn partial(count: u32, mounted: &[FileSystem]) -> Option<String> {
    let devices: BTreeMap<&str, &FileSystem> = mounted
        .iter()
        .filter(|system| system.counts())
        .map(|system| (system.device.as_str(), system))
        .collect();
    let wanted = devices.len();
    if usize::try_from(count).is_ok_and(|count| count >= wanted) {
        return None;
    }
    let names: Vec<String> = devices
        .values()
        .take(8)
        .map(|system| format!("{} ({})", system.mount_point, system.kind))
        .collect();
    let names = names.join(", ");
    Some(format!("only {count} of {wanted} file systems were frozen; mounted are {names}"))
}

/// The level of a freeze that was thawed in the end.
pub(super) fn level(count: u32, partial: Option<String>, budget_ms: u64, end: Ended) -> Quiescence {
    let Ended { count: thawed, frozen_ms, expired } = end;
    let reason = match partial {
        _ if expired || frozen_ms > budget_ms => {
            Some(format!("frozen for longer than {budget_ms} ms"))
        }
        _ if count == 0 => Some("the guest agent found no file system to freeze".into()),
        _ if thawed < count => Some("file systems had been thawed before the end".into()),
        partial => partial,
    };
    let level = if reason.is_none() { Consistency::Filesystem } else { Consistency::Crash };
    Quiescence { level, frozen_ms: Some(frozen_ms), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn system(device: &str, mount_point: &str, kind: &str) -> FileSystem {
        let text = |text: &str| text.to_owned();
        FileSystem { device: text(device), mount_point: text(mount_point), kind: text(kind) }
    }

    #[test]
    fn a_file_system_that_was_left_out_is_named() {
        let mounted = [
            system("vda1", "/", "ext4"),
            system("vda1", "/srv/bound", "ext4"),
            system("vda2", "/boot/efi", "vfat"),
            system("loop0", "/snap/core", "squashfs"),
            system("vdb", "/data", "exfat"),
        ];
        assert_eq!(partial(2, &mounted), None);
        let reason = partial(1, &mounted).unwrap();
        assert!(reason.contains("only 1 of 2") && reason.contains("/data (exfat)"), "{reason}");
        assert_eq!(partial(0, &mounted[2..4]), None);
        assert!(partial(0, &[system("vda2", "/data", "vfat")]).is_some());
    }

    #[test]
    fn only_a_whole_freeze_within_its_budget_is_file_system_consistent() {
        let end = |count, frozen_ms, expired| Ended { count, frozen_ms, expired };
        let of = |count, partial: Option<&str>, end| {
            level(count, partial.map(str::to_owned), 100, end).level == Consistency::Filesystem
        };
        assert!(of(2, None, end(2, 100, false)));
        assert!(!of(2, None, end(1, 50, false)), "thawed in between");
        assert!(!of(2, None, end(2, 101, false)), "too long");
        assert!(!of(2, None, end(2, 50, true)), "expired");
        assert!(!of(0, None, end(0, 1, false)), "nothing frozen");
        assert!(!of(2, Some("part"), end(2, 1, false)), "partial");
    }
}
