//! Who uses a block device, and whether it was written.
//!
//! QEMU's locks lie on the inode it opened. libvirt gives each of its QEMUs a `/dev` of its own
//! (`qemu.conf`, `namespaces`), so a device has an inode of its own in there, and the locks of host
//! and QEMU never meet; nor does QEMU open with `O_EXCL`. What both sides share is the device
//! number: a device is in use when another process has it open (`/proc`), and was written when the
//! kernel has counted writes to it (`/sys`).
//!
//! Only root sees the files of all processes. Others are not told that nobody uses a device.

use std::fs::File;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, StatxFlags, makedev, statx};

/// What another process does with a device that keeps us from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// It may write.
    Writes,
    /// It has it open, be it only for reading.
    Opens,
}

/// A process that has the device open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct User {
    pub(super) process: u32,
    /// Its name (`qemu-system-x86`).
    pub(super) name: String,
}

/// Whether `path` leads to a block device.
pub fn is_device(path: &Path) -> bool {
    path.metadata().is_ok_and(|data| data.file_type().is_block_device())
}

/// The device number, if the file is a block device.
pub(super) fn number(file: &File) -> Option<u64> {
    let data = file.metadata().ok()?;
    data.file_type().is_block_device().then(|| data.rdev())
}

/// Who was found to use a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Users {
    Nobody,
    /// Nobody that we may see.
    Hidden,
    One(User),
}

/// Another process that uses the device with this number in this way, if there is one. A process
/// that ends meanwhile uses nothing.
pub(super) fn users(number: u64, how: Use) -> std::io::Result<Users> {
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let name = entry.file_name();
        let Some(process) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        if process != std::process::id() && has_open(&entry.path(), number, how) {
            let name = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            return Ok(Users::One(User { process, name: name.trim_end().to_owned() }));
        }
    }
    let all = rustix::process::geteuid().is_root();
    Ok(if all { Users::Nobody } else { Users::Hidden })
}

fn has_open(process: &Path, number: u64, how: Use) -> bool {
    let Ok(descriptors) = std::fs::read_dir(process.join("fd")) else { return false };
    descriptors.flatten().any(|descriptor| {
        // The link leads to the open file itself, also into another mount namespace (proc(5)). Not
        // synced: a file on a server that is gone would hang us.
        let flags = AtFlags::STATX_DONT_SYNC;
        let Ok(data) = statx(CWD, descriptor.path(), flags, StatxFlags::TYPE) else { return false };
        let same = FileType::from_raw_mode(data.stx_mode.into()) == FileType::BlockDevice
            && makedev(data.stx_rdev_major, data.stx_rdev_minor) == number;
        same && (how == Use::Opens || writes(&process.join("fdinfo").join(descriptor.file_name())))
    })
}

/// Whether the flags of an open file (octal, proc(5)) allow writing; if they cannot be read, yes.
fn writes(info: &Path) -> bool {
    let Ok(text) = std::fs::read_to_string(info) else { return true };
    let flags = text.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok());
    // O_RDONLY is 0, O_WRONLY 1, O_RDWR 2.
    flags.is_none_or(|flags| flags & 3 != 0)
}

/// Sectors of the device written and discarded so far; `None` where the kernel does not tell. What
/// is written but still in the page cache is counted, too: it is synced first (which is a request
/// itself, of no sectors).
pub(super) fn written_so_far(file: &File, number: u64) -> std::io::Result<Option<[u64; 2]>> {
    file.sync_all()?;
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    let Ok(stat) = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/stat")) else {
        return Ok(None);
    };
    let fields: Vec<u64> = stat.split_whitespace().filter_map(|n| n.parse().ok()).collect();
    // Linux, Documentation/block/stat.rst: sectors written, and discarded (since 4.18).
    let discarded = fields.get(13).copied().unwrap_or(0);
    Ok(fields.get(6).map(|written| [*written, discarded]))
}
