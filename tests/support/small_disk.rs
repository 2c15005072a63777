//! A file system that is soon full.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A file system in memory, unmounted with its guard.
pub(crate) struct SmallDisk {
    /// Where it is.
    pub(crate) path: PathBuf,
}

impl SmallDisk {
    /// Mounts one of `size` (`4M`) on `small` in `directory`; everybody may write to it.
    pub(crate) fn mount(directory: &Path, size: &str) -> Self {
        Self::mount_as(directory, &["-t", "tmpfs", "-o", &format!("size={size},mode=777")])
    }

    /// Mounts one at the same place that has no bound, and cannot take room in advance.
    pub(crate) fn mount_ramfs(directory: &Path) -> Self {
        Self::mount_as(directory, &["-t", "ramfs", "-o", "mode=777"])
    }

    fn mount_as(directory: &Path, options: &[&str]) -> Self {
        let small = Self { path: directory.join("small") };
        std::fs::create_dir(&small.path).expect("own directory");
        let mounted = Command::new("mount").args(options).arg("vmbtest").arg(&small.path).status();
        assert!(mounted.expect("mount runs").success(), "it is not mounted");
        small
    }

    /// What is in it.
    pub(crate) fn files(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(&self.path).expect("mounted");
        entries.map(|entry| entry.expect("readable").path()).collect()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Nothing is left to tell it to; a program that still uses it ends with its own guard.
        let _ = Command::new("umount").arg("-l").arg(&self.path).status();
    }
}
